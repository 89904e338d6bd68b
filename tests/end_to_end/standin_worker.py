"""A worker that does not train: small exact numbers, so that a test can work out every weight by hand.

`init` makes weights that are multiples of 1/8. `train` adds `CHANGE[site]` to each of them and one to
the count in the personal state. `seed` and `bank` put one patient's token into each slot. All values stay
exact in float32, whatever the order in which they are added.

FEDOAP_TEST_GATE names a folder: the worker waits while a file `hold-SITE-KIND-ROUND` lies in it, after
saying that it began. FEDOAP_TEST_ROUGH makes the numbers inexact instead. FEDOAP_TEST_FAIL names a site
whose worker ends with an error that names a patient. What was done is written to `trained.txt` in the
site's state folder. It imports little, as a test starts dozens of it.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import TypeAlias, TypedDict

import numpy as np
from numpy.typing import NDArray

from fedoap.manifests import BlobManifest
from fedoap.tensors import read_blob, write_blob

CHANGE = {"hospital_a": 0.5, "hospital_b": 1.0, "hospital_c": 1.5}
ROUGH = "FEDOAP_TEST_ROUGH" in os.environ
ROWS = int(os.environ.get("FEDOAP_TEST_ROWS", "300"))
Tensors: TypeAlias = dict[str, NDArray[np.generic]]


class Files(TypedDict):
    blob: str
    manifest: str


class Job(TypedDict):
    kind: str
    site: str
    round: int
    plan: dict[str, dict[str, int]]
    model: Files
    personal: str | None
    output: str


def main() -> None:
    job: Job = json.loads(Path(sys.argv[1]).read_bytes())
    output = Path(job["output"])
    say(job, 0)
    wait_at_gate(job)
    if job["site"] == os.environ.get("FEDOAP_TEST_FAIL"):
        sys.exit("mask of patient Miller is empty")
    with (output.parents[1] / "trained.txt").open("a") as diary:
        diary.write(f"{job['kind']} {job['round']}\n")
    update, metrics = work(job, output)
    if update:
        (output / "update.manifest").write_bytes(write_blob(output / "update.blob", update).pack())
    say(job, 1)
    (output / "draft.json").write_text(json.dumps({"cases": 8, "metrics": metrics}))
    (output / "draft.json").rename(output / "result.json")


def say(job: Job, step: int) -> None:
    line = {"stage": job["kind"], "step": step, "steps": 1, "loss": 0.5, "dice": -1.0}
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def wait_at_gate(job: Job) -> None:
    gate = os.environ.get("FEDOAP_TEST_GATE")
    while gate and (Path(gate) / f"hold-{job['site']}-{job['kind']}-{job['round']}").exists():
        time.sleep(0.02)


def work(job: Job, output: Path) -> tuple[Tensors, dict[str, float]]:
    match job["kind"]:
        case "init":
            return first_weights(), {"seconds": 0.0}
        case "train":
            count = count_round(job, output)
            return trained(job), {"loss": 1.0 / (1 + job["round"]), "dice_validation": 0.5, "steps": count}
        case "seed" | "bank":
            return sums(job), {"seconds": 0.0}
        case _:
            return {}, {"dice_test": 0.75, "dice_test_shared": 0.5, "steps": 3.0}


def first_weights() -> Tensors:
    values = np.random.default_rng(7).integers(-64, 64, (ROWS, 1000)) / (7 if ROUGH else 8)
    return {"decoder.weight": values.astype(np.float32), "encoder.bias": np.arange(7, dtype=np.float32)}


def trained(job: Job) -> Tensors:
    manifest = BlobManifest.unpack(Path(job["model"]["manifest"]).read_bytes())
    weights = read_blob(Path(job["model"]["blob"]), manifest)
    change = np.float32(CHANGE[job["site"]] / (3 if ROUGH else 1))
    return {name: np.asarray(values, np.float32) + change for name, values in weights.items()}


def count_round(job: Job, output: Path) -> float:
    old = float((Path(job["personal"]) / "count.txt").read_text()) if job["personal"] else 0.0
    (output / "personal").mkdir()
    (output / "personal" / "count.txt").write_text(str(old + 1))
    return old + 1


def sums(job: Job) -> Tensors:
    network = job["plan"]["network"]
    slots, channels = job["plan"]["bank"]["slots"], network["width"] * 2 ** network["depth"]
    ones = np.ones(slots, np.int64)
    rows = np.ones((slots, channels), np.float32) * np.arange(1, slots + 1, dtype=np.float32)[:, None]
    return {"counts": ones, "patients": ones, "keys": rows, "values": 2 * rows}


if __name__ == "__main__":
    main()
