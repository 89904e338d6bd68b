"""How a federation stands, for the console, the log and the tests: a frozen view of the coordinator."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

from fedoap.manifests import TaskKind

SiteState: TypeAlias = Literal[
    "absent", "idle", "working", "waiting", "uploading", "committed", "failed", "silent", "revoked"
]
"""`absent` never came or took its leave; `waiting` has offered its result and others are ahead of it."""
RunState: TypeAlias = Literal["waiting", "open", "merging", "finished", "stopped"]


@dataclass(frozen=True, slots=True)
class SiteStatus:
    """One site of the configuration."""

    name: str
    state: SiteState
    heard_seconds: float | None = None
    """Seconds since its last message, or None where there was none since the coordinator's start."""
    stage: str = ""
    step: int = 0
    steps: int = 0
    loss: float = 0.0
    dice: float = -1.0
    """Mean validation Dice, or -1 while there is none."""
    received: int = 0
    """Bytes of its upload that have arrived, of `size`."""
    size: int = 0
    software: str = ""
    """What it said that it runs when it was let in last; empty before."""


@dataclass(frozen=True, slots=True)
class Status:
    """The whole federation; `kind`, `round` and `attempt` are those of the exchange under way or due next."""

    state: RunState
    reason: str
    kind: TaskKind | None
    round: int
    rounds: int
    attempt: int
    seconds: float
    """Since the exchange was opened, 0 where none is."""
    deadline_seconds: float
    """Until the exchange's deadline, 0 where none is open."""
    sites: tuple[SiteStatus, ...]
