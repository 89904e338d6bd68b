"""Tests and times both kernels on a GPU: one command, a table last.

    PYTHONPATH=. python benchmarks/gpu.py [--only dca|pbl] [--quick] [--sweep] [--out FILE]

Runs the tests that need a GPU, measures what the machine can do at most, checks each competitor against plain float32
and times all of them by turns: forward, backward and both, eager and as a CUDA graph, every run with a cold L2 cache.
Takes no more than torch, triton, numpy and pytest. A competitor that cannot run is a row with the reason, a part
that fails does not end the rest, and the JSON is rewritten after each contest.
"""

import argparse
import datetime as dt
import gc
import itertools
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from benchmarks.gpu_bench import contest
from benchmarks.gpu_bench.contests import contests
from benchmarks.gpu_bench.machine import ceilings, description
from benchmarks.gpu_bench.report import Report, table, verdict
from benchmarks.gpu_bench.suite import run_suite
from benchmarks.gpu_bench.timing import Stopwatch, stopwatch

RESULTS = Path(__file__).parent / "results"


def main(arguments: list[str] | None = None) -> int:
    """Run what is asked for; return 1 if a test or a part failed."""
    options = _options(arguments)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    warnings.simplefilter("ignore")  # compilers and refused backends warn at length
    torch._dynamo.config.recompile_limit = 100  # one function, many shapes
    start = time.monotonic()
    device = torch.device(options.device)
    report = Report(options.out or _default_path(device), description(device))
    _say(start, ", ".join(f"{key} {value}" for key, value in report.machine.items()))
    if not options.no_tests:
        _part(report, "tests", lambda: _tests(report, options.minutes * 30))
        _say(start, f"tests: {report.suite}")
    with _side_stream(device):
        _measure(report, options, device, start)
    if report.rows:
        print(table(report.rows), verdict(report.rows), sep="\n\n")
    print(f"tests: {report.suite}; failed parts: {report.failures or 'none'}; {time.monotonic() - start:.0f} s in all")
    return 1 if report.failures or report.suite.get("failed") or report.suite.get("error") else 0


def _measure(report: Report, options: argparse.Namespace, device: torch.device, start: float) -> None:
    watch = stopwatch(device)
    report.ceilings = best = ceilings(watch, quick=options.quick)
    _say(start, f"ceilings: {best.copy_tb_s:.2f} TB/s copy, {best.tflop_s:.0f} TFLOP/s")
    if options.sweep:
        _part(report, "sweep", lambda: _sweep(report, watch, options.only, start + options.minutes * 60))
        return
    prepare, timing = (20, 0.1) if options.quick else (60, 0.5)
    limits = contest.Limits(start + options.minutes * 60, prepare, timing)
    candidates = contests(device, only=options.only, quick=options.quick)
    for number in itertools.count():
        try:
            held = next(candidates, None)
        except Exception:  # noqa: BLE001 - reported; the generator is over, what was measured is not lost
            _failed(report, "a contest's preparation")
            return
        if held is None:
            return
        if number < options.skip:
            continue
        _say(start, held.name)
        _part(report, held.name, lambda held=held: report.rows.extend(contest.held(held, watch, best, limits)))  # type: ignore[misc]
        del held
        gc.collect()


def _sweep(report: Report, watch: Stopwatch, only: str | None, deadline: float) -> None:
    from benchmarks.gpu_bench import sweep  # where there is no Triton, the rest still runs

    for row in sweep.swept(watch, only=only, deadline=deadline):
        report.sweep.append(row)
    print(sweep.table(report.sweep))


def _side_stream(device: torch.device) -> AbstractContextManager[object]:
    """Return a stream to work on: graphs are not captured on the default one."""
    if device.type != "cuda":
        return nullcontext()
    stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return torch.cuda.stream(stream)


def _part(report: Report, name: str, action: Callable[[], None]) -> None:
    try:
        action()
    except Exception:  # noqa: BLE001 - reported, and the rest goes on
        _failed(report, name)
    report.save()


def _failed(report: Report, name: str) -> None:
    traceback.print_exc()
    report.failures.append(name)
    if torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:  # an address out of bounds takes the whole process with it
            report.save()
            sys.exit(f"the GPU is lost to this process after {name}: {str(error).splitlines()[0]}; see --skip")


def _tests(report: Report, seconds: float) -> None:
    report.suite = run_suite(seconds)


def _say(start: float, text: str) -> None:
    print(f"[{time.monotonic() - start:5.0f} s] {text}", flush=True)


def _default_path(device: torch.device) -> Path:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    date = dt.datetime.now(dt.UTC).strftime("%Y-%m-%d")
    return RESULTS / f"gpu-{'-'.join(name.lower().split())}-{date}.json"


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", maxsplit=1)[0])
    parser.add_argument("--only", choices=("dca", "pbl"), help="one kernel")
    parser.add_argument("--quick", action="store_true", help="fewer shapes, less time to compile")
    parser.add_argument("--sweep", action="store_true", help="time the candidates of the tile tables instead")
    parser.add_argument("--no-tests", action="store_true", help="leave out the tests")
    parser.add_argument("--skip", type=int, default=0, help="leave out the first contests")
    parser.add_argument("--minutes", type=float, default=8, help="begin nothing after so long")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="the JSON file; by default one in benchmarks/results")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
