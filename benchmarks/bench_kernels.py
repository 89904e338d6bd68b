"""Both kernels against what a user would otherwise write, on a GPU where there is one, else on the CPU.

    python -m pytest benchmarks/bench_kernels.py

Each competitor's result is compared before it is timed. Attention: PyTorch's scaled dot-product
attention over the concatenation of local keys and a bank expanded to the batch. Loss: the same formula
with fresh noise for every voxel. Groups are shapes; `bytes` and `flops` are the least that a pass needs:
every input read once, every output written once.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from fedoap.kernels import decoupled_cross_attention, perturbed_boundary_loss
from fedoap.kernels.philox import normal

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPE = torch.bfloat16 if GPU else torch.float32
PASSES = ("forward", "forward and backward")


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """B batch, H heads, N queries and local keys, M bank slots, D channels of a head."""

    b: int
    h: int
    n: int
    m: int
    d: int

    @property
    def flops(self) -> int:
        """Of a forward pass; a backward pass needs 2.5 times as many."""
        return 4 * self.b * self.h * self.n * (self.n + self.m) * self.d

    @property
    def values(self) -> int:
        """Elements of q, k, v, the output, and the bank's keys and values."""
        return self.h * self.d * (4 * self.b * self.n + 2 * self.m)


@dataclass(frozen=True, slots=True)
class Attention:
    """q, k, v, bank_k, bank_v, and the slots' bias."""

    inputs: tuple[Tensor, ...]
    bias: Tensor

    @classmethod
    def random(cls, s: AttentionShape) -> Self:
        """Return inputs of this shape that ask for gradients."""
        generator = torch.Generator().manual_seed(0)
        sizes = [(s.b, s.h, s.n, s.d)] * 3 + [(s.h, s.m, s.d)] * 2
        inputs = tuple(torch.randn(size, generator=generator).to(DEVICE, DTYPE).requires_grad_() for size in sizes)
        return cls(inputs, torch.randn(s.m, generator=generator).to(DEVICE))

    def fedoap(self) -> Tensor:
        """Return this project's attention."""
        q, k, v, bank_k, bank_v = self.inputs
        return decoupled_cross_attention(q, k, v, bank_k, bank_v, slot_bias=self.bias)

    def sdpa(self) -> Tensor:
        """Return PyTorch's attention over concatenated keys, the bank expanded to the batch."""
        q, k, v, bank_k, bank_v = self.inputs
        b, h, n = q.shape[:3]
        keys = torch.cat([k, bank_k.expand(b, *bank_k.shape)], 2)
        values = torch.cat([v, bank_v.expand(b, *bank_v.shape)], 2)
        bias = torch.cat([self.bias.new_zeros(n), self.bias]).to(q.dtype).expand(b, h, n, -1)
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=bias)


@dataclass(frozen=True, slots=True)
class Boundary:
    """Logits and target."""

    logits: Tensor
    target: Tensor

    @classmethod
    def random(cls, shape: tuple[int, ...]) -> Self:
        """Return smooth logits with a few per cent of the voxels wrong at an edge, and a target."""
        generator = torch.Generator().manual_seed(0)
        pool = F.avg_pool2d if len(shape) == 4 else F.avg_pool3d
        y, change = (pool(torch.randn(shape, generator=generator), 15, stride=1, padding=7) for _ in range(2))
        logits = 4 * (y + 0.3 * change) / y.std()
        return cls(logits.to(DEVICE).requires_grad_(), (y > 0).to(DEVICE))

    def fedoap(self) -> Tensor:
        """Return this project's loss."""
        return perturbed_boundary_loss(self.logits, self.target, seed=1, region="both")

    def plain(self) -> Tensor:
        """Return the loss with fresh noise for every voxel."""
        return self.with_noise(torch.randn_like(self.logits))

    def with_noise(self, noise: Tensor) -> Tensor:
        """Return the loss as its formula reads."""
        z, y = self.logits, self.target.float()
        pool = F.max_pool2d if z.dim() == 4 else F.max_pool3d
        mask = (z > 0).float()
        band = pool(mask, 3, 1, 1) + pool(-mask, 3, 1, 1) > 0
        error = (torch.sigmoid(z.detach()) - y).abs() > 0.75
        return 0.9 * self._loss(z, y) + 0.1 * self._loss(z + 0.1 * noise * (band & error), y)

    @staticmethod
    def _loss(z: Tensor, y: Tensor) -> Tensor:
        p, axes = torch.sigmoid(z), tuple(range(1, z.dim()))
        dice = (2 * (p * y).sum(axes) + 1e-5) / (p.sum(axes) + y.sum(axes) + 1e-5)
        return F.binary_cross_entropy_with_logits(z, y) + (1 - dice).mean()


SHAPES = [AttentionShape(8, 1, 256, 512, 1024), AttentionShape(8, 8, 256, 512, 128)]
SHAPES += [AttentionShape(4, 8, 4096, 2048, 64)] if GPU else [AttentionShape(1, 8, 1024, 512, 64)]
IMAGES = (
    [(16, 1, 256, 256), (64, 1, 512, 512), (2, 1, 160, 160, 160)] if GPU else [(16, 1, 256, 256), (2, 1, 64, 64, 64)]
)


@pytest.mark.parametrize("part", PASSES)
@pytest.mark.parametrize("name", ["fedoap", "sdpa"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention(benchmark: BenchmarkFixture, shape: AttentionShape, name: str, part: str) -> None:
    """Time one pass of one competitor, whose result agrees with the other's."""
    case = Attention.random(shape)
    competitors = {"fedoap": case.fedoap, "sdpa": case.sdpa}
    expected = case.sdpa()
    assert (case.fedoap() - expected).norm() < (0.02 if GPU else 1e-5) * expected.norm()

    backward = part != "forward"
    benchmark.group = f"attention, {part}: {shape}"
    benchmark.extra_info["flops"] = shape.flops * (3.5 if backward else 1)
    benchmark.extra_info["bytes"] = shape.values * DTYPE.itemsize * (3 if backward else 1)
    _time(benchmark, competitors[name], case.inputs, backward=backward)


@pytest.mark.parametrize("part", PASSES)
@pytest.mark.parametrize("name", ["fedoap", "plain"])
@pytest.mark.parametrize("shape", IMAGES, ids=str)
def test_loss(benchmark: BenchmarkFixture, shape: tuple[int, ...], name: str, part: str) -> None:
    """Time one pass of one competitor; with the same noise both give the same loss."""
    case = Boundary.random(shape)
    competitors = {"fedoap": case.fedoap, "plain": case.plain}
    count = math.prod(shape)
    noise = normal(torch.tensor(1), torch.arange(count)).view(shape).to(DEVICE)
    assert case.fedoap().item() == pytest.approx(case.with_noise(noise).item(), rel=1e-5)

    backward = part != "forward"
    benchmark.group = f"loss, {part}: {shape}"
    # reads float32 logits and a byte of target a voxel; a backward pass reads both again and writes the gradient
    benchmark.extra_info["bytes"] = count * (5 + 9 * backward)
    _time(benchmark, competitors[name], (case.logits,), backward=backward)


def _time(
    benchmark: BenchmarkFixture, compute: Callable[[], Tensor], inputs: tuple[Tensor, ...], *, backward: bool
) -> None:
    benchmark.extra_info |= {"device": torch.cuda.get_device_name() if GPU else "cpu", "torch": torch.__version__}

    def run() -> None:
        if backward:
            output = compute()
            torch.autograd.grad([output], inputs, [torch.ones_like(output)])
        else:
            with torch.no_grad():
                compute()
        if GPU:
            torch.cuda.synchronize()

    benchmark.pedantic(run, rounds=20 if GPU else 5, warmup_rounds=3 if GPU else 1)  # type: ignore[no-untyped-call]
