"""A real coordinator under nonsense: from a site that it knows, and from strangers who do not even speak ZeroMQ.

`FEDOAP_FUZZ_MESSAGES=10000000 FEDOAP_FUZZ_CONNECTIONS=100000 pytest -s tests/end_to_end/test_fuzzing.py` tries more.
"""

import hashlib
import os
import random
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import psutil
import pytest
import zmq

from fedoap.manifests import UploadManifest
from fedoap.messages import FromCoordinator, Idle, Refuse, Wait
from fedoap.seal import public_half
from fedoap.tensors import write_blob
from fedoap_coordinator.folder import LEDGER
from fedoap_coordinator.ledger import Ledger
from malformed import Malformed
from scripted import SEAL_SECRET, ScriptedSite

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Federation

pytestmark = [pytest.mark.slow, pytest.mark.timeout(0)]
MESSAGES = int(os.environ.get("FEDOAP_FUZZ_MESSAGES", "200000"))
CONNECTIONS = int(os.environ.get("FEDOAP_FUZZ_CONNECTIONS", "3000"))
SEED = int(os.environ.get("FEDOAP_FUZZ_SEED", "1"))
GROWTH_MB = 20
VARIETY = 20_000
"""So many are made beforehand for each pass, as making one takes longer than refusing it."""
GREETING = b"\xff\0\0\0\0\0\0\0\x01\x7f\x03\0" + b"CURVE".ljust(20, b"\0") + bytes(32)


def test_a_known_site_that_sends_nonsense_gets_nothing_accepted_and_stops_nobody(
    federate: "Callable[..., Federation]", tmp_path: Path
) -> None:
    """Planted bugs: a codec that lets unknown keys through; refusals kept in a list; an offer's site not compared."""
    federation = federate(rounds=1, quorum=1, silence=6.0)
    federation.start_coordinator()
    process = psutil.Process(federation.processes["coordinator"].pid)
    with zmq.Context() as context, ScriptedSite(context, federation.site("hospital_a")) as site:
        site.join()
        upload, raw = result(site, tmp_path)
        nonsense = Malformed(random.Random(SEED), upload, site.member.signing.secret)
        answers = Counter(pour(site, nonsense, VARIETY))
        before, began = process.memory_info().rss, time.monotonic()

        answers.update(pour(site, nonsense, MESSAGES - VARIETY))

        seconds, growth = time.monotonic() - began, (process.memory_info().rss - before) / 1e6
        assert set(answers) <= {"refuse", "wait"}
        assert list((federation.root / "state/parts").iterdir()) == []
        site.upload(upload, raw)
        federation.wait_for("coordinator", "task_closed", kind="init")  # the first weights are the upload, opened
        assert (federation.root / "state/blobs" / upload.blob.id.hex()).read_bytes() == raw
    with Ledger(federation.root / "state" / LEDGER, "trial") as ledger:
        assert [row.manifest for row in ledger.updates(upload.task)] == [upload]
    assert federation.stop("coordinator") == 0
    assert growth < GROWTH_MB
    sys.stdout.write(
        f"\nmessages: {MESSAGES} malformed from an enrolled site, {(MESSAGES - VARIETY) / seconds:.0f} a second: "
        f"0 accepted, 0 crashes, {growth:.1f} MB growth, an honest upload afterwards intact\n"
    )


def test_strangers_who_send_raw_bytes_are_let_go_and_cost_nothing(federate: "Callable[..., Federation]") -> None:
    """Planted bug: `maxmsgsize` not set, so that a stranger's frame of 6 GiB is taken in."""
    federation = federate(rounds=1, quorum=1, silence=6.0)
    federation.start_coordinator()
    process = psutil.Process(federation.processes["coordinator"].pid)
    rng, began = random.Random(SEED), time.monotonic()
    for _ in range(200):
        knock(federation.port, rng)
    before = process.memory_info().rss

    for _ in range(CONNECTIONS - 200):
        knock(federation.port, rng)
    flooded = flood(federation.port, process)

    growth = (max(process.memory_info().rss, flooded) - before) / 1e6
    with zmq.Context() as context, ScriptedSite(context, federation.site("hospital_a")) as site:
        site.join()
        assert site.await_task()
    assert federation.stop("coordinator") == 0
    assert growth < GROWTH_MB
    sys.stdout.write(
        f"\nconnections: {CONNECTIONS} of raw bytes, {CONNECTIONS / (time.monotonic() - began):.0f} a second: "
        f"0 let in, 0 crashes, {growth:.1f} MB growth, a site afterwards served\n"
    )


def result(site: ScriptedSite, folder: Path) -> tuple[UploadManifest, bytes]:
    """Return an honest result of the task that is due, in several chunks."""
    task = hashlib.sha256(site.await_task()).digest()
    path = folder / "update"
    blob = write_blob(path, {"weight": np.arange(800_000, dtype=np.float32)})
    return UploadManifest(
        task, site.member.site, 8, (("seconds", 0.0),), blob, public_half(SEAL_SECRET)
    ), path.read_bytes()


def pour(site: ScriptedSite, nonsense: Malformed, count: int) -> list[str]:
    """Send so many messages, and return the kinds of answer that came."""
    answers: set[str] = set()
    while count > 0:
        batch = [nonsense.one() for _ in range(min(count, VARIETY))]
        for number, frames in enumerate(batch):
            site.socket.send_multipart(frames)
            if number % 16 == 0:
                answers |= {_kind(answer) for answer, _ in site.drain()}
        count -= len(batch)
    time.sleep(1.0)
    return [*answers, *[_kind(answer) for answer, _ in site.drain()]]


def _kind(answer: FromCoordinator) -> str:
    assert isinstance(answer, Refuse | Wait | Idle), answer
    return answer.type


def knock(port: int, rng: random.Random) -> None:
    """Connect, say something, and leave; some wait for an answer, some do not."""
    with socket.create_connection(("127.0.0.1", port), timeout=5) as stranger:
        said = rng.choice(
            (rng.randbytes(rng.randrange(200)), GREETING[: rng.randrange(64)], _garbled(rng), b"GET / HTTP/1.1\r\n\r\n")
        )
        try:
            stranger.sendall(said)
            if rng.random() < 0.3:
                stranger.settimeout(0.01)
                stranger.recv(256)
        except OSError:
            return


def _garbled(rng: random.Random) -> bytes:
    """A ZMTP greeting, whole or with a flipped bit, and a frame that is no HELLO behind it."""
    said = bytearray(GREETING)
    if rng.random() < 0.5:
        said[rng.randrange(len(said))] ^= 1 << rng.randrange(8)
    return bytes(said) + rng.choice((b"\x04", b"\x06", b"\x02", b"\0")) + rng.randbytes(rng.randrange(300))


def flood(port: int, process: psutil.Process) -> int:
    """Announce a frame of 6 GiB before the handshake, send what is taken of it, and return the memory it took."""
    with socket.create_connection(("127.0.0.1", port), timeout=5) as stranger:
        stranger.settimeout(0.5)
        with suppress(OSError):
            stranger.sendall(GREETING + b"\x06" + (6 << 30).to_bytes(8, "big"))
            for _ in range(100):
                stranger.sendall(bytes(1 << 20))
        return process.memory_info().rss
