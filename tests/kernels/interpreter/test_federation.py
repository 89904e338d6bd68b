"""A whole federation with both kernels in the interpreter ends where plain PyTorch does."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from easy_site import easy_plan
from fedoap.config import Attention, CalibrationConfig, NetworkConfig, TrainingConfig
from small_federation import SmallFederation, Weights

TOLERANCE = 1e-5
PARTS = ("attention.", "bottleneck", "decoder.", "encoder.", "adapter.", "head.")


@pytest.mark.parametrize("attention", ["joint", "gated"])
def test_a_federation_ends_with_the_same_weights_by_either_backend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attention: Attention
) -> None:
    """Planted bug: the slots' bias left out of the kernel's logits."""
    plan = easy_plan(
        network=NetworkConfig(width=4, depth=2, heads=2, attention=attention),
        training=TrainingConfig(steps_per_round=2, batch_size=4),
        calibration=CalibrationConfig(steps=2, region="both", tau=0.3, lam=0.5, evaluations=2),
    )

    ends: dict[str, Weights] = {}
    for backend in ("eager", "triton"):
        monkeypatch.setenv("FEDOAP_KERNELS", backend)
        ends[backend] = SmallFederation(tmp_path / backend, plan).run()

    assert ends["eager"].keys() == ends["triton"].keys()
    for owner in ("a.", "b.", ""):
        expected, found = (_flat(ends[backend], owner) for backend in ("eager", "triton"))
        assert expected.size > 0
        assert np.linalg.norm(found - expected) < TOLERANCE * np.linalg.norm(expected), owner or "shared"


def _flat(weights: Weights, owner: str) -> NDArray[np.float64]:
    """Return all weights of a site, or with no owner the shared ones, side by side."""
    mine = [value for name, value in sorted(weights.items()) if name.startswith(owner or PARTS)]
    return np.concatenate([value.astype(np.float64).ravel() for value in mine])
