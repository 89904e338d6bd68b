"""The command line `fedoap`: quick help, one line and exit code 2 for what a user can set right."""

import json
import re
import subprocess
import sys
from pathlib import Path

import nibabel
import pytest
from click.testing import CliRunner

import fedoap
from fedoap.cli import cli

HELP_SECONDS = 0.3
SIMULATION = '[federation]\nfederation = "f"\n[sites.a.data]\ndatalist = "list.json"\n'
HEAVY = ("torch", "monai", "matplotlib", "scipy", "fedoap.segmentation")


def test_help_shows_an_example_of_each_command() -> None:
    """Planted bug: `demo` without one."""
    shown = {name: CliRunner().invoke(cli, [name, "--help"]).output for name in cli.commands}

    assert "Examples:\n    fedoap demo\n" in _fedoap("--help").stdout
    assert [name for name, text in shown.items() if f"Example: fedoap {name}" not in text] == []


def test_help_waits_for_nothing_heavy() -> None:
    """Planted bug: `import torch` at the head of the command line."""
    script = (
        "import sys, time; began = time.process_time()\n"
        "from fedoap.cli import cli\n"
        "cli.main(['--help'], standalone_mode=False)\n"
        "print(time.process_time() - began, *sorted(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-Ic", script], capture_output=True, text=True, check=True)
    seconds, *modules = done.stdout.splitlines()[-1].split()

    assert float(seconds) < HELP_SECONDS
    assert [name for name in modules if name in HEAVY] == []


def test_version_is_the_package_s() -> None:
    assert _fedoap("--version").stdout == f"fedoap, version {fedoap.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["evaluate", "--json", "x.json"], "give either --site or --model"),
        (["evaluate", "--site", "a", "--model", ".", "--json", "x.json"], "give either --site or --model"),
        (["evaluate", "--model", ".", "--json", "x.json"], "--model needs --config or --datalist"),
        (["evaluate", "--site", "nobody", "--home", ".", "--json", "x"], "site nobody: has no folder on this machine"),
        (["evaluate", "--site", "a", "--split", "all", "--json", "x"], "'all' is not one of"),
        (["predict", "nothing.png", "-o", "mask.png", "--site", "a"], "nothing.png"),
        (["simulate", "nothing.toml", "--out", "run"], "nothing.toml: no such file"),
        (["simulate"], "Missing argument"),
        (["report", "."], "results.json: no such file"),
        (["phantoms", "p", "--organ", "toe"], "'toe' is not one of"),
        (["phantoms", "p", "--organ", "liver-ct", "--size", "8", "8"], "size is (8, 8)"),
        (["phantoms", "p", "--organ", "liver-ct", "--slices", "8"], "size is (64, 64, 8), but must be two or three"),
        (["frobnicate"], "No such command 'frobnicate'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path: Path, arguments: list[str], expected: str) -> None:
    said = _fedoap(*arguments, folder=tmp_path)

    assert said.returncode == 2
    assert re.fullmatch(r"fedoap: [^\n]+\n", said.stderr), said.stderr
    assert expected in said.stderr


def test_a_disk_that_refuses_is_one_line_that_names_the_file(tmp_path: Path) -> None:
    """Planted bug: an `OSError` let through, with its traceback."""
    (tmp_path / "file").touch()
    (tmp_path / "simulate.toml").write_text(SIMULATION)
    (tmp_path / "list.json").write_text("{}")

    said = _fedoap("simulate", "simulate.toml", "--out", "file/run", folder=tmp_path)

    assert (said.returncode, said.stderr) == (2, "fedoap: file/run: the system refused: Not a directory\n")


def test_phantoms_are_a_datalist_of_the_sizes_asked_for(tmp_path: Path) -> None:
    said = _fedoap("phantoms", "liver", "--organ", "liver-ct", "--training", "4", "--test", "2", folder=tmp_path)

    lists = json.loads((tmp_path / said.stdout.strip()).read_text())

    assert {name: len(lists[name]) for name in ("training", "validation", "test")} == {
        "training": 4,
        "validation": 12,
        "test": 2,
    }


def test_phantoms_with_slices_are_volumes(tmp_path: Path) -> None:
    """Planted bug: the slices left out, which draws pictures."""
    counts = ("--training", "1", "--validation", "1", "--test", "1")
    said = _fedoap(
        "phantoms", "liver", "--organ", "liver-ct", "--size", "32", "48", "--slices", "40", *counts, folder=tmp_path
    )

    lists = json.loads((tmp_path / said.stdout.strip()).read_text())
    volume = nibabel.load(tmp_path / "liver" / lists["training"][0]["image"])

    assert volume.shape == (48, 32, 40)


def test_a_folder_that_is_no_simulation_s_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "thesis.txt").write_text("years of work")

    said = _fedoap("demo", "--overwrite", folder=tmp_path)

    assert said.returncode == 2
    assert "is not the folder of a simulation" in said.stderr
    assert (tmp_path / "demo" / "thesis.txt").exists()


def _fedoap(*arguments: str, folder: Path | None = None) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-Im", "fedoap", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
