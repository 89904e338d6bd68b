"""A thousand sites at one coordinator: they join, do a round of 1 MB, lose the coordinator, and come back.

    PYTHONPATH=. python benchmarks/scale.py --sites 1000 --mb 1

The coordinator is the real one. A site here is the real connection, seal and machine of a node, many to a process,
without disk and worker: it returns what it got plus a constant that its number fixes. Sites are enrolled before the
start. After the round the coordinator is killed and started again; the average is checked at the end. Memory is over
what the coordinator had before the first site came.
"""

import argparse
import datetime as dt
import hashlib
import json
import multiprocessing
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from multiprocessing.synchronize import Event
from pathlib import Path

import numpy as np
import psutil
import zmq
from numpy.typing import NDArray

from fedoap.config import ModelRecord, load_federation
from fedoap.errors import MessageError
from fedoap.identity import KeyPair, Member, curve_keys, signing_keys
from fedoap.manifests import BlobManifest, TaskManifest, TensorSpec, UploadManifest
from fedoap.messages import CHUNK_BYTES, Chunk
from fedoap.protocol.events import (
    Answered,
    BlobStored,
    Connected,
    Disconnected,
    FinishPart,
    Leave,
    Say,
    SayChunk,
    SiteEffect,
    SiteEvent,
    StartWork,
    Tick,
    WorkDone,
    WritePart,
)
from fedoap.protocol.site import Site
from fedoap.seal import KEY_BYTES, Seal, public_half
from fedoap.tensors import read_blob
from fedoap_coordinator.descriptors import raise_limit
from fedoap_coordinator.folder import open_ledger, prepare
from fedoap_node.link import Address, Link, News

TICK_MS = 200
SECRET = bytes(range(KEY_BYTES))
PATIENCE_SECONDS = 600.0
Row = dict[str, str | int | float]


@dataclass(frozen=True, slots=True)
class Federation:
    """What every site has to know."""

    address: Address
    key: bytes
    floats: int


class LightSite:
    """One site: a connection and a machine. `models` is what all sites of a process have fetched."""

    def __init__(
        self,
        number: int,
        keys: tuple[KeyPair, KeyPair],
        federation: Federation,
        context: "zmq.Context[zmq.Socket[bytes]]",
        models: dict[bytes, bytes],
    ) -> None:
        self._name, self._change = site_name(number), np.float32(site_change(number))
        curve, signing = keys
        self._floats, self._models = federation.floats, models
        self._machine = Site("scale", self._name, federation.key, signing.secret, curve.public, software="scale")
        self.link = Link(context, federation.address, curve)
        self._parts: dict[bytes, bytearray] = {}
        self._base = b""
        self._seal: Seal
        self._outbox: deque[Say | SayChunk] = deque()
        self.held_back: StartWork | None = None
        self.left = False

    def turn(self, now: float, *, tick: bool, may_end: bool) -> None:
        """Hear, decide, speak."""
        for news in self.link.news(now):
            if news is News.UP:
                self._feed(Connected())
            elif news is News.DOWN:
                self._outbox.clear()
                self._feed(Disconnected())
        for answer in self.link.receive():
            assert not isinstance(answer, MessageError), answer
            self._feed(Answered(*answer))
        if may_end and self.held_back is not None:
            held, self.held_back = self.held_back, None
            self._work(held)
        if tick:
            self._feed(Tick())
            self.link.dial(now)
        self._flush()

    def _feed(self, event: SiteEvent) -> None:
        events = deque([event])
        while events:
            for effect in self._machine.handle(events.popleft(), time.monotonic()):
                outcome = self._carry_out(effect)
                if outcome is not None:
                    events.append(outcome)

    def _carry_out(self, effect: SiteEffect) -> SiteEvent | None:
        match effect:
            case Say() | SayChunk():
                self._outbox.append(effect)
            case WritePart(part, at, data) if part not in self._models:
                whole = self._parts.setdefault(part, bytearray())
                whole[at : at + len(data)] = data
            case FinishPart(part, blob):
                self._models.setdefault(blob.id, bytes(self._parts.pop(part, b"")))
                return BlobStored(blob.id)
            case StartWork(_, TaskManifest(kind="calibrate")):
                self.held_back = effect
            case StartWork():
                self._work(effect)
            case Leave():
                self.left = True
        return None

    def _work(self, effect: StartWork) -> None:
        task, manifest = effect.task, effect.manifest
        blob = BlobManifest((), b"")
        if manifest.kind == "init":
            blob, self._base = described(first_weights(self._floats).tobytes(), self._floats), b""
        elif manifest.kind == "train":
            assert manifest.model is not None
            self._base = manifest.model.id
            blob = described(self._update(), self._floats)
        upload = UploadManifest(task, self._name, 8, (("loss", 0.5),), blob)
        if blob.size:
            upload = replace(upload, seal_key=public_half(SECRET))
            self._seal = Seal.of_site(upload, SECRET, manifest.seal_key)
        self._feed(WorkDone(task, upload))

    def _update(self) -> bytes:
        if not self._base:
            return first_weights(self._floats).tobytes()
        return (np.frombuffer(self._models[self._base], np.float32) + self._change).tobytes()

    def _flush(self) -> None:
        while self._outbox and self.link.up:
            match self._outbox[0]:
                case Say(message, body):
                    sent = self.link.send(message, body)
                case SayChunk(upload, _, at, size):
                    sent = self.link.send(Chunk(upload, at), self._seal.close(at, self._update()[at : at + size]))
            if not sent:
                break
            self._outbox.popleft()


def run_sites(numbers: range, seeds: dict[int, tuple[bytes, bytes]], federation: Federation, may_end: Event) -> None:
    """Be these sites until the federation has ended."""
    raise_limit(len(numbers))
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    context.max_sockets = 4 * len(numbers) + 64
    models: dict[bytes, bytes] = {}
    keys = {k: (curve_keys(seeds[k][0]), signing_keys(seeds[k][1])) for k in numbers}
    sites = [LightSite(k, keys[k], federation, context, models) for k in numbers]
    poller, of = zmq.Poller(), dict[object, LightSite]()
    for site in sites:
        for one in (site.link.socket, site.link.monitor):
            poller.register(one, zmq.POLLIN)
            of[one] = site
    next_tick = 0.0
    while not all(site.left for site in sites):
        ready = {of[one] for one, _ in poller.poll(TICK_MS)}
        now, released = time.monotonic(), may_end.is_set()
        tick = now >= next_tick
        if tick:
            next_tick = now + TICK_MS / 1000
        for site in sites if tick else ready:
            site.turn(now, tick=tick, may_end=released)
    for site in sites:
        site.link.close()
    context.term()


@dataclass
class Watch:
    """Samples the coordinator's resident memory, its aggregation process left out."""

    process: psutil.Process
    before: int = 0
    peak: int = 0
    over: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        """Sample until `over` is set."""
        while not self.over.wait(0.05):
            try:
                self.peak = max(self.peak, self.process.memory_info().rss)
            except psutil.NoSuchProcess:
                return


class Coordinator:
    """The real daemon, and what it logs."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.started = time.time()
        command = [sys.executable, "-m", "fedoap_coordinator", "--config", str(root / "fed.toml")]
        out = (root / "coordinator.out").open("ab")
        self.process = subprocess.Popen([*command, "--exit-when-finished"], stdout=out, stderr=out)
        out.close()
        self.watch = Watch(psutil.Process(self.process.pid))
        self._sampler = threading.Thread(target=self.watch.run)
        self._sampler.start()

    def until(self, what: str, happened: Callable[[list[Row]], bool]) -> list[Row]:
        """Return this process's log lines as soon as they show what is waited for."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            rows = self.rows()
            if happened(rows):
                return rows
            time.sleep(0.1)
        raise SystemExit(f"the coordinator did not get to {what}; it lies in {self.root}")

    def rows(self) -> list[Row]:
        """Return what this process has logged."""
        text = (self.root / "state/log.jsonl").read_text() if (self.root / "state/log.jsonl").exists() else ""
        lines = text.split("\n")[:-1]
        begun = max((index for index, line in enumerate(lines) if '"ready"' in line), default=len(lines))
        rows: list[Row] = [json.loads(line) for line in lines[begun:]]
        return rows if rows and _seconds(rows[0]) >= self.started else []

    def kill(self) -> None:
        """End it as a power cut would."""
        self.process.send_signal(signal.SIGKILL)
        self.close()

    def close(self) -> None:
        """End it if it runs."""
        self.process.terminate()
        self.process.wait(60)
        self.watch.over.set()
        self._sampler.join()


def main() -> None:
    """Run and print."""
    raise_limit((options := _options()).sites)
    with tempfile.TemporaryDirectory(prefix="fedoap-scale-") as folder, ExitStack() as stack:
        measure(Path(folder), options, stack)


def measure(root: Path, options: argparse.Namespace, stack: ExitStack) -> None:
    """Go through the course and print what it cost."""
    sites, floats = options.sites, int(options.mb * 1e6) // 4
    federation, seeds = enrol(root, sites, floats)
    coordinator = Coordinator(root)
    stack.callback(coordinator.close)
    coordinator.until("its start", bool)
    time.sleep(1)
    before, spawn = coordinator.watch.peak, multiprocessing.get_context("spawn")
    may_end, begun = spawn.Event(), time.time()
    share = -(-sites // options.processes)
    for low in range(0, sites, share):
        numbers = range(low, min(sites, low + share))
        crowd = spawn.Process(target=run_sites, args=(numbers, {k: seeds[k] for k in numbers}, federation, may_end))
        crowd.start()
        stack.callback(crowd.kill)
    rows = coordinator.until("its sites", lambda rows: _count(rows, "site_joined") >= sites)
    _print("all joined", _last(rows, "site_joined") - begun, "s, with the start of the sites' processes")
    _print("memory with all joined", (coordinator.watch.peak - before) / 1e6, "MB more than before")
    rows = coordinator.until("the end of the round", lambda rows: _round(rows, "task_closed") > 0)
    _print("round", _round(rows, "task_closed") - _round(rows, "task_opened"), f"s, {sites} x {options.mb:g} MB")
    _print("memory at its peak", (coordinator.watch.peak - before) / 1e6, "MB more than before")
    time.sleep(8)  # until every site has its next task in hand
    coordinator.kill()
    again = Coordinator(root)
    stack.callback(again.close)
    rows = again.until("its sites again", lambda rows: _count(rows, "site_joined") >= sites)
    _print("start of the coordinator", _seconds(rows[0]) - again.started, "s, until it listens")
    _print("all back", _last(rows, "site_joined") - again.started, "s after the restart")
    may_end.set()
    if again.process.wait(PATIENCE_SECONDS):
        raise SystemExit(f"the coordinator ended with code {again.process.returncode}; it lies in {root}")
    check_average(root, sites, floats)


def enrol(root: Path, sites: int, floats: int) -> tuple[Federation, dict[int, tuple[bytes, bytes]]]:
    """Make the configuration and a member of each site; return what they need to connect."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    names = [site_name(number) for number in range(sites)]
    (root / "fed.toml").write_text(
        f'federation = "scale"\nsites = {json.dumps(names)}\n'
        f'[coordinator]\nbind = "{endpoint}"\n[rounds]\ncount = 1\n[network]\nattention = "off"\n'
    )
    config = load_federation(root / "fed.toml")
    keys = prepare(config.coordinator.state)
    seeds = {number: (secrets.token_bytes(32), secrets.token_bytes(32)) for number in range(sites)}
    with open_ledger(config) as ledger:
        for number, (curve, signing) in seeds.items():
            member = Member(site_name(number), curve_keys(curve).public, signing_keys(signing).public)
            ledger.enrol(b"", member, time.time())
    return Federation(Address(endpoint, keys.curve.public), keys.signing.public, floats), seeds


def check_average(root: Path, sites: int, floats: int) -> None:
    """Return if the model is the average of what the sites sent."""
    export = [sys.executable, "-m", "fedoap_coordinator", "export", str(root / "model"), "--config"]
    subprocess.run([*export, str(root / "fed.toml")], check=True, capture_output=True)
    record = ModelRecord.model_validate_json((root / "model/model.json").read_bytes())
    manifest = BlobManifest.unpack(record.shared.manifest.read_bytes())
    found = read_blob(record.shared.blob, manifest)["weight"].astype(np.float32)
    change = sum(site_change(number) for number in range(sites)) / sites
    error = float(np.abs(found - (first_weights(floats) + np.float32(change))).max())
    if error > 1e-5:
        raise SystemExit(f"the average is off by {error}")
    _print("largest error of the average", error, "")


def site_name(number: int) -> str:
    """Return a site's name.

    >>> site_name(7)
    'site0007'
    """
    return f"site{number:04d}"


def site_change(number: int) -> float:
    """Return what a site adds to each weight."""
    return 1e-5 * (1 + number)


def first_weights(floats: int) -> NDArray[np.float32]:
    """Return the first model."""
    return np.random.default_rng(1).standard_normal(floats, np.float32)


def described(raw: bytes, floats: int) -> BlobManifest:
    """Return the manifest of one tensor's bytes."""
    pieces = (raw[at : at + CHUNK_BYTES] for at in range(0, len(raw), CHUNK_BYTES))
    hashes = b"".join(hashlib.sha256(piece).digest() for piece in pieces)
    return BlobManifest((TensorSpec("weight", "float32", (floats,)),), hashes)


def _round(rows: list[Row], event: str) -> float:
    return max((_seconds(row) for row in rows if row["event"] == event and row["kind"] == "train"), default=0.0)


def _count(rows: list[Row], event: str) -> int:
    return len({row["site"] for row in rows if row["event"] == event})


def _last(rows: list[Row], event: str) -> float:
    return max(_seconds(row) for row in rows if row["event"] == event)


def _seconds(row: Row) -> float:
    return dt.datetime.fromisoformat(str(row["time"])).timestamp()


def _print(what: str, value: float, unit: str) -> None:
    print(f"{what:28} {value:10.3g} {unit}", flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, default=1000)
    parser.add_argument("--mb", type=float, default=1, help="size of the shared model in 10^6 bytes of float32")
    parser.add_argument("--processes", type=int, default=4, help="that the sites share")
    return parser.parse_args()


if __name__ == "__main__":
    main()
