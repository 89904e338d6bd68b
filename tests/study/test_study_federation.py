"""A federation in one process is the daemons' own, and leaves no trace for the next one."""

import subprocess
import sys
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from fedoap.config import ModelRecord
from fedoap.errors import ConfigError, DataError
from fedoap.manifests import BlobManifest
from fedoap.report.results import Ledger
from fedoap.simulation import federation as daemons
from fedoap.simulation.config import SimulationConfig
from fedoap.simulation.display import Display
from fedoap.simulation.layout import make_layout
from fedoap.simulation.processes import Processes
from fedoap.study.federation import run_federation
from fedoap.study.figures import FederationRun, read_run
from fedoap.study.work import quiet_process
from tiny_study import left, no_report

FRESH = """
import sys
from pathlib import Path
from fedoap.simulation.config import load_simulation
from fedoap.study.federation import run_federation
run_federation(load_simulation(Path(sys.argv[1])), Path(sys.argv[2]), lambda *_: None)
"""


@pytest.mark.slow
def test_it_is_bit_for_bit_the_federation_of_daemons_on_loopback(
    config: SimulationConfig, ran: tuple[Path, FederationRun], tmp_path: Path
) -> None:
    """Planted bug: training goes on from no personal state of the round before."""
    folder, run = ran
    layout = make_layout(tmp_path / "out", overwrite=False)
    display = Display(Console(file=StringIO()), config.plan, list(config.sites))

    with Processes(layout.logs) as processes:
        daemons.run_federation(config, layout, processes, display)
        ledger = Ledger.model_validate_json(daemons.read_ledger(layout, processes))

    assert left(folder) == left(layout.out)
    theirs = {
        (name, one.round): {key: value for key, value in share.metrics.items() if key != "seconds"}
        for one in ledger.exchanges
        if one.kind in ("train", "calibrate")
        for name, share in one.sites.items()
    }
    assert {(one.site, one.round): one.metrics for one in run.rounds} == theirs


def test_what_ran_before_leaves_no_trace(
    config: SimulationConfig, ran: tuple[Path, FederationRun], tmp_path: Path
) -> None:
    """Planted bug: noise from PyTorch's global generator in each batch."""
    folder, run = ran
    rounds = config.federation.rounds.model_copy(update={"count": 1})
    changed = config.federation.model_copy(update={"seed": 6, "rounds": rounds})
    other = config.model_copy(update={"federation": changed})
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002 - the one that nothing may depend on
    run_federation(other, tmp_path / "other", no_report)

    again = run_federation(config, tmp_path / "again", no_report)

    assert left(tmp_path / "again") == left(folder)
    assert left(tmp_path / "other") != left(folder)
    assert [one.metrics for one in again.rounds] == [one.metrics for one in run.rounds]


def test_a_job_leaves_the_process_as_many_threads_as_it_had() -> None:
    """Planted bug: the job's number stays, so that a site without one of its own takes it over."""
    before = torch.get_num_threads()

    with quiet_process(before + 1):
        within = torch.get_num_threads()
        torch.set_num_threads(before + 2)

    assert (within, torch.get_num_threads()) == (before + 1, before)


def test_a_fresh_process_makes_the_same(
    config: SimulationConfig, ran: tuple[Path, FederationRun], tmp_path: Path
) -> None:
    """Planted bug: noise from PyTorch's global generator, which starts each process at the same seed."""
    data = config.sites["a"].data
    assert data is not None
    simulate = data.datalist.parents[1] / "simulate.toml"

    subprocess.run([sys.executable, "-Ic", FRESH, str(simulate), str(tmp_path)], check=True)

    assert left(tmp_path) == left(ran[0])


def test_figures_hold_each_round_of_each_site_and_the_bytes_that_manifests_name(
    ran: tuple[Path, FederationRun],
) -> None:
    """Planted bugs: the first weights are left out; what the round before fetched is counted again."""
    folder, run = ran

    assert [(one.round, one.site, one.stage, one.step) for one in run.rounds] == [
        (1, "a", "train", 3),
        (1, "b", "train", 3),
        (2, "a", "train", 6),
        (2, "b", "train", 6),
        (3, "a", "calibrate", 9),
        (3, "b", "calibrate", 9),
    ]
    assert run.rounds[0].metrics.keys() >= {"loss", "dice_validation"}
    assert run.rounds[-1].metrics.keys() >= {"dice_test_before", "dice_test", "hd95_test"}
    assert read_run(folder) == run
    model, bank, sums = _size(folder / "model" / "model.manifest"), _size(folder / "model" / "bank.manifest"), 576
    moved = [(one.bytes_sent, one.bytes_received) for one in run.rounds]
    assert moved == [
        (2 * model, model),
        (model, model),
        *[(sums + model, model + bank)] * 2,
        *[(sums, model + bank)] * 2,
    ]


def test_packed_updates_change_nothing_but_the_bytes_that_travel(
    config: SimulationConfig, ran: tuple[Path, FederationRun], tmp_path: Path
) -> None:
    """Planted bug: the bytes of the plain update are counted."""
    folder, run = ran
    wire = config.federation.wire.model_copy(update={"updates": "packed"})
    packed = config.model_copy(update={"federation": config.federation.model_copy(update={"wire": wire})})

    again = run_federation(packed, tmp_path, no_report)

    assert left(tmp_path) == left(folder)
    sent = [[one.bytes_sent for one in each.rounds if one.stage == "train"] for each in (again, run)]
    assert sum(sent[0]) < 0.95 * sum(sent[1])


def test_models_lie_where_commands_find_them_and_nothing_else_is_left(ran: tuple[Path, FederationRun]) -> None:
    folder, _ = ran
    record = ModelRecord.model_validate_json((folder / "home" / "a" / "model" / "model.json").read_bytes())

    assert record.personal is not None
    assert all(path.exists() for path in (record.shared.blob, record.personal / "personal.safetensors"))
    assert sorted(path.name for path in folder.iterdir()) == ["cache", "federation.json", "home", "model"]
    assert [path.name for path in (folder / "home" / "a" / "state").iterdir()] == ["personal"]


def test_a_run_that_was_cut_short_is_begun_anew(
    config: SimulationConfig, ran: tuple[Path, FederationRun], tmp_path: Path
) -> None:
    """Planted bug: what lies in the folder stays."""

    def stop_late(site: str, number: int, progress: object) -> None:
        if number == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_federation(config, tmp_path, stop_late)
    assert read_run(tmp_path) is None

    run_federation(config, tmp_path, no_report)

    assert left(tmp_path) == left(ran[0])


def test_a_worker_of_the_sites_own_is_refused(config: SimulationConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"site b: worker.command is given, but a study runs fedoap's own worker"):
        run_federation(_with_worker(config, command=("mine",)), tmp_path, no_report)
    with pytest.raises(ConfigError, match=r"site b: worker.gpus is 2, but a study trains a site on one"):
        run_federation(_with_worker(config, gpus=2), tmp_path, no_report)


def test_what_a_site_cannot_do_ends_the_run_with_its_reason(config: SimulationConfig, tmp_path: Path) -> None:
    """Planted bug: the failure goes to the coordinator, which tries the round again and again."""
    site = config.sites["b"]
    assert site.data is not None
    data = site.data.model_copy(update={"spacing_mm": (1.0, 1.0, 1.0)})
    broken = config.model_copy(update={"sites": {**config.sites, "b": site.model_copy(update={"data": data})}})

    with pytest.raises(DataError, match=r"data.spacing_mm has 3 numbers, but network.dimensions is 2"):
        run_federation(broken, tmp_path, no_report)


def _with_worker(config: SimulationConfig, **changes: object) -> SimulationConfig:
    site = config.sites["b"]
    broken = site.model_copy(update={"worker": site.worker.model_copy(update=changes)})
    return config.model_copy(update={"sites": {**config.sites, "b": broken}})


def _size(manifest: Path) -> int:
    return BlobManifest.unpack(manifest.read_bytes()).size
