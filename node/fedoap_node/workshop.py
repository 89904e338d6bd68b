"""Where a worker does its jobs: a job's cases, model and bank in, tensors, personal state and figures out.

From one job of a site to the next it keeps the prepared cases, the GPU's context and the networks, whose
weights each job sets anew, and nothing else. `result.json` is written last and in one move, so a job that is
ended at any moment leaves none.
Started by `torch.distributed.run`, the processes share each batch and the first one writes.
PyTorch is imported when there is a job.
"""

# ruff: noqa: PLC0415

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError

from fedoap.config import Plan
from fedoap.errors import ConfigError, StorageError, TrainingError
from fedoap.manifests import Dtype
from fedoap.tensors import write_blob
from fedoap_node.job import PERSONAL, RESULT, UPDATE_BLOB, UPDATE_MANIFEST, Job, JobResult

if TYPE_CHECKING:
    from torch import Tensor, device

    from fedoap.segmentation.descent import Report, Workplace
    from fedoap.segmentation.network import Bank
    from fedoap.segmentation.optimizer import SiteOptimizer
    from fedoap.segmentation.sitemodel import SiteModel

OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"
PATIENCE = timedelta(hours=12)
"""How long the other processes wait for the first, which alone evaluates."""


@dataclass(frozen=True, slots=True)
class Personal:
    """What stays at the site: its weights, AdamW's moments, and how far its course is."""

    weights: Mapping[str, NDArray[np.generic]]
    moments: "Mapping[str, Tensor]"
    stage: str
    round: int
    step: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a job leaves behind."""

    metrics: dict[str, float]
    update: Mapping[str, NDArray[np.generic]] = field(default_factory=dict)
    dtype: Dtype = "float32"
    personal: Personal | None = None


@dataclass(slots=True)
class _Networks:
    """The networks of the last job, for the next one to fill: to build them takes longer than a few steps."""

    model: "SiteModel | None" = None
    plan: Plan | None = None

    def filled(self, job: Job, place: "Workplace") -> "SiteModel":
        """Return them with the job's shared weights and a new site's personal ones, built where the plan is another.

        Raises:
            ConfigError: the job names no model, but works on one.
        """
        from fedoap.segmentation.modelfolder import read_files
        from fedoap.segmentation.sitemodel import SiteModel

        if job.model is None:
            if job.kind != "init":
                raise ConfigError(f"job {job.kind}: names no model, but works on one")
            return SiteModel(job.plan).to(place.device)
        if self.model is None or self.plan != job.plan:
            self.model, self.plan = SiteModel(job.plan, blank=True), job.plan
        self.model.load_shared(read_files(job.model))
        self.model.reset_personal()
        return self.model.to(place.device)

    def drop_gradients(self) -> None:
        """Let go of what only a job under way needs."""
        if self.model is not None:
            self.model.zero_grad(set_to_none=True)


class Workshop:
    """Does one job after the other; the cases that it prepared for one stand ready for the site's next.

    Args:
        keeps: Bytes of prepared cases that may stay in memory between jobs; where there are more, none do.
    """

    def __init__(self, keeps: int = 2**30) -> None:
        self._keeps = keeps
        self._place: Workplace | None = None
        self._made_of: tuple[object, ...] = ()
        self._networks = _Networks()

    def carry_out(self, job: Job, report: "Report") -> None:
        """Leave the job's result in its output folder, `result.json` last.

        Raises:
            FedoapError: what is wrong with job, data or disk.
        """
        import torch

        start = time.monotonic()
        place = self._open(job, report)
        try:
            outcome = _outcome(job, place, self._networks)
        except torch.OutOfMemoryError:
            text = "lower training.batch_size, data.patch, data.size or network.width"
            raise TrainingError(f"site {job.site}: {job.kind} needs more GPU memory than there is; {text}") from None
        if outcome is not None:
            metrics = outcome.metrics | {"seconds": time.monotonic() - start}
            _write(job, outcome, JobResult(cases=len(place.training), metrics=metrics))
        self._networks.drop_gradients()
        if place.device.type == "cuda":
            torch.cuda.empty_cache()
        self._place = place if place.ready.nbytes <= self._keeps else None

    def _open(self, job: Job, report: "Report") -> "Workplace":
        """Return the last job's place if nothing that it was made of has changed since, else a new one."""
        import torch

        from fedoap.segmentation.descent import Workplace

        rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        if job.worker.threads:
            torch.set_num_threads(job.worker.threads)
        if self._place is not None and self._made_of == _made_of(job, self._place):
            return replace(self._place, report=report)
        device = _device(job)
        place = Workplace.open(job.site, job.plan, job.data, cache=job.cache, device=device, report=report)
        self._made_of = _made_of(job, place)
        return place.shared_out(rank, ranks)


def _made_of(job: Job, place: "Workplace") -> tuple[object, ...]:
    from fedoap.segmentation.prepared import file_states

    files = [job.data.datalist, *(file for case in (*place.training, *place.validation) for file in case.files)]
    return job.site, job.plan, job.data, job.worker, job.cache, *map(file_states, files)


def _outcome(job: Job, place: "Workplace", networks: _Networks) -> Outcome | None:
    """Return what the job leaves behind, or nothing where another process leaves it."""
    if job.kind in ("init", "seed", "bank"):
        return _prepare(job, place, networks) if place.leads else None
    if place.ranks == 1:
        return _train(job, place, networks)
    import torch.distributed as dist

    dist.init_process_group("nccl" if place.device.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        outcome = _train(job, place, networks)
    finally:
        dist.destroy_process_group()
    return outcome if place.leads else None


def _prepare(job: Job, place: "Workplace", networks: _Networks) -> Outcome:
    from fedoap.segmentation.banksums import TokenSource, bank_sums, seed_sums

    model = networks.filled(job, place)
    if job.kind == "init":
        return Outcome({}, model.shared_state(), job.plan.wire.dtype)
    source = TokenSource(model.shared, place.training, place.data, place.plan, place.cache, place.device)
    if job.kind == "seed":
        return Outcome({}, seed_sums(source, place.seed("bank")))
    bank = _bank(job, place)
    if bank is None:
        raise ConfigError(f"job {job.kind}: names no bank, but refreshes one")
    return Outcome({}, bank_sums(source, bank.keys.transpose(0, 1).flatten(1)))


def _train(job: Job, place: "Workplace", networks: _Networks) -> Outcome:
    from fedoap.params import PERSONAL_PREFIX
    from fedoap.segmentation.calibration import calibrate, train_alone
    from fedoap.segmentation.training import site_optimizer, train_round

    if job.kind == "local":
        network, metrics = train_alone(place)
    else:
        model, bank = networks.filled(job, place), _bank(job, place)
        optimizer = site_optimizer(model, place)
        _take_up(job, model, optimizer)
        if job.kind == "train":
            metrics = train_round(model, optimizer, bank, job.round, place)
            step = job.round * job.plan.training.steps_per_round
            personal = Personal(model.personal_state(), optimizer.state(), job.kind, job.round, step)
            return Outcome(metrics, model.shared_state(), job.plan.wire.dtype, personal)
        network, metrics = calibrate(model, bank, place)
    weights = {PERSONAL_PREFIX + name: value.detach().cpu().numpy() for name, value in network.named_parameters()}
    return Outcome(metrics, personal=Personal(weights, {}, job.kind, job.round, int(metrics["steps"])))


def _bank(job: Job, place: "Workplace") -> "Bank | None":
    from fedoap.segmentation.modelfolder import read_files
    from fedoap.segmentation.network import Bank

    return None if job.bank is None else Bank.from_arrays(read_files(job.bank), place.device)


def _take_up(job: Job, model: "SiteModel", optimizer: "SiteOptimizer") -> None:
    """Put the site's personal state, if it has one, into model and optimizer."""
    from safetensors.torch import load_file

    from fedoap.segmentation.modelfolder import PERSONAL_FILE, load_tensors

    if job.personal is None:
        return
    weights = load_tensors(job.personal / PERSONAL_FILE)
    # a calibrated network is all the site's own; its common parameters have no place beside newer shared ones
    own = model.personal_state()
    model.load_personal({name: value for name, value in weights.items() if name in own})
    moments = job.personal / OPTIMIZER_FILE
    if moments.exists():
        optimizer.load(load_file(moments))


def _device(job: Job) -> "device":
    from fedoap.segmentation.modelfolder import choose_device

    name, local = job.worker.device, os.environ.get("LOCAL_RANK")
    chosen = choose_device(name)
    if local is None or chosen.type != "cuda":
        return chosen
    import torch

    mine = choose_device(f"cuda:{local}")
    torch.cuda.set_device(mine)
    return mine


def _write(job: Job, outcome: Outcome, result: JobResult) -> None:
    try:
        job.output.mkdir(parents=True, exist_ok=True)
        manifest = write_blob(job.output / UPDATE_BLOB, outcome.update, outcome.dtype)
        (job.output / UPDATE_MANIFEST).write_bytes(manifest.pack())
        if outcome.personal is not None:
            _write_personal(job.output / PERSONAL, outcome.personal)
        part = job.output / f"{RESULT}.part"
        part.write_text(result.model_dump_json(), encoding="utf-8")
        part.replace(job.output / RESULT)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{job.output}: result cannot be written: {error}") from None


def _write_personal(folder: Path, personal: Personal) -> None:
    from safetensors.numpy import save_file

    from fedoap.segmentation.modelfolder import PERSONAL_FILE

    folder.mkdir(exist_ok=True)
    save_file(dict(personal.weights), folder / PERSONAL_FILE)
    if personal.moments:
        save_file({name: moment.numpy() for name, moment in personal.moments.items()}, folder / OPTIMIZER_FILE)
    state = {"stage": personal.stage, "round": personal.round, "step": personal.step}
    (folder / STATE_FILE).write_text(json.dumps(state), encoding="utf-8")
