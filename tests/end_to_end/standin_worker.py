"""A worker that does not train: small exact numbers, so that a test can work out every weight by hand.

`init` makes weights that are multiples of 1/8. `train` adds `CHANGE[site]` to each of them and one to
the count in the personal state. `seed` and `bank` put one patient's token into each slot. All values stay
exact in float32, whatever the order in which they are added.

FEDOAP_TEST_GATE names a folder: the worker waits before `KIND-ROUND` while a file `hold-SITE-KIND-ROUND`
lies in it, after saying that it began.
"""

import os
import sys
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from fedoap.config import Plan
from fedoap.tensors import BlobManifest, read_blob, write_blob
from fedoap_node.job import PERSONAL, RESULT, UPDATE_BLOB, UPDATE_MANIFEST, Job, JobProgress, JobResult

CHANGE = {"hospital_a": 0.5, "hospital_b": 1.0, "hospital_c": 1.5}
Tensors = dict[str, np.ndarray]


def main() -> None:
    job = Job.model_validate_json(Path(sys.argv[1]).read_bytes())
    say(job, 0)
    wait_at_gate(job)
    with Path(f"{job.output.parents[2]}/trained.txt").open("a") as diary:
        diary.write(f"{job.kind} {job.round}\n")
    update, metrics = work(job)
    if update:
        manifest = write_blob(job.output / UPDATE_BLOB, update, job.plan.wire.dtype)
        (job.output / UPDATE_MANIFEST).write_bytes(manifest.pack())
    say(job, 1)
    draft = job.output / "draft.json"
    draft.write_text(JobResult(cases=8, metrics=metrics).model_dump_json())
    draft.rename(job.output / RESULT)


def say(job: Job, step: int) -> None:
    sys.stdout.write(JobProgress(stage=job.kind, step=step, steps=1, loss=0.5).model_dump_json() + "\n")
    sys.stdout.flush()


def wait_at_gate(job: Job) -> None:
    gate = os.environ.get("FEDOAP_TEST_GATE")
    while gate and (Path(gate) / f"hold-{job.site}-{job.kind}-{job.round}").exists():
        time.sleep(0.02)


def work(job: Job) -> tuple[Tensors, dict[str, float]]:
    match job.kind:
        case "init":
            return first_weights(), {"seconds": 0.0}
        case "train":
            weights = {name: values + np.float32(CHANGE[job.site]) for name, values in tensors(job).items()}
            count = count_round(job)
            return weights, {"loss": 1.0 / (1 + job.round), "dice_validation": 0.5, "steps": count}
        case "seed" | "bank":
            return sums(job.plan), {"seconds": 0.0}
        case _:
            return {}, {"dice_test": 0.75, "dice_test_shared": 0.5, "steps": 3.0}


def first_weights() -> Tensors:
    values = np.random.default_rng(7).integers(-64, 64, (300, 1000)) / 8
    return {"decoder.weight": values.astype(np.float32), "encoder.bias": np.arange(7, dtype=np.float32)}


def tensors(job: Job) -> Tensors:
    assert job.model is not None
    manifest = BlobManifest.unpack(job.model.manifest.read_bytes())
    return {name: np.asarray(values, np.float32) for name, values in read_blob(job.model.blob, manifest).items()}


def count_round(job: Job) -> float:
    old = load_file(job.personal / "personal.safetensors")["personal.count"][0] if job.personal else 0.0
    folder = job.output / PERSONAL
    folder.mkdir()
    save_file({"personal.count": np.array([old + 1], np.float32)}, folder / "personal.safetensors")
    return float(old + 1)


def sums(plan: Plan) -> Tensors:
    slots, channels = plan.bank.slots, plan.network.bottleneck
    ones = np.ones(slots, np.int64)
    rows = np.ones((slots, channels), np.float32) * np.arange(1, slots + 1, dtype=np.float32)[:, None]
    return {"counts": ones, "patients": ones, "keys": rows, "values": 2 * rows}


if __name__ == "__main__":
    main()
