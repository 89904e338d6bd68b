"""New keys for a site with a real coordinator: at work, and with a crash at each step."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fedoap.errors import RefusedError
from fedoap.identity import fingerprint, write_private
from fedoap.sitefolder import SiteFolder
from fedoap_node import membership as members
from fedoap_node import rotation
from fedoap_node.files import write_durably
from fedoap_node.membership import Membership
from fedoap_node.probe import probe

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Federation

pytestmark = pytest.mark.slow


class PowerCutError(Exception):
    """Stands for a power cut: nothing after it is done."""


def crash(*_: object) -> None:
    raise PowerCutError


@pytest.fixture
def hospital(federate: "Callable[..., Federation]") -> Iterator["Federation"]:
    federation = federate()
    federation.start_coordinator()
    yield federation
    federation.close()


def folder(federation: "Federation", site: str = "hospital_a") -> SiteFolder:
    return SiteFolder(federation.site(site))


def works(member: Membership) -> bool:
    """Return whether the coordinator lets the site in with these keys."""
    return [finding.verdict for finding in probe(member, None) if finding.check == "welcome"] == ["ok"]


def test_a_node_at_work_takes_up_new_keys_and_its_worker_goes_on(federate: "Callable[..., Federation]") -> None:
    """Planted bugs: a node that ends when its key is refused; a result signed by the old key."""
    federation = federate(rounds=1)
    held = federation.hold("hospital_a", "init", 0)
    federation.start_all()
    federation.wait_for("hospital_a", "work_started", kind="init")

    command = [sys.executable, "-m", "fedoap_node", "rotate", "--site", "hospital_a"]
    home = ["--home", str(federation.root / "sites")]
    done = subprocess.run([*command, *home], capture_output=True, text=True, check=True, timeout=60)
    federation.wait_for("coordinator", "rotated", site="hospital_a")
    federation.wait_for("hospital_a", "rotated")
    held.unlink()
    federation.finish()

    now = fingerprint(Membership.read(folder(federation)).signing.public)
    assert now in done.stdout
    assert f"hospital_a: enrolled, key {now}" in federation.command("sites")
    started = [row for row in federation.log("hospital_a") if row["event"] == "work_started" and row["kind"] == "init"]
    assert len(started) == 1


def test_a_crash_before_the_coordinator_hears_of_it_leaves_the_old_keys_good(
    hospital: "Federation", monkeypatch: pytest.MonkeyPatch
) -> None:
    old = Membership.read(folder(hospital))
    with monkeypatch.context() as patch:
        patch.setattr(rotation, "_certified", crash)
        with pytest.raises(PowerCutError):
            rotation.rotate(folder(hospital), None)
    assert Membership.read(folder(hospital)) == old
    assert works(old)

    new = rotation.rotate(folder(hospital), None)

    assert works(new)
    assert not works(old)
    assert Membership.read(folder(hospital)) == new
    assert not (folder(hospital).identity / "next").exists()


def test_a_crash_after_the_coordinator_took_them_is_mended_by_the_next_attempt_or_a_node_that_starts(
    hospital: "Federation", monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer is lost with it. Planted bugs: new keys made at each attempt; only the old key asked under."""

    def rotate_and_crash() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(rotation, "write_durably", crash)
            with pytest.raises(PowerCutError):
                rotation.rotate(folder(hospital), None)

    old = Membership.read(folder(hospital))
    rotate_and_crash()
    assert not works(old)

    assert works(rotation.rotate(folder(hospital), None))

    rotate_and_crash()
    hospital.start_node("hospital_a")
    hospital.wait_for("coordinator", "site_joined", site="hospital_a")
    assert works(Membership.read(folder(hospital)))
    assert hospital.stop("hospital_a") == 0


def test_a_crash_while_the_files_are_exchanged_is_mended_by_whoever_reads_them(
    hospital: "Federation", monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted bug: the new files put aside before they are all in place."""

    def crash_at(step: str, real: Callable[[Path, bytes], None]) -> Callable[[Path, bytes], None]:
        def write(path: Path, data: bytes) -> None:
            if path.name == step and path.parent.name == "identity":
                raise PowerCutError
            real(path, data)

        return write

    for step in ("signing.key", "curve.key", "certificate", "the end"):
        with monkeypatch.context() as patch:
            patch.setattr(members, "write_private", crash_at(step, write_private))
            patch.setattr(members, "write_durably", crash_at(step, write_durably))
            if step == "the end":
                patch.setattr(members, "sync_folder", crash)
            with pytest.raises(PowerCutError):
                rotation.rotate(folder(hospital), None)

        assert works(Membership.read(folder(hospital))), step
    assert works(rotation.rotate(folder(hospital), None))


def test_a_revoked_site_cannot_give_itself_new_keys(hospital: "Federation") -> None:
    hospital.command("revoke", "hospital_a")

    with pytest.raises(RefusedError, match=r"hospital_a: neither its old nor its new key is enrolled|was revoked"):
        rotation.rotate(folder(hospital), None)

    assert "hospital_a: revoked" in hospital.command("sites")
