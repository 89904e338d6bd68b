"""The mended interpreter computes what PyTorch, or arithmetic by hand, does."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from interpreter_mending import cut_to_tf32, narrowed, widened

N = 32
SPECIAL = (0.0, -0.0, 1.0, 1.00390625, 1.01171875, 3.4e38, 1e-40, -1e-40, float("inf"), float("-inf"), float("nan"))
"""1 + 1/256 and 1 + 3/256 lie halfway between two bfloat16: one rounds down, the other up."""


@triton.jit
def elementwise(
    x_ptr: tl.tensor, y_ptr: tl.tensor, out_ptr: tl.tensor, OPERATION: tl.constexpr, N: tl.constexpr
) -> None:
    """Store one operation of x and y."""
    i = tl.arange(0, N)
    x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
    if OPERATION == "add":
        z = x + y
    elif OPERATION == "mul":
        z = x * y
    elif OPERATION == "sub":
        z = x - y
    elif OPERATION == "div":
        z = x / y
    elif OPERATION == "neg":
        z = -x
    elif OPERATION == "abs":
        z = tl.abs(x)
    elif OPERATION == "max":
        z = tl.maximum(x, y)
    elif OPERATION == "where":
        z = tl.where(x > y, x, y)
    elif OPERATION == "constant":
        z = x * 0.7
    else:
        z = tl.fma(x, y, x)
    tl.store(out_ptr + i, z)


@triton.jit
def cast(x_ptr: tl.tensor, out_ptr: tl.tensor, N: tl.constexpr) -> None:
    """Store x as the output's dtype."""
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.load(x_ptr + i).to(out_ptr.dtype.element_ty))


@triton.jit
def product(a_ptr: tl.tensor, b_ptr: tl.tensor, out_ptr: tl.tensor, PRECISION: tl.constexpr, N: tl.constexpr) -> None:
    """Store the product of two square matrices."""
    i = tl.arange(0, N)
    cells = i[:, None] * N + i[None, :]
    c = tl.dot(tl.load(a_ptr + cells), tl.load(b_ptr + cells), input_precision=PRECISION, out_dtype=tl.float32)
    tl.store(out_ptr + cells, c.to(out_ptr.dtype.element_ty))


@triton.jit
def reduction(x_ptr: tl.tensor, out_ptr: tl.tensor, N: tl.constexpr) -> None:
    """Store the greatest and least of all and the sum of x."""
    x = tl.load(x_ptr + tl.arange(0, N))
    tl.store(out_ptr, tl.max(x, 0))
    tl.store(out_ptr + 1, tl.min(x, 0))
    tl.store(out_ptr + 2, tl.sum(x, 0))


@triton.jit
def counting(length_ptr: tl.tensor, out_ptr: tl.tensor) -> None:
    """Store the sum of the numbers below a loaded length."""
    total = 0
    for i in range(tl.load(length_ptr)):
        total += i
    tl.store(out_ptr, total)


@triton.jit
def greater(x_ptr: tl.tensor, y_ptr: tl.tensor, out_ptr: tl.tensor) -> None:
    """Store the greater of two numbers."""
    tl.store(out_ptr, tl.maximum(tl.load(x_ptr), tl.load(y_ptr)))


def random(dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


EXPECTED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "div": lambda x, y: x / y,
    "neg": lambda x, _: -x,
    "abs": lambda x, _: x.abs(),
    "max": torch.maximum,
    "where": lambda x, y: torch.where(x > y, x, y),
    "constant": lambda x, _: x * torch.tensor(0.7, dtype=torch.bfloat16),
    "fma": lambda x, y: (x.float() * y.float() + x.float()).bfloat16(),
}


@pytest.mark.parametrize("operation", EXPECTED)
def test_bfloat16_has_the_bits_of_torch(operation: str) -> None:
    """Fails where the operation runs on the raw bits, as without `_mend_elementwise`."""
    x, y = random(torch.bfloat16, N), random(torch.bfloat16, N, seed=1)
    out = torch.empty_like(x)

    elementwise[(1,)](x, y, out, operation, N)

    assert torch.equal(out, EXPECTED[operation](x, y))


@pytest.mark.parametrize("source", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int32])
@pytest.mark.parametrize("target", [torch.float32, torch.float16, torch.bfloat16, torch.int32])
def test_a_cast_has_the_bits_of_torch(source: torch.dtype, target: torch.dtype) -> None:
    """Fails where float32 is cut off on its way to bfloat16, as without `_mend_casts`."""
    x = (random(torch.float32, N) * 1000).to(source)
    out = torch.empty(N, dtype=target)

    cast[(1,)](x, out, N)

    assert torch.equal(out, x.to(target))


def test_special_values_round_as_in_torch() -> None:
    values = torch.tensor(SPECIAL)

    bits = narrowed(values.numpy())

    ours, theirs = torch.from_numpy(widened(bits)), values.bfloat16().float()
    assert torch.equal(ours.nan_to_num(nan=7.0), theirs.nan_to_num(nan=7.0))


def test_every_float16_and_many_float32_round_as_in_torch() -> None:
    """Fails with 0x8000 added instead of 0x7FFF and the parity."""
    halves = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    bits = torch.randint(-(2**31), 2**31 - 1, (2**16,), generator=torch.Generator().manual_seed(0))
    values = torch.cat([halves, bits.to(torch.int32).view(torch.float32)])
    values = values[~values.isnan()]

    rounded = torch.from_numpy(narrowed(values.numpy()).view(np.int16)).view(torch.bfloat16)

    assert torch.equal(rounded, values.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_product_of_half_precision_sums_in_float32(dtype: torch.dtype) -> None:
    a, b, out = random(dtype, N, N), random(dtype, N, N, seed=1), torch.empty(N, N)

    product[(1,)](a, b, out, "ieee", N)

    torch.testing.assert_close(out, (a.double() @ b.double()).float(), rtol=1e-5, atol=1e-5)


def test_a_product_in_tf32_reads_ten_bits_of_each_operand() -> None:
    """Fails with full float32, as without `_mend_dot`."""
    a, b, out = random(torch.float32, N, N), random(torch.float32, N, N, seed=1), torch.empty(N, N)

    product[(1,)](a, b, out, "tf32", N)

    cut = [torch.from_numpy(cut_to_tf32(x.numpy())).double() for x in (a, b)]
    torch.testing.assert_close(out, (cut[0] @ cut[1]).float(), rtol=1e-5, atol=1e-5)


def test_tf32_keeps_ten_bits_of_the_mantissa() -> None:
    kept, lost = 1 + 2.0**-10, 2.0**-10 - 2.0**-23

    assert cut_to_tf32(np.array([kept, -1 - lost, np.inf])).tolist() == [kept, -1.0, np.inf]


@pytest.mark.parametrize("precision", ["ieee", "tf32x3"])
def test_a_precise_product_keeps_float32(precision: str) -> None:
    a, b, out = random(torch.float32, N, N), random(torch.float32, N, N, seed=1), torch.empty(N, N)

    product[(1,)](a, b, out, precision, N)

    torch.testing.assert_close(out, (a.double() @ b.double()).float(), rtol=1e-5, atol=1e-5)


def test_bfloat16_reduces_by_value() -> None:
    """Fails where bits are compared: a negative number has the greatest."""
    x, out = random(torch.bfloat16, N), torch.empty(3, dtype=torch.bfloat16)

    reduction[(1,)](x, out, N)

    assert torch.equal(out, torch.stack([x.max(), x.min(), x.double().sum().bfloat16()]))


def test_a_loop_runs_to_a_loaded_length() -> None:
    """Fails in Triton 3.6 with NumPy 2.4, whose int() takes no array of one."""
    out = torch.zeros(1, dtype=torch.int32)

    counting[(1,)](torch.tensor([5], dtype=torch.int32), out)

    assert out.item() == 10


def test_the_greater_of_nan_and_a_number_is_the_number() -> None:
    """Fails in Triton 3.6, which takes np.maximum."""
    out = torch.empty(1)

    greater[(1,)](torch.tensor([float("nan")]), torch.tensor([2.0]), out)

    assert out.item() == 2.0
