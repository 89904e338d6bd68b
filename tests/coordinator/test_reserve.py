"""The reserve: a coordinator whose disk is full ends in good order and says why."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedoap.errors import DiskError
from fedoap_coordinator.cli import main
from fedoap_coordinator.daemon import Daemon
from fedoap_coordinator.reserve import RESERVE_BYTES, Reserve

FED_TOML = 'federation = "demo"\nsites = ["a"]\n[coordinator]\nbind = "tcp://127.0.0.1:*"\n'
ON_A_FULL_DISK = """
import json, os, sys
from pathlib import Path
from fedoap_coordinator.cli import main
from fedoap_coordinator.daemon import Daemon
from fedoap_coordinator.folder import open_ledger
from fedoap.config import load_federation

def fill(daemon, *, exit_when_finished):
    for name, piece in (("filler", bytes(1 << 20)), ("filler", b"0"), ("log.jsonl", b"\\n")):
        with (daemon.state / name).open("ab", buffering=0) as file:
            try:
                while file.write(piece):
                    pass
            except OSError:
                pass
    for number in range(1000):
        daemon.ledger.set_fact(f"fact {number}", bytes(4000))

Daemon.serve = fill
config = Path(sys.argv[1])
state = config.parent / "state"
sys.argv[1:] = ["--config", str(config)]
try:
    main()
except SystemExit as ended:
    code = ended.code
last = json.loads((state / "log.jsonl").read_text().splitlines()[-1])
with open_ledger(load_federation(config)) as ledger:
    tasks = len(ledger.tasks())
print(json.dumps([code, last["event"], last["reason"], (state / "reserve").exists(), tasks]))
"""


def test_the_room_is_really_taken_and_given_back(tmp_path: Path) -> None:
    """Planted bug: a file with a hole, made by truncate."""
    reserve = Reserve(tmp_path)
    reserve.make()
    reserve.make()

    taken = (tmp_path / "reserve").stat()
    assert (taken.st_size, taken.st_mode & 0o777) == (RESERVE_BYTES, 0o600)
    assert taken.st_blocks * 512 >= RESERVE_BYTES

    reserve.give_up()
    reserve.give_up()
    assert not (tmp_path / "reserve").exists()


def test_without_room_for_it_the_coordinator_does_not_start_and_says_how_much_it_takes(tmp_path: Path) -> None:
    reserve = Reserve(tmp_path, size=1 << 60)

    with pytest.raises(DiskError, match=r"reserve: cannot set 1099511627776 MB aside: .*; make room, then start again"):
        reserve.make()

    assert not (tmp_path / "reserve").exists()


def test_a_ledger_without_room_ends_the_coordinator_in_one_line_and_the_next_start_takes_the_reserve_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Planted bugs: the reserve kept; not made again."""
    (tmp_path / "fed.toml").write_text(FED_TOML)
    monkeypatch.setattr(sys, "argv", ["fedoap-coordinator", "--config", str(tmp_path / "fed.toml")])

    def fill(daemon: Daemon, *, exit_when_finished: bool) -> None:
        assert (tmp_path / "state" / "reserve").stat().st_size == RESERVE_BYTES
        ((pages,),) = daemon.ledger._run("pragma page_count")
        daemon.ledger._run(f"pragma max_page_count={pages}")
        for number in range(1000):
            daemon.ledger.set_fact(f"fact {number}", bytes(4000))

    monkeypatch.setattr(Daemon, "serve", fill)
    with pytest.raises(SystemExit) as ended:
        main()

    assert ended.value.code == 1
    said = capsys.readouterr().err.splitlines()
    assert said[-1].endswith(
        "fed.sqlite: the disk is full: make room, then start the coordinator again; "
        "nothing that it acknowledged is lost"
    )
    assert not (tmp_path / "state" / "reserve").exists()

    def end_at_once(_daemon: Daemon, *, exit_when_finished: bool) -> None: ...

    monkeypatch.setattr(Daemon, "serve", end_at_once)
    main()
    assert (tmp_path / "state" / "reserve").stat().st_size == RESERVE_BYTES


@pytest.mark.slow
def test_on_a_disk_that_is_really_full_the_log_still_says_why(tmp_path: Path) -> None:
    """Planted bug: the reserve kept. Needs a small file system of its own."""
    (tmp_path / "fed.toml").write_text(FED_TOML)
    (tmp_path / "script.py").write_text(ON_A_FULL_DISK)
    (tmp_path / "state").mkdir(mode=0o700)
    mounted = 'mount -t tmpfs -o size=80m,mode=700 tmpfs "$1" && shift && exec "$@"'
    alone = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mounted, "sh", str(tmp_path / "state")]
    if subprocess.run([*alone, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this system lets no user mount a file system")

    done = subprocess.run(
        [*alone, sys.executable, str(tmp_path / "script.py"), str(tmp_path / "fed.toml")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )

    assert done.returncode == 0, done.stderr
    code, event, reason, has_reserve, tasks = json.loads(done.stdout.splitlines()[-1])
    assert (code, event, has_reserve, tasks) == (1, "ended_by_error", False, 0)
    assert "fed.sqlite: the disk is full: make room" in reason
