"""When an exchange is over: the rules, for every state that its cohort can be in."""

from hypothesis import given
from hypothesis import strategies as st

from fedoap.protocol.exchange import Tally

SITES = ("a", "b", "c", "d")


@given(
    st.integers(1, 4),
    st.dictionaries(st.sampled_from(SITES), st.sampled_from(["committed", "failed", "silent"])),
    st.booleans(),
)
def test_a_round_closes_exactly_by_the_rules(quorum: int, states: dict[str, str], is_late: bool) -> None:
    """The rules in words, once more. Planted bug: a silent site that is not waited for without a quorum."""
    of = {state: {site for site in states if states[site] == state} for state in ("committed", "failed", "silent")}
    tally = Tally(SITES, quorum, of["committed"], of["failed"], of["silent"], is_late=is_late)
    committed, awaited = len(of["committed"]), [site for site in SITES if site not in states]
    possible = len(SITES) - len(of["failed"])

    outcome = tally.outcome()

    is_over_in_vain = committed < quorum and (is_late or possible < quorum)
    nobody_failed = not of["failed"] and not awaited
    assert (outcome == "done") == (committed >= quorum and (is_late or not awaited))
    assert (outcome == "abandoned") == (is_over_in_vain and not nobody_failed)
    assert (outcome == "unattended") == (is_over_in_vain and nobody_failed)
