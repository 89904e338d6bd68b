"""A whole federation on this machine: real commands, real keys, loopback."""

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fedoap.errors import ProcessError
from fedoap.simulation.config import SimulationConfig
from fedoap.simulation.display import Display
from fedoap.simulation.layout import Layout, write_federation, write_site
from fedoap.simulation.processes import Child, Processes

READY_SECONDS = 60.0
LEAVE_SECONDS = 30.0
POLL_SECONDS = 0.1
COORDINATOR = (sys.executable, "-m", "fedoap_coordinator")
NODE = (sys.executable, "-m", "fedoap_node")


def run_federation(config: SimulationConfig, layout: Layout, processes: Processes, display: Display) -> None:
    """Train the federation to its end; the results are in its ledger, its model and the sites' folders.

    Raises:
        ProcessError: the coordinator ended early, or fewer nodes are left than make a round.
    """
    write_federation(layout, config)
    settings = ["--config", str(layout.fed_toml)]
    coordinator = processes.start("coordinator", [*COORDINATOR, *settings, "--exit-when-finished"])
    _await_endpoint(layout, coordinator)
    nodes = []
    for name, site in config.sites.items():
        token = processes.run(f"invite {name}", [*COORDINATOR, "invite", name, *settings]).strip()
        processes.run(f"join {name}", [*NODE, "join", token, "--home", str(layout.home)])
        write_site(layout.home / name / "site.toml", site)
        command = [*NODE, "--site", name, "--home", str(layout.home), "--exit-when-finished"]
        nodes.append(processes.start(name, command))
    _follow(coordinator, len(nodes) - config.federation.quorum, layout, processes, display)
    processes.wait([coordinator, *nodes], LEAVE_SECONDS)
    processes.run("export", [*COORDINATOR, "export", str(layout.model), *settings])


def read_ledger(layout: Layout, processes: Processes) -> str:
    """Return the coordinator's results as JSON."""
    return processes.run("results", [*COORDINATOR, "results", "--json", "--config", str(layout.fed_toml)])


@dataclass(slots=True)
class Log:
    """A JSON-lines file that another process is writing."""

    path: Path
    at: int = field(default=0, init=False)

    def new(self) -> Iterator[dict[str, object]]:
        """Yield the complete lines since the last call; lines that are not JSON objects are skipped."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self.at)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self.at += len(whole)
        yield from (json.loads(line) for line in whole.splitlines() if line.startswith(b"{"))


def _await_endpoint(layout: Layout, coordinator: Child) -> None:
    until = time.monotonic() + READY_SECONDS
    while not (layout.state / "endpoint").exists():
        if coordinator.code is not None:
            raise ProcessError(coordinator.last_words())
        if time.monotonic() > until:
            raise ProcessError(f"coordinator is not ready after {READY_SECONDS:.0f} seconds, see {coordinator.log}")
        time.sleep(POLL_SECONDS)


def _follow(coordinator: Child, spare: int, layout: Layout, processes: Processes, display: Display) -> None:
    log = Log(layout.state / "log.jsonl")
    while coordinator.code is None:
        for event in log.new():
            display.show(event)
        lost = [child for child in processes.ended() if child.code and child is not coordinator]
        for child in lost:
            display.warn(child.last_words())
        spare -= len(lost)
        if spare < 0:
            raise ProcessError(f"too few nodes are left for a round; {lost[-1].last_words()}")
        time.sleep(POLL_SECONDS)
    for event in log.new():
        display.show(event)
    if coordinator.code:
        raise ProcessError(coordinator.last_words())
