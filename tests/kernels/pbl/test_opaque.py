"""The plain PyTorch loss in compiled code: the same bits, the same refusals."""

import pytest
import torch
from torch import Tensor

from boundary_by_hand import case
from fedoap.kernels import Region, perturbed_boundary, perturbed_boundary_loss
from fedoap.kernels.pbl import opaque, reference
from fedoap.kernels.pbl.problem import Recipe

OPTIONS = ("band", 2, "square", 0.75, 0.5, 0.3, 1e-5)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own


@pytest.fixture(autouse=True)
def _forget() -> None:
    """Compiled code of other tests counts towards the compiler's limit."""
    torch.compiler.reset()


def step(z: Tensor, y: Tensor, region: Region) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss, parts = perturbed_boundary_loss(z, y, seed=3, region=region, sigma=0.7, lam=0.4, return_parts=True)
    return 2 * loss, parts.clean, parts.perturbed, parts.voxels


@pytest.mark.parametrize("region", ["error", "band", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_whole_loss_compiles_and_keeps_its_bits(region: Region, dtype: torch.dtype) -> None:
    """Planted bugs: the region's voxels counted in the graph (does not compile); the incoming gradient left out."""
    z, y = case((2, 1, 9, 12), dtype)
    z.requires_grad_()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(z, y, region)
    plain = step(z, y, region)

    assert all(map(torch.equal, compiled, plain))
    found, expected = (torch.autograd.grad([made[0]], [z])[0] for made in (compiled, plain))
    assert torch.equal(found, expected)
    with torch.no_grad():
        assert torch.equal(torch.compile(step, fullgraph=True, backend="aot_eager")(z, y, region)[0], plain[0])


def test_region_and_perturbed_logits_compile_and_keep_their_bits() -> None:
    z, y = case((2, 1, 9, 12))
    z.requires_grad_()

    def perturb(z: Tensor) -> tuple[Tensor, Tensor]:
        made = perturbed_boundary(z, y, seed=3, region="band")
        return made.region, made.logits

    compiled = torch.compile(perturb, fullgraph=True, backend="aot_eager")(z)

    assert all(map(torch.equal, compiled, perturb(z)))
    (gradient,) = torch.autograd.grad([compiled[1].sum()], [z])
    assert torch.equal(gradient, torch.ones_like(z))


def test_compiled_code_refuses_what_other_code_does() -> None:
    """Planted bug: values left unread while the call is compiled, and ever after."""
    z, y = torch.zeros(1, 1, 4, 4), torch.full((1, 1, 4, 4), 255, dtype=torch.uint8)

    with pytest.raises(ValueError, match=r"target ranges from 255 to 255, but must stay in \[0, 1\]"):
        torch.compile(step, fullgraph=True, backend="aot_eager")(z, y, "band")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_where_nobody_can_read_a_target_it_makes_the_loss_nan(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU. Planted bug: a target of 255 taken for a number, whose loss is finite."""
    monkeypatch.setattr(reference, "are_readable", lambda _: False)
    z, y = case((2, 1, 8, 8))
    wrong = y.to(dtype)
    wrong[1, 0, 2, 3] = 2

    good, bad = (
        reference.evaluate(z, target, torch.tensor(1), Recipe("band", 1, "square", 0.75, 0.1), with_slope=True)
        for target in (y, wrong)
    )

    assert torch.isfinite(good[0])
    assert torch.isnan(bad[0])
    assert torch.equal(bad[1][:1], good[1][:1])


def test_operators_keep_pytorchs_rules() -> None:
    z, y = case((2, 1, 3, 5))
    seed = torch.tensor(5)

    torch.library.opcheck(opaque.pbl_plain, (z.requires_grad_(), y, seed, *OPTIONS, True))
    torch.library.opcheck(opaque.pbl_plain, (z.detach(), y, seed, *OPTIONS, False))
    torch.library.opcheck(opaque.perturb_plain, (z, y, seed, *OPTIONS))
