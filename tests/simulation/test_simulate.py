"""A whole simulation with the real worker, made as small as it gets."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from fedoap.report.results import read_results
from fedoap.segmentation.phantoms import write_phantoms

pytestmark = pytest.mark.slow

SIMULATE = """
threads = 1
[federation]
federation = "tiny"
rounds.count = 1
network = { width = 4, depth = 2 }
bank = { slots = 4, min_patients = 1 }
data = { size = [32, 32] }
training = { steps_per_round = 2, batch_size = 2 }
calibration = { steps = 2 }
[sites]
a = { data = { datalist = "liver-ct/datalist.json", modality = "ct" } }
b = { data = { datalist = "breast-us/datalist.json", modality = "ultrasound" } }
[unseen]
c = { data = { datalist = "lung-ct/datalist.json", modality = "ct" } }
"""


def test_a_simulation_leaves_results_and_report_and_no_process(tmp_path: Path) -> None:
    command = [*_command(tmp_path), "--out", "run"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    assert _running_in(tmp_path) == []
    results = read_results(tmp_path / "run" / "results.json")
    assert (results.rounds, set(results.sites), set(results.unseen)) == (1, {"a", "b"}, {"c"})
    assert all(site.dice_local is not None for site in results.sites.values())
    raw = json.loads((tmp_path / "run" / "results.json").read_text())
    assert {"dice", "dice_local"} <= raw["sites"]["a"].keys()
    assert {"dice"} <= raw["unseen"]["c"].keys()
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count("<svg") == 4
    assert page.count("data:image/png;base64,") == 8
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (again.returncode, again.stderr.count("\n")) == (2, 1)
    assert "run is not empty" in again.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_simulation_that_is_stopped_ends_everything_it_started(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    """Planted bugs: for SIGKILL a watcher that ends nothing; for SIGTERM no `termination_raises`."""
    simulation = subprocess.Popen([*_command(tmp_path), "--out", "run"], cwd=tmp_path, stderr=subprocess.DEVNULL)
    _await(lambda: len(_running_in(tmp_path)) >= 6)  # itself, its watcher, coordinator, two nodes, a worker

    simulation.send_signal(number)

    assert simulation.wait(240) == code
    _await(lambda: _running_in(tmp_path) == [])


def _command(folder: Path) -> list[str]:
    for organ in ("liver-ct", "breast-us", "lung-ct"):
        write_phantoms(folder / organ, organ, {"training": 4, "validation": 3, "test": 2}, (32, 32), seed=0)
    (folder / "simulate.toml").write_text(SIMULATE)
    return [sys.executable, "-Im", "fedoap", "simulate", "simulate.toml"]


def _running_in(folder: Path) -> list[list[str]]:
    """What runs below the folder; a worker that waits for its job has no path on its command line."""
    running = psutil.process_iter(["cmdline", "cwd"])
    return [one.info["cmdline"] or [] for one in running if (one.info["cwd"] or "").startswith(str(folder))]


def _await(holds: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.1)
