"""What sites and coordinator compute in the simulation: deterministic, small, and different for each site."""

import hashlib
from collections.abc import Iterable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from federation_builders import blob
from fedoap.config import Plan
from fedoap.manifests import BlobManifest, TaskKind, TaskManifest, UploadManifest
from fedoap.protocol.events import RecordClosed, RecordOpened, Update
from fedoap.protocol.history import Record

Arrays = dict[str, NDArray[np.generic]]
SHAPES = {"conv.weight": (5, 7), "norm.bias": (3,)}
Blob = tuple[BlobManifest, bytes]


def train(site: str, manifest: TaskManifest, model: Arrays, plan: Plan) -> Arrays:
    """A site's result: a function of the work and the model alone, as seeded training is."""
    return _trained(site, manifest.kind, manifest.work, model, plan)


def result(site: str, manifest: TaskManifest, model: Blob | None, plan: Plan) -> Blob:
    """The same, of blobs."""
    return _remember_trained(site, manifest.kind, manifest.work, model, plan)


@lru_cache(4096)
def _remember_trained(site: str, kind: TaskKind, work: bytes, model: Blob | None, plan: Plan) -> Blob:
    return blob(_trained(site, kind, work, arrays(*model) if model else {}, plan))


def _trained(site: str, kind: TaskKind, work: bytes, model: Arrays, plan: Plan) -> Arrays:
    rng = np.random.default_rng(list(hashlib.sha256(work + site.encode()).digest()))
    slots, channels = plan.bank.slots, plan.network.bottleneck
    match kind:
        case "init":
            fresh = np.random.default_rng(plan.seed)
            return {name: fresh.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
        case "train":
            return {name: array + rng.standard_normal(array.shape).astype(np.float32) for name, array in model.items()}
        case "seed" | "bank":
            sums = {name: rng.standard_normal((slots, channels)).astype(np.float32) for name in ("keys", "values")}
            counts = {name: rng.integers(3, 9, slots) for name in ("counts", "patients")}
            return {**sums, **counts}
        case "calibrate":
            return {}


def merge(manifest: TaskManifest, updates: Iterable[tuple[UploadManifest, bytes]]) -> Blob:
    """The mean of the updates, or the sum of their counts, in the order given."""
    return _remember_merged(manifest.kind in ("init", "train"), tuple((upload.blob, raw) for upload, raw in updates))


@lru_cache(4096)
def _remember_merged(is_model: bool, updates: tuple[Blob, ...], /) -> Blob:
    tables = [arrays(*update) for update in updates]
    mean = {name: sum(table[name].astype(np.float64) for table in tables) / len(tables) for name in tables[0]}
    if is_model:
        return blob({name: np.asarray(array) for name, array in mean.items()})
    keys, values = (np.asarray(mean[name])[None] for name in ("keys", "values"))
    counts = np.asarray(sum(table["counts"].astype(np.int64) for table in tables))
    return blob({"counts": counts, "keys": keys, "log_weights": np.log(counts), "values": values})


def again(plan: Plan, records: Iterable[Record]) -> tuple[BlobManifest | None, BlobManifest | None]:
    """Model and bank, worked out anew from nothing but who was counted."""
    model: Blob | None = None
    bank: Blob | None = None
    opened, site_of = dict[bytes, TaskManifest](), dict[bytes, Update]()
    for record in records:
        match record:
            case RecordOpened():
                opened[record.task] = record.manifest
            case Update():
                site_of[record.upload] = record
            case RecordClosed(task, "done", counted) if opened[task].kind != "calibrate":
                sent = [site_of[upload] for upload in counted]
                made = [(one.manifest, result(one.site, opened[task], model, plan)[1]) for one in sent]
                made_of_them = merge(opened[task], made)
                model, bank = (made_of_them, bank) if opened[task].kind in ("init", "train") else (model, made_of_them)
    return model and model[0], bank and bank[0]


def arrays(manifest: BlobManifest, raw: bytes) -> Arrays:
    """The tensors of a blob of float32 and int64."""
    table: Arrays = {}
    for spec, at in manifest.offsets():
        kind = "<i8" if spec.dtype == "int64" else "<f4"
        table[spec.name] = np.frombuffer(raw[at : at + spec.size], kind).reshape(spec.shape)
    return table
