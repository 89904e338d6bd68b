"""A federation of real processes on loopback, with real keys; every process is ended by its number."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray

from fedoap.config import ModelRecord
from fedoap.manifests import BlobManifest
from fedoap.tensors import read_blob
from fedoap_coordinator.cli import cli as coordinator_cli
from fedoap_node.join import join

SITES = ("hospital_a", "hospital_b", "hospital_c")
WORKER = Path(__file__).with_name("standin_worker.py")
PATIENCE_SECONDS = 120.0
Row = dict[str, str | int | float]

CONFIG = """\
federation = "trial"
sites = {sites}

[coordinator]
bind = "tcp://127.0.0.1:{port}"
advertise = "tcp://127.0.0.1:{port}"

[rounds]
count = {rounds}
quorum = {quorum}
silence_seconds = {silence}

[network]
width = 4
depth = 1
attention = "{attention}"

[data]
size = [8, 8]

[bank]
slots = 4
min_patients = 1

[wire]
updates = "{updates}"
"""


@dataclass
class Federation:
    """The folders and processes of one trial federation."""

    root: Path
    rounds: int = 2
    quorum: int = 3
    attention: str = "off"
    silence: float = 30.0
    updates: str = "plain"
    environment: dict[str, str] = field(default_factory=dict)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        numbers = {"port": self.port, "rounds": self.rounds, "quorum": self.quorum, "silence": self.silence}
        text = CONFIG.format(sites=json.dumps(SITES), attention=self.attention, updates=self.updates, **numbers)
        self.root.mkdir(parents=True, exist_ok=True)
        (self.root / "gate").mkdir()
        (self.root / "datalist.json").write_text('{"training": ["1.png"]}')
        self.config.write_text(text)

    @property
    def config(self) -> Path:
        return self.root / "fed.toml"

    @property
    def sites(self) -> tuple[str, ...]:
        return SITES

    def site(self, name: str) -> Path:
        return self.root / "sites" / name

    def command(self, *arguments: str) -> str:
        """Run a command of the coordinator's operator and return what it printed."""
        done = CliRunner().invoke(coordinator_cli, [*arguments, "--config", str(self.config)], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.stdout

    def join_all(self) -> None:
        """Let every site join; the coordinator runs only for as long, unless it did before."""
        alone = "coordinator" not in self.processes
        if alone:
            self.start_coordinator()
        for name in SITES:
            join(self.command("invite", name).strip(), self.root / "sites", self.root / "datalist.json")
            worker = json.dumps([sys.executable, str(WORKER)])
            with (self.site(name) / "site.toml").open("a") as text:
                text.write(f"command = {worker}\n")
        if alone:
            assert self.stop("coordinator") == 0

    def start_coordinator(self, *flags: str) -> None:
        before = len(self.log("coordinator"))
        self._start("coordinator", "fedoap_coordinator", "--config", str(self.config), *flags)
        self.wait_for("coordinator", "ready", after=before)

    def start_node(self, name: str, *flags: str) -> None:
        self._start(name, "fedoap_node", "--site", name, "--home", str(self.root / "sites"), *flags)

    def _start(self, name: str, module: str, *arguments: str) -> None:
        gate = {"FEDOAP_TEST_GATE": str(self.root / "gate"), "OMP_NUM_THREADS": "1"}
        with (self.root / f"{name}.out").open("ab") as out:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdout=out,
                stderr=out,
                env={**os.environ, **gate, **self.environment},
            )

    def said(self, name: str) -> str:
        """Return everything that a daemon printed."""
        return (self.root / f"{name}.out").read_text()

    def log(self, name: str) -> list[Row]:
        path = self.root / "state/log.jsonl" if name == "coordinator" else self.site(name) / "log.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def wait_for(self, name: str, event: str, *, after: int = 0, **fields: str | int) -> Row:
        """Return the first such line that a daemon still running writes to its log, after the first `after` ones."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            has_ended = self.processes[name].poll() is not None
            for row in self.log(name)[after:]:
                if row["event"] == event and fields.items() <= row.items():
                    return row
            assert not has_ended, f"{name} ended:\n{self.said(name)}"
            time.sleep(0.02)
        raise AssertionError(f"{name} never said {event} {fields}:\n{self.said(name)}")

    def hold(self, site: str, kind: str, number: int) -> Path:
        """Make a site's worker wait at this work, until the path returned is removed."""
        path = self.root / "gate" / f"hold-{site}-{kind}-{number}"
        path.touch()
        return path

    def kill(self, name: str) -> None:
        self.processes[name].send_signal(signal.SIGKILL)
        self.processes.pop(name).wait()

    def stop(self, name: str) -> int:
        self.processes[name].send_signal(signal.SIGTERM)
        return self.ended(name)

    def ended(self, name: str) -> int:
        """Return the exit code of a daemon that ends by itself."""
        try:
            return self.processes.pop(name).wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{name} did not end:\n{self.said(name)}") from None

    def start_all(self) -> None:
        """Start the coordinator and every node, to end by themselves."""
        self.start_coordinator("--exit-when-finished")
        for name in SITES:
            self.start_node(name, "--exit-when-finished")

    def finish(self) -> None:
        """Wait until everybody has ended by itself, all in good order."""
        codes = {name: self.ended(name) for name in list(self.processes)}
        said = [self.said(name) for name, code in codes.items() if code]
        assert not said, "\n".join(said)

    def weights(self) -> dict[str, NDArray[np.generic]]:
        """Return the model that the coordinator exports."""
        self.command("export", str(self.root / "model"))
        record = ModelRecord.model_validate_json((self.root / "model/model.json").read_bytes())
        manifest = BlobManifest.unpack(record.shared.manifest.read_bytes())
        return read_blob(record.shared.blob, manifest)

    def trained(self, site: str) -> list[str]:
        """Return what a site's workers finished, in order."""
        path = self.site(site) / "state/trained.txt"
        return path.read_text().splitlines() if path.exists() else []

    def close(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()


@pytest.fixture(scope="session")
def federation_type() -> type[Federation]:
    """Gives test modules the class, which they cannot import: tests are no package."""
    return Federation


@pytest.fixture
def federate(tmp_path: Path) -> Iterator[Callable[..., Federation]]:
    """Make federations that all sites have joined; their processes are ended after the test, whatever happened."""
    made: list[Federation] = []

    def make(**settings: int | float | str | dict[str, str]) -> Federation:
        federation = Federation(tmp_path / f"federation{len(made)}", **settings)  # type: ignore[arg-type] # forwarded as given
        made.append(federation)
        federation.join_all()
        return federation

    yield make
    for one in made:
        one.close()
