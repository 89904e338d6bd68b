"""Small real objects that the coordinator's tests are built from."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import zmq

from fedoap.config import FederationConfig, RetentionConfig
from fedoap.identity import Member, curve_keys, signing_keys
from fedoap.manifests import BlobManifest, TaskKind, TaskManifest, UploadManifest
from fedoap.seal import Seal, public_half, sealed_at
from fedoap.tensors import write_blob
from fedoap_coordinator.blobs import Blobs
from fedoap_coordinator.folder import prepare
from fedoap_coordinator.ledger import Ledger
from fedoap_coordinator.notary import Notary
from fedoap_coordinator.store import Store

FEDERATION_KEYS = signing_keys(b"f" * 32)
LONG_AGO = 1_700_000_000.0
EXCHANGE, SITE = b"e" * 32, b"s" * 32
"""Secrets of the one exchange and of the one upload that these tests seal."""


@dataclass
class Clock:
    """Unix time that stands still until it is set."""

    now: float = LONG_AGO

    def __call__(self) -> float:
        return self.now


@dataclass
class Maker:
    """Makes tensors on disk and the manifests that name them."""

    folder: Path
    made: int = field(default=0)

    def blob(self, value: float = 1.0, size: int = 3000) -> tuple[Path, BlobManifest]:
        self.made += 1
        path = self.folder / f"made-{self.made}"
        return path, write_blob(path, {"weight": np.full(size, value, np.float32)})

    def task(self, kind: TaskKind, number: int, model: BlobManifest | None = None, attempt: int = 1) -> TaskManifest:
        key = public_half(EXCHANGE)
        cohort = ("hospital_a", "hospital_b")
        return TaskManifest("demo", b"p" * 32, kind, number, attempt, cohort, 600, model, seal_key=key)

    def upload(self, task: bytes, site: str, blob: BlobManifest, cases: int = 3) -> UploadManifest:
        return UploadManifest(task, site, cases, (("loss", 0.5),), blob, public_half(SITE))

    def sealed(self, manifest: UploadManifest, data: bytes) -> Iterator[tuple[int, bytes]]:
        """The upload's chunks as they lie at the coordinator: where, and what."""
        seal, blob = Seal.of_site(manifest, SITE, public_half(EXCHANGE)), manifest.blob
        for at in range(0, blob.size, blob.chunk_bytes):
            yield sealed_at(blob, at), seal.close(at, data[at : at + blob.chunk_bytes])


def notary(config: FederationConfig | None = None) -> Notary:
    chosen = config or FederationConfig(federation="demo", sites=("hospital_a", "hospital_b"))
    return Notary(chosen.plan, "fedoap test", FEDERATION_KEYS.secret)


def open_store(ledger: Ledger, state: Path, reserve_bytes: int = 0, retention: RetentionConfig | None = None) -> Store:
    return Store(ledger, Blobs(state, reserve_bytes), lambda: 1.0, notary().sign, retention or RetentionConfig())


@pytest.fixture
def make(tmp_path: Path) -> Maker:
    folder = tmp_path / "made"
    folder.mkdir()
    return Maker(folder)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    folder = tmp_path / "state"
    folder.mkdir()
    return folder


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def config(state: Path) -> FederationConfig:
    return FederationConfig.model_validate(
        {
            "federation": "demo",
            "sites": ["hospital_a", "hospital_b", "hospital_c"],
            "coordinator": {"state": state, "bind": "tcp://127.0.0.1:*", "advertise": "tcp://fed.example.org:7470"},
            "rounds": {"quorum": 2},
        }
    )


@pytest.fixture
def ledger(state: Path) -> Iterator[Ledger]:
    prepare(state)
    with Ledger(state / "fed.sqlite", "demo") as opened:
        yield opened


@pytest.fixture
def context() -> Iterator["zmq.Context[zmq.Socket[bytes]]"]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield context
    context.destroy(linger=0)


@pytest.fixture
def member() -> Callable[[str], Member]:
    def build(name: str) -> Member:
        return Member(name, curve_keys(os.urandom(32)).public, signing_keys(os.urandom(32)).public)

    return build
