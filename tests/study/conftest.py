"""One tiny federation that ran in this process, for all tests that only look at what it left."""

from pathlib import Path

import pytest

from fedoap.simulation.config import SimulationConfig
from fedoap.study.federation import run_federation
from fedoap.study.figures import FederationRun
from tiny_study import no_report, tiny_study


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> SimulationConfig:
    return tiny_study(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def ran(config: SimulationConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, FederationRun]:
    folder = tmp_path_factory.mktemp("ran")
    return folder, run_federation(config, folder, no_report)
