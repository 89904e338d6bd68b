"""Times runs that compete with each other: interleaved, with a cold cache, eager and as CUDA graphs."""

import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Protocol, TypeAlias

import torch
from torch.profiler import ProfilerActivity, profile

Run: TypeAlias = Callable[[], object]

WARM_RUNS = 3
FLUSH_BYTES = 256 * 2**20
"""More than any L2 cache holds."""


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Microseconds of one run."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, microseconds: list[float]) -> "Quantiles":
        """Return the quantiles of two runs or more."""
        cuts = statistics.quantiles(microseconds, n=10, method="inclusive")
        return cls(cuts[1], statistics.median(microseconds), cuts[7])


class Stopwatch(Protocol):
    """How runs are timed on one kind of device."""

    device: torch.device

    def interleaved(self, runs: Mapping[str, Run], seconds: float) -> dict[str, Quantiles]:
        """Return the quantiles of each, timed by turns for about so long."""

    def captured(self, run: Run) -> Run | None:
        """Return what replays the run as one graph; None where there are no graphs."""

    def peak_bytes(self, run: Run) -> int | None:
        """Return what the run allocates at most beyond what it found."""

    def host_us(self, run: Run) -> float | None:
        """Return the microseconds that a call keeps the host, the device's work left out."""


class GpuStopwatch:
    """CUDA events; every run finds a cache that holds nothing of its own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device=device)

    def interleaved(self, runs: Mapping[str, Run], seconds: float) -> dict[str, Quantiles]:
        """Return the quantiles of each run."""
        for run in runs.values():
            for _ in range(WARM_RUNS):
                run()
        share = seconds * 1e6 / len(runs)
        counts = {name: max(5, min(100, int(share / _elapsed_us(*self._events(run))))) for name, run in runs.items()}
        events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in runs}
        names, turns = list(runs), max(counts.values())
        for turn in range(turns):
            # who comes first moves on, so that nobody always follows the same run; slow ones sit turns out
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                if (turn + 1) * counts[name] // turns > turn * counts[name] // turns:
                    events[name].append(self._events(runs[name]))
        torch.cuda.synchronize(self.device)
        return {name: Quantiles.of([_elapsed_us(*pair) for pair in pairs]) for name, pairs in events.items()}

    def _events(self, run: Run) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        self._flush.zero_()
        start.record()
        run()
        end.record()
        return start, end

    def captured(self, run: Run) -> Run | None:
        """Return the run's replay; runs must have been made on the current stream, which is not the default one."""
        for _ in range(WARM_RUNS):
            run()
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream(self.device)):
            run()
        replay: Run = graph.replay
        return replay

    def peak_bytes(self, run: Run) -> int | None:
        """Return what PyTorch's allocator counts."""
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        run()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before

    def host_us(self, run: Run) -> float | None:
        """Return the mean of a hundred calls that wait for nothing."""
        torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        for _ in range(100):
            run()
        return (time.perf_counter() - start) * 1e4


class CpuStopwatch:
    """Wall time."""

    device = torch.device("cpu")

    def interleaved(self, runs: Mapping[str, Run], seconds: float) -> dict[str, Quantiles]:
        """Return the quantiles of each run."""
        taken: dict[str, list[float]] = {name: [] for name in runs}
        deadline = time.perf_counter() + seconds
        while time.perf_counter() < deadline or len(next(iter(taken.values()))) < 3:
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                taken[name].append((time.perf_counter() - start) * 1e6)
        return {name: Quantiles.of(values) for name, values in taken.items()}

    def captured(self, run: Run) -> Run | None:  # noqa: ARG002 - the protocol's
        """Return None: there are no graphs here."""
        return None

    def peak_bytes(self, run: Run) -> int | None:
        """Return what the profiler counts."""
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            run()
        assert profiled.profiler is not None
        events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
        held = peak = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            held += event.nbytes()
            peak = max(peak, held)
        return peak

    def host_us(self, run: Run) -> float | None:  # noqa: ARG002 - the protocol's
        """Return None: nothing runs beside the host."""
        return None


def stopwatch(device: torch.device) -> Stopwatch:
    """Return the stopwatch of a device."""
    return GpuStopwatch(device) if device.type == "cuda" else CpuStopwatch()


@contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError inside once so many seconds have passed: a compiler may take longer than it is worth."""

    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise TimeoutError(f"took longer than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _elapsed_us(start: torch.cuda.Event, end: torch.cuda.Event) -> float:
    end.synchronize()
    return float(start.elapsed_time(end)) * 1000
