"""Joining, with the real coordinator: what each token that is wrong is answered, and what is left behind."""

import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fedoap.errors import FedoapError, StorageError
from fedoap.identity import Token, curve_keys, fingerprint, read_private, signing_keys
from fedoap.sitefolder import SiteFolder
from fedoap_node import asking, membership
from fedoap_node.join import join
from fedoap_node.membership import Membership

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Federation

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def hospital(federation_type: "type[Federation]", tmp_path_factory: pytest.TempPathFactory) -> Iterator["Federation"]:
    federation = federation_type(tmp_path_factory.mktemp("joining"))
    federation.start_coordinator()
    yield federation
    federation.close()


def refusal(token: str, home: Path) -> str:
    """Return why a token is refused, after making sure that nothing was left behind."""
    with pytest.raises(FedoapError) as caught:
        join(token, home / "deep" / "home")
    assert not (home / "deep").exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_site_joins_by_one_command_and_its_keys_are_its_own(hospital: "Federation", tmp_path: Path) -> None:
    token = hospital.command("invite", "hospital_a", "--valid-hours", "1").strip()
    (tmp_path / "list.json").write_text('{"training": ["1.png"]}')
    data = ["--data", str(tmp_path / "list.json"), "--modality", "ct", "--home", str(tmp_path / "home")]

    done = subprocess.run(
        [sys.executable, "-m", "fedoap_node", "join", token, *data], capture_output=True, text=True, check=True
    )

    folder = SiteFolder(tmp_path / "home" / "hospital_a")
    site = signing_keys(read_private(folder.identity / "signing.key"))
    assert Membership.read(folder).signing == site
    assert fingerprint(site.public) in done.stdout
    assert fingerprint(Token.decode(token).federation_key) in done.stdout
    assert fingerprint(site.public) in hospital.command("sites")
    assert [path.stat().st_mode & 0o77 for path in folder.identity.glob("*.key")] == [0, 0]
    assert f'datalist = "{tmp_path}/list.json"' in folder.config.read_text()
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["hospital_a"]


def test_a_token_used_twice_is_refused(hospital: "Federation", tmp_path: Path) -> None:
    token = hospital.command("invite", "hospital_b").strip()
    join(token, tmp_path / "first")

    assert "used" in refusal(token, tmp_path / "second")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("site.toml", "not a JSON datalist"),
        ("[]", "holds a list, but a datalist is an object"),
        ('{"training": [7]}', r"training\[0\]: is 7, but a case is an object"),
        ('{"cases": ["1.png"]}', "training, validation, test are empty or missing"),
    ],
)
def test_a_file_that_is_no_datalist_leaves_the_token_good(
    hospital: "Federation", tmp_path: Path, content: str, expected: str
) -> None:
    """Planted bug: the datalist looked at when the node starts, when the token is used up."""
    token, data = hospital.command("invite", "hospital_b").strip(), tmp_path / "list.json"
    data.write_text(content)

    with pytest.raises(FedoapError, match=expected):
        join(token, tmp_path / "home", data)

    assert not (tmp_path / "home").exists()
    join(token, tmp_path / "home")


def test_a_full_disk_leaves_the_token_good(
    hospital: "Federation", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted bug: keys and settings written when the coordinator has answered."""
    token = hospital.command("invite", "hospital_b").strip()

    def full(*_: object) -> None:
        raise StorageError("the disk is full")

    monkeypatch.setattr(membership, "write_private", full)
    with pytest.raises(StorageError):
        join(token, tmp_path / "home")
    monkeypatch.undo()

    join(token, tmp_path / "home")


def test_an_expired_token_is_refused(hospital: "Federation", tmp_path: Path) -> None:
    token = hospital.command("invite", "hospital_b", "--valid-hours", "0.00001").strip()
    time.sleep(0.05)

    assert "expired" in refusal(token, tmp_path)


def test_a_token_that_a_newer_one_replaced_is_refused(hospital: "Federation", tmp_path: Path) -> None:
    old = hospital.command("invite", "hospital_c").strip()
    hospital.command("invite", "hospital_c")

    assert "withdrawn" in refusal(old, tmp_path)


def test_a_truncated_token_is_refused_before_anything_is_dialled(hospital: "Federation", tmp_path: Path) -> None:
    token = hospital.command("invite", "hospital_c").strip()

    assert "truncated" in refusal(token[:-20], tmp_path)


def test_an_invented_secret_is_refused(hospital: "Federation", tmp_path: Path) -> None:
    token = Token.decode(hospital.command("invite", "hospital_c").strip())
    forged = replace(token, secret=bytes(16))

    assert "ask for a new one" in refusal(forged.encode(), tmp_path)


def test_a_token_of_another_coordinator_is_refused(hospital: "Federation", tmp_path: Path) -> None:
    token = Token.decode(hospital.command("invite", "hospital_c").strip())
    foreign = replace(token, server_key=curve_keys(bytes(32)).public)

    assert "does not hold the key that the token names" in refusal(foreign.encode(), tmp_path)


def test_a_coordinator_that_does_not_run_is_named(
    hospital: "Federation", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = Token.decode(hospital.command("invite", "hospital_c").strip())
    nowhere = replace(token, endpoint="tcp://127.0.0.1:9")
    monkeypatch.setattr(asking, "ANSWER_SECONDS", 0.5)

    assert "tcp://127.0.0.1:9: nobody answers" in refusal(nowhere.encode(), tmp_path)


def test_a_site_that_has_joined_is_not_overwritten(hospital: "Federation", tmp_path: Path) -> None:
    token = hospital.command("invite", "hospital_b").strip()
    joined = join(token, tmp_path)
    before = (joined.folder.identity / "signing.key").read_bytes()

    with pytest.raises(FedoapError, match="has joined already"):
        join(hospital.command("invite", "hospital_b").strip(), tmp_path)

    assert (joined.folder.identity / "signing.key").read_bytes() == before
