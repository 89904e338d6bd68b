"""When a round opens, when it closes, and what a restart makes of it."""

import pytest

from desk import Desk
from federation_builders import FEDERATION_SECRET, config, public, roster
from fedoap.identity import TASK_CONTEXT, is_signed
from fedoap.messages import Ack, Failed, Get, Idle, Proceed, Progress, Refuse, Sync, Task
from fedoap.protocol.events import (
    Aggregate,
    AggregateFailed,
    Note,
    RecordClosed,
    RecordOpened,
    RosterChanged,
    Send,
    SendBlob,
)


def _due(desk: Desk, site: str, task: bytes = b"") -> object:
    (answer,) = desk.say(site, Sync(task))
    return answer


def _reason(desk: Desk, site: str) -> str:
    answer = _due(desk, site)
    assert isinstance(answer, Idle)
    return answer.reason


def _closed(desk: Desk) -> list[tuple[str, int, int, str]]:
    return [(one.kind, one.round, one.attempt, one.outcome) for one in desk.history.closed]


def test_a_federation_runs_from_first_weights_to_calibration() -> None:
    desk = Desk()
    desk.join(*desk.config.sites)
    while desk.history.open is not None:
        desk.do()

    assert [(kind, number) for kind, number, _, _ in _closed(desk)] == [
        ("init", 0),
        ("train", 1),
        ("seed", 2),
        ("train", 2),
        ("bank", 3),
        ("calibrate", 3),
    ]
    assert _due(desk, "alpha") == Idle("finished", "all 2 rounds are done")
    assert Note("finished") in desk.effects
    assert desk.machine.status().state == "finished"


def test_without_a_bank_there_are_only_rounds_of_training() -> None:
    desk = Desk(config=config(has_bank=False, rounds=3))
    desk.join(*desk.config.sites)
    while desk.history.open is not None:
        desk.do()

    assert [kind for kind, _, _, _ in _closed(desk)] == ["init", "train", "train", "train", "calibrate"]


def test_nothing_is_merged_after_calibration() -> None:
    desk = Desk(config=config(has_bank=False, rounds=1))
    desk.join(*desk.config.sites)
    while desk.history.open is not None:
        desk.do()

    assert [one.manifest.kind for one in desk.effects if isinstance(one, Aggregate)] == ["init", "train"]


def test_a_task_is_on_record_before_any_site_hears_of_it_and_is_signed() -> None:
    desk = Desk()
    desk.join(*desk.config.sites)

    record = next(at for at, one in enumerate(desk.effects) if isinstance(one, RecordOpened))
    send = next(at for at, one in enumerate(desk.effects) if isinstance(one, Send) and isinstance(one.message, Task))
    effect = desk.effects[send]

    assert record < send
    assert isinstance(effect, Send)
    assert isinstance(effect.message, Task)
    assert is_signed(public(FEDERATION_SECRET), effect.message.signature, TASK_CONTEXT, effect.body)


def test_a_round_is_closed_on_record_before_the_next_is_opened() -> None:
    desk = Desk()
    desk.to_train()

    kinds = [type(one) for one in desk.effects if isinstance(one, RecordOpened | RecordClosed)]

    assert kinds == [RecordOpened, RecordClosed, RecordOpened]


def test_the_first_exchange_waits_for_a_quorum_and_names_who_is_missing() -> None:
    desk = Desk(config=config(quorum=2))
    desk.join("beta")

    assert desk.history.open is None
    reason = "1 of 3 sites are here, quorum is 2: waiting for alpha (not here yet), gamma (not here yet)"
    assert _reason(desk, "beta") == reason


def test_with_a_quorum_the_others_have_time_to_come() -> None:
    desk = Desk(config=config(quorum=2))
    desk.join("alpha", "beta")
    desk.wait(59.0)
    assert desk.history.open is None

    desk.say("alpha", Sync(b""))
    desk.say("beta", Sync(b""))
    desk.wait(1.0)

    assert desk.task.kind == "init"


def test_when_all_are_here_nobody_waits() -> None:
    desk = Desk(config=config(quorum=2))
    desk.join("alpha", "beta", "gamma")

    assert desk.task.kind == "init"


def test_a_site_that_was_revoked_before_the_start_is_not_waited_for() -> None:
    desk = Desk(config=config(quorum=2), roster=roster("gamma"))
    desk.join("alpha", "beta")

    assert desk.task.kind == "init"


def test_a_roster_below_the_quorum_is_the_reason_to_wait() -> None:
    desk = Desk(config=config(quorum=2))
    desk.join("alpha")

    desk.handle(RosterChanged(roster("beta", "gamma")))

    assert _reason(desk, "alpha") == "quorum is 2, but only 1 of 3 sites are enrolled and not revoked"


def test_a_site_in_the_cohort_is_told_to_go_on_and_one_that_is_done_to_wait() -> None:
    desk = Desk()
    desk.to_train()
    desk.commit("alpha")

    assert isinstance(_due(desk, "beta"), Task)
    assert _due(desk, "beta", desk.open.task) == Proceed(desk.open.task)
    assert _reason(desk, "alpha") == "train of round 1: waiting for beta, gamma, for 10 minutes at most"


def test_a_failed_site_is_not_waited_for_and_takes_part_in_the_next_round() -> None:
    desk = Desk(config=config(quorum=2))
    desk.to_train()
    task = desk.open.task
    desk.commit("alpha", "beta")

    assert desk.say("gamma", Failed(task, "out of memory"))[0] == Ack(task)

    assert _closed(desk)[-1] == ("train", 1, 1, "done")
    assert desk.task.cohort == ("alpha", "beta", "gamma")


def test_a_failure_reported_twice_is_acknowledged_twice() -> None:
    desk = Desk(config=config(quorum=2))
    desk.to_train()
    task = desk.open.task

    assert desk.say("gamma", Failed(task, "out of memory")) == [Ack(task)]
    assert desk.say("gamma", Failed(task, "out of memory")) == [Ack(task)]
    assert isinstance(_due(desk, "gamma"), Idle)


def test_a_silent_site_is_not_waited_for_once_there_is_a_quorum() -> None:
    desk = Desk(config=config(quorum=2))
    desk.to_train()
    desk.commit("alpha", "beta")
    assert desk.task.kind == "train"

    effects = desk.wait(60.5)

    assert Note("site_silent", {"site": "gamma"}) in effects
    assert _closed(desk)[-1] == ("train", 1, 1, "done")


def test_a_site_that_is_heard_is_waited_for() -> None:
    desk = Desk(config=config(quorum=2))
    desk.to_train()
    desk.commit("alpha", "beta")
    for _ in range(9):
        desk.wait(59.0)
        desk.say("gamma", Sync(desk.open.task))

    assert desk.task.kind == "train"


def test_a_silent_site_is_waited_for_while_there_is_no_quorum() -> None:
    desk = Desk()
    desk.to_train()
    desk.commit("alpha", "beta")

    desk.wait(300.0)

    assert desk.task.round == 1
    assert desk.machine.status().sites[2].state == "silent"


def test_a_deadline_with_a_quorum_closes_the_round_without_those_that_are_late() -> None:
    desk = Desk(config=config(quorum=2))
    desk.to_train()
    desk.commit("alpha", "beta")
    for _ in range(10):
        desk.wait(59.0)
        desk.say("gamma", Sync(desk.open.task))
    late = desk.open.task

    desk.wait(11.0)

    assert _closed(desk)[-1] == ("train", 1, 1, "done")
    assert desk.history.closed[-1].task == late


def test_a_deadline_without_a_quorum_starts_the_round_anew() -> None:
    desk = Desk()
    desk.to_train()
    desk.commit("alpha", "beta")
    before = desk.task

    desk.wait(601.0)
    desk.join("alpha", "beta", "gamma")

    assert _closed(desk)[-1] == ("train", 1, 1, "unattended")
    assert desk.task.attempt == 2
    assert desk.task.work == before.work


def test_too_many_failures_for_a_quorum_start_the_round_anew_after_a_growing_pause() -> None:
    """Planted bug: no pause, so that one broken worker uses up all attempts before its operator can look."""
    desk = Desk(config=config(quorum=2))
    desk.to_train()
    task = desk.open.task

    desk.say("alpha", Failed(task, "no data"))
    desk.say("beta", Failed(task, "no data"))

    reason = "0 of 3 sites committed, but 2 are needed; alpha failed: no data; beta failed: no data; gamma was still"
    assert desk.history.closed[-1].reason == f"{reason} at work"
    assert desk.machine.status().reason.startswith("train of round 1 is tried again in 30 s; it failed because 0 of 3")
    desk.idle(29.0)
    assert desk.history.open is None
    desk.idle(2.0)
    assert desk.task.attempt == 2

    for site in ("alpha", "beta"):
        desk.say(site, Failed(desk.open.task, "no data"))
    desk.idle(119.0)
    assert desk.history.open is None
    desk.idle(2.0)
    assert desk.task.attempt == 3


def test_after_the_last_attempt_the_run_stops_and_says_why() -> None:
    desk = Desk(config=config(attempts=2))
    desk.to_train()
    for _ in range(2):
        desk.idle(31.0)
        desk.say("alpha", Failed(desk.open.task, "no data"))

    answer = _due(desk, "alpha")

    assert isinstance(answer, Idle)
    assert answer.state == "stopped"
    assert answer.reason.startswith("train of round 1 failed 2 times, last because 0 of 3 sites committed")
    assert desk.machine.status().state == "stopped"


def test_a_stopped_run_goes_on_with_more_attempts() -> None:
    desk = Desk(config=config(attempts=1))
    desk.to_train()
    desk.say("alpha", Failed(desk.open.task, "no data"))
    desk.config = config(attempts=2)

    desk.boot()
    desk.join(*desk.config.sites)

    assert desk.task.attempt == 2


def test_first_weights_are_asked_of_another_site_when_the_first_fails_or_falls_silent() -> None:
    desk = Desk()
    desk.join(*desk.config.sites)
    desk.say("alpha", Failed(desk.open.task, "no torch"))
    assert desk.task.cohort == ("beta",)

    desk.now += 50
    for site in ("alpha", "gamma"):
        desk.say(site, Sync(b""))
    desk.wait(11.0)
    assert desk.history.open is None
    desk.say("beta", Sync(b""))
    desk.wait(0.2)

    assert desk.task.cohort == ("gamma",)


def test_a_restart_goes_on_with_the_open_round_and_what_was_committed() -> None:
    desk = Desk()
    desk.to_train()
    desk.commit("alpha", "beta")
    before = desk.open

    desk.boot()
    desk.join("gamma")
    desk.commit("gamma")

    assert _closed(desk)[-1] == ("train", 1, 1, "done")
    assert desk.history.closed[-1].task == before.task


def test_a_crash_between_the_last_commit_and_the_close_does_not_hang_the_round() -> None:
    desk = Desk(merges=False)
    desk.to_train_without_merging()
    desk.merges = True

    desk.boot()

    assert _closed(desk)[-1] == ("init", 0, 1, "done")


def test_a_merge_that_failed_is_tried_again_after_a_growing_pause() -> None:
    desk = Desk()
    desk.to_train()
    desk.merges = False
    desk.do()
    desk.handle(AggregateFailed(desk.open.task, "no space left"))

    assert not [one for one in desk.wait(9.0) if isinstance(one, Aggregate)]
    assert [one for one in desk.wait(1.0) if isinstance(one, Aggregate)]
    desk.handle(AggregateFailed(desk.open.task, "no space left"))
    assert not [one for one in desk.wait(19.0) if isinstance(one, Aggregate)]
    assert "merging failed and is tried again: no space left" in desk.machine.status().reason


def test_a_site_whose_update_cannot_be_merged_is_left_out() -> None:
    desk = Desk(config=config(quorum=2))
    desk.to_train()
    desk.merges = False
    desk.do()

    desk.handle(AggregateFailed(desk.open.task, "slot 2 has a negative count", "beta"))

    merge = [one for one in desk.effects if isinstance(one, Aggregate)][-1]
    assert [update.site for update in merge.updates] == ["alpha", "gamma"]


def test_a_published_blob_is_sent_a_window_at_a_time_and_no_other() -> None:
    desk = Desk()
    desk.to_train()
    model = desk.task.model
    assert model is not None

    effects = desk.handle_say("alpha", Get(model.id, 64, 10_000))
    refused = desk.say("alpha", Get(bytes(32), 0, 64))
    odd = desk.say("alpha", Get(model.id, 7, 64))

    assert effects == [SendBlob(b"alpha", model.id, 64, model.size)]
    assert [one.code for one in (*refused, *odd) if isinstance(one, Refuse)] == ["no_blob", "malformed"]


def test_progress_reaches_the_console_only_while_it_is_about_the_open_task() -> None:
    desk = Desk()
    desk.to_train()
    desk.handle_say("alpha", Progress(desk.open.task, "train", 3, 50, 0.25, 0.5))
    desk.handle_say("beta", Progress(bytes(32), "train", 9, 50, 0.25, 0.5))

    alpha, beta, _ = desk.machine.status().sites

    assert (alpha.stage, alpha.step, alpha.steps, alpha.loss, alpha.dice) == ("train", 3, 50, 0.25, 0.5)
    assert beta.step == 0


@pytest.mark.parametrize("quorum", [1, 2])
def test_a_site_that_came_late_to_the_federation_joins_the_next_round(quorum: int) -> None:
    desk = Desk(config=config(quorum=quorum), roster=roster(sites=("alpha", "beta")))
    desk.join("alpha", "beta")
    desk.wait(60.0)
    desk.say("alpha", Sync(b""))
    desk.say("beta", Sync(b""))
    assert desk.task.kind == "init"
    desk.handle(RosterChanged(roster()))
    desk.join("gamma")

    desk.commit(*desk.task.cohort)

    assert desk.task.cohort == ("alpha", "beta", "gamma")
