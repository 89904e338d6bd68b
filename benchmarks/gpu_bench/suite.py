"""Runs the tests that need a GPU and counts them."""

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_suite(seconds: float, folder: str = "tests/kernels/gpu") -> dict[str, object]:
    """Return how many tests passed, failed and were skipped, and the names of those that failed.

    The project's pytest options are left out: plugins that they name may be missing on a machine lent for measuring.
    """
    with tempfile.TemporaryDirectory() as scratch:
        xml = Path(scratch) / "result.xml"
        options = [
            "-c",
            os.devnull,
            "--rootdir",
            str(ROOT),
            "-o",
            f"pythonpath={ROOT} {ROOT / 'tests/support'}",  # relative ones start from where the missing file would lie
            "-o",
            "markers=gpu: needs one",
        ]
        options += ["--import-mode=importlib", "-q", "-p", "no:cacheprovider", "--tb=short", f"--junitxml={xml}"]
        if find_spec("xdist"):  # most of the time goes into compiling
            options += ["-n", str(max(1, min(14, (os.cpu_count() or 2) - 1)))]
        try:
            done = subprocess.run(
                [sys.executable, "-m", "pytest", folder, *options], cwd=ROOT, timeout=seconds, check=False
            )
        except subprocess.TimeoutExpired:
            return {"error": f"took longer than {seconds:.0f} s"}
        return {"exit": done.returncode, **(_counts(xml) if xml.exists() else {"error": "no result"})}


def _counts(xml: Path) -> dict[str, object]:
    cases = list(ET.parse(xml).getroot().iter("testcase"))  # noqa: S314 - pytest wrote it a moment ago
    bad = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = [c for c in cases if c.find("skipped") is not None]
    return {
        "passed": len(cases) - len(bad) - len(skipped),
        "failed": len(bad),
        "skipped": len(skipped),
        "failures": [f"{c.get('classname')}.{c.get('name')}" for c in bad],
    }
