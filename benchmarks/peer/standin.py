"""A worker that does not train: it returns the model that it got plus a small constant, which its site's number fixes.

    python standin.py JOB.json | -        with `-` paths come as lines of standard input, and it says when a job is done

`init` leaves the blob that $STANDIN_FIRST names; its manifest lies beside it under the same name and `.manifest`.
It imports little and holds one tensor at a time, so that a benchmark measures the daemons.
"""

import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, TypedDict

import numpy as np
from numpy.typing import NDArray

from fedoap.manifests import BlobManifest
from fedoap.tensors import as_float32, write_blob

FIRST = "STANDIN_FIRST"


class Job(TypedDict):
    """What this worker reads of its job."""

    kind: str
    site: str
    plan: dict[str, dict[str, Literal["float32", "bfloat16"]]]
    model: dict[str, str]
    output: str


class Trained(Mapping[str, NDArray[np.generic]]):
    """A blob's tensors plus a constant, each made when it is asked for."""

    def __init__(self, blob: Path, manifest: BlobManifest, change: float) -> None:
        self._bytes = np.memmap(blob, np.uint8, "r")
        self._places = {spec.name: (spec, at) for spec, at in manifest.offsets()}
        self._change = np.float32(change)

    def __getitem__(self, name: str) -> NDArray[np.generic]:
        """Return one tensor."""
        spec, at = self._places[name]
        raw = self._bytes[at : at + spec.size].data
        return (as_float32(raw, spec.dtype) + self._change).reshape(spec.shape)

    def __iter__(self) -> Iterator[str]:
        """Yield the names."""
        return iter(self._places)

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._places)


def site_change(site: str) -> float:
    """Return what a site adds to each weight in a round.

    >>> site_change("site2")
    0.003
    """
    return 0.001 * (1 + int(re.sub(r"\D", "", site)))


def work(job: Job) -> None:
    """Leave the job's result in its output folder."""
    output, dtype = Path(job["output"]), job["plan"]["wire"]["dtype"]
    update = output / "update.blob"
    if job["kind"] == "init":
        first = Path(os.environ[FIRST])
        shutil.copyfile(first, update)
        shutil.copyfile(f"{first}.manifest", output / "update.manifest")
    elif job["kind"] == "train":
        base = BlobManifest.unpack(Path(job["model"]["manifest"]).read_bytes())
        trained = Trained(Path(job["model"]["blob"]), base, site_change(job["site"]))
        (output / "update.manifest").write_bytes(write_blob(update, trained, dtype).pack())
    (output / "draft.json").write_text(json.dumps({"cases": 8, "metrics": {"loss": 0.5}}))
    (output / "draft.json").rename(output / "result.json")


if __name__ == "__main__":
    waits = sys.argv[1] == "-"
    for path in sys.stdin if waits else sys.argv[1:]:
        work(json.loads(Path(path.rstrip("\n")).read_bytes()))
        if waits:
            sys.stdout.write('{"done": true}\n')
            sys.stdout.flush()
