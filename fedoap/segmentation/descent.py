"""Gradient steps: the loop that rounds, calibration and training alone have in common.

Everything random is a function of the plan's seed, the site's name and the step's number in the site's
whole course, so work that is repeated, or continued in a new process, gives the same weights: on a CPU
to the last bit. With several ranks each works on its part of every batch.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Self, TypeAlias

import torch
from torch import Tensor, nn

from fedoap.config import Plan, SiteData
from fedoap.errors import TrainingError
from fedoap.segmentation.data import PreparedCase, Shelf, prepared_cases, shelf_batches
from fedoap.segmentation.datalist import Case, load_splits
from fedoap.segmentation.optimizer import SiteOptimizer

CHECK_EVERY = 10
"""The loss is checked and reported every so many steps; each check waits for the GPU."""

Batches: TypeAlias = Iterator[tuple[Tensor, Tensor]]
Metrics: TypeAlias = dict[str, float]
Loss: TypeAlias = Callable[[Tensor, Tensor, int], Tensor]
"""Mean loss of images (B, C, *S) and masks (B, 1, *S) at a step of the site's course."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a stage is; `dice` is the mean on the validation cases, or -1 while there is none."""

    stage: str
    step: int
    steps: int
    loss: float
    dice: float = -1.0


Report: TypeAlias = Callable[[Progress], None]


@dataclass(slots=True)
class Ready:
    """Prepared cases, kept so that several jobs at one place read them only once."""

    training: Shelf | None = None
    validation: list[PreparedCase] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that the cases take in memory."""
        kept = [*(self.training.kept if self.training else ()), *(self.validation or ())]
        return sum(case.nbytes for case in kept)


@dataclass(frozen=True, slots=True)
class Workplace:
    """A site's cases and the process that works on them."""

    site: str
    plan: Plan
    data: SiteData
    training: tuple[Case, ...]
    validation: tuple[Case, ...]
    test: tuple[Case, ...]
    cache: Path | None
    device: torch.device
    report: Report
    rank: int = 0
    ranks: int = 1
    ready: Ready = field(default_factory=Ready, compare=False, repr=False)

    @classmethod
    def open(
        cls, site: str, plan: Plan, data: SiteData, *, cache: Path | None, device: torch.device, report: Report
    ) -> Self:
        """Return a site's workplace; all three lists are read, so that a mistake in any of them shows at once.

        Raises:
            DataError: the datalist is wrong, or a split is empty or lacks masks.
        """
        training, validation, test = load_splits(data)
        return cls(site, plan, data, training, validation, test, cache, device, report)

    def shared_out(self, rank: int, ranks: int) -> Self:
        """Return the workplace of one of several processes.

        Raises:
            TrainingError: there are more of them than items in a batch.
        """
        if ranks > self.plan.training.batch_size:
            size = self.plan.training.batch_size
            raise TrainingError(f"worker.gpus is {ranks}, but training.batch_size is {size}; each needs an item")
        return replace(self, rank=rank, ranks=ranks)

    @property
    def leads(self) -> bool:
        """Whether this process evaluates, reports and writes."""
        return self.rank == 0

    def seed(self, purpose: str, step: int = 0) -> int:
        """Return a seed in [0, 2**63), one for each combination of the plan's seed, site, purpose and step."""
        text = repr((self.plan.seed, self.site, purpose, step)).encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest()) >> 1

    def batches(self, first: int) -> Batches:
        """Return this process's part of the endless batches, from step `first` of the site's course on.

        Raises:
            DataError: a case is wrong.
        """
        if self.ready.training is None:
            self.ready.training = Shelf(self.training, self.data, self.plan, self.cache)
        seed = self.seed("batches")
        return shelf_batches(self.ready.training, seed=seed, start_step=first, rank=self.rank, ranks=self.ranks)

    def validation_cases(self) -> list[PreparedCase]:
        """Return the validation cases, prepared.

        Raises:
            DataError: a case is wrong, or every mask is empty.
        """
        if self.ready.validation is None:
            self.ready.validation = prepared_cases(self.validation, self.data, self.plan, self.cache)
        return self.ready.validation

    def parallel(self, network: nn.Module) -> nn.Module:
        """Return the network, its gradients averaged over all processes where there are several."""
        if self.ranks == 1:
            return network
        # which parameters take part differs from step to step: a path leaves the other path's alone
        return nn.parallel.DistributedDataParallel(network, find_unused_parameters=True)


@dataclass(frozen=True, slots=True)
class Stretch:
    """Consecutive steps: `count` of them, from number `first` of the site's course."""

    stage: str
    first: int
    count: int
    rate: Callable[[int], float]
    """Learning rate of a step by its number in the site's course."""
    done: int
    """For reports: the stage's steps before these and, below, all of its steps."""
    steps: int


@dataclass(frozen=True, slots=True)
class Descent:
    """What is minimised, and over which parameters."""

    loss: Loss
    optimizer: SiteOptimizer
    amend: Callable[[int], None] = lambda _: None
    """Changes the gradients of a step of the site's course before they are clipped."""
    parts: int = 1
    """Batches per step, which follows the mean of their gradients."""
    settle: Callable[[], None] = lambda: None
    """Called after each step has moved the parameters."""


def descend(place: Workplace, batches: Batches, stretch: Stretch, descent: Descent) -> float:
    """Take the steps and return the mean of their losses, on this process's part of the batches.

    Raises:
        TrainingError: the loss is no longer finite.
    """
    total = torch.zeros((), dtype=torch.float64, device=place.device)
    for index in range(stretch.count):
        step = stretch.first + index
        descent.optimizer.zero()
        for image, mask in islice(batches, descent.parts):
            loss = descent.loss(image.to(place.device), mask.to(place.device), step)
            # DistributedDataParallel averages over processes, whose parts of a batch may differ in size
            share = len(image) * place.ranks / place.plan.training.batch_size if place.ranks > 1 else 1.0
            torch.autograd.backward([loss * (share / descent.parts)])
            total += loss.detach() / descent.parts
        descent.amend(step)
        descent.optimizer.step(stretch.rate(step))
        descent.settle()
        if (index + 1) % CHECK_EVERY == 0 or index + 1 == stretch.count:
            _check(place, stretch, index + 1, total.item() / (index + 1))
    return total.item() / max(1, stretch.count)


def _check(place: Workplace, stretch: Stretch, count: int, loss: float) -> None:
    if not math.isfinite(loss):
        step = stretch.done + count
        raise TrainingError(
            f"site {place.site}: loss is {loss} by step {step} of {stretch.stage}; lower the learning rate"
        )
    if place.leads:
        place.report(Progress(stretch.stage, stretch.done + count, stretch.steps, loss))
