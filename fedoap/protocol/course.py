"""What is due next: the course of a federation as a list that follows from the plan alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from fedoap.config import Plan
from fedoap.protocol.history import ClosedExchange
from fedoap.tensors import TaskKind


@dataclass(frozen=True, slots=True)
class Step:
    """One exchange of the course, whatever the attempt."""

    kind: TaskKind
    round: int

    def __str__(self) -> str:
        """Return the step as an operator reads it."""
        return "first weights" if self.kind == "init" else f"{self.kind} of round {self.round}"


def course(plan: Plan) -> tuple[Step, ...]:
    """Return every exchange of a federation in order.

    >>> from fedoap.config import Plan
    >>> [f"{step.kind}{step.round}" for step in course(Plan(federation="demo", rounds=2))]
    ['init0', 'train1', 'seed2', 'train2', 'bank3', 'calibrate3']
    """
    steps = [Step("init", 0)]
    for number in range(1, plan.rounds + 2):
        if plan.network.has_bank and number >= 2:
            steps.append(Step("seed" if number == 2 else "bank", number))
        steps.append(Step("train" if number <= plan.rounds else "calibrate", number))
    return tuple(steps)


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
