"""Kernels run in two ways that exclude each other in one process; see test_interpreter.py."""

import os
from pathlib import Path

INTERPRETED = Path(__file__).parent / "interpreter"


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave interpreted tests to the process that test_interpreter.py starts."""
    return True if collection_path == INTERPRETED and os.environ.get("TRITON_INTERPRET") != "1" else None
