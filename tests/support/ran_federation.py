"""A federation that has run: a state folder with real keys, signatures, merges and records, made in a second."""

import hashlib
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedoap.config import FederationConfig
from fedoap.identity import TASK_CONTEXT, UPLOAD_CONTEXT, KeyPair, Member, curve_keys, sign, signing_keys
from fedoap.manifests import BlobManifest, Dtype, TaskKind, TaskManifest, UploadManifest
from fedoap.messages import CHUNK_BYTES
from fedoap.packing import pack_blob
from fedoap.protocol.events import FinishPart, OpenPart, RecordClosed, RecordOpened, WritePart
from fedoap.seal import Seal, public_half, sealed_at
from fedoap.tensors import write_blob
from fedoap_coordinator.aggregator import BLOB, MASTER, merge
from fedoap_coordinator.blobs import Blobs, blob_files
from fedoap_coordinator.folder import Keys, open_ledger, prepare
from fedoap_coordinator.jobs import merge_job
from fedoap_coordinator.ledger import Ledger
from fedoap_coordinator.notary import Notary
from fedoap_coordinator.store import Made, Store

SITES = ("hospital_a", "hospital_b", "hospital_c")
EXCHANGE, UPLOAD = b"e" * 32, b"u" * 32
"""Secrets of every exchange and of every upload."""
VALUES = 300_000
"""Of the model: two chunks as float32."""


def config_of(
    state: Path, dtype: Dtype = "bfloat16", upload_rounds: int = 99, updates: str = "plain"
) -> FederationConfig:
    return FederationConfig.model_validate(
        {
            "federation": "demo",
            "sites": SITES,
            "coordinator": {"state": state, "bind": "tcp://127.0.0.1:*"},
            "rounds": {"quorum": 2, "count": 2},
            "retention": {"upload_rounds": upload_rounds, "results": 99},
            "network": {"width": 4, "depth": 1},
            "data": {"size": [8, 8]},
            "bank": {"slots": 4, "min_patients": 1},
            "strategy": {"weighting": "cases", "server_learning_rate": 0.7},
            "wire": {"dtype": dtype, "updates": updates},
        }
    )


@dataclass
class Ran:
    """Runs exchanges on a state folder, as the daemon does it but in one process and without a network."""

    config: FederationConfig
    now: float = 1_700_000_000.25
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    sites: dict[str, KeyPair] = field(init=False)
    keys: Keys = field(init=False)
    ledger: Ledger = field(init=False)
    store: Store = field(init=False)

    def __post_init__(self) -> None:
        self.sites = {name: signing_keys(name.encode().ljust(32)) for name in SITES}
        self.keys = prepare(self.state)
        self.ledger = open_ledger(self.config)
        self.ledger.set_fact("plan", self.config.plan.to_bytes())
        notary = Notary(self.config.plan, "fedoap test", self.keys.signing.secret)
        self.store = Store(self.ledger, Blobs(self.state, 0), self.clock, notary.sign, self.config.retention)
        for name, pair in self.sites.items():
            self.ledger.enrol(b"t" * 32, Member(name, curve_keys(pair.secret).public, pair.public), self.clock())

    @property
    def state(self) -> Path:
        return self.config.coordinator.state

    def clock(self) -> float:
        self.now += 1.5
        return self.now

    def exchange(
        self, kind: TaskKind, number: int, attempt: int = 1, *, late: str = "", end: str = "done"
    ) -> TaskManifest:
        """Run an exchange, to its end unless that is empty; the upload of the site `late` does not count."""
        history = self.store.history()
        cohort = SITES[:1] if kind == "init" else SITES
        model, bank = (None, None) if kind == "init" else (history.model, history.bank)
        plan, half = self.config.plan.digest, public_half(EXCHANGE)
        manifest = TaskManifest("demo", plan, kind, number, attempt, cohort, 600, model, bank, half)
        packed = manifest.pack()
        task = hashlib.sha256(packed).digest()
        signature = sign(self.keys.signing.secret, TASK_CONTEXT, packed)
        self.store.apply(RecordOpened(task, manifest, packed, signature, EXCHANGE))
        uploads = {site: self.upload(task, kind, site) for site in cohort}
        if end == "done":
            self.close(task, manifest, [uploads[site] for site in cohort if site != late])
        elif end == "abandoned":
            self.store.apply(RecordClosed(task, "abandoned", (), None, "nobody was there"))
        return manifest

    def upload(self, task: bytes, kind: TaskKind, site: str) -> UploadManifest:
        source = self.state / "made"
        dtype = self.config.wire.dtype if kind in ("init", "train") else "float32"
        blob = write_blob(source, self.tensors(kind), dtype)
        if kind == "train" and self.config.wire.updates == "packed":
            source, blob = self._packed(source, blob)
        upload = UploadManifest(task, site, 3 + SITES.index(site), (("loss", 0.5),), blob, public_half(UPLOAD))
        packed = upload.pack()
        name = hashlib.sha256(packed).digest()
        self.store.apply(OpenPart(name, sealed_at(blob, blob.size)))
        data, seal = source.read_bytes(), Seal.of_site(upload, UPLOAD, public_half(EXCHANGE))
        for at in range(0, blob.size, CHUNK_BYTES):
            self.store.apply(WritePart(name, sealed_at(blob, at), seal.close(at, data[at : at + CHUNK_BYTES])))
        signature = sign(self.sites[site].secret, UPLOAD_CONTEXT, packed)
        self.store.apply(FinishPart(name, blob, upload, site, signature))
        source.unlink()
        return upload

    def _packed(self, source: Path, blob: BlobManifest) -> tuple[Path, BlobManifest]:
        model = self.store.history().model
        assert model is not None
        packed = source.with_name("packed")
        return packed, pack_blob(source, blob, blob_files(self.state, model.id).blob, model, packed)

    def tensors(self, kind: TaskKind) -> dict[str, NDArray[np.generic]]:
        match kind:
            case "init" | "train":
                return {"weight": self.rng.standard_normal(VALUES).astype(np.float32), "bias": np.ones(7, np.float32)}
            case "seed" | "bank":
                keys, values = self.rng.standard_normal((2, 4, 8)).astype(np.float32)
                counts = np.array([3, 1, 4, 2])
                return {"counts": counts, "patients": counts, "keys": keys, "values": values}
            case "calibrate":
                return {}

    def close(self, task: bytes, manifest: TaskManifest, counted: list[UploadManifest]) -> None:
        names = tuple(hashlib.sha256(one.pack()).digest() for one in counted)
        result = None
        if manifest.kind != "calibrate":
            output = Path(tempfile.mkdtemp(dir=self.state))
            made = merge(merge_job(manifest, counted, self.config.plan, self.state, output), EXCHANGE)
            result = BlobManifest.unpack(bytes.fromhex(made.blob))
            exact = BlobManifest.unpack(bytes.fromhex(made.master)) if made.master else None
            self.store.publish(Made(result, output / BLOB, (output / MASTER, exact) if exact else None))
            shutil.rmtree(output)
        self.store.apply(RecordClosed(task, "done", names, result))

    def close_files(self) -> None:
        self.store.blobs.close()
        self.ledger.__exit__()


def run_federation(config: FederationConfig) -> None:
    """Run two rounds with an attempt in vain, a late upload, and an exchange that is still open at the end."""
    ran = Ran(config)
    ran.exchange("init", 0)
    ran.exchange("train", 1, late="hospital_b")
    ran.exchange("seed", 2, end="abandoned")
    ran.exchange("seed", 2, attempt=2)
    ran.exchange("train", 2)
    ran.exchange("bank", 3)
    ran.exchange("calibrate", 3)
    ran.exchange("train", 4, end="")
    ran.close_files()
