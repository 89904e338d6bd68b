"""The contract between the node daemon and its training process: files in, lines out, files back.

The daemon writes a `Job` as JSON and starts `python -m fedoap_node.worker JOB.json`, or gives the path to a
worker that waits for it (`fedoap_node.standby`); such a worker says `JobDone` at the job's end and may be
given another. A worker prints one JSON object a line on standard output (`JobProgress`), and everything else
on standard error. In `job.output` it leaves `update.blob` and `update.manifest` (the tensors to upload,
perhaps none), the new personal state as safetensors files under `personal/` where the job changed it, and
last, in one move, `result.json` (`JobResult`). It never touches `job.personal`.

Exit code 0 means that `result.json` is there, 2 that the last line of standard error says what to set right.
As something else may write there after the worker, `torch.distributed.run` for one, the worker leaves that
line as `error.txt` beside the job's file too.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from fedoap.config import BlobFiles, Plan, SiteConfig, SiteData, WorkerConfig
from fedoap.errors import StorageError, TrainingError
from fedoap.fields import Frozen
from fedoap.manifests import TaskManifest

JobKind = Literal["init", "seed", "bank", "train", "calibrate", "local"]
"""`local` trains alone, with the steps of all rounds and of the calibration, for comparison."""

Count = Annotated[int, Field(ge=0, lt=2**31)]
"""What a message can carry."""

JOB = "job.json"
RESULT = "result.json"
ERROR = "error.txt"
UPDATE_BLOB = "update.blob"
UPDATE_MANIFEST = "update.manifest"
PERSONAL = "personal"


class Job(Frozen):
    """One task, made out for the worker; all paths are absolute."""

    kind: JobKind
    site: str
    round: int
    plan: Plan
    data: SiteData
    worker: WorkerConfig = WorkerConfig()
    model: BlobFiles | None = None
    bank: BlobFiles | None = None
    personal: Path | None = None
    """Folder with the personal state that the last finished job left; none at first."""
    cache: Path
    """Folder in which preprocessed cases may be kept between jobs."""
    output: Path


class JobProgress(Frozen):
    """One line of the worker's standard output."""

    stage: str
    step: Count
    steps: Count
    loss: float
    dice: float = -1.0
    """Mean validation Dice, or -1 while there is none."""


class JobDone(Frozen):
    """The line that a worker prints which has done a job and waits for the next."""

    done: Literal[True]


class JobResult(Frozen):
    """What the worker has to say at the end, beside the tensors."""

    cases: Count
    """Training cases used, which are the site's weight where the strategy weighs by cases."""
    metrics: dict[Annotated[str, Field(min_length=1, max_length=64)], float]
    """Finite numbers only, such as `loss`, `dice_validation`, `dice_test`, `seconds`, `steps`."""


def write_job(
    manifest: TaskManifest,
    *,
    site: str,
    plan: Plan,
    config: SiteConfig,
    blobs: Callable[[bytes], BlobFiles],
    personal: Path | None,
    cache: Path,
    output: Path,
) -> Job:
    """Return the job that does a task's work at a site, written into its output folder.

    `blobs` says where a blob lies that the site has.

    Raises:
        TrainingError: `site.toml` names no data.
        StorageError: the disk refuses.
    """
    if config.data is None:
        raise TrainingError("site.toml: section data is missing")
    job = Job(
        kind=manifest.kind,
        site=site,
        round=manifest.round,
        plan=plan,
        data=config.data,
        worker=config.worker,
        model=blobs(manifest.model.id) if manifest.model else None,
        bank=blobs(manifest.bank.id) if manifest.bank else None,
        personal=personal,
        cache=cache,
        output=output,
    )
    _write(job)
    return job


def write_local_job(site: str, config: SiteConfig, plan: Plan, cache: Path, output: Path) -> Job:
    """Return the job that trains a site alone, written into its output folder, which is made.

    Raises:
        TrainingError: `site.toml` names no data.
        StorageError: the disk refuses.
    """
    if config.data is None:
        raise TrainingError("site.toml: section data is missing")
    job = Job(
        kind="local",
        site=site,
        round=0,
        plan=plan,
        data=config.data,
        worker=config.worker,
        cache=cache,
        output=output,
    )
    _write(job)
    return job


def _write(job: Job) -> None:
    path = job.output / JOB
    try:
        job.output.mkdir(parents=True, exist_ok=True)
        path.write_text(job.model_dump_json(indent=1), encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error.strerror}") from None
