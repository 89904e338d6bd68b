"""One shape's competitors: each checked against plain float32, then all timed by turns."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from benchmarks.gpu_bench.machine import Ceilings
from benchmarks.gpu_bench.timing import Quantiles, Run, Stopwatch, limit

PARTS = ("forward", "backward", "both")
OURS = "fedoap"


class Shape(Protocol):
    """How much work a shape is at least."""

    def flops(self, part: str) -> float:
        """Floating-point operations of a part."""
        ...

    def bytes(self, part: str, itemsize: int) -> float:
        """Bytes to and from memory."""
        ...


class Case(Protocol):
    """One call's tensors."""

    @property
    def shape(self) -> Shape:
        """Its sizes."""
        ...

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """What gradients are taken of."""
        ...


C = TypeVar("C", bound=Case)


class WrongError(ValueError):
    """A competitor computes something else."""


@dataclass(frozen=True, slots=True)
class Contest(Generic[C]):
    """Who competes in what."""

    name: str
    case: C
    competitors: Mapping[str, Callable[[C], Tensor]]
    checked: C
    """What results are compared on; the case itself, or the same with fixed noise."""
    exact: Tensor
    """The result for `checked`, in float32."""
    exact_gradients: tuple[Tensor, ...]
    upstream: Tensor
    """The gradient of the result that backward passes start from."""
    tolerance: float
    unchecked: frozenset[str] = frozenset()

    def bytes(self, part: str) -> float:
        """Return the least that a part moves through memory."""
        return self.case.shape.bytes(part, self.case.inputs[0].dtype.itemsize)


@dataclass(frozen=True, slots=True)
class Row:
    """One competitor in one part of one contest, or why there is nothing to tell."""

    contest: str
    part: str
    competitor: str
    reason: str = ""
    eager: Quantiles | None = None
    graph: Quantiles | None = None
    host_us: float | None = None
    peak_mb: float | None = None
    floor_us: float = math.nan
    errors: tuple[float, ...] = ()
    """Relative error of the result and of each gradient."""

    @property
    def best_us(self) -> float:
        """The shorter median of eager and graph."""
        return min((q.p50 for q in (self.eager, self.graph) if q is not None), default=math.nan)


@dataclass(frozen=True, slots=True)
class Limits:
    """How long things may take, in seconds."""

    deadline: float
    """On the monotonic clock; what has not begun by then is left out."""
    prepare: float = 60.0
    """A competitor's first run, compiling included."""
    timing: float = 0.5
    """All competitors of one part together."""


@dataclass(slots=True)
class _Entry(Generic[C]):
    name: str
    compute: Callable[[C], Tensor]
    errors: tuple[float, ...] = ()
    reason: str = ""
    runs: dict[str, Run] = field(default_factory=dict)
    graphs: dict[str, Run] = field(default_factory=dict)


def gradients(out: Tensor, inputs: tuple[Tensor, ...], upstream: Tensor, *, keep: bool = False) -> tuple[Tensor, ...]:
    """Return the gradients of the inputs."""
    return torch.autograd.grad([out], inputs, [upstream], retain_graph=keep)


def held(contest: Contest[C], watch: Stopwatch, ceilings: Ceilings, limits: Limits) -> Iterator[Row]:
    """Yield the rows of a contest, part by part; nothing that a competitor does ends it."""
    entries = [_Entry(name, compute) for name, compute in contest.competitors.items()]
    for entry in entries:
        _attempt(entry, lambda entry=entry: _check(entry, contest), limits)  # type: ignore[misc]
        print(f"  {contest.name}: {entry.name}: {entry.reason or 'errors ' + _short(entry.errors)}", flush=True)
    for part in PARTS:
        for entry in entries:
            _attempt(entry, lambda entry=entry, part=part: _prepare(entry, part, contest, watch), limits)  # type: ignore[misc]
        alive = [entry for entry in entries if not entry.reason]
        if not alive or time.monotonic() > limits.deadline:
            yield from (Row(contest.name, part, e.name, e.reason or "left out: no time left") for e in entries)
            continue
        eager = watch.interleaved({e.name: e.runs[part] for e in alive}, limits.timing)
        graphs = {e.name: e.graphs[part] for e in alive if part in e.graphs}
        replayed = watch.interleaved(graphs, limits.timing) if graphs else {}
        for entry in entries:
            row = Row(contest.name, part, entry.name, entry.reason, errors=entry.errors)
            if entry in alive:
                row = _timed(row, contest, entry, watch, ceilings)
                row = replace(row, eager=eager[entry.name], graph=replayed.get(entry.name))
            yield row
            entry.runs.clear()
            entry.graphs.clear()  # a graph keeps its memory


def _attempt(entry: _Entry[C], action: Callable[[], None], limits: Limits) -> None:
    if entry.reason:
        return
    if time.monotonic() > limits.deadline:
        entry.reason = "left out: no time left"
        return
    try:
        with limit(limits.prepare):
            action()
    except Exception as error:  # noqa: BLE001 - a competitor that cannot run is a result
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        text = lines[0] if lines else ""
        entry.reason = (
            f"wrong: {text}" if isinstance(error, WrongError) else f"cannot: {type(error).__name__}: {text}"
        )[:160]


def errors_of(contest: Contest[C], name: str, compute: Callable[[C], Tensor]) -> tuple[float, ...]:
    """Return the relative errors of the result and of each gradient; none where another result is right too.

    Raises:
        WrongError: one is beyond the contest's tolerance, or NaN.
    """
    if name in contest.unchecked:
        compute(contest.case)
        return ()
    out = compute(contest.checked)
    found = (out, *gradients(out, contest.checked.inputs, contest.upstream))
    exact = (contest.exact, *contest.exact_gradients)
    errors = tuple(_relative(x, y) for x, y in zip(found, exact, strict=True))
    if not all(error <= contest.tolerance for error in errors):
        raise WrongError(f"errors {_short(errors)}")
    return errors


def _check(entry: _Entry[C], contest: Contest[C]) -> None:
    entry.errors = errors_of(contest, entry.name, entry.compute)


def _prepare(entry: _Entry[C], part: str, contest: Contest[C], watch: Stopwatch) -> None:
    run = run_of(entry.compute, part, contest)
    run()
    entry.runs[part] = run
    try:
        replay = watch.captured(run)
    except Exception as error:  # noqa: BLE001 - what copies to the host cannot be captured, and can be timed
        print(f"  {contest.name}: {entry.name}, {part}: no graph: {type(error).__name__}", flush=True)
        if watch.device.type == "cuda":
            torch.cuda.synchronize(watch.device)
        return
    if replay is not None:
        entry.graphs[part] = replay


def run_of(compute: Callable[[C], Tensor], part: str, contest: Contest[C]) -> Run:
    """Return what runs one part of a contest once."""
    case, upstream = contest.case, contest.upstream

    def forward() -> None:
        with torch.no_grad():
            compute(case)

    def both() -> None:
        gradients(compute(case), case.inputs, upstream)

    match part:
        case "forward":
            return forward
        case "both":
            return both
        case _:
            out = compute(case)
            return lambda: gradients(out, case.inputs, upstream, keep=True)


def _timed(row: Row, contest: Contest[C], entry: _Entry[C], watch: Stopwatch, ceilings: Ceilings) -> Row:
    shape, run = contest.case.shape, entry.runs[row.part]
    peak = watch.peak_bytes(run)
    return replace(
        row,
        host_us=watch.host_us(run) if entry.name == OURS else None,
        peak_mb=None if peak is None else peak / 1e6,
        floor_us=ceilings.floor_us(shape.flops(row.part), shape.bytes(row.part, contest.case.inputs[0].dtype.itemsize)),
    )


def _relative(found: Tensor, exact: Tensor) -> float:
    exact = exact.double()
    return float((found.detach().double() - exact).norm() / exact.norm())


def _short(errors: tuple[float, ...]) -> str:
    return " ".join(f"{error:.0e}" for error in errors)
