"""Every strategy through jobs and merges: the worker's and the coordinator's own code, two sites, two rounds."""

from pathlib import Path

import numpy as np
import pytest

from easy_site import easy_plan
from fedoap.config import CalibrationConfig, NetworkConfig, StrategyConfig, TrainingConfig
from fedoap.strategies import STRATEGIES
from small_federation import SmallFederation

FEDERATED = [name for name, strategy in STRATEGIES.items() if not strategy.only_in_studies]


@pytest.mark.parametrize("name", FEDERATED)
def test_a_federation_runs_to_its_end_and_its_weights_are_finite(tmp_path: Path, name: str) -> None:
    plan = easy_plan(
        network=NetworkConfig(width=4, depth=1, attention="projection"),
        training=TrainingConfig(steps_per_round=4, batch_size=2, learning_rate=1e-3),
        calibration=CalibrationConfig(steps=2, evaluations=1),
        strategy=StrategyConfig(name=name),
    )

    weights = SmallFederation(tmp_path, plan).run()

    assert all(np.isfinite(value).all() for value in weights.values())
    assert {f"{site}.personal.head.weight" for site in "ab"} <= weights.keys()
