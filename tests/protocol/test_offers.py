"""Bad results, each refused with its reason before it can touch the sum."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from desk import Arrays, Desk, code_of, offer_of, with_nan
from federation_builders import CHUNK_BYTES, blob, config, roster, secret
from fedoap.identity import UPLOAD_CONTEXT, sign
from fedoap.messages import Chunk, Commit, Credit, Failed, Go, Idle, Offer, Refuse, Sync, Wait
from fedoap.protocol.events import (
    Aggregate,
    DropPart,
    FinishPart,
    OpenPart,
    RosterChanged,
    Send,
    Stopping,
    StoreFailed,
    SyncPart,
    WritePart,
)
from fedoap.seal import TAG_BYTES
from simulated.training import SHAPES

GOOD: Arrays = {name: np.ones(shape, np.float32) for name, shape in SHAPES.items()}


@pytest.fixture
def desk() -> Desk:
    desk = Desk()
    desk.to_train()
    return desk


def _upload(desk: Desk, arrays: Arrays, site: str = "alpha") -> list[object]:
    manifest, raw = desk.result(site, arrays)
    return [*desk.offer(site, manifest), *desk.send(site, manifest, raw)]


def _refusal(answers: Sequence[object]) -> tuple[str, str]:
    first = next(one for one in answers if isinstance(one, Refuse))
    return first.code, first.reason


def test_a_good_result_is_committed(desk: Desk) -> None:
    manifest, raw = desk.result("alpha", GOOD)
    upload = hashlib.sha256(manifest.pack()).digest()

    assert desk.offer("alpha", manifest) == [Go(upload, 0, len(raw))]
    assert desk.send("alpha", manifest, raw) == [Credit(upload, len(raw)), Credit(upload, len(raw)), Commit(upload)]


@pytest.mark.parametrize("name", sorted(SHAPES))
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_is_refused_and_its_tensor_named(desk: Desk, name: str, value: float) -> None:
    spoilt = with_nan(GOOD, name)
    spoilt[name].flat[-1] = value

    assert _refusal(_upload(desk, spoilt)) == ("not_finite", f"tensor {name} holds a number that is not finite")


def test_a_result_that_is_not_finite_leaves_nothing_behind(desk: Desk) -> None:
    manifest, _ = desk.result("alpha", with_nan(GOOD, "norm.bias"))
    upload = hashlib.sha256(manifest.pack()).digest()

    _upload(desk, with_nan(GOOD, "norm.bias"))

    assert DropPart(upload) in desk.effects
    assert not [one for one in desk.effects if isinstance(one, FinishPart) and one.part == upload]
    assert not desk.open.updates


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({**GOOD, "norm.bias": np.ones(4, np.float32)}, "tensor norm.bias is float32 [4], but must be float32 [3]"),
        ({**GOOD, "norm.bias": np.ones(3, np.int64)}, "tensor norm.bias is int64 [3], but must be float32 [3]"),
        ({"conv.weight": GOOD["conv.weight"]}, "tensor norm.bias is missing"),
        ({**GOOD, "extra": np.ones(1, np.float32)}, "tensor extra is not one of those that train returns"),
        (
            {**GOOD, "personal.head.weight": np.ones(1, np.float32)},
            "tensor personal.head.weight is not one of those that train returns",
        ),
    ],
)
def test_a_table_other_than_the_models_is_refused(desk: Desk, arrays: Arrays, reason: str) -> None:
    manifest, _ = desk.result("alpha", arrays)

    (answer,) = desk.offer("alpha", manifest)

    assert isinstance(answer, Refuse)
    assert (answer.code, answer.reason) == ("schema", reason)


def test_another_dtype_than_the_wires_is_refused(desk: Desk) -> None:
    manifest, _ = desk.result("alpha", GOOD)
    half, _ = blob(GOOD, "bfloat16")

    assert code_of(desk.offer("alpha", replace(manifest, blob=half))) == "schema"


def test_an_offer_whose_bytes_are_not_canonical_is_refused(desk: Desk) -> None:
    """The store would look for it under the hash of the canonical ones. Planted bug: it is taken."""
    body = desk.result("alpha", GOOD)[0].pack().replace(b"\xa5cases\x0c", b"\xa5cases\xcc\x0c")
    offer = Offer(hashlib.sha256(body).digest(), sign(secret("alpha"), UPLOAD_CONTEXT, body))

    assert code_of(desk.say("alpha", offer, body)) == "malformed"


def test_first_weights_may_not_hold_a_personal_part() -> None:
    desk = Desk()
    desk.join(*desk.config.sites)
    manifest, _ = desk.result("alpha", {**GOOD, "personal.head.weight": np.ones(1, np.float32)})

    assert code_of(desk.offer("alpha", manifest)) == "schema"


@pytest.mark.parametrize(
    ("slots", "channels", "code"), [(4, 8, "ok"), (3, 8, "ok"), (5, 8, "schema"), (4, 9, "schema")]
)
def test_sums_for_the_first_bank_may_have_fewer_slots_but_not_more(slots: int, channels: int, code: str) -> None:
    desk = Desk()
    desk.to_train()
    desk.do()
    assert desk.task.kind == "seed"
    sums = {name: np.ones((slots, channels), np.float32) for name in ("keys", "values")}
    counts = {name: np.ones(slots, np.int64) for name in ("counts", "patients")}
    manifest, _ = desk.result("alpha", {**sums, **counts})

    (answer,) = desk.offer("alpha", manifest)

    assert answer.type == "go" if code == "ok" else code_of([answer]) == code


def test_a_calibration_that_brings_tensors_is_refused() -> None:
    desk = Desk(config=config(rounds=1, has_bank=False))
    desk.to_train()
    desk.do()
    assert desk.task.kind == "calibrate"
    manifest, _ = desk.result("alpha", GOOD)

    assert code_of(desk.offer("alpha", manifest)) == "schema"


def test_a_result_that_stands_for_no_case_is_refused(desk: Desk) -> None:
    manifest, _ = desk.result("alpha", GOOD)

    assert code_of(desk.offer("alpha", replace(manifest, cases=0))) == "cases"


def test_a_result_of_another_base_model_is_bound_to_another_task_and_refused(desk: Desk) -> None:
    other, _ = blob({name: 2 * array for name, array in GOOD.items()})
    task = hashlib.sha256(replace(desk.task, model=other).pack()).digest()
    manifest, _ = desk.result("alpha", GOOD)

    assert code_of(desk.offer("alpha", replace(manifest, task=task))) == "unknown_task"


def test_a_result_of_a_round_that_is_over_is_late_and_changes_nothing(desk: Desk) -> None:
    late, _ = desk.result("gamma", {**GOOD, "norm.bias": np.zeros(3, np.float32)})
    desk.do()
    before = desk.history

    assert code_of(desk.offer("gamma", late)) == "late"
    assert desk.history == before


def test_a_result_made_out_for_another_site_is_foreign(desk: Desk) -> None:
    manifest, _ = desk.result("beta", GOOD)

    assert code_of(desk.say("alpha", offer_of(manifest, "alpha"), manifest.pack())) == "foreign"


def test_a_result_of_a_site_outside_the_cohort_is_foreign() -> None:
    desk = Desk()
    desk.join(*desk.config.sites)
    assert desk.task.cohort == ("alpha",)
    manifest, _ = desk.result("beta", GOOD)

    assert code_of(desk.offer("beta", manifest)) == "foreign"


def test_an_offer_signed_by_another_key_is_refused(desk: Desk) -> None:
    manifest, _ = desk.result("alpha", GOOD)

    assert code_of(desk.offer("alpha", manifest, key="beta")) == "bad_signature"


def test_an_offer_whose_body_is_not_what_it_names_is_malformed(desk: Desk) -> None:
    manifest, _ = desk.result("alpha", GOOD)

    assert code_of(desk.say("alpha", offer_of(manifest, "alpha"), manifest.pack() + b"\0")) == "malformed"


def test_a_chunk_with_the_wrong_hash_is_refused_and_the_right_one_still_taken(desk: Desk) -> None:
    manifest, raw = desk.result("alpha", GOOD)
    desk.offer("alpha", manifest)
    upload = hashlib.sha256(manifest.pack()).digest()

    assert code_of(desk.say("alpha", Chunk(upload, 0), bytes(CHUNK_BYTES + TAG_BYTES))) == "corrupt"
    assert Commit(upload) in desk.send("alpha", manifest, raw)


def test_a_chunk_of_the_wrong_length_is_malformed(desk: Desk) -> None:
    manifest, raw = desk.result("alpha", GOOD)
    desk.offer("alpha", manifest)

    message, sealed = desk.chunk(manifest, raw, 0)
    assert code_of(desk.say("alpha", message, sealed[:10])) == "malformed"
    assert code_of(desk.say("alpha", message, raw[:64])) == "malformed"


def test_a_chunk_after_a_gap_is_not_written_and_the_gap_is_asked_for_once(desk: Desk) -> None:
    manifest, raw = desk.result("alpha", GOOD)
    desk.offer("alpha", manifest)
    upload = hashlib.sha256(manifest.pack()).digest()

    assert desk.say("alpha", *desk.chunk(manifest, raw, 64)) == [Go(upload, 0, len(raw))]
    assert desk.say("alpha", *desk.chunk(manifest, raw, 128)) == []
    assert not [one for one in desk.effects if isinstance(one, WritePart) and one.part == upload]


def test_a_repeated_chunk_is_written_once(desk: Desk) -> None:
    manifest, raw = desk.result("alpha", GOOD)
    desk.offer("alpha", manifest)
    upload = hashlib.sha256(manifest.pack()).digest()
    first = desk.say("alpha", *desk.chunk(manifest, raw, 0))

    assert desk.say("alpha", *desk.chunk(manifest, raw, 0)) == first
    assert len([one for one in desk.effects if isinstance(one, WritePart) and one.part == upload]) == 1


def test_a_second_result_of_one_site_is_refused_and_the_first_committed_again(desk: Desk) -> None:
    first, raw = desk.result("alpha", GOOD)
    desk.offer("alpha", first)
    desk.send("alpha", first, raw)
    second, _ = desk.result("alpha", {**GOOD, "norm.bias": np.zeros(3, np.float32)})

    assert code_of(desk.offer("alpha", second)) == "duplicate"
    assert desk.offer("alpha", first) == [Commit(hashlib.sha256(first.pack()).digest())]
    assert len(desk.open.updates) == 1


def test_a_second_result_on_the_same_connection_does_not_disturb_the_first(desk: Desk) -> None:
    first, raw = desk.result("alpha", GOOD)
    desk.offer("alpha", first)
    second, _ = desk.result("alpha", {**GOOD, "norm.bias": np.zeros(3, np.float32)})

    assert code_of(desk.offer("alpha", second)) == "duplicate"
    assert Commit(hashlib.sha256(first.pack()).digest()) in desk.send("alpha", first, raw)


def test_a_site_that_came_back_with_another_result_starts_anew(desk: Desk) -> None:
    lost, _ = desk.result("alpha", GOOD)
    desk.offer("alpha", lost)
    desk.join("alpha", route=b"alpha again")
    fresh, raw = desk.result("alpha", {**GOOD, "norm.bias": np.zeros(3, np.float32)})
    upload = hashlib.sha256(fresh.pack()).digest()

    answers = desk.say("alpha", offer_of(fresh, "alpha"), fresh.pack(), route=b"alpha again")

    assert answers == [Go(upload, 0, len(raw))]
    assert DropPart(hashlib.sha256(lost.pack()).digest()) in desk.effects


def test_an_upload_goes_on_where_it_was_on_a_new_connection(desk: Desk) -> None:
    manifest, raw = desk.result("alpha", GOOD)
    upload = hashlib.sha256(manifest.pack()).digest()
    desk.offer("alpha", manifest)
    desk.say("alpha", *desk.chunk(manifest, raw, 0))
    desk.join("alpha", route=b"alpha again")

    answers = desk.say("alpha", offer_of(manifest, "alpha"), manifest.pack(), route=b"alpha again")

    assert answers == [Go(upload, 64, len(raw))]


def test_an_upload_goes_on_where_it_was_durable_after_a_restart(desk: Desk) -> None:
    manifest, raw = desk.result("alpha", GOOD)
    upload = hashlib.sha256(manifest.pack()).digest()
    desk.offer("alpha", manifest)
    desk.say("alpha", *desk.chunk(manifest, raw, 0))
    desk.boot()
    desk.join(*desk.config.sites)

    answers = desk.offer("alpha", manifest)

    assert answers == [Go(upload, 64, len(raw))]
    assert OpenPart(upload, len(raw) + 3 * TAG_BYTES, 64) in desk.effects
    desk.say("alpha", *desk.chunk(manifest, raw, 64))
    assert desk.say("alpha", *desk.chunk(manifest, raw, 128)) == [Commit(upload)]


def test_after_a_restart_a_site_may_come_back_with_another_result(desk: Desk) -> None:
    lost, raw = desk.result("alpha", GOOD)
    upload = hashlib.sha256(lost.pack()).digest()
    desk.offer("alpha", lost)
    desk.say("alpha", *desk.chunk(lost, raw, 0))
    desk.boot()
    desk.join(*desk.config.sites)
    fresh, _ = desk.result("alpha", {**GOOD, "norm.bias": np.zeros(3, np.float32)})

    assert desk.offer("alpha", fresh) == [Go(hashlib.sha256(fresh.pack()).digest(), 0, len(raw))]
    assert DropPart(upload) in desk.effects


def test_what_has_arrived_is_made_durable_before_the_coordinator_ends(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedoap.transfer.CHECKPOINT_CHUNKS", 32)
    manifest, raw = desk.result("alpha", GOOD)
    upload = hashlib.sha256(manifest.pack()).digest()
    desk.offer("alpha", manifest)
    written = desk.handle_say("alpha", *desk.chunk(manifest, raw, 0))
    assert not [one for one in written if isinstance(one, SyncPart)]

    effects = desk.handle(Stopping())

    (sync,) = [one for one in effects if isinstance(one, SyncPart)]
    assert (sync.part, sync.at, sync.upload, sync.site) == (upload, 64, manifest, "alpha")


def test_a_third_upload_waits_until_one_of_two_is_done(desk: Desk) -> None:
    results = {site: desk.result(site) for site in desk.config.sites}
    third = hashlib.sha256(results["gamma"][0].pack()).digest()
    desk.offer("alpha", results["alpha"][0])
    desk.offer("beta", results["beta"][0])

    assert desk.offer("gamma", results["gamma"][0]) == [Wait(third)]
    assert code_or_type(desk.say("gamma", Chunk(third, 0), results["gamma"][1][:64])) == "wait"
    desk.send("alpha", *results["alpha"])
    assert Send(b"gamma", Go(third, 0, len(results["gamma"][1]))) in desk.effects


def code_or_type(answers: Sequence[object]) -> str:
    (answer,) = answers
    return answer.code if isinstance(answer, Refuse) else str(getattr(answer, "type", ""))


def test_an_upload_that_stands_still_makes_room_and_keeps_what_arrived(desk: Desk) -> None:
    results = {site: desk.result(site) for site in desk.config.sites}
    ids = {site: hashlib.sha256(manifest.pack()).digest() for site, (manifest, _) in results.items()}
    for site, (manifest, _) in results.items():
        desk.offer(site, manifest)
    desk.say("alpha", *desk.chunk(*results["alpha"], 0))
    desk.now += 29.0
    desk.say("beta", *desk.chunk(*results["beta"], 0))

    effects = desk.wait(2.0)

    assert Send(b"alpha", Wait(ids["alpha"])) in effects
    assert Send(b"gamma", Go(ids["gamma"], 0, 152)) in effects
    desk.send("beta", *results["beta"])
    assert Send(b"alpha", Go(ids["alpha"], 64, 152)) in desk.effects


def test_a_full_disk_refuses_the_upload_and_takes_it_when_there_is_room(desk: Desk) -> None:
    manifest, raw = desk.result("alpha", GOOD)
    upload = hashlib.sha256(manifest.pack()).digest()
    desk.offer("alpha", manifest)

    effects = desk.handle(StoreFailed(upload, "no_space", "no space left"))

    assert Send(b"alpha", Refuse("no_space", "no space left", upload)) in effects
    assert code_or_type(desk.say("alpha", *desk.chunk(manifest, raw, 64))) == "wait"
    assert desk.offer("alpha", manifest) == [Go(upload, 0, len(raw))]
    assert Commit(upload) in desk.send("alpha", manifest, raw)


def test_a_late_chunk_and_a_late_failure_are_refused(desk: Desk) -> None:
    task = desk.open.task
    desk.do()
    desk.commit("alpha")

    assert code_of(desk.say("alpha", Chunk(bytes(32), 0), b"x")) == "late"
    assert code_of(desk.say("beta", Failed(task, "too slow"))) == "late"
    assert code_of(desk.say("beta", Failed(bytes(32), "what task"))) == "unknown_task"
    assert code_of(desk.say("alpha", Failed(desk.open.task, "second thoughts"))) == "duplicate"


def test_a_revoked_sites_result_does_not_count(desk: Desk) -> None:
    desk = Desk(config=config(quorum=2))
    desk.to_train()
    desk.commit("alpha")

    desk.handle(RosterChanged(roster("alpha")))
    desk.commit("beta", "gamma")

    (merge,) = [one for one in desk.effects if isinstance(one, Aggregate) and one.manifest.kind == "train"]
    assert [update.site for update in merge.updates] == ["beta", "gamma"]
    assert isinstance(desk.say("beta", Sync(b""))[0], Idle) is False
