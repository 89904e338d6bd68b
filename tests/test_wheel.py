"""The wheel in a clean environment without PyTorch: the coordinator works, the rest says what is missing.

Needs the package index, and nothing else from outside.
"""

import json
import os
import re
import subprocess
import sys
import time
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FED_TOML = 'federation = "f"\nsites = ["hospital_a"]\n[coordinator]\nbind = "tcp://127.0.0.1:*"\n'

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    _run([sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(ROOT)])
    return next(folder.glob("fedoap-*.whl"))


@pytest.fixture(scope="module")
def commands(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the commands of a clean environment with the wheel and what it asks for."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder, with_pip=True)
    pins = str(ROOT / "constraints.txt")
    _run([str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--constraint", pins, str(wheel)])
    return folder / "bin"


def test_the_wheel_holds_the_three_packages_and_what_they_read(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()

    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {
        "fedoap",
        "fedoap_coordinator",
        "fedoap_node",
    }
    for name in ("py.typed", "report/templates/report.html.j2", "report/templates/study.md.j2", "simulation/demo.toml"):
        assert f"fedoap/{name}" in names


def test_the_coordinator_invites_and_serves_without_torch(commands: Path, tmp_path: Path) -> None:
    (tmp_path / "fed.toml").write_text(FED_TOML)
    assert _fails([str(commands / "python"), "-Ic", "import torch"])

    daemon = subprocess.Popen([commands / "fedoap-coordinator", "--config", "fed.toml"], cwd=tmp_path, text=True)
    _await(tmp_path / "state" / "endpoint")
    token = _run([str(commands / "fedoap-coordinator"), "invite", "hospital_a", "--config", "fed.toml"], tmp_path)
    daemon.terminate()

    assert re.fullmatch(r"fedoap1-\S+\n", token)
    assert daemon.wait(20) == 0
    assert '"ready"' in (tmp_path / "state" / "log.jsonl").read_text()


def test_what_needs_torch_says_so_in_one_line(commands: Path, tmp_path: Path) -> None:
    said = _fails([str(commands / "fedoap"), "demo"], tmp_path)

    assert said == "fedoap: this command needs PyTorch; install it with: pip install 'fedoap[node]'\n"


def test_a_node_without_torch_says_so_in_one_line(commands: Path, tmp_path: Path) -> None:
    (tmp_path / "fed.toml").write_text(FED_TOML)
    (tmp_path / "list.json").write_text(json.dumps({"training": ["1.png"]}))
    daemon = subprocess.Popen([commands / "fedoap-coordinator", "--config", "fed.toml"], cwd=tmp_path, text=True)
    _await(tmp_path / "state" / "endpoint")
    node = str(commands / "fedoap-node")
    token = _run([str(commands / "fedoap-coordinator"), "invite", "hospital_a", "--config", "fed.toml"], tmp_path)
    _run([node, "join", token.strip(), "--home", "home", "--data", "list.json"], tmp_path)
    daemon.terminate()
    daemon.wait(20)

    said = _fails([node, "--site", "hospital_a", "--home", "home"], tmp_path)

    assert re.fullmatch(r"fedoap-node: torch is not installed[^\n]+\n", said)


def _run(command: list[str], folder: Path | None = None) -> str:
    done = subprocess.run(command, cwd=folder, env=_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _fails(command: list[str], folder: Path | None = None) -> str:
    done = subprocess.run(command, cwd=folder, env=_environment(), capture_output=True, text=True, check=False)
    assert done.returncode in (1, 2), done.stdout
    return done.stderr


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}


def _await(path: Path) -> None:
    until = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < until, path
        time.sleep(0.05)
