"""What this project's operations add to a training step of the network, beside PyTorch's own.

    python -m pytest benchmarks/bench_training.py --benchmark-only

Both steps train the same network from the same weights on the same batch: width 16, images of 128 x 128, a bank of 256
slots. One takes `decoupled_cross_attention` (joint) and `perturbed_boundary_loss`; the other PyTorch's attention over
keys concatenated with the bank, expanded to the batch, and plain BCE with Dice. Attention gives the same logits in
both, which is checked first.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from fedoap.config import NetworkConfig
from fedoap.kernels import decoupled_cross_attention, perturbed_boundary_loss
from fedoap.segmentation import network as networks
from fedoap.segmentation.network import Bank, FedOAPNet
from fedoap.segmentation.objectives import segmentation_loss

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BATCH, SIZE, SLOTS = 8, 128, 256
STEPS = ("fedoap", "sdpa, bce and dice")
pytestmark = pytest.mark.timeout(1800)


class Step:
    """A network, its optimizer and one batch."""

    def __init__(self) -> None:
        config = NetworkConfig(width=16, attention="joint")
        self.network = FedOAPNet(config, seed=0).to(DEVICE)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-4)
        generator = torch.Generator().manual_seed(0)
        slots = (config.heads, SLOTS, config.bottleneck // config.heads)
        keys, values = (torch.randn(slots, generator=generator).to(DEVICE) for _ in "kv")
        self.bank = Bank(keys, values, torch.zeros(SLOTS, device=DEVICE))
        self.image = torch.randn(BATCH, 1, SIZE, SIZE, generator=generator).to(DEVICE)
        y = F.avg_pool2d(torch.randn(self.image.shape, generator=generator), 31, stride=1, padding=15)
        self.mask = (y > 0.02).to(DEVICE)

    def logits(self) -> Tensor:
        """Return the network's."""
        logits: Tensor = self.network(self.image, self.bank)
        return logits

    def run(self, loss_of: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Take one step."""
        self.optimizer.zero_grad(set_to_none=True)
        loss_of(self.logits(), self.mask).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()


def boundary_loss(logits: Tensor, mask: Tensor) -> Tensor:
    """Return this project's loss as the calibration has it."""
    return perturbed_boundary_loss(logits, mask, seed=1, region="both")


def expanded_attention(q: Tensor, k: Tensor, v: Tensor, bank_k: Tensor, bank_v: Tensor, *, slot_bias: Tensor) -> Tensor:
    """Return PyTorch's attention over local keys and the bank, expanded to the batch."""
    b, h, n = q.shape[:3]
    keys, values = (torch.cat([own, bank.expand(b, *bank.shape)], 2) for own, bank in ((k, bank_k), (v, bank_v)))
    bias = torch.cat([slot_bias.new_zeros(h, k.shape[2]), slot_bias], 1)
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=bias[None, :, None].expand(b, h, n, -1))


@contextmanager
def attention(function: Callable[..., Tensor]) -> Iterator[None]:
    """Let the network attend by this function."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(networks, "decoupled_cross_attention", function)
        yield


@pytest.mark.parametrize("name", STEPS)
def test_step(benchmark: BenchmarkFixture, taken: dict[str, dict[str, float]], name: str) -> None:
    """Time one training step, after both attentions gave the same logits."""
    step = Step()
    ours = step.logits()
    with attention(expanded_attention):
        torch.testing.assert_close(step.logits(), ours, rtol=1e-3, atol=1e-4)
    function, loss = (
        (decoupled_cross_attention, boundary_loss) if name == "fedoap" else (expanded_attention, segmentation_loss)
    )

    benchmark.group = f"training step: batch {BATCH}, {SIZE} x {SIZE}, {SLOTS} slots, {DEVICE.type}"
    with attention(function):
        benchmark.pedantic(step.run, args=(loss,), rounds=7, warmup_rounds=1)  # type: ignore[no-untyped-call]
    if benchmark.stats is not None:
        taken[benchmark.group][name] = benchmark.stats.stats.median
