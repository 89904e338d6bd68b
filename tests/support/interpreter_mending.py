"""Triton's interpreter with a GPU's arithmetic, so that precision can be tested where there is no GPU.

Triton 3.6 to 3.9 interpret kernels in NumPy and get these wrong, which `mend` repairs:

* bfloat16 is kept as its 16 bits and multiplied, added and compared as integers; casts to it cut off.
  Here each operation runs in float32 and rounds to nearest even, as PyTorch does.
* A float32 product at `tf32` keeps all 23 bits of the mantissa. Here operands lose the lowest 13: compiled
  code hands tensor cores unrounded float32, and these ignore the rest.
* 3.6 cannot loop over `range` of a loaded value with NumPy 2.4 and newer, knows no bfloat16 constant,
  and lets a NaN win `tl.maximum`, which a GPU drops.

Triton reads TRITON_INTERPRET when a kernel is decorated: it must be set before triton is imported.
"""

import functools
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, TensorHandle

Array = npt.NDArray[np.generic]

_BITWISE = (np.bitwise_and, np.bitwise_or, np.bitwise_xor)
_SIXTEEN_BIT_NAN = np.uint16(0x7FC0)
_TF32_MASK = np.uint32(0xFFFFE000)


def widened(bits: Array) -> npt.NDArray[np.float32]:
    """Return the float32 values of bfloat16 bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrowed(values: Array) -> npt.NDArray[np.uint16]:
    """Return bfloat16 bits of the values, rounded to nearest even by way of float32."""
    single = np.atleast_1d(values).astype(np.float32)
    bits = single.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(single), _SIXTEEN_BIT_NAN, rounded).reshape(np.shape(values))


def cut_to_tf32(values: Array) -> npt.NDArray[np.float32]:
    """Return float32 values with the 10 bits of mantissa that a tensor core reads of them."""
    return (np.ascontiguousarray(values, np.float32).view(np.uint32) & _TF32_MASK).view(np.float32)


@functools.cache
def mend() -> None:
    """Repair this process's interpreter; kernels that ran before are as if they had not."""
    for mending in (_mend_casts, _mend_elementwise, _mend_dot, _mend_reductions, _mend_triton_3_6):
        mending()


def _is_bf16(x: TensorHandle) -> bool:
    return bool(x.dtype.scalar == tl.bfloat16)


def _mend_casts() -> None:
    stock_cast, stock_float_cast = InterpreterBuilder.cast_impl, InterpreterBuilder.create_fp_to_fp

    def cast_impl(self: InterpreterBuilder, src: TensorHandle, dst_type: tl.dtype) -> TensorHandle:
        target = dst_type.scalar
        if _is_bf16(src) == (target == tl.bfloat16):
            return stock_cast(self, src, dst_type)
        if target == tl.bfloat16:
            return TensorHandle(narrowed(src.data), target)
        return stock_cast(self, TensorHandle(widened(src.data), tl.float32), dst_type)

    def create_fp_to_fp(
        self: InterpreterBuilder, src: TensorHandle, dst_type: tl.dtype, rounding: ir.ROUNDING_MODE
    ) -> TensorHandle:
        either = (src.dtype.scalar, dst_type.scalar)
        if rounding == ir.ROUNDING_MODE.RTZ or any(t.primitive_bitwidth == 8 for t in either):
            return stock_float_cast(self, src, dst_type, rounding)
        return cast_impl(self, src, dst_type)

    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_fp_to_fp = create_fp_to_fp


def _mend_elementwise() -> None:
    """Let what takes operands and a NumPy function compute bfloat16 in float32."""
    for name in ("unary_op", "binary_op", "ternary_op"):
        setattr(InterpreterBuilder, name, _in_float32(getattr(InterpreterBuilder, name)))
    stock_fma = InterpreterBuilder.create_fma

    def create_fma(self: InterpreterBuilder, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        if not _is_bf16(z):
            return stock_fma(self, x, y, z)
        return TensorHandle(narrowed(widened(x.data) * widened(y.data) + widened(z.data)), tl.bfloat16)

    InterpreterBuilder.create_fma = create_fma


def _in_float32(stock: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    def mended(self: InterpreterBuilder, *arguments: TensorHandle) -> TensorHandle:
        *operands, operation = arguments
        # np.where goes on as it is, since its condition is no bfloat16
        if operation in _BITWISE or not all(map(_is_bf16, operands)):
            return stock(self, *arguments)
        result = operation(*(widened(x.data) for x in operands))
        return TensorHandle(result if result.dtype == np.bool_ else narrowed(result), tl.bfloat16)

    return mended


def _mend_dot() -> None:
    stock = InterpreterBuilder.create_dot

    def create_dot(
        self: InterpreterBuilder,
        a: TensorHandle,
        b: TensorHandle,
        d: TensorHandle,
        input_precision: ir.INPUT_PRECISION,
        *imprecise: int,
    ) -> TensorHandle:
        if _is_bf16(a):
            a, b = (TensorHandle(widened(x.data), tl.float32) for x in (a, b))
        elif a.data.dtype == np.float32 and input_precision == ir.INPUT_PRECISION.TF32:
            a, b = (TensorHandle(cut_to_tf32(x.data), tl.float32) for x in (a, b))
        return stock(self, a, b, d, input_precision, *imprecise)

    InterpreterBuilder.create_dot = create_dot


def _mend_reductions() -> None:
    stock = ReduceOps.apply_impl

    def apply_impl(self: ReduceOps, inputs: tuple[tl.tensor, ...]) -> list[tl.tensor] | tl.tensor:
        if not any(x.dtype == tl.bfloat16 for x in inputs):
            return stock(self, inputs)
        result = stock(self, tuple(_with_dtype(x, tl.float32, widened) for x in inputs))
        if isinstance(result, tl.tensor):
            return _with_dtype(result, tl.bfloat16, narrowed)
        return [_with_dtype(x, tl.bfloat16, narrowed) for x in result]

    ReduceOps.apply_impl = apply_impl


def _with_dtype(x: tl.tensor, dtype: tl.dtype, convert: Callable[[Array], Array]) -> tl.tensor:
    """Return a bfloat16 tensor as float32 or a float32 one as bfloat16, others (indices) as they are."""
    if x.dtype not in (tl.bfloat16, tl.float32):
        return x
    kind = tl.block_type(dtype, list(x.type.shape)) if x.type.is_block() else dtype
    return tl.tensor(TensorHandle(convert(x.handle.data), dtype), kind)


def _mend_triton_3_6() -> None:
    InterpreterBuilder.get_bf16 = lambda _, value: TensorHandle(narrowed(np.array([value])), tl.bfloat16)
    InterpreterBuilder.create_minnumf = lambda self, x, y: self.binary_op(x, y, np.fmin)
    InterpreterBuilder.create_maxnumf = lambda self, x, y: self.binary_op(x, y, np.fmax)
    stock = interpreter._patch_lang_tensor

    def patch(tensor: type[tl.tensor], scope: interpreter._LangPatchScope) -> None:
        stock(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.reshape(-1)[0]))

    interpreter._patch_lang_tensor = patch
