"""Fills the tables of docs/kernels.md with what was compiled and measured.

    python -m benchmarks.aot --json gate.json
    python benchmarks/gpu.py --out benchmarks/results/NAME.json
    python -m benchmarks.pages [--gate gate.json] [--measured benchmarks/results/NAME.json]

A table stands between `<!-- NAME -->` and `<!-- /NAME -->`; nothing else of the page changes.
"""

import argparse
import json
import re
from pathlib import Path
from typing import TypedDict

from benchmarks.aot.__main__ import summary
from benchmarks.gpu_bench.contest import Row
from benchmarks.gpu_bench.report import verdict
from benchmarks.gpu_bench.timing import Quantiles

PAGE = Path(__file__).parents[1] / "docs/kernels.md"


class _Times(TypedDict):
    p20: float
    p50: float
    p80: float


class _Row(TypedDict):
    """What a table takes of a row of benchmarks/gpu.py."""

    contest: str
    part: str
    competitor: str
    reason: str
    eager: _Times | None
    graph: _Times | None
    floor_us: float | None


class _Ceilings(TypedDict):
    copy_tb_s: float
    tflop_s: float


class Measured(TypedDict):
    """What a page takes of a file that benchmarks/gpu.py wrote."""

    machine: dict[str, str]
    ceilings: _Ceilings
    rows: list[_Row]


def replaced(page: str, name: str, text: str) -> str:
    """Return the page with this text between the two marks of a name.

    Raises:
        ValueError: the page has no such marks.
    """
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if start not in page or end not in page:
        raise ValueError(f"page: {start} or {end} is missing")
    head, rest = page.split(start, 1)
    return f"{head}{start}\n{text}\n{end}{rest.split(end, 1)[1]}"


def measured_text(measured: Measured) -> str:
    """Return what machine it was, what it can do at most, and a line for each contest and part."""
    machine, best = measured["machine"], measured["ceilings"]
    facts = ", ".join(machine.get(key, "") for key in ("device", "torch", "triton") if machine.get(key))
    ceilings = f"Ceilings: {best['copy_tb_s']:.2f} TB/s copying, {best['tflop_s']:.0f} TFLOP/s at 8192 x 8192 bfloat16."
    return f"{facts}. {ceilings}\n\n{verdict([_row(row) for row in measured['rows']])}"


def _row(row: _Row) -> Row:
    eager, graph = (
        None if q is None else Quantiles(q["p20"], q["p50"], q["p80"]) for q in (row["eager"], row["graph"])
    )
    floor = float("nan") if row["floor_us"] is None else row["floor_us"]
    return Row(row["contest"], row["part"], row["competitor"], row["reason"], eager=eager, graph=graph, floor_us=floor)


def main() -> None:
    """Rewrite the page."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", maxsplit=1)[0])
    parser.add_argument("--gate", type=Path, nargs="+", help="files of benchmarks.aot")
    parser.add_argument("--measured", type=Path, help="a file of benchmarks/gpu.py")
    options = parser.parse_args()
    page = PAGE.read_text(encoding="utf-8")
    if options.gate:
        records = [record for file in options.gate for record in json.loads(file.read_text(encoding="utf-8"))]
        page = replaced(page, "gate", summary(records))
    if options.measured:
        page = replaced(page, "measured", measured_text(json.loads(options.measured.read_text(encoding="utf-8"))))
    PAGE.write_text(re.sub(r"[ \t]+\n", "\n", page), encoding="utf-8")


if __name__ == "__main__":
    main()
