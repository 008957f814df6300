"""What the compiler made: kernels compiled without a GPU, read, and held to budgets."""
