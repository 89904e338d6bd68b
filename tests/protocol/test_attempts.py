"""Which attempts at a step count against `rounds.attempts`, and which are only repeated."""

from desk import Desk
from federation_builders import config
from fedoap.messages import Failed, Sync
from fedoap.protocol.course import attempts, failures


def _night(desk: Desk) -> None:
    """Let everybody fall silent until after the deadline, then come back."""
    desk.wait(601.0)
    desk.join(*desk.config.sites)


def test_a_federation_whose_sites_are_away_every_night_does_not_end() -> None:
    """Planted bug: every attempt in vain counts."""
    desk = Desk(config=config(attempts=2))
    desk.to_train()
    for _ in range(5):
        _night(desk)

    assert [one.outcome for one in attempts(desk.history.closed)] == ["unattended"] * 5
    assert desk.machine.status().state == "open"
    assert desk.task.attempt == 6


def test_a_night_before_the_first_weights_is_not_counted_either() -> None:
    desk = Desk(config=config(attempts=1))
    desk.join(*desk.config.sites)
    for _ in range(3):
        _night(desk)

    assert (desk.task.kind, desk.task.attempt) == ("init", 4)


def test_failures_are_counted_across_nights_and_restarts() -> None:
    """Planted bug: a night starts the count anew."""
    desk = Desk(config=config(attempts=2))
    desk.to_train()
    desk.say("alpha", Failed(desk.open.task, "no data"))
    desk.idle(31.0)
    _night(desk)
    desk.boot()
    desk.join(*desk.config.sites)
    desk.say("beta", Failed(desk.open.task, "no memory"))

    assert len(failures(desk.history.closed)) == 2
    status = desk.machine.status()
    assert status.state == "stopped"
    assert "train of round 1 failed 2 times, last because" in status.reason
    assert "beta failed: no memory" in status.reason


def test_an_attempt_at_whose_deadline_a_site_is_at_work_counts() -> None:
    """A deadline too short for the work would else be missed for ever."""
    desk = Desk(config=config(attempts=1))
    desk.to_train()
    for _ in range(121):
        desk.now += 5.0
        desk.say("alpha", Sync(desk.open.task))

    desk.wait(0.0)

    assert [one.outcome for one in attempts(desk.history.closed)] == ["abandoned"]
    assert desk.machine.status().state == "stopped"


def test_an_attempt_that_a_site_failed_counts_though_others_are_away() -> None:
    desk = Desk(config=config(attempts=1, quorum=2))
    desk.to_train()
    desk.say("alpha", Failed(desk.open.task, "no data"))

    desk.wait(601.0)

    assert [one.outcome for one in attempts(desk.history.closed)] == ["abandoned"]


def test_a_coordinator_that_was_held_up_does_not_take_its_own_deafness_for_silence() -> None:
    """Planted bug: a sync that takes longer than `silence_seconds` leaves out the sites that were not heard."""
    desk = Desk(config=config(quorum=2))
    desk.to_train()
    desk.commit("alpha")
    desk.now += 61.0
    desk.machine.excuse(61.0)

    desk.commit("beta")

    assert (desk.task.kind, len(desk.open.updates)) == ("train", 2)
    desk.wait(61.0)
    assert (desk.history.closed[-1].kind, desk.history.closed[-1].outcome) == ("train", "done")
