"""The systemd units: systemd understands every line, they shut in what they start, and the pages name them."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
UNITS = ("fedoap-coordinator.service", "fedoap-node@.service")
MOST_EXPOSURE = 2.5
"""Of 10, by `systemd-analyze security`; a unit without any hardening has 9.6."""

needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")


def settings(unit: str) -> dict[str, list[str]]:
    lines = (ROOT / "deploy" / unit).read_text(encoding="utf-8").splitlines()
    found: dict[str, list[str]] = {}
    for line in lines:
        if "=" in line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


def runnable(unit: str, folder: Path) -> Path:
    """Leave the unit with a program that is here: systemd looks whether it can be started."""
    text = (ROOT / "deploy" / unit).read_text(encoding="utf-8")
    copy = folder / unit
    copy.write_text(re.sub(r"(?m)^ExecStart=/opt/fedoap/bin/\S+", "ExecStart=/bin/true", text))
    return copy


def analyze(*words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(["systemd-analyze", *words], capture_output=True, text=True, check=False, timeout=60)


@needs_systemd
@pytest.mark.parametrize("unit", UNITS)
def test_systemd_understands_every_line(unit: str, tmp_path: Path) -> None:
    """Planted bugs: `ProtectSystems=strict`; `RestrictAddressFamilies=AF_INTE`."""
    done = analyze("verify", "--man=no", str(runnable(unit, tmp_path)))

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@needs_systemd
@pytest.mark.parametrize("unit", UNITS)
def test_a_unit_shuts_in_what_it_starts(unit: str, tmp_path: Path) -> None:
    """Planted bug: no `CapabilityBoundingSet`."""
    done = analyze("security", "--offline=yes", "--no-pager", str(runnable(unit, tmp_path)))
    exposure = re.search(r"Overall exposure level for \S+: ([0-9.]+)", done.stdout)

    assert exposure, done.stdout + done.stderr
    assert float(exposure[1]) <= MOST_EXPOSURE


@pytest.mark.parametrize("unit", UNITS)
def test_a_person_is_waited_for_where_one_is_needed(unit: str) -> None:
    """Exit code 2 means that: started again and again, a daemon would only fill the journal."""
    found = settings(unit)

    assert found["Restart"] == ["on-failure"]
    assert found["RestartPreventExitStatus"] == ["2"]
    assert found["NoNewPrivileges"] == ["yes"]
    assert "MemoryMax" in found


def test_a_node_may_open_gpus() -> None:
    """Planted bug: `PrivateDevices=yes`, with which training silently falls back to the CPU."""
    found = settings("fedoap-node@.service")

    assert "PrivateDevices" not in found
    assert "char-nvidia* rw" in found["DeviceAllow"]
    assert "MemoryDenyWriteExecute" not in found  # Triton and CUDA compile


@pytest.mark.parametrize("unit", UNITS)
def test_the_page_for_operators_names_the_unit(unit: str) -> None:
    assert f"deploy/{unit}" in (ROOT / "docs/deployment.md").read_text(encoding="utf-8")
