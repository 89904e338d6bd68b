"""The chain of rounds, the audit and a restored backup, with real daemons."""

import json
import shutil
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Federation

pytestmark = pytest.mark.slow
KEEP_ALL = "\n[retention]\nupload_rounds = 99\nresults = 99\n"


def findings(federation: "Federation") -> list[str]:
    return [line.partition(": ")[2] for line in federation.command("verify").splitlines()[1:-1]]


def test_a_run_restored_from_a_backup_is_verified_and_audited_to_its_end(
    federate: "Callable[..., Federation]",
) -> None:
    federation = federate(attention="joint")
    with federation.config.open("a") as text:
        text.write(KEEP_ALL)
    held = federation.hold("hospital_a", "train", 2)
    federation.start_all()
    federation.wait_for("hospital_a", "work_started", kind="train", round=2)
    assert findings(federation) == ["verified", "verified", "verified", "open"]  # while the daemon runs

    assert federation.stop("coordinator") == 0
    state, backup = federation.root / "state", federation.root / "backup"
    shutil.copytree(state, backup)
    shutil.rmtree(state)
    shutil.copytree(backup, state)
    federation.start_coordinator("--exit-when-finished")
    held.unlink()
    federation.finish()

    assert findings(federation) == ["verified"] * 6
    found = json.loads(federation.command("audit", "--json"))
    for site in federation.sites:
        kinds = [one["kind"] for one in found[site]["entered"] if one["counted"]]
        assert kinds[-5:] == ["train", "seed", "train", "bank", "calibrate"]
        left = {one["what"]: (one["sent"], one["bytes"]) for one in found[site]["left"]}
        assert {"result of seed round 2", "result of train round 2", "result of bank round 3"} <= left.keys()
        assert all(sent >= size > 0 for sent, size in left.values())


def test_nodes_that_are_ahead_of_a_restored_backup_go_back_with_it(federate: "Callable[..., Federation]") -> None:
    """Planted bug: a node that never does a task behind its newest, whatever coordinator it is let in by."""
    federation = federate(rounds=3)
    with federation.config.open("a") as text:
        text.write(KEEP_ALL)
    second, third = federation.hold("hospital_a", "train", 2), federation.hold("hospital_b", "train", 3)
    federation.start_all()
    federation.wait_for("hospital_a", "work_started", kind="train", round=2)
    assert federation.stop("coordinator") == 0
    state, backup = federation.root / "state", federation.root / "backup"
    shutil.copytree(state, backup)
    federation.start_coordinator("--exit-when-finished")
    second.unlink()
    federation.wait_for("coordinator", "site_committed", site="hospital_c", kind="train", round=3)

    federation.kill("coordinator")
    shutil.rmtree(state)
    shutil.copytree(backup, state)
    federation.start_coordinator("--exit-when-finished")
    third.unlink()
    federation.finish()

    assert federation.trained("hospital_c") == ["train 1", "train 2", "train 3", "train 2", "train 3", "calibrate 4"]
    assert findings(federation) == ["verified"] * 5
