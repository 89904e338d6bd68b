"""The walk-through of the README runs as printed, in three shells."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")

pytestmark = pytest.mark.slow


def test_every_make_target_that_the_pages_name_is_there_and_those_for_developers() -> None:
    """Planted bug: `wheel` misspelt in its rule."""
    pages = README + (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")

    named = set(re.findall(r"(?m)^ +make (\w+)", pages))
    assert {"demo", "test", "check"} <= named
    for target in (*named, "bench", "wheel"):
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
        assert ".venv/bin/" in done.stdout, done.stderr  # make calls a phony target without a rule well done


def test_the_walk_through_runs_as_printed_and_a_revoked_site_is_refused(tmp_path: Path) -> None:
    """Planted bug: a site's name misspelt in one of the blocks."""
    setting, coordinator, first, second, use, revoke = _blocks()
    daemon = _shell(setting + "exec 2>&1\n" + coordinator.replace("\nfedoap-coord", "\nexec fedoap-coord"), tmp_path)
    sites: list[subprocess.Popen[str]] = []
    try:
        _await((tmp_path / "state" / "endpoint").exists)
        sites = [_shell(setting + block, tmp_path) for block in (first, second)]
        for site in sites:
            said, _ = site.communicate(timeout=280)
            assert site.returncode == 0, said
        said, _ = (shell := _shell(setting + use, tmp_path)).communicate()
        assert shell.returncode == 0, said
        assert "Dice" in said
        assert (tmp_path / "mask.png").exists()
        said, _ = (shell := _shell(setting + revoke, tmp_path)).communicate()
        assert shell.returncode == 2
        assert "revoked" in said
        log = tmp_path / "state" / "log.jsonl"
        _await(lambda: '"refused"' in log.read_text())
    finally:
        for site in sites:
            if site.poll() is None:
                os.killpg(site.pid, signal.SIGTERM)
        daemon.send_signal(signal.SIGINT)
        said, _ = daemon.communicate(timeout=30)

    assert daemon.returncode == 0, said
    assert re.search(r"hospital_b was refused .*revoked", said)


def _blocks() -> list[str]:
    port = _free_port()
    return [block.replace("7470", str(port)) for block in re.findall(r"(?ms)^```sh\n(.*?)^```", README)]


def _shell(script: str, folder: Path) -> "subprocess.Popen[str]":
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.Popen(
        ["bash", "-ec", script],
        cwd=folder,
        env=os.environ | {"PATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _await(holds: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.05)
