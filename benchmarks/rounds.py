"""What a round costs when nothing is trained: the real daemons, a stand-in worker, the average checked.

    PYTHONPATH=. python benchmarks/rounds.py --mb 200 --sites 3 --rounds 3

The worker is the one of `peer/standin.py`: a site sends back what it got, plus a change that its number fixes.
Prints, over the training rounds: seconds from the announcement of a round to that of the next, the same without
the slowest site's worker, processor time by role, the peak resident memory of the coordinator (all its processes
together) and of the largest node daemon (without its worker), and the bytes that travelled. Everything is on
loopback, in a temporary folder, and is ended by its process number.
"""

import argparse
import csv
import datetime as dt
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path

import numpy as np
import psutil

from benchmarks.peer import standin
from benchmarks.peer.standin import FIRST, site_change
from fedoap.config import ModelRecord
from fedoap.manifests import BlobManifest, Dtype
from fedoap.tensors import as_float32, write_blob

TENSORS = 60
Row = dict[str, str | int | float]
Times = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Figures:
    """One run's results."""

    mb: float
    sites: int
    rounds: int
    dtype: str
    round_seconds: float
    """Median."""
    round_seconds_best: float
    round_seconds_worst: float
    outside_seconds: float
    """Median of the time outside the slowest site's worker."""
    outside_seconds_worst: float
    cpu_seconds: float
    """Median of the processor time of everybody in a round, workers too: what a busy machine cannot hide.
    The four that follow are its parts; the coordinator's is without its aggregation process."""
    cpu_coordinator: float
    cpu_aggregator: float
    cpu_nodes: float
    cpu_workers: float
    cpu_system: float
    """What of `cpu_seconds` the kernel used."""
    coordinator_peak_mb: float
    node_peak_mb: float
    mb_a_round: float
    time: str = field(default_factory=lambda: dt.datetime.now(dt.UTC).isoformat(timespec="seconds"))
    machine: str = f"{platform.machine()}, {os.cpu_count()} cores"


@dataclass(frozen=True, slots=True)
class Trial:
    """What is run, and where."""

    root: Path
    mb: float
    names: list[str]
    rounds: int
    dtype: Dtype

    @property
    def config(self) -> Path:
        """The federation's configuration."""
        return self.root / "fed.toml"

    @property
    def floats(self) -> int:
        """Parameters of the shared model."""
        return int(self.mb * 1e6) // 4


@dataclass(frozen=True, slots=True)
class Cpu:
    """Processor seconds by role, and what of all that the kernel used."""

    coordinator: float
    aggregator: float
    nodes: float
    workers: float
    system: float

    def __sub__(self, other: "Cpu") -> "Cpu":
        """Return what was used since."""
        return Cpu(*(mine - before for mine, before in zip(astuple(self), astuple(other), strict=True)))

    @property
    def whole(self) -> float:
        """Of all roles together."""
        return self.coordinator + self.aggregator + self.nodes + self.workers


@dataclass
class Watch:
    """Samples resident memory ten times a second while the daemons run."""

    coordinator: psutil.Process
    nodes: list[psutil.Process]
    coordinator_peak: int = 0
    node_peak: int = 0
    cpu: list[tuple[float, Cpu]] = field(default_factory=list)
    """Unix time, and processor seconds used up to then."""
    over: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        """Sample until `over` is set."""
        while not self.over.wait(0.1):
            together = [self.coordinator, *_children(self.coordinator)]
            self.coordinator_peak = max(self.coordinator_peak, sum(map(_resident, together)))
            self.node_peak = max([self.node_peak, *map(_resident, self.nodes)])
            self.cpu.append((time.time(), self._used()))

    def cpu_between(self, begin: float, end: float) -> Cpu:
        """Return the processor seconds used between two moments, as of the last samples before them."""
        before, after = (
            max((one for one in self.cpu if one[0] <= moment), default=self.cpu[0]) for moment in (begin, end)
        )
        return after[1] - before[1]

    def _used(self) -> Cpu:
        coordinator, aggregator = _times(self.coordinator), _children_times(self.coordinator)
        nodes, workers = _sum(map(_times, self.nodes)), _sum(map(_children_times, self.nodes))
        system = sum(part[1] for part in (coordinator, aggregator, nodes, workers))
        return Cpu(sum(coordinator), sum(aggregator), sum(nodes), sum(workers), system)


def main() -> None:
    """Measure and print."""
    options = _options()
    with tempfile.TemporaryDirectory(prefix="fedoap-rounds-", dir=options.folder) as folder:
        names = [f"site{k}" for k in range(options.sites)]
        figures = measure(Trial(Path(folder), options.mb, names, options.rounds, options.dtype))
    for name, value in asdict(figures).items():
        print(f"{name:24} {value:.2f}" if isinstance(value, float) else f"{name:24} {value}")
    if options.csv:
        _append(options.csv, figures)


def measure(trial: Trial) -> Figures:
    """Run one federation and return its figures; the final average is checked first."""
    os.environ |= {FIRST: str(trial.root / "first.blob"), "OMP_NUM_THREADS": "1"}
    _write_config(trial)
    first = write_blob(trial.root / "first.blob", first_weights(trial.floats), trial.dtype)
    (trial.root / "first.blob.manifest").write_bytes(first.pack())
    with ExitStack() as stack:
        coordinator = _start(stack, trial, "coordinator", "fedoap_coordinator", "--config", str(trial.config))
        for name in trial.names:
            _join(trial, name)
        home = ["--home", str(trial.root / "home")]
        nodes = [_start(stack, trial, name, "fedoap_node", "--site", name, *home) for name in trial.names]
        watch = Watch(psutil.Process(coordinator.pid), [psutil.Process(node.pid) for node in nodes])
        sampler = threading.Thread(target=watch.run)
        sampler.start()
        stack.callback(watch.over.set)
        for process in (coordinator, *nodes):
            if process.wait(1800) != 0:
                raise SystemExit(f"a daemon failed; its output lies in {trial.root}")
    sampler.join()
    _check_average(trial)
    return _figures(trial, watch)


def first_weights(floats: int) -> dict[str, np.ndarray]:
    """Return tensors of so many standard-normal values together."""
    random = np.random.default_rng(1)
    return {f"layer{k:02d}.weight": random.standard_normal(floats // TENSORS, np.float32) for k in range(TENSORS)}


def _figures(trial: Trial, watch: Watch) -> Figures:
    log = _rows(trial.root / "state/log.jsonl", "task_opened")
    opened = {(row["kind"], row["round"]): _seconds(row) for row in log}
    whole, outside, cpu = [], [], []
    for number in range(1, trial.rounds + 1):
        begin = opened["train", number]
        end = opened[("train", number + 1) if number < trial.rounds else ("calibrate", trial.rounds + 1)]
        whole.append(end - begin)
        cpu.append(watch.cpu_between(begin, end))
        outside.append(end - begin - max(_worker_seconds(trial, name, number) for name in trial.names))
    return Figures(
        mb=trial.mb,
        sites=len(trial.names),
        rounds=trial.rounds,
        dtype=trial.dtype,
        round_seconds=statistics.median(whole),
        round_seconds_best=min(whole),
        round_seconds_worst=max(whole),
        outside_seconds=statistics.median(outside),
        outside_seconds_worst=max(outside),
        cpu_seconds=statistics.median(one.whole for one in cpu),
        cpu_coordinator=statistics.median(one.coordinator for one in cpu),
        cpu_aggregator=statistics.median(one.aggregator for one in cpu),
        cpu_nodes=statistics.median(one.nodes for one in cpu),
        cpu_workers=statistics.median(one.workers for one in cpu),
        cpu_system=statistics.median(one.system for one in cpu),
        coordinator_peak_mb=watch.coordinator_peak / 1e6,
        node_peak_mb=watch.node_peak / 1e6,
        mb_a_round=trial.mb * (1 if trial.dtype == "float32" else 0.5) * 2 * len(trial.names),
    )


def _worker_seconds(trial: Trial, name: str, number: int) -> float:
    rows = _rows(trial.root / "home" / name / "log.jsonl", "work_done")
    return next(float(row["seconds"]) for row in rows if (row["kind"], row["round"]) == ("train", number))


def _check_average(trial: Trial) -> None:
    model = trial.root / "model"
    export = [sys.executable, "-m", "fedoap_coordinator", "export", str(model), "--config", str(trial.config)]
    subprocess.run(export, check=True, capture_output=True)
    record = ModelRecord.model_validate_json((model / "model.json").read_bytes())
    manifest = BlobManifest.unpack(record.shared.manifest.read_bytes())
    change = trial.rounds * statistics.mean(map(site_change, trial.names))
    first = first_weights(trial.floats)
    tolerance = 1e-5 if trial.dtype == "float32" else 0.05
    with record.shared.blob.open("rb") as blob:
        for spec in manifest.tensors:
            values = as_float32(blob.read(spec.size), spec.dtype)
            error = float(np.abs(values - (first[spec.name] + np.float32(change))).max())
            if error > tolerance:
                raise SystemExit(f"{spec.name}: the average is off by {error}")


def _join(trial: Trial, name: str) -> None:
    invite = [sys.executable, "-m", "fedoap_coordinator", "invite", name, "--config", str(trial.config)]
    token = subprocess.run(invite, check=True, capture_output=True, text=True).stdout.strip()
    home, data = trial.root / "home", trial.root / "datalist.json"
    join = [sys.executable, "-m", "fedoap_node", "join", token, "--home", str(home), "--data", str(data)]
    subprocess.run(join, check=True, capture_output=True)
    worker = json.dumps([sys.executable, standin.__file__])
    with (home / name / "site.toml").open("a") as text:
        text.write(f"command = {worker}\nkeep_warm = true\nstay_seconds = 60\n")


def _write_config(trial: Trial) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    (trial.root / "datalist.json").write_text('{"training": ["1.png"]}')
    trial.config.write_text(
        f'federation = "rounds"\nsites = {json.dumps(trial.names)}\n'
        f'[coordinator]\nbind = "{endpoint}"\nadvertise = "{endpoint}"\n'
        f'[rounds]\ncount = {trial.rounds}\n[network]\nattention = "off"\n[wire]\ndtype = "{trial.dtype}"\n'
    )


def _start(stack: ExitStack, trial: Trial, name: str, module: str, *arguments: str) -> subprocess.Popen[bytes]:
    out = stack.enter_context((trial.root / f"{name}.out").open("wb"))
    command = [sys.executable, "-m", module, *arguments, "--exit-when-finished"]
    process = subprocess.Popen(command, stdout=out, stderr=out)
    stack.callback(_end, process)
    return process


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _rows(path: Path, event: str) -> list[Row]:
    rows: list[Row] = [json.loads(line) for line in path.read_text().splitlines()]
    return [row for row in rows if row["event"] == event]


def _seconds(row: Row) -> float:
    return dt.datetime.fromisoformat(str(row["time"])).timestamp()


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _resident(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


def _times(process: psutil.Process) -> Times:
    """Return the seconds that a process itself used, in user mode and in the kernel."""
    try:
        spent = process.cpu_times()
    except psutil.NoSuchProcess:
        return 0.0, 0.0
    return spent.user, spent.system


def _children_times(process: psutil.Process) -> Times:
    """Return the seconds that all its children used, those that live and those that it has buried."""
    living = [process, *_children(process)]
    try:
        buried = [one.cpu_times() for one in living]
    except psutil.NoSuchProcess:  # one ended just now: the next sample counts it
        return _children_times(process) if process.is_running() else (0.0, 0.0)
    own = _sum([_times(one) for one in living[1:]])
    return own[0] + sum(one.children_user for one in buried), own[1] + sum(one.children_system for one in buried)


def _sum(times: Iterable[Times]) -> Times:
    pairs = list(times)
    return sum(user for user, _ in pairs), sum(system for _, system in pairs)


def _append(path: Path, figures: Figures) -> None:
    row = asdict(figures)
    fresh = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if fresh:
            writer.writeheader()
        writer.writerow({name: round(value, 3) if isinstance(value, float) else value for name, value in row.items()})


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=float, default=200, help="size of the shared model in 10^6 bytes of float32")
    parser.add_argument("--sites", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of tensors on the wire")
    parser.add_argument("--csv", type=Path, help="append the figures to this file")
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made: the disk that is measured")
    return parser.parse_args()


if __name__ == "__main__":
    started = time.monotonic()
    main()
    print(f"{'whole run':24} {time.monotonic() - started:.1f} s")
