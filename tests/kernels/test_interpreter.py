"""Runs tests/kernels/interpreter in a process where Triton interprets kernels.

Triton reads TRITON_INTERPRET when a kernel is decorated, and what is compiled cannot be interpreted
later, so both kinds of test need processes of their own. By hand:

    TRITON_INTERPRET=1 python -Im pytest tests/kernels/interpreter
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "interpreter"
ROOT = FOLDER.parents[2]


@pytest.mark.timeout(3600)  # the tests inside have a limit each
def test_every_interpreted_test_passes(capfd: pytest.CaptureFixture[str]) -> None:
    """Would fail with a test inside that fails, and with none collected."""
    with capfd.disabled():
        sys.stdout.write(f"\n{FOLDER.relative_to(ROOT)}, interpreted: ")
        sys.stdout.flush()
        done = subprocess.run(
            [sys.executable, "-Im", "pytest", FOLDER, "-p", "no:cacheprovider", "--no-header"],
            cwd=ROOT,
            env=os.environ | {"TRITON_INTERPRET": "1"},
            check=False,
        )

    assert done.returncode == 0
