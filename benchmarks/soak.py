"""The fault tests at length: the same tests that `make test` runs a sample of, with large numbers.

    python benchmarks/soak.py                                  all of it: hours
    python benchmarks/soak.py --only kills --kills 100         one of them, shorter

Prints one line of counts for each, as the test itself counted, and ends with 1 if one of them failed; what
pytest said is then printed too, and names the seed that shows the failure again.
"""

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True, slots=True)
class Part:
    """One fault test: where it is, the variable that says how much of it, and how much that is."""

    name: str
    file: str
    variable: str = ""
    full: int = 0
    unit: str = ""
    chosen: str = ""
    """Of the file's tests, those whose name holds this."""


PARTS = (
    Part("power cuts", "tests/coordinator/test_power_loss.py"),
    Part("node's power cuts", "tests/node/test_power_loss.py"),
    Part("line", "tests/end_to_end/test_line.py", "FEDOAP_LINE_MB", 200, "MB over 200 Mbit/s, 50 ms", "long_line"),
    Part("cuts", "tests/end_to_end/test_line.py", chosen="cuts"),
    Part("connections", "tests/end_to_end/test_fuzzing.py", "FEDOAP_FUZZ_CONNECTIONS", 100_000, "", "strangers"),
    Part("messages", "tests/end_to_end/test_fuzzing.py", "FEDOAP_FUZZ_MESSAGES", 10_000_000, "malformed", "known"),
    Part("kills", "tests/end_to_end/test_killing.py", "FEDOAP_KILLS", 1000),
    Part("schedules", "tests/protocol/test_simulation.py", "FEDOAP_SIMULATION_SEEDS", 1_000_000, "of faults"),
)


def main() -> None:
    """Run what was asked for, and end with 1 if something failed."""
    options = _options()
    parts = [part for part in PARTS if options.only in (None, part.name)]
    passed = [_run(part, getattr(options, part.name.replace(" ", "_"), 0)) for part in parts]
    sys.exit(0 if all(passed) else 1)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The fault tests at length.")
    parser.add_argument("--only", choices=[part.name for part in PARTS], help="run one of them")
    for part in PARTS:
        if part.variable:
            said = f"{part.name} {part.unit}".strip()
            parser.add_argument(f"--{part.name}", type=int, default=part.full, help=f"{said} (default {part.full})")
    return parser.parse_args()


def _run(part: Part, count: int) -> bool:
    """Print a test's line of counts, and return whether it passed."""
    command = [sys.executable, "-Im", "pytest", "-q", "-x", "-s", "--timeout=0", part.file]
    environment = {**os.environ, part.variable: str(count)} if part.variable else dict(os.environ)
    began = time.monotonic()
    done = subprocess.run(
        [*command, "-k", part.chosen] if part.chosen else command,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith(f"{part.name}:")]
    if done.returncode or not lines:
        print(f"{part.name}: FAILED\n{done.stdout}{done.stderr}", flush=True)
        return False
    print(f"{lines[-1]} ({time.monotonic() - began:.0f} s in all)", flush=True)
    return True


if __name__ == "__main__":
    main()
