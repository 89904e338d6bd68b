"""Times the candidates of the tile tables: which are best on this GPU for each kernel and call.

All are compiled first, in processes that share the cores and see no GPU (benchmarks.aot); this also tells what
spills. Then they are timed by turns, as CUDA graphs with a cold L2 cache, their results compared with the default's.

    python -m benchmarks.gpu_bench.sweep --target sm_90 --part 0 --of 8 [--only dca|pbl]

compiles every eighth candidate for a parent process.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu_bench.candidates import Candidate, candidates
from benchmarks.gpu_bench.timing import Quantiles, Run, Stopwatch

ROOT = Path(__file__).parents[2]
WORST_STACK = 128
"""Bytes a thread may spill and still be worth a timing."""
TOLERANCE = 0.02


@dataclass(frozen=True, slots=True)
class Swept:
    """One candidate's time, or why it has none."""

    case: str
    kernel: str
    tile: str
    is_default: bool
    stack: int | None
    reason: str = ""
    time: Quantiles | None = None


def swept(watch: Stopwatch, *, only: str | None, deadline: float) -> Iterator[Swept]:
    """Yield the candidates' times, those of one kernel and call together."""
    stacks = _compiled(watch.device, only)
    print(f"  {len(stacks)} candidates compiled", flush=True)
    for group in candidates(watch.device, only):
        runs: dict[str, Run] = {}
        rows = {c.tile: _prepared(c, group[0], stacks.get(_key(c)), watch, runs) for c in group}
        if time.monotonic() > deadline:
            print("  no time left", flush=True)
            return
        times = watch.interleaved(runs, 0.03 * len(runs)) if runs else {}
        best = sorted(times, key=lambda tile: times[tile].p50)[:3]
        print(
            f"  {group[0].case}, {group[0].kernel}: {', '.join(f'{t} {times[t].p50:.1f} us' for t in best)}", flush=True
        )
        for tile, row in rows.items():
            yield replace(row, time=times.get(tile))


def _prepared(
    candidate: Candidate, default: Candidate, stack: int | str | None, watch: Stopwatch, runs: dict[str, Run]
) -> Swept:
    reason = stack if isinstance(stack, str) else ""
    spilled = stack if isinstance(stack, int) else None
    if spilled is not None and spilled > WORST_STACK:
        reason = f"spills {spilled} bytes"
    if not reason:
        try:
            worst = _difference(candidate.run(), default.run())
            reason = "" if worst <= TOLERANCE else f"wrong: differs by {worst:.0e}"
            if not reason:
                runs[candidate.tile] = watch.captured(candidate.run) or candidate.run
        except Exception as error:  # noqa: BLE001 - a tile that does not run is a result
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:120]
    return Swept(candidate.case, candidate.kernel, candidate.tile, candidate.is_default, spilled, reason)


def _difference(found: object, exact: object) -> float:
    """Return the greatest relative difference between two results' tensors."""
    pairs = zip(_tensors(found), _tensors(exact), strict=True)
    return max((float((x.float() - y.float()).norm() / y.float().norm().clamp_min(1e-30)) for x, y in pairs), default=0)


def _tensors(result: object) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result] if result.is_floating_point() and result.numel() else []
    if is_dataclass(result):
        # workspaces are laid out by tiles: only what callers get is compared
        names = [field.name for field in fields(result) if field.name not in ("sums", "marks", "weights", "pivots")]
        return [tensor for name in names for tensor in _tensors(getattr(result, name))]
    return []


def _compiled(device: torch.device, only: str | None) -> dict[str, int | str]:
    """Return each candidate's stack bytes, or why it does not compile; the cache then holds what does."""
    if device.type != "cuda" or torch.version.hip is not None:
        return {}
    target = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    count = max(1, min(14, (os.cpu_count() or 2) - 1))
    with ThreadPoolExecutor(count) as pool:
        parts = pool.map(lambda part: _compiled_part(target, part, count, only), range(count))
    return {key: stack for part in parts for key, stack in part.items()}


def _compiled_part(target: str, part: int, count: int, only: str | None) -> dict[str, int | str]:
    command = [sys.executable, "-m", "benchmarks.gpu_bench.sweep", "--target", target]
    command += ["--part", str(part), "--of", str(count), *(("--only", only) if only else ())]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        print(f"  part {part} of {count} ended with {done.returncode}: its candidates are compiled as they are timed")
        return {}
    stacks: dict[str, int | str] = json.loads(done.stdout)
    return stacks


def _work(target: str, part: int, count: int, only: str | None) -> dict[str, int | str]:
    from benchmarks.aot.compiling import TARGETS, compiling_for
    from benchmarks.aot.inspection import resources

    found: dict[str, int | str] = {}
    with compiling_for(TARGETS[target]) as launches:
        every = (candidate for group in candidates(torch.device("cpu"), only) for candidate in group)
        for candidate in (c for i, c in enumerate(every) if i % count == part):
            launches.clear()
            try:
                candidate.run()
                found[_key(candidate)] = max((resources(launch.compiled).stack for launch in launches), default=0)
            except Exception as error:  # noqa: BLE001 - a tile that does not compile is a result
                found[_key(candidate)] = f"does not compile: {type(error).__name__}"
    return found


def _key(candidate: Candidate) -> str:
    return f"{candidate.case}, {candidate.kernel}, {candidate.tile}"


def table(rows: Sequence[Swept]) -> str:
    """Return the default and the three best of each kernel and call as a markdown table."""
    lines = ["| call | kernel | tile | us (p20 p80) | |", "|---|---|---|---|---|"]
    groups: dict[tuple[str, str], list[Swept]] = {}
    for row in rows:
        groups.setdefault((row.case, row.kernel), []).append(row)
    for (case, kernel), group in groups.items():
        timed = sorted((row for row in group if row.time is not None), key=lambda row: row.time.p50)  # type: ignore[union-attr]
        for row in [*timed[:3], *(row for row in group if row.is_default and row not in timed[:3])]:
            q = row.time
            text = row.reason if q is None else f"{q.p50:.1f} ({q.p20:.1f} {q.p80:.1f})"
            lines.append(f"| {case} | {kernel} | {row.tile} | {text} | {'default' if row.is_default else ''} |")
    return "\n".join(lines)


def main() -> int:
    """Compile a part of the candidates and print what they take."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--target", required=True)
    parser.add_argument("--part", type=int, required=True)
    parser.add_argument("--of", type=int, required=True)
    parser.add_argument("--only", choices=("dca", "pbl"))
    options = parser.parse_args()
    json.dump(_work(options.target, options.part, options.of, options.only), sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
