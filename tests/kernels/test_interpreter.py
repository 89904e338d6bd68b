"""Runs tests/kernels/interpreter in a process where Triton interprets kernels.

Triton reads TRITON_INTERPRET when a kernel is decorated, and what is compiled cannot be interpreted
later, so both kinds of test need processes of their own. By hand:

    TRITON_INTERPRET=1 python -Im pytest tests/kernels/interpreter
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "interpreter"
ROOT = FOLDER.parents[2]


@pytest.mark.long
@pytest.mark.timeout(3600)  # the tests inside have a limit each
def test_every_interpreted_test_passes(record_property: Callable[[str, object], None]) -> None:
    """Would fail with a test inside that fails, and with none collected."""
    others = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-Im", "pytest", FOLDER, "-p", "no:cacheprovider", "--no-header"],
        cwd=ROOT,
        env=others | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    count = done.stdout.strip().splitlines()[-1].strip("= ")
    record_property("said", f"{FOLDER.relative_to(ROOT)}, interpreted: {count}")
