"""What the tests hold the kernels against: an honest bf16 interpreter, a sanitizer, a second Philox, exact integers."""
