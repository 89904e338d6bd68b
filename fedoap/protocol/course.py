"""What is due next: the course of a federation as a list that follows from the plan alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from fedoap.config import Plan
from fedoap.manifests import TaskKind
from fedoap.protocol.history import ClosedExchange


@dataclass(frozen=True, slots=True)
class Step:
    """One exchange of the course, whatever the attempt."""

    kind: TaskKind
    round: int

    def __str__(self) -> str:
        """Return the step as an operator reads it, in rounds that the plan counts.

        >>> [str(Step(*one)) for one in (("init", 0), ("train", 3), ("bank", 4), ("calibrate", 4))]
        ['first weights', 'train of round 3', 'bank after round 3', 'calibration']
        """
        match self.kind:
            case "init":
                return "first weights"
            case "train":
                return f"train of round {self.round}"
            case "seed" | "bank":
                return f"{self.kind} after round {self.round - 1}"
            case "calibrate":
                return "calibration"


def course(plan: Plan) -> tuple[Step, ...]:
    """Return every exchange of a federation in order.

    >>> from fedoap.config import Plan
    >>> [f"{step.kind}{step.round}" for step in course(Plan(federation="demo", rounds=2))]
    ['init0', 'train1', 'seed2', 'train2', 'bank3', 'calibrate3']
    """
    last = plan.rounds + 1
    steps = [Step("init", 0)]
    for number in range(1, last + 1):
        if plan.network.has_bank and number >= 2 and ((number - 2) % plan.bank.refresh_every == 0 or number == last):
            steps.append(Step("seed" if number == 2 else "bank", number))
        steps.append(Step("train" if number < last else "calibrate", number))
    return tuple(steps)


def place(kind: TaskKind | None, number: int, rounds: int) -> str:
    """Return how far a course has come, for a headline; `kind` is that of the step due, None behind the last.

    >>> [place("train", 2, 3), place("bank", 4, 3), place(None, 4, 3)]
    ['round 2 of 3', 'calibration', 'finished']
    """
    if kind is None:
        return "finished"
    return f"round {number} of {rounds}" if number <= rounds else "calibration"


def due(steps: Sequence[Step], closed: Sequence[ClosedExchange]) -> Step | None:
    """Return the first step that is not done, or None where all are."""
    done = sum(one.outcome == "done" for one in closed)
    return steps[done] if done < len(steps) else None


def attempts(closed: Sequence[ClosedExchange]) -> tuple[ClosedExchange, ...]:
    """Return the attempts at the step that is due, all of them in vain, in order."""
    return tuple(takewhile(lambda one: one.outcome != "done", reversed(closed)))[::-1]


def failures(closed: Sequence[ClosedExchange]) -> tuple[ClosedExchange, ...]:
    """Return those attempts that failed: one that sites left by falling silent may well be done on their return."""
    return tuple(one for one in attempts(closed) if one.outcome == "abandoned")
