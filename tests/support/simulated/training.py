"""What sites and coordinator compute in the simulation: deterministic, small, and different for each site."""

import hashlib

import numpy as np
from numpy.typing import NDArray

from federation_builders import blob
from fedoap.config import Plan
from fedoap.tensors import BlobManifest, TaskManifest, UploadManifest

Arrays = dict[str, NDArray[np.generic]]
SHAPES = {"conv.weight": (5, 7), "norm.bias": (3,)}
PERSONAL = "personal.head.weight"


def train(site: str, manifest: TaskManifest, model: Arrays, plan: Plan) -> Arrays:
    """A site's result: a function of the work alone, as seeded training is."""
    rng = np.random.default_rng(list(hashlib.sha256(manifest.work + site.encode()).digest()))
    slots, channels = plan.bank.slots, plan.network.bottleneck
    match manifest.kind:
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


def merge(manifest: TaskManifest, updates: list[tuple[UploadManifest, bytes]]) -> tuple[BlobManifest, bytes]:
    """The mean of the updates, or the sum of their counts, in the order given."""
    tables = [arrays(upload.blob, raw) for upload, raw in updates]
    mean = {name: sum(table[name].astype(np.float64) for table in tables) / len(tables) for name in tables[0]}
    if manifest.kind in ("init", "train"):
        return blob({name: np.asarray(array) for name, array in mean.items()})
    keys, values = (np.asarray(mean[name])[None] for name in ("keys", "values"))
    counts = np.asarray(sum(table["counts"].astype(np.int64) for table in tables))
    return blob({"counts": counts, "keys": keys, "log_weights": np.log(counts), "values": values})


def arrays(manifest: BlobManifest, raw: bytes) -> Arrays:
    """The tensors of a blob of float32 and int64."""
    table: Arrays = {}
    for spec, at in manifest.offsets():
        kind = "<i8" if spec.dtype == "int64" else "<f4"
        table[spec.name] = np.frombuffer(raw[at : at + spec.size], kind).reshape(spec.shape)
    return table
