"""The real commands federate on loopback; only the worker is a stand-in that does not train."""

import json
import os
import signal
import sys
from io import StringIO
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from fedoap.errors import ProcessError
from fedoap.protocol.course import course
from fedoap.report.results import Ledger
from fedoap.simulation.config import SimulationConfig, load_simulation
from fedoap.simulation.display import Display
from fedoap.simulation.federation import read_ledger, run_federation
from fedoap.simulation.layout import Layout, make_layout
from fedoap.simulation.processes import Processes

pytestmark = pytest.mark.slow

STANDIN = Path(__file__).parents[1] / "end_to_end" / "standin_worker.py"


def test_a_federation_runs_to_its_end_and_leaves_ledger_and_model(tmp_path: Path) -> None:
    config, layout = _config(tmp_path), make_layout(tmp_path / "out", overwrite=False)

    said, ledger = _run(config, layout)

    done = [each for each in ledger.exchanges if each.outcome == "done"]
    assert ledger.finished
    assert len(done) == len(course(config.plan))
    assert done[-1].sites["hospital_a"].metrics["dice_test"] == 0.75
    assert (layout.model / "model.json").exists()
    assert "train round 1/1: done" in said


def test_a_node_that_dies_is_quoted_and_ends_the_simulation(tmp_path: Path) -> None:
    """Planted bug: only the coordinator waited for, which itself waits for sites."""
    config, layout = _config(tmp_path), make_layout(tmp_path / "out", overwrite=False)
    broken = layout.home / "hospital_b" / "site.toml"

    with pytest.raises(ProcessError, match="too few nodes are left for a round; hospital_b ended with code"):
        _run(config, layout, spoil=broken)

    left = [process for process in psutil.process_iter(["cmdline"]) if str(tmp_path) in str(process.info["cmdline"])]
    assert left == []


def _run(config: SimulationConfig, layout: Layout, spoil: Path | None = None) -> tuple[str, Ledger]:
    said = StringIO()
    console = Console(file=said, width=200)
    with Processes(layout.logs) as processes, _Spoiling(console, config, spoil) as display:
        run_federation(config, layout, processes, display)
        return said.getvalue(), Ledger.model_validate_json(read_ledger(layout, processes))


class _Spoiling(Display):
    """A display that kills the node of one site when its first task is announced."""

    def __init__(self, console: Console, config: SimulationConfig, spoil: Path | None) -> None:
        super().__init__(console, config.plan, list(config.sites))
        self._spoil = spoil

    def show(self, event: object) -> None:
        assert isinstance(event, dict)
        super().show(event)
        if self._spoil and event["event"] == "task_opened":
            name, home = self._spoil.parent.name, str(self._spoil.parents[1])
            for process in psutil.process_iter(["cmdline"]):
                line = process.info["cmdline"] or []
                if {"fedoap_node", "--site", name, home} <= set(line):
                    os.kill(process.pid, signal.SIGKILL)
            self._spoil = None


def _config(folder: Path) -> SimulationConfig:
    (folder / "list.json").write_text(json.dumps({"training": []}))
    command = json.dumps([sys.executable, str(STANDIN)])
    lines = [
        'federation.federation = "f"',
        "federation.rounds.count = 1",
        "federation.network.width = 4",
        "federation.bank.slots = 4",
        "federation.bank.min_patients = 1",
    ]
    for name in ("hospital_a", "hospital_b"):
        lines += [f'sites.{name}.data.datalist = "list.json"', f"sites.{name}.worker.command = {command}"]
    (folder / "simulate.toml").write_text("\n".join(lines))
    return load_simulation(folder / "simulate.toml")
