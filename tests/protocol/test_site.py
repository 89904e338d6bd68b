"""What a site does with a task, from the first byte of its model to the commit of its result."""

from dataclasses import replace

import pytest

from bench import MODEL, MODEL_RAW, RESULT, Bench, name, said, started, upload_name
from federation_builders import secret
from fedoap.manifests import HASH_BYTES, Packing
from fedoap.messages import (
    Ack,
    Commit,
    Credit,
    Data,
    Failed,
    Get,
    Go,
    Idle,
    Offer,
    Proceed,
    Progress,
    Refuse,
    Sync,
    Task,
    Wait,
)
from fedoap.protocol.events import (
    BlobFailed,
    BlobStored,
    Committed,
    Disconnected,
    DropPart,
    FinishPart,
    Leave,
    Note,
    OpenPart,
    Say,
    SayChunk,
    SiteEffect,
    StartWork,
    Stopping,
    StopWork,
    WorkFailed,
    WorkProgress,
    WritePart,
)

WAITING = Idle("waiting", "train of round 1: waiting for beta")


@pytest.fixture
def bench() -> Bench:
    """A site that has the model already."""
    return Bench(frozenset({MODEL.id}))


def _offers(effects: list[SiteEffect]) -> list[bytes]:
    return [message.upload for message in said(effects) if isinstance(message, Offer)]


def test_a_task_whose_blobs_are_here_is_started_at_once(bench: Bench) -> None:
    task = bench.task()

    assert bench.give(task) == [StartWork(name(task), task)]


def test_a_missing_model_is_fetched_written_and_durable_before_the_work_starts() -> None:
    bench = Bench()
    task = bench.task()
    assert bench.give(task) == [OpenPart(MODEL.id, 152, 0, MODEL), Say(Get(MODEL.id, 0, 152))]

    chunks = [bench.hear(Data(MODEL.id, at), MODEL_RAW[at : at + 64]) for at in (0, 64, 128)]

    assert [[type(one) for one in effects] for effects in chunks] == [[WritePart], [WritePart], [WritePart, FinishPart]]
    assert bench.handle(BlobStored(MODEL.id)) == [StartWork(name(task), task), Say(Sync(name(task)))]


def test_a_chunk_that_does_not_match_the_signed_hash_is_not_written() -> None:
    bench = Bench()
    bench.give(bench.task())

    (note,) = bench.hear(Data(MODEL.id, 0), bytes(64))

    assert isinstance(note, Note)
    assert note.fields["code"] == "corrupt"


def test_a_download_goes_on_at_the_first_missing_byte_on_a_new_connection() -> None:
    bench = Bench()
    bench.give(bench.task())
    bench.hear(Data(MODEL.id, 0), MODEL_RAW[:64])
    bench.handle(Disconnected())

    assert Get(MODEL.id, 64, 152) in said(bench.connect())


def test_a_download_that_the_disk_refused_is_tried_again_after_a_while() -> None:
    bench = Bench()
    bench.give(bench.task())
    bench.handle(BlobFailed(MODEL.id, "no space left"))

    assert not any(isinstance(one, OpenPart) for one in bench.wait(9))
    assert OpenPart(MODEL.id, 152, 0, MODEL) in bench.wait(1)


PACKED_MODEL = replace(MODEL, packing=Packing(bytes(32), (64,) * (len(MODEL.hashes) // HASH_BYTES)))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"federation": "other"}, "task is federation other's, but this site belongs to demo"),
        ({"plan": bytes(32)}, "task goes by another plan than the coordinator sent"),
        ({"cohort": ("beta",)}, "task is not for site alpha"),
        (
            {"model": PACKED_MODEL},
            "task's model or bank is packed, but only updates may be",
        ),
        ({"round": 77}, "task train of round 77 is not in the plan's course"),
    ],
)
def test_a_task_that_does_not_fit_is_not_done(bench: Bench, changes: dict[str, object], reason: str) -> None:
    assert bench.give(bench.task(**changes)) == [Note("task_refused", {"reason": reason})]


def test_a_task_that_the_federation_did_not_sign_is_not_done(bench: Bench) -> None:
    reason = "task is not signed by the federation's key"

    assert bench.give(bench.task(), key=secret("mallory")) == [Note("task_refused", {"reason": reason})]


def test_a_garbled_task_is_not_done(bench: Bench) -> None:
    (note,) = bench.hear(Task(bytes(32), bytes(64)), b"garbled")

    assert note == Note("task_refused", {"reason": "task does not name its body's hash"})


def test_a_repeated_task_changes_nothing(bench: Bench) -> None:
    bench.give(bench.task())

    assert bench.give(bench.task()) == []
    assert bench.hear(Proceed(name(bench.task()))) == []


def test_an_older_task_that_arrives_late_changes_nothing(bench: Bench) -> None:
    bench.give(bench.task(round=2))

    assert bench.give(bench.task(round=1)) == []


def test_a_site_asks_every_five_seconds_and_names_the_task_in_hand(bench: Bench) -> None:
    bench.give(bench.task())

    assert said(bench.wait(12)) == [Sync(name(bench.task())), Sync(name(bench.task()))]


def test_progress_is_passed_on_while_the_work_runs(bench: Bench) -> None:
    task = bench.task()
    event = WorkProgress("train", 3, 50, 0.25, -1.0)
    assert bench.handle(event) == []
    bench.give(task)

    assert said(bench.handle(event)) == [Progress(name(task), "train", 3, 50, 0.25, -1.0)]
    assert bench.handle(replace(event, loss=float("nan"))) == []


def test_another_task_ends_the_work_on_the_one_before(bench: Bench) -> None:
    first, second = bench.task(), bench.task(round=2)
    bench.give(first)

    assert bench.give(second) == [StopWork(name(first)), StartWork(name(second), second)]


def test_another_attempt_at_the_same_work_lets_it_go_on_and_has_the_result_made_out_anew(bench: Bench) -> None:
    first, second = bench.task(), bench.task(attempt=2)
    bench.give(first)

    assert bench.give(second) == []
    assert bench.done(first) == [StartWork(name(second), second)]
    assert _offers(bench.done(second)) == [upload_name(second)]


def test_a_result_on_its_way_is_made_out_anew_for_another_attempt(bench: Bench) -> None:
    first, second = bench.task(), bench.task(attempt=2)
    bench.give(first)
    bench.done(first)

    assert bench.give(second) == [StartWork(name(second), second)]


def test_work_that_is_not_due_any_more_is_ended(bench: Bench) -> None:
    task = bench.task()
    bench.give(task)

    assert bench.hear(WAITING) == [StopWork(name(task)), Say(Sync(b""))]


def test_a_download_that_is_not_due_any_more_is_dropped() -> None:
    bench = Bench()
    bench.give(bench.task())

    assert DropPart(MODEL.id) in bench.hear(WAITING)


def test_a_task_that_was_dropped_may_come_again(bench: Bench) -> None:
    bench.give(bench.task())
    bench.hear(WAITING)

    assert started(bench.give(bench.task())) == [name(bench.task())]


def test_a_result_is_offered_until_the_coordinator_answers(bench: Bench) -> None:
    bench.give(bench.task())
    first = _offers(bench.done(bench.task()))

    assert first == [upload_name(bench.task())]
    assert _offers(bench.wait(22)) == first * 3


def test_chunks_are_sent_as_far_as_there_is_credit(bench: Bench) -> None:
    bench.give(bench.task())
    bench.done(bench.task())
    upload = upload_name(bench.task())

    assert bench.hear(Go(upload, 0, 64)) == [SayChunk(upload, RESULT.id, 0, 64)]
    assert bench.hear(Credit(upload, 64)) == []
    assert bench.hear(Credit(upload, 152)) == [
        SayChunk(upload, RESULT.id, 64, 64),
        SayChunk(upload, RESULT.id, 128, 24),
    ]
    assert bench.hear(Credit(bytes(32), 152)) == []


def test_a_link_that_takes_half_a_minute_for_a_chunk_is_not_asked_to_start_over(bench: Bench) -> None:
    bench.give(bench.task())
    bench.done(bench.task())
    bench.hear(Go(upload_name(bench.task()), 0, 152))

    assert _offers(bench.wait(29)) == []
    assert _offers(bench.wait(1)) == [upload_name(bench.task())]


def test_a_site_that_has_to_wait_offers_again_a_little_later(bench: Bench) -> None:
    bench.give(bench.task())
    bench.done(bench.task())
    bench.hear(Wait(upload_name(bench.task())))

    assert _offers(bench.wait(4)) == []
    assert _offers(bench.wait(1)) == [upload_name(bench.task())]


def test_on_a_new_connection_the_result_is_offered_at_once_and_old_credit_is_void(bench: Bench) -> None:
    bench.give(bench.task())
    bench.done(bench.task())
    upload = upload_name(bench.task())
    bench.hear(Go(upload, 0, 64))
    bench.handle(Disconnected())

    assert _offers(bench.connect()) == [upload]
    assert bench.hear(Credit(upload, 152)) == []


def test_after_the_commit_the_site_asks_at_once_what_is_next(bench: Bench) -> None:
    task = bench.task()
    bench.give(task)
    bench.done(task)

    assert bench.hear(Commit(upload_name(task))) == [Committed(name(task), task), Say(Sync(b""))]
    assert bench.hear(Commit(upload_name(task))) == []


def test_blobs_that_the_daemon_may_have_deleted_are_fetched_again(bench: Bench) -> None:
    first = bench.task(model=None, kind="init", round=0)
    bench.give(first)
    bench.done(first)
    bench.hear(Commit(upload_name(first)))

    assert OpenPart(MODEL.id, 152, 0, MODEL) in bench.give(bench.task())


def test_an_idle_word_while_a_result_is_on_its_way_makes_the_site_ask_after_it(bench: Bench) -> None:
    """Its commit may have been lost, and a result that counted must not be taken for one that did not."""
    bench.give(bench.task())
    bench.done(bench.task())

    assert _offers(bench.hear(WAITING)) == [upload_name(bench.task())]
    assert not any(isinstance(one, Leave) for one in bench.hear(Idle("finished", "all rounds are done")))


@pytest.mark.parametrize("code", ["late", "unknown_task", "foreign", "duplicate"])
def test_a_result_that_nobody_waits_for_is_let_go(bench: Bench, code: str) -> None:
    bench.give(bench.task())
    bench.done(bench.task())

    refuse = Refuse(code, "too late", upload_name(bench.task()))  # type: ignore[arg-type]
    assert bench.hear(refuse) == [Say(Sync(b""))]


@pytest.mark.parametrize("code", ["schema", "not_finite", "cases", "bad_signature", "malformed"])
def test_a_result_that_is_wrong_is_reported_as_a_failure(bench: Bench, code: str) -> None:
    task = bench.task()
    bench.give(task)
    bench.done(task)

    effects = bench.hear(Refuse(code, "tensor a is missing", upload_name(task)))  # type: ignore[arg-type]

    assert said(effects) == [Failed(name(task), "the coordinator refused the result: tensor a is missing")]


def test_a_full_disk_at_the_coordinator_is_waited_for(bench: Bench) -> None:
    bench.give(bench.task())
    bench.done(bench.task())

    effects = bench.hear(Refuse("no_space", "no space left", upload_name(bench.task())))

    assert Note("upload_refused", {"code": "no_space", "reason": "no space left"}) in effects
    assert _offers(bench.wait(30)) == [upload_name(bench.task())] * 2


def test_a_result_whose_bytes_are_damaged_is_given_up_after_three_times(bench: Bench) -> None:
    task = bench.task()
    bench.give(task)
    bench.done(task)
    corrupt = Refuse("corrupt", "chunk at byte 0 does not match", upload_name(task))

    assert [bool(said(bench.hear(corrupt))) for _ in range(3)] == [False, False, True]


def test_a_failure_is_reported_until_it_is_acknowledged_and_then_the_site_is_free(bench: Bench) -> None:
    task = bench.task()
    bench.give(task)
    failed = Failed(name(task), "out of memory")

    assert said(bench.handle(WorkFailed(name(task), "out of memory"))) == [failed]
    assert failed in said(bench.wait(5))
    assert said(bench.hear(Ack(name(task)))) == [Sync(b"")]
    assert bench.give(task) == []
    assert started(bench.give(bench.task(round=2))) == [name(bench.task(round=2))]


def test_what_the_worker_says_about_another_task_changes_nothing(bench: Bench) -> None:
    bench.give(bench.task())
    other = bench.task(round=2)

    assert bench.done(other) == []
    assert bench.handle(WorkFailed(name(other), "out of memory")) == []


def test_work_goes_on_while_the_connection_is_down(bench: Bench) -> None:
    task = bench.task()
    bench.give(task)
    bench.handle(Disconnected())

    assert bench.done(task) == []
    assert _offers(bench.connect()) == [upload_name(task)]


def test_when_all_is_done_the_site_takes_its_leave_once_and_asks_seldom(bench: Bench) -> None:
    finished = Idle("finished", "all 2 rounds are done")

    assert bench.hear(finished) == [Leave("finished", "all 2 rounds are done")]
    assert bench.hear(finished) == []
    assert len(said(bench.wait(60))) == 2


def test_a_federation_that_was_stopped_and_goes_on_finds_the_site_there(bench: Bench) -> None:
    bench.hear(Idle("stopped", "train of round 1 failed 5 times"))
    bench.give(bench.task())

    assert bench.hear(Idle("stopped", "again")) == [
        StopWork(name(bench.task())),
        Leave("stopped", "again"),
        Say(Sync(b"")),
    ]


def test_a_site_that_is_stopped_ends_its_work_and_says_goodbye(bench: Bench) -> None:
    bench.give(bench.task())

    effects = bench.handle(Stopping())

    assert effects[0] == StopWork(name(bench.task()))
    assert [message.type for message in said(effects)] == ["bye"]
    assert bench.wait(60) == []


def test_a_result_made_out_for_an_attempt_that_is_over_is_not_offered(bench: Bench) -> None:
    first, second = bench.task(), bench.task(round=2)
    bench.give(first)
    bench.give(second)

    assert bench.done(first) == []
