"""What a simulation shows of itself while the coordinator's log grows."""

from io import StringIO

from rich.console import Console

from fedoap.config import BankConfig, Plan
from fedoap.protocol.course import course
from fedoap.simulation.display import Display


def test_the_bar_is_full_after_the_last_exchange_though_not_every_round_renews_the_bank() -> None:
    """First weights, 4 rounds, banks before rounds 2 and 5, calibration: 8. Planted bug: a bank every round."""
    plan = Plan(federation="f", rounds=4, bank=BankConfig(refresh_every=3))
    display = Display(Console(file=StringIO()), plan, ["a"])

    for step in course(plan):
        display.show(
            {"event": "task_closed", "kind": step.kind, "round": step.round, "outcome": "done", "seconds": 1.0}
        )

    (whole, _) = display._progress.tasks
    assert (whole.completed, whole.total) == (8, 8)
