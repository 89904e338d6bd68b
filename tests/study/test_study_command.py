"""A whole study through the command, with real processes, as small as it gets."""

import csv
import io
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from fedoap.segmentation.phantoms import write_phantoms
from fedoap.study.folder import WORK
from fedoap.study.table import COLUMNS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SIMULATE = """
threads = 1
[federation]
federation = "tiny"
rounds.count = 1
network = { width = 4, depth = 2, attention = "projection" }
data = { size = [32, 32] }
training = { steps_per_round = 2, batch_size = 2 }
calibration = { steps = 2, evaluations = 1 }
[sites]
a = { data = { datalist = "liver-ct/datalist.json", modality = "ct" } }
b = { data = { datalist = "breast-us/datalist.json", modality = "ultrasound" } }
[unseen]
c = { data = { datalist = "lung-ct/datalist.json", modality = "ct" } }
"""
STUDY = """
name = "tiny"
base = "simulate.toml"
seeds = [0, 1]
[variants.local.federation.strategy]
name = "local"
[variants.fedavg.federation.strategy]
name = "fedavg"
"""


def test_a_killed_study_goes_on_and_ends_in_tables_that_name_nobody(tmp_path: Path) -> None:
    """Planted bugs: a `work` that is not swept; models that are kept."""
    command = start(tmp_path)
    out = tmp_path / "out"
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL) as killed:
        until(lambda: len(list(out.glob("runs/*"))) >= 1)
        until(lambda: any((out / WORK).iterdir()))
        killed.kill()
    until(lambda: not running_in(tmp_path))
    first = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/done")}

    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in first} == first
    assert sorted(path.parent.name for path in out.glob("runs/*/done")) == [
        *("fedavg-f0-s0", "fedavg-f0-s1", "local-f0-s0", "local-f0-s1")
    ]
    assert not list((out / WORK).glob("*"))
    cases = rows(out, "cases.csv")
    found = {(row["variant"], row["site"], row["split"], row["stage"]) for row in cases}
    assert found == {
        *(("local", site, "test", "final") for site in "ab"),
        *(("fedavg", site, "test", stage) for site in "ab" for stage in ("before", "shared", "final")),
        *((variant, "c", "unseen", "tuned") for variant in ("local", "fedavg")),
        ("fedavg", "c", "unseen", "zero_shot"),
    }
    assert {row["steps"] for row in rows(out, "runs.csv")} == {"4"}
    assert {row["step"] for row in rows(out, "rounds.csv") if row["stage"] in ("local", "calibrate")} == {"4"}
    text = "".join((out / name).read_text() for name in COLUMNS if (out / name).exists())
    assert not re.search(r"liver|breast|lung|phantom|png|/", text)
    assert "tiny" in (out / "report.html").read_text()
    assert len(list(out.glob("runs/*/evaluation/*/*.png"))) == 4 * 2 * 2  # of runs, sites and test cases
    assert not list(out.glob("runs/*/models"))

    # one run done again, from its settings alone, gives the same figures
    (out / "runs" / "fedavg-f0-s1" / "done").unlink()
    before = figures(out)
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (again.returncode, figures(out)) == (0, before)


def test_ctrl_c_ends_every_run(tmp_path: Path) -> None:
    """Planted bug: an interruption that is taken for the end of the study."""
    command = start(tmp_path)
    study = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    until(lambda: len(running_in(tmp_path)) >= 3)  # itself, its watcher, a run

    study.send_signal(signal.SIGINT)
    _, said = study.communicate(timeout=240)

    assert (study.returncode, said.strip()) == (130, "fedoap: interrupted")
    until(lambda: not running_in(tmp_path))


def test_a_failed_run_ends_in_exit_code_1(tmp_path: Path) -> None:
    """Site a's images are no images: it is told in one line, and the study's own output names what failed."""
    command = start(tmp_path)
    for image in (tmp_path / "liver-ct" / "images").iterdir():
        image.write_bytes(b"no image")

    done = subprocess.run([*command, "--only", "local"], cwd=tmp_path, capture_output=True, text=True, check=False)

    assert done.returncode == 1
    assert done.stdout.count("failed: ended with code 2: ") == 2
    assert "0 runs done, 2 failed: local-f0-s0, local-f0-s1" in done.stdout


def test_a_mistake_ends_in_exit_code_2_before_anything_runs(tmp_path: Path) -> None:
    command = start(tmp_path)
    (tmp_path / "study.toml").write_text(STUDY.replace("fedavg", "fedavgg"))

    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "variants.fedavgg: strategy.name is fedavgg, which is no known strategy" in done.stderr
    assert not (tmp_path / "out").exists()


def start(folder: Path) -> list[str]:
    """Draw the phantoms, write the files and return the command."""
    for organ in ("liver-ct", "breast-us", "lung-ct"):
        write_phantoms(folder / organ, organ, {"training": 4, "validation": 3, "test": 2}, (32, 32), seed=0)
    (folder / "simulate.toml").write_text(SIMULATE)
    (folder / "study.toml").write_text(STUDY)
    return [sys.executable, "-Im", "fedoap", "study", "study.toml", "--out", "out"]


def rows(out: Path, name: str) -> list[dict[str, str]]:
    """Return a table's rows."""
    return list(csv.DictReader(io.StringIO((out / name).read_text())))


def figures(out: Path) -> str:
    """Return all tables without the columns that tell how long something took."""
    return json.dumps(
        [[{k: v for k, v in row.items() if k != "seconds"} for row in rows(out, name)] for name in sorted(COLUMNS)[:3]]
    )


def running_in(folder: Path) -> list[list[str]]:
    """Return the commands of what runs below the folder."""
    running = psutil.process_iter(["cmdline", "cwd"])
    return [one.info["cmdline"] or [] for one in running if (one.info["cwd"] or "").startswith(str(folder))]


def until(holds: Callable[[], bool]) -> None:
    """Wait until it holds."""
    last = time.monotonic() + 240
    while not holds():
        assert time.monotonic() < last
        time.sleep(0.05)
