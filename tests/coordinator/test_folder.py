"""The state folder: its keys are made once, and one coordinator owns it."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from fedoap.config import FederationConfig
from fedoap.errors import ConfigError, IdentityError, StorageError
from fedoap.identity import TASK_CONTEXT, sign
from fedoap.manifests import TaskManifest
from fedoap_coordinator.folder import (
    check_keys,
    invited_endpoint,
    open_ledger,
    prepare,
    read_endpoint,
    running,
    sole_owner,
    write_endpoint,
)
from fedoap_coordinator.ledger import Ledger
from fedoap_coordinator.service import check_plan


def test_keys_are_made_once_and_are_their_owners_alone(tmp_path: Path) -> None:
    state = tmp_path / "deep" / "state"
    first = prepare(state)

    assert prepare(state) == first
    assert stat.S_IMODE(state.stat().st_mode) == 0o700
    assert {stat.S_IMODE(key.stat().st_mode) for key in (state / "keys").glob("*.key")} == {0o600}


def test_two_processes_that_prepare_a_folder_at_once_agree_on_its_keys(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from fedoap_coordinator.folder import prepare; "
        "print(prepare(pathlib.Path(sys.argv[1])).signing.public.hex())"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "state")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]

    assert len({process.communicate(timeout=30)[0] for process in processes}) == 1


def test_a_key_that_others_may_read_stops_the_start(state: Path) -> None:
    prepare(state)
    (state / "keys" / "federation.key").chmod(0o644)

    with pytest.raises(IdentityError, match="chmod 600"):
        prepare(state)


@pytest.mark.parametrize("name", ["federation.key", "curve.key"])
def test_a_key_that_is_gone_from_a_folder_in_use_is_not_made_anew(config: FederationConfig, name: str) -> None:
    """Planted bug: a restore without keys/ made new ones, which no site knows and which sign no earlier record."""
    key = config.coordinator.state / "keys" / name
    prepare(config.coordinator.state)
    with open_ledger(config):
        key.unlink()

        with pytest.raises(IdentityError, match=r"key is missing, but .*fed\.sqlite was written with it: put"):
            prepare(config.coordinator.state)
    with pytest.raises(IdentityError, match="key is missing"):
        prepare(config.coordinator.state)
    assert not key.exists()


def test_a_crash_before_the_first_ledger_leaves_a_folder_that_can_be_prepared(state: Path) -> None:
    first = prepare(state)
    (state / "keys" / "curve.key").unlink()

    assert prepare(state).signing == first.signing


@pytest.mark.parametrize("left", [None, b""])
def test_a_ledger_that_is_gone_is_not_begun_anew_over_its_blobs(config: FederationConfig, left: bytes | None) -> None:
    """Planted bug: a coordinator started without its ledger made an empty one and deleted every blob."""
    state = config.coordinator.state
    prepare(state)
    open_ledger(config).__exit__()
    (state / "blobs").mkdir()
    open_ledger(config).__exit__()
    (state / "blobs" / "ab").write_bytes(b"weights")
    (state / "fed.sqlite").unlink()
    if left is not None:
        (state / "fed.sqlite").write_bytes(left)

    with pytest.raises(StorageError, match=r"fed\.sqlite: ledger is missing, but .*blobs holds blobs that it knew"):
        open_ledger(config)


def test_a_key_that_did_not_sign_the_rounds_stops_the_start(config: FederationConfig, state: Path) -> None:
    """Planted bug: a key from another backup went on with the chain, which no site and no `verify` believes."""
    keys, others = prepare(state), prepare(state.parent / "others")
    packed = TaskManifest("demo", config.plan.digest, "init", 0, 1, ("a",), 600).pack()
    with open_ledger(config) as ledger:
        check_keys(ledger, others)
        ledger.open_task(b"t" * 32, packed, sign(keys.signing.secret, TASK_CONTEXT, packed), 1.0)

        check_keys(ledger, keys)
        with pytest.raises(IdentityError, match=r"is not the key that signed the rounds in .*fed\.sqlite"):
            check_keys(ledger, others)


def test_an_address_used_last_that_cannot_be_read_is_none(state: Path) -> None:
    """Planted bug: a traceback at the start, as the file's bytes are no text."""
    state.mkdir(exist_ok=True)
    (state / "endpoint").write_bytes(b"\xff\xfe")

    assert read_endpoint(state) is None


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")

    with pytest.raises(StorageError, match="state folder cannot be made: Not a directory"):
        prepare(tmp_path / "file" / "state")


def test_a_second_coordinator_is_refused_and_told_the_firsts_process(state: Path) -> None:
    with sole_owner(state):
        message = f"another coordinator, process {os.getpid()}, runs on this state folder"
        with pytest.raises(StorageError, match=message), sole_owner(state):
            pass

        assert running(state) == os.getpid()
    assert running(state) is None
    with sole_owner(state):
        pass


def test_an_invitation_names_what_is_advertised_with_the_real_port(config: FederationConfig, state: Path) -> None:
    write_endpoint(state, "tcp://0.0.0.0:4321")
    fixed = config.coordinator.model_copy(update={"bind": "tcp://0.0.0.0:7470"})

    assert invited_endpoint(config.coordinator) == "tcp://fed.example.org:4321"
    assert invited_endpoint(fixed) == "tcp://fed.example.org:7470"


@pytest.mark.parametrize(
    ("bind", "invited"),
    [
        ("tcp://10.1.2.3:7000", "tcp://10.1.2.3:7000"),
        ("tcp://0.0.0.0:7000", "tcp://127.0.0.1:7000"),
        ("tcp://[::]:7000", "tcp://127.0.0.1:7000"),
        ("tcp://*:7000", "tcp://127.0.0.1:7000"),
        ("tcp://127.0.0.1:*", "tcp://127.0.0.1:4321"),
    ],
)
def test_an_invitation_names_where_the_coordinator_listens_if_nothing_is_advertised(
    config: FederationConfig, state: Path, bind: str, invited: str
) -> None:
    """Planted bug: port 7470 named whatever `bind` says."""
    write_endpoint(state, "tcp://0.0.0.0:4321")

    assert invited_endpoint(config.coordinator.model_copy(update={"bind": bind, "advertise": None})) == invited


def test_a_plan_may_change_until_the_first_exchange_and_not_after(config: FederationConfig, ledger: Ledger) -> None:
    other = config.model_copy(update={"rounds": config.rounds.model_copy(update={"count": 7})})
    check_plan(ledger, config)
    check_plan(ledger, other)
    manifest = TaskManifest("demo", other.plan.digest, "init", 0, 1, ("hospital_a",), 600)
    ledger.open_task(b"t" * 32, manifest.pack(), b"s" * 64, 1.0)

    check_plan(ledger, other)
    ledger.set_fact("plan", b"{" + other.plan.to_bytes())
    with pytest.raises(StorageError, match=r"ledger is damaged: facts\.plan is no JSON; fedoap-coordinator verify"):
        check_plan(ledger, other)
    ledger.set_fact("plan", other.plan.to_bytes())
    with pytest.raises(ConfigError, match=r"rounds\.count is 20, but the run in .* was begun with 7: set it back"):
        check_plan(ledger, config)
