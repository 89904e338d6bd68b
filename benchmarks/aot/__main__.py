"""Compiles all kernels as they are launched, for hardware that is not at hand, and checks the code.

    python -m benchmarks.aot [--targets sm_80,sm_86,sm_90,gfx942] [--triton FOLDER] [--json FILE] [--markdown FILE]

Each kernel must compile, keep everything in registers, fit into shared memory, multiply with matrix
instructions, compute addresses in 64 bits and load 16 bytes at a time. Needs no GPU. `--triton` names a folder
with another version of Triton. Exit code 1 if anything is amiss.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).parents[2]
TARGETS = "sm_90,gfx942,sm_80,sm_86"


def main(arguments: list[str] | None = None) -> int:
    """Compile for the targets asked for, two at a time; return 1 if anything is amiss."""
    options = _options(arguments)
    if options.worker:
        return _work(options.worker)
    start = time.monotonic()
    names = options.targets.split(",")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = [record for records in pool.map(lambda n: _compiled(n, options.triton), names) for record in records]
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    text = summary(found)
    if options.markdown:
        options.markdown.write_text(text + "\n", encoding="utf-8")
    print(text)
    amiss = [record for record in found if record["faults"]]
    for record in amiss:
        print(f"{record['target']}: {record['case']}: {record['kernel']} {record['config']}: {record['faults']}")
    versions = ", ".join(sorted({str(record["triton"]) for record in found}))
    print(f"triton {versions}: {len(found)} launches, {len(amiss)} amiss, {time.monotonic() - start:.0f} s")
    return 1 if amiss or not found else 0


def _compiled(target: str, triton: Path | None) -> list[dict[str, object]]:
    """Return the records of one target from a process of its own: Triton compiles on one core."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(path) for path in (triton, ROOT) if path is not None]
    environment |= {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.aot", "--worker", target],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    records: list[dict[str, object]] = json.loads(done.stdout)
    return records


def _work(target: str) -> int:
    from benchmarks.aot.gate import records, target_named

    json.dump([asdict(record) for record in records(target_named(target))], sys.stdout)
    return 0


def summary(records: Sequence[dict[str, object]]) -> str:
    """Return a markdown table: a line for each kernel and target, the extremes over its cases and versions."""
    groups: dict[tuple[str, str], list[dict[str, object]]] = defaultdict(list)
    for record in records:
        groups[str(record["kernel"]), str(record["target"])].append(record)
    head = ("kernel", "target", "triton", "launches", "registers", "stack", "shared KB", "matrix", "16-byte loads")
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for (kernel, target), group in sorted(groups.items()):
        triton = ", ".join(sorted({str(r["triton"]) for r in group}))
        shared = _range([round(int(str(r["shared"])) / 1024) for r in group])
        matrix = _range([sum(int(str(r[name])) for name in ("wgmma", "mma", "mfma")) for r in group])
        cells = (_range([int(str(r[name])) for r in group]) for name in ("registers", "stack", "wide_loads"))
        registers, stack, loads = cells
        line = (
            kernel or "(does not compile)",
            target,
            triton,
            str(len(group)),
            registers,
            stack,
            shared,
            matrix,
            loads,
        )
        lines.append(f"| {' | '.join(line)} |")
    return "\n".join(lines)


def _range(values: list[int]) -> str:
    return str(values[0]) if min(values) == max(values) else f"{min(values)}..{max(values)}"


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aot", description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--targets", default=TARGETS)
    parser.add_argument("--triton", type=Path, help="a folder with another version of Triton")
    parser.add_argument("--json", type=Path, help="write every record there")
    parser.add_argument("--markdown", type=Path, help="write the table there")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
