"""What every test runs under, and what some have to say at the end of a run."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# tiny tensors gain nothing from threads, and threads that wait for each other by spinning starve on a busy machine
os.environ.setdefault("OMP_NUM_THREADS", "1")

SAID = "said"
"""A test says a figure at the end by `record_property("said", ...)`, whichever process it ran in."""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes minutes where processes share the tests: whoever is done first takes from the others."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: item.get_closest_marker("long") is None)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what tests had to say."""
    reports = terminalreporter.getreports("passed")
    said = [value for report in reports for name, value in report.user_properties if name == SAID]
    if said:
        terminalreporter.section("said")
    for line in said:
        terminalreporter.write_line(str(line))


@pytest.fixture
def fast_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: thousands of folders with real fsyncs take minutes."""
    memory = Path("/dev/shm")  # noqa: S108
    folder = Path(tempfile.mkdtemp(dir=memory if memory.is_dir() else tmp_path))
    yield folder
    shutil.rmtree(folder)
