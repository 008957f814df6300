"""Make bf16 honest in Triton's interpreter: exact products, round-to-nearest-even casts, no other arithmetic.

As shipped (3.6 to 3.9) the interpreter keeps bf16 as uint16: `tl.dot` multiplies the bit patterns and casts truncate
(triton-lang/triton#11584). Anything but loads, selects, dots, casts and stores of bf16 is made an error here.
"""

import numpy as np

_CASTS = (
    "create_si_to_fp", "create_ui_to_fp", "create_fp_to_si", "create_fp_to_ui", "create_fp_ext", "create_fp_trunc",
    "create_int_cast",
)  # fmt: skip


def widen(bits: np.ndarray) -> np.ndarray:
    """bf16 bit patterns to float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """Round floats to bf16 bit patterns, ties to even; NaN stays NaN."""
    single = np.ascontiguousarray(values, dtype=np.float32)
    bits = single.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(single), np.uint16(0x7FC0), rounded).reshape(np.shape(values))


def install() -> None:
    """Patch the interpreter's builder, once a process."""
    import triton.language as tl
    import triton.runtime.interpreter as interpreter

    builder = interpreter.InterpreterBuilder
    if getattr(builder, "_honest_bf16", False):
        return
    builder._honest_bf16 = True

    def is_bf16(handle) -> bool:
        # Ask numpy first, because to compare Triton's dtypes takes longer than to add two blocks.
        return (
            isinstance(handle, interpreter.TensorHandle)
            and handle.data.dtype == np.uint16
            and handle.dtype.scalar == tl.bfloat16
        )

    def wide(handle) -> np.ndarray:
        return widen(handle.data) if is_bf16(handle) else handle.data

    stock_dot, stock_cast, stock_fp_to_fp = builder.create_dot, builder.cast_impl, builder.create_fp_to_fp

    def create_dot(self, a, b, d, *args, **kwargs):
        if is_bf16(a) or is_bf16(b):
            product = np.matmul(wide(a), wide(b), dtype=d.data.dtype) + d.data
            return interpreter.TensorHandle(product, d.dtype.scalar)
        return stock_dot(self, a, b, d, *args, **kwargs)

    def cast_impl(self, src, dst_type):
        to_bf16, from_bf16 = dst_type.scalar == tl.bfloat16, is_bf16(src)
        if to_bf16 and not from_bf16:
            return interpreter.TensorHandle(narrow(src.data), dst_type.scalar)
        if from_bf16 and not to_bf16:
            return interpreter.TensorHandle(
                widen(src.data).astype(interpreter._get_np_dtype(dst_type)), dst_type.scalar
            )
        return stock_cast(self, src, dst_type)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        if is_bf16(src) or dst_type.scalar == tl.bfloat16:
            return self.cast_impl(src, dst_type)
        return stock_fp_to_fp(self, src, dst_type, rounding_mode)

    def refuse(name, stock):
        def method(self, *handles, **kwargs):
            if any(map(is_bf16, handles)):
                raise NotImplementedError(f"bf16 {name}: the interpreter would use bit patterns; cast to float32 first")
            return stock(self, *handles, **kwargs)

        return method

    builder.create_dot, builder.cast_impl, builder.create_fp_to_fp = create_dot, cast_impl, create_fp_to_fp
    for name in _CASTS:
        setattr(builder, name, lambda self, src, dst_type, *args, **kwargs: self.cast_impl(src, dst_type))
    for name in ("binary_op", "unary_op", "create_fma"):
        if hasattr(builder, name):
            setattr(builder, name, refuse(name, getattr(builder, name)))
