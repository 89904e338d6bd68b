"""Downloads that a restart of the site cut short."""

from bench import MODEL, MODEL_RAW, RESULT, Bench, upload_name
from fedoap.messages import Data, Get, Refuse
from fedoap.protocol.events import DropPart, FinishPart, KeepBlobs, OpenPart, Say, Stopping


def test_a_download_goes_on_behind_what_the_disk_had_at_the_start() -> None:
    bench = Bench(partly={MODEL.id: 64})

    assert bench.give(bench.task()) == [OpenPart(MODEL.id, 152, 64, MODEL), Say(Get(MODEL.id, 64, 152))]
    bench.hear(Data(MODEL.id, 64), MODEL_RAW[64:128])
    assert FinishPart(MODEL.id, MODEL) in bench.hear(Data(MODEL.id, 128), MODEL_RAW[128:])


def test_a_download_that_is_here_to_the_last_byte_is_only_finished() -> None:
    bench = Bench(partly={MODEL.id: 152})

    assert bench.give(bench.task()) == [OpenPart(MODEL.id, 152, 152, MODEL), FinishPart(MODEL.id, MODEL)]


def test_a_download_stays_where_it_is_when_the_node_ends() -> None:
    """Planted bug: `Hand.drop` at the end."""
    bench = Bench()
    bench.give(bench.task())

    assert not [one for one in bench.handle(Stopping()) if isinstance(one, DropPart)]


def test_what_was_fetched_for_a_task_that_came_too_late_goes_with_the_next_one() -> None:
    """Planted bug: blobs deleted after a commit alone, so that a site that is always late fills its disk."""
    bench = Bench(frozenset({MODEL.id}))
    first, second = bench.task(), bench.task(round=2, model=RESULT)
    bench.give(first)
    bench.done(first)
    bench.hear(Refuse("late", "too late", upload_name(first)))

    effects = bench.give(second)

    assert effects[:2] == [KeepBlobs(frozenset({RESULT.id})), OpenPart(RESULT.id, RESULT.size, 0, RESULT)]


def test_another_attempt_at_the_same_work_deletes_nothing() -> None:
    """Planted bug: blobs let go with their task, and fetched again for each attempt."""
    bench = Bench(frozenset({MODEL.id}))
    bench.give(bench.task())

    assert bench.give(bench.task(attempt=2)) == []


def test_a_part_that_was_deleted_meanwhile_is_fetched_from_its_first_byte() -> None:
    """Planted bug: what the disk had at the start still counted on, which leaves a hole in the blob."""
    bench = Bench(partly={MODEL.id: 64})

    assert KeepBlobs(frozenset({RESULT.id})) in bench.give(bench.task(model=RESULT))
    assert OpenPart(MODEL.id, 152, 0, MODEL) in bench.give(bench.task(round=2))
