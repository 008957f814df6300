"""Make Triton's interpreter faster: do once what it does, as shipped (3.6 to 3.9), again and again. Results are the same.

A third of a small launch goes by in looking through all members of `triton.language`, to patch at each call of a device
function what the launch has patched already, and in building a table of dtypes at each operation.
"""

import functools
from types import SimpleNamespace


def install() -> None:
    """Patch the interpreter, once a process."""
    import triton.language as tl
    import triton.runtime.interpreter as interpreter

    if hasattr(interpreter, "_faster"):
        return
    interpreter._faster = True
    patch, np_dtype = interpreter._patch_lang, functools.cache(interpreter._get_np_dtype)
    # Both modules, because a kernel uses the one and what it calls may use the other.
    both, nothing = SimpleNamespace(__globals__={"tl": tl, "core": tl.core}), SimpleNamespace(restore=lambda: None)

    def patch_once(fn):
        patched = not tl.core.is_builtin(tl.load) and not tl.core.is_builtin(tl.core.load)
        return nothing if patched else patch(both)

    def np_dtype_of_elements(dtype):
        scalar = dtype.scalar
        # Pointers cannot be hashed, and are 64-bit numbers there.
        return np_dtype(tl.uint64 if scalar.is_ptr() else scalar)

    interpreter._patch_lang, interpreter._get_np_dtype = patch_once, np_dtype_of_elements
