"""Whole federations of real processes; the stand-in worker's numbers make every weight known by hand.

A round adds the mean of the changes of the sites that counted: 0.5 (a), 1 (b) and 1.5 (c).
"""

import signal
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pytest

from fedoap.config import ModelRecord

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Federation, Row

pytestmark = pytest.mark.slow
FIRST = np.random.default_rng(7).integers(-64, 64, (300, 1000)) / 8


def test_three_sites_finish_and_the_model_is_the_mean_worked_out_by_hand(
    federate: "Callable[..., Federation]",
) -> None:
    federation = federate(rounds=2, attention="joint")
    federation.start_all()

    federation.finish()

    weights = federation.weights()
    assert np.array_equal(weights["decoder.weight"], FIRST + 2)
    assert np.array_equal(weights["encoder.bias"], np.arange(7) + 2.0)
    assert federation.trained("hospital_b") == ["train 1", "seed 2", "train 2", "bank 3", "calibrate 3"]
    record = ModelRecord.model_validate_json((federation.site("hospital_b") / "model/model.json").read_bytes())
    assert (record.round, record.bank is not None) == (3, True)
    assert record.personal is not None
    assert (record.personal / "count.txt").read_text() == "2.0"


def test_packed_updates_make_the_very_same_weights_with_fewer_bytes(federate: "Callable[..., Federation]") -> None:
    """Planted bug: a change that is taken from what the site trained last, not from the round's model."""
    rough = {"FEDOAP_TEST_ROUGH": "1"}
    plain, packed = federate(environment=rough), federate(environment=rough, updates="packed")
    for federation in (plain, packed):
        federation.start_all()
    for federation in (plain, packed):
        federation.finish()

    for name, values in plain.weights().items():
        assert values.tobytes() == packed.weights()[name].tobytes()
    assert sent(packed) < 0.9 * sent(plain)


def sent(federation: "Federation") -> int:
    """Return how many bytes the sites sent to be trained with."""
    return sum(int(row["bytes"]) for row in federation.log("coordinator") if _is_trained(row))


def _is_trained(row: "Row") -> bool:
    return (row["event"], row.get("kind")) == ("site_committed", "train")


def test_a_round_closes_without_a_node_that_was_killed_and_the_node_goes_on_when_it_is_back(
    federate: "Callable[..., Federation]",
) -> None:
    federation = federate(rounds=3, quorum=2, silence=6.0)
    kept = federation.hold("hospital_c", "train", 1)
    others = federation.hold("hospital_a", "train", 2)
    federation.start_all()
    federation.wait_for("hospital_c", "work_started", kind="train", round=1)

    federation.kill("hospital_c")
    federation.wait_for("coordinator", "task_closed", kind="train", round=1)
    kept.unlink()
    before = len(federation.log("coordinator"))
    federation.start_node("hospital_c", "--exit-when-finished")
    federation.wait_for("coordinator", "site_joined", after=before, site="hospital_c")
    others.unlink()
    federation.finish()

    assert np.array_equal(federation.weights()["decoder.weight"], FIRST + 0.75 + 0.75 + 1.0)
    assert federation.trained("hospital_c") == ["train 3", "calibrate 4"]


def test_a_coordinator_killed_between_rounds_and_in_mid_upload_ends_with_the_very_same_weights(
    federate: "Callable[..., Federation]",
) -> None:
    rough = {"FEDOAP_TEST_ROUGH": "1", "FEDOAP_TEST_ROWS": "4000"}
    quiet, shaken = federate(environment=rough), federate(environment=rough)
    quiet.start_all()
    held = shaken.hold("hospital_b", "train", 2)
    shaken.start_all()

    shaken.wait_for("coordinator", "task_closed", kind="train", round=1)
    shaken.kill("coordinator")
    shaken.start_coordinator("--exit-when-finished")
    stop_in_mid_upload(shaken, "hospital_b", held.unlink)
    shaken.kill("coordinator")
    shaken.processes["hospital_b"].send_signal(signal.SIGCONT)
    shaken.start_coordinator("--exit-when-finished")
    shaken.finish()
    quiet.finish()

    for name, values in quiet.weights().items():
        assert values.tobytes() == shaken.weights()[name].tobytes()
    assert shaken.trained("hospital_b") == ["train 1", "train 2", "calibrate 3"]


def stop_in_mid_upload(federation: "Federation", site: str, begin: Callable[[], None]) -> None:
    """Freeze a node as soon as a part of its upload lies at the coordinator, the others being done."""
    for other in {"hospital_a", "hospital_c"} - {site}:
        federation.wait_for("coordinator", "site_committed", site=other, kind="train", round=2)
    begin()
    deadline = time.monotonic() + 20
    while not any((federation.root / "state/parts").iterdir()):
        assert time.monotonic() < deadline, federation.said("coordinator")
        time.sleep(0.001)
    federation.processes[site].send_signal(signal.SIGSTOP)
    committed = [row for row in federation.log("coordinator") if row["event"] == "site_committed"]
    assert ("train", 2, site) not in {(row["kind"], row["round"], row["site"]) for row in committed}


def test_a_site_revoked_in_mid_round_leaves_with_one_line_and_the_others_finish(
    federate: "Callable[..., Federation]",
) -> None:
    federation = federate(rounds=1, quorum=2)
    federation.hold("hospital_c", "train", 1)
    the_end = federation.hold("hospital_a", "calibrate", 2)
    federation.start_all()
    federation.wait_for("hospital_c", "work_started", kind="train", round=1)

    federation.command("revoke", "hospital_c")

    assert federation.ended("hospital_c") == 2
    assert "revoked" in federation.said("hospital_c").splitlines()[-1]
    federation.start_node("hospital_c")
    assert federation.ended("hospital_c") == 2
    assert "its key is not enrolled" in federation.said("hospital_c").splitlines()[-1]
    federation.wait_for("coordinator", "refused", site="hospital_c", code="revoked")
    the_end.unlink()
    federation.finish()
    assert np.array_equal(federation.weights()["decoder.weight"], FIRST + 0.75)


def test_a_worker_s_error_stays_at_the_site_and_the_coordinator_hears_only_that_it_failed(
    federate: "Callable[..., Federation]",
) -> None:
    federation = federate(rounds=1, quorum=2, environment={"FEDOAP_TEST_FAIL": "hospital_c"})
    federation.start_all()

    federation.finish()

    assert "mask of patient Miller is empty (ended with exit code 1)" in federation.said("hospital_c")
    failed = next(row for row in federation.log("coordinator") if row["event"] == "site_failed")
    assert failed["reason"] == "the worker ended with exit code 1; the site's own log says why"
    assert "Miller" not in federation.said("coordinator")
