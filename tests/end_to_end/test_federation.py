"""Whole federations of real processes; the stand-in worker's numbers make every weight known by hand."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Federation

pytestmark = pytest.mark.slow


def test_three_sites_finish_and_the_model_is_the_mean_worked_out_by_hand(
    federation_type: "type[Federation]", federations: "list[Federation]", tmp_path: Path
) -> None:
    federation = federation_type(tmp_path, rounds=2, attention="joint")
    federations.append(federation)
    federation.join_all()
    federation.start_coordinator("--exit-when-finished")
    for name in federation.sites:
        federation.start_node(name, "--exit-when-finished")

    federation.finish()

    first = np.random.default_rng(7).integers(-64, 64, (300, 1000)) / 8
    weights = federation.weights()
    # Each round adds the mean of 0.5, 1 and 1.5 to every weight.
    assert np.array_equal(weights["decoder.weight"], first + 2)
    assert np.array_equal(weights["encoder.bias"], np.arange(7) + 2.0)
    assert federation.trained("hospital_b") == ["train 1", "seed 2", "train 2", "bank 3", "calibrate 3"]
