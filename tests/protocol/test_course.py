import pytest

from fedoap.config import BankConfig, NetworkConfig, Plan
from fedoap.protocol.course import course


@pytest.mark.parametrize(
    ("rounds", "every", "expected"),
    [(3, 1, [2, 3, 4]), (6, 2, [2, 4, 6, 7]), (6, 3, [2, 5, 7]), (4, 100, [2, 5]), (1, 5, [2])],
)
def test_the_bank_is_renewed_every_so_many_rounds_and_before_the_calibration(
    rounds: int, every: int, expected: list[int]
) -> None:
    """Planted bugs: none before the calibration; the first one late."""
    plan = Plan(
        federation="trial",
        rounds=rounds,
        network=NetworkConfig(attention="joint"),
        bank=BankConfig(refresh_every=every),
    )

    steps = course(plan)

    assert [step.round for step in steps if step.kind in ("seed", "bank")] == expected
    assert [step.kind for step in steps if step.round == 2 and step.kind in ("seed", "bank")] == ["seed"]
    assert [step.round for step in steps if step.kind in ("train", "calibrate")] == [*range(1, rounds + 2)]
