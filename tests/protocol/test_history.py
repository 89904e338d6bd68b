from dataclasses import replace

from desk import Desk, code_of
from federation_builders import config, roster
from fedoap.protocol.events import Aggregate, RecordClosed, RecordOpened, RosterChanged, Update
from fedoap.protocol.history import History, Revoked, after, replay


def _desk() -> Desk:
    desk = Desk()
    desk.to_train()
    desk.commit("beta", "alpha")
    return desk


def test_what_the_machine_believes_is_what_its_records_tell() -> None:
    desk = _desk()

    assert replay(desk.records) == desk.machine._rounds.history


def test_a_whole_run_is_replayed_to_the_same_model_and_bank() -> None:
    desk = Desk()
    desk.join(*desk.config.sites)
    while desk.history.open is not None:
        desk.do()

    history = replay(desk.records)

    assert history.model is not None
    assert history.bank is not None
    assert history.schema == history.model.tensors
    assert history == desk.machine._rounds.history


def test_updates_are_sorted_by_site_whatever_their_order() -> None:
    opened = replay(_desk().records).open

    assert opened is not None
    assert [update.site for update in opened.updates] == ["alpha", "beta"]


def test_a_second_update_of_a_site_and_one_of_another_task_add_nothing() -> None:
    history = replay(_desk().records)
    assert history.open is not None
    update = history.open.updates[0]
    foreign = replace(update, site="gamma", manifest=replace(update.manifest, task=bytes(32)))

    assert after(history, replace(update, upload=bytes(32))) == history
    assert after(history, foreign) == history


def test_the_close_of_a_task_that_is_not_open_adds_nothing() -> None:
    history = replay(_desk().records)

    assert after(history, RecordClosed(bytes(32), "done", (), None)) == history


def test_an_abandoned_exchange_publishes_nothing() -> None:
    desk = _desk()
    before = replay(desk.records)

    history = after(before, RecordClosed(desk.open.task, "abandoned", (), None, "no quorum"))

    assert (history.model, history.bank, history.open) == (before.model, before.bank, None)
    assert history.closed[-1].reason == "no quorum"


def test_records_come_in_the_order_opened_updates_closed() -> None:
    kinds = [type(record) for record in _desk().records]

    assert kinds == [RecordOpened, Update, RecordClosed, RecordOpened, Update, Update]


def test_nothing_recorded_is_an_empty_history() -> None:
    assert replay([]) == History()
    assert History().schema is None


def test_what_was_sent_under_a_revoked_key_counts_after_no_restart_though_the_site_joined_anew() -> None:
    """Planted bug: revoked is who is revoked at the start."""
    desk = Desk(config=config(quorum=2))
    desk.to_train()
    desk.commit("alpha")
    desk.records.append(Revoked("alpha"))

    desk.boot()
    desk.join(*desk.config.sites)
    desk.commit("beta", "gamma")

    merges = [one for one in desk.effects if isinstance(one, Aggregate) and one.manifest.kind == "train"]
    assert [[update.site for update in merge.updates] for merge in merges] == [["beta", "gamma"]]


def test_a_revocation_is_forgotten_with_the_exchange() -> None:
    desk = _desk()
    revoked = replay([*desk.records, Revoked("alpha")])
    assert revoked.open is not None
    assert revoked.open.revoked == {"alpha"}

    closed = after(revoked, RecordClosed(desk.open.task, "abandoned", (), None))

    assert after(closed, Revoked("alpha")) == closed


def test_a_site_that_was_revoked_and_joined_anew_takes_part_from_the_next_exchange_on() -> None:
    """Planted bug: an offer takes it back into this one, as a site that had failed; a restart does not."""
    desk = Desk(config=config(quorum=2))
    desk.to_train()
    manifest, _ = desk.result("alpha")
    desk.handle(RosterChanged(roster("alpha")))
    desk.handle(RosterChanged(roster()))
    desk.join("alpha")

    assert code_of(desk.offer("alpha", manifest)) == "foreign"
    desk.commit("beta", "gamma")
    assert "alpha" in desk.task.cohort
