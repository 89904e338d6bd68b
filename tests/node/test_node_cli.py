"""The command line: one line and exit code 2 for what the site's operator can set right."""

import errno
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fedoap.errors import StorageError
from fedoap.identity import Certificate, curve_keys, signing_keys
from fedoap_node.cli import main, next_command
from fedoap_node.daemon import Node
from fedoap_node.membership import Membership

FEDERATION, SITE = signing_keys(b"f" * 32), signing_keys(b"s" * 32)
SERVER, CURVE = curve_keys(b"c" * 32), curve_keys(b"k" * 32)


def run(home: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-Im", "fedoap_node", *arguments]
    return subprocess.run(command, cwd=home, capture_output=True, text=True, check=False, timeout=60)


def joined(home: Path) -> Path:
    """Leave the folder of a site that has joined, and return it."""
    folder = home / "hospital_a"
    (folder / "identity").mkdir(parents=True)
    (home / "list.json").write_text("{}")
    (folder / "site.toml").write_text('[data]\ndatalist = "../list.json"\n[worker]\ncommand = ["true"]\n')
    address = ("tcp://127.0.0.1:1", SERVER.public, FEDERATION.public)
    certificate = Certificate.issue(FEDERATION.secret, "demo", "hospital_a", (CURVE.public, SITE.public))
    Membership("demo", "hospital_a", *address, CURVE, SITE).write(folder / "identity")
    (folder / "identity/certificate").write_bytes(certificate.pack())
    return folder


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "name the site: fedoap-node --site hospital_a"),
        (["status"], "name the site: fedoap-node status --site hospital_a"),
        (["--sit", "a"], "No such option"),
        (["frobnicate"], "No such command 'frobnicate'"),
        (["join"], "Missing argument 'TOKEN'"),
        (["join", "x", "--modality", "pet"], "'pet' is not one of"),
        (["join", "x", "--data", "none.json"], "File 'none.json' does not exist"),
        (["join", "x"], "token: begins with 'x', but an invitation begins with fedoap1-"),
        (["--site", "nobody", "--home", "."], "site nobody: has no folder on this machine"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path: Path, arguments: list[str], expected: str) -> None:
    """Planted bug: click's own words, which come with two lines of usage."""
    said = run(tmp_path, *arguments)

    assert (said.returncode, said.stdout) == (2, "")
    assert re.fullmatch(r"fedoap-node: [^\n]+\n", said.stderr), said.stderr
    assert expected in said.stderr


def test_the_command_to_paste_after_joining_names_a_home_as_the_shell_reads_it() -> None:
    """Planted bug: a home with a space, unquoted."""
    home = Path("/srv/Küche 2/sites")

    command = next_command("hospital_a", home)

    assert shlex.split(command) == ["fedoap-node", "--site", "hospital_a", "--home", str(home)]


@pytest.mark.parametrize("line", ["[]", '{"a": 1}', "{", "\xff"])
def test_a_damaged_log_keeps_nobody_from_a_site_s_status(tmp_path: Path, line: str) -> None:
    """Planted bug: `AttributeError` and `KeyError` let through."""
    (joined(tmp_path) / "log.jsonl").write_text(line + "\n")

    said = run(tmp_path, "status", "--site", "hospital_a", "--home", str(tmp_path))

    assert (said.returncode, said.stderr) == (0, "")
    assert "last event  none" in said.stdout


def no_data(folder: Path) -> None:
    (folder / "site.toml").write_text("")


def no_datalist(folder: Path) -> None:
    (folder.parent / "list.json").unlink()


def damaged(folder: Path) -> None:
    (folder / "identity/federation.json").write_text("{")


def open_key(folder: Path) -> None:
    (folder / "identity/signing.key").chmod(0o644)


def log_is_a_folder(folder: Path) -> None:
    (folder / "log.jsonl").mkdir()


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (no_data, r"site\.toml: section \[data\] is missing; name the site's datalist there"),
        (no_datalist, r"site\.toml: data\.datalist is .*list\.json, but there is no such file"),
        (damaged, r"federation\.json: content: invalid json: .*; it is not what joining wrote"),
        (open_key, r"signing\.key: key has mode 0644, but must be its owner's alone: chmod 600"),
        (log_is_a_folder, r"log\.jsonl: the system refused: Is a directory"),
    ],
)
def test_what_is_wrong_in_a_site_s_folder_is_one_line_that_names_the_file(
    tmp_path: Path, spoil: Callable[[Path], None], expected: str
) -> None:
    """Planted bugs: an `OSError` let through; a place left out where the JSON has none."""
    spoil(joined(tmp_path))

    said = run(tmp_path, "--site", "hospital_a", "--home", str(tmp_path))

    assert said.returncode == 2
    assert re.fullmatch(rf"fedoap-node: [^\n]*{expected}\n", said.stderr), said.stderr


def test_unknown_kernels_are_refused_before_the_site_dials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted bug: left to the worker, which would fail once an attempt."""
    folder = joined(tmp_path)
    (folder / "site.toml").write_text('[data]\ndatalist = "../list.json"\n')
    monkeypatch.setenv("FEDOAP_KERNELS", "bogus")

    said = run(tmp_path, "--site", "hospital_a", "--home", str(tmp_path))

    assert said.returncode == 2
    assert said.stderr == "fedoap-node: FEDOAP_KERNELS is 'bogus', but must be one of auto, eager, triton\n"


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device", "log"), StorageError("ledger full")]
)
def test_a_disk_that_refuses_a_node_at_work_is_worth_another_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Planted bug: exit code 2, after which systemd leaves the node down for good."""

    def run_out_of_room(_node: Node, *, exit_when_finished: bool) -> None:
        raise error

    joined(tmp_path)
    monkeypatch.setattr(Node, "run", run_out_of_room)
    monkeypatch.setattr(sys, "argv", ["fedoap-node", "--site", "hospital_a", "--home", str(tmp_path)])

    with pytest.raises(SystemExit) as ended:
        main()

    assert ended.value.code == 1


def test_a_disk_that_is_full_at_the_start_is_worth_another_start(tmp_path: Path) -> None:
    """Planted bug: exit code 2, so that a node that ran out of room is down for good at its second start."""
    folder = joined(tmp_path)
    (folder / "log.jsonl").symlink_to("/dev/full")

    said = run(tmp_path, "--site", "hospital_a", "--home", str(tmp_path))

    assert (said.returncode, said.stderr) == (1, "fedoap-node: disk: the system refused: No space left on device\n")
