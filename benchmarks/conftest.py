"""Prints, after the benchmarks' own tables, each competitor's median over ours."""

from collections import defaultdict

import pytest

OURS = "fedoap"
TAKEN: dict[str, dict[str, float]] = defaultdict(dict)
"""Median seconds by group and competitor."""


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print a line a group."""
    groups = {group: times for group, times in TAKEN.items() if OURS in times and len(times) > 1}
    if not groups:
        return
    terminalreporter.section("time over ours")
    for group, times in groups.items():
        ours = times[OURS]
        ratios = ", ".join(f"{name} {seconds / ours:.2f}" for name, seconds in times.items() if name != OURS)
        terminalreporter.write_line(f"{group}: {OURS} {ours * 1e3:.2f} ms; {ratios}")


@pytest.fixture
def taken() -> dict[str, dict[str, float]]:
    """Where a benchmark leaves its median."""
    return TAKEN
