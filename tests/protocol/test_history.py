from dataclasses import replace

from desk import Desk
from fedoap.protocol.events import RecordClosed, RecordOpened, Update
from fedoap.protocol.history import History, after, replay


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
