"""What the round makes of an update that the aggregation found too far off: a site fewer, by name."""

from desk import Desk
from federation_builders import config
from fedoap.protocol.events import Aggregate, AggregateFailed, Note, RecordClosed

FIGURES = "site beta: its update lies 160 from the model, but at most 30 counts"


def found_far_off(quorum: int) -> Desk:
    desk = Desk(config=config(quorum=quorum))
    desk.to_train()
    desk.merges = False
    desk.do()
    desk.handle(AggregateFailed(desk.open.task, FIGURES, "beta"))
    return desk


def test_the_site_is_named_with_its_figures_and_the_quorum_merges_without_it() -> None:
    """Planted bug: the aggregation is merely tried again."""
    desk = found_far_off(quorum=2)

    (merge,) = [one for one in desk.effects if isinstance(one, Aggregate)][-1:]
    assert Note("site_failed", {"site": "beta", "reason": FIGURES}) in desk.effects
    assert [update.site for update in merge.updates] == ["alpha", "gamma"]


def test_without_it_there_must_still_be_a_quorum() -> None:
    """Planted bug: a site that was left out counts for the quorum."""
    desk = found_far_off(quorum=3)

    (closed,) = [one for one in desk.effects if isinstance(one, RecordClosed)][-1:]
    assert (closed.outcome, closed.counted, closed.result) == ("abandoned", (), None)
    assert "2 of 3 sites committed, but 3 are needed; beta failed: " + FIGURES in closed.reason
