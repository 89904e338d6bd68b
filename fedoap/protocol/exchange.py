"""One exchange: a task, its cohort, what came back, and when it is over."""

from collections.abc import Callable, Set
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from fedoap.chain import Outcome
from fedoap.manifests import TaskManifest
from fedoap.protocol.course import Step
from fedoap.protocol.events import Update
from fedoap.protocol.history import OpenExchange

Standing: TypeAlias = Outcome | Literal["open"]


@dataclass(frozen=True, slots=True)
class Tally:
    """How the cohort stands; a site is in at most one of `committed` and `failed`."""

    cohort: tuple[str, ...]
    quorum: int
    committed: Set[str] = frozenset()
    failed: Set[str] = frozenset()
    silent: Set[str] = frozenset()
    is_late: bool = False
    """Whether the deadline has passed."""
    is_movable: bool = False
    """Whether any other site would give the same result: then a silent one's return is not waited for."""

    @property
    def missing(self) -> tuple[str, ...]:
        """The sites that may still commit."""
        return tuple(site for site in self.cohort if site not in self.committed and site not in self.failed)

    def outcome(self) -> Standing:
        """Return whether the exchange is over.

        >>> Tally(("a", "b", "c"), 2, committed={"a", "b"}).outcome()
        'open'
        >>> Tally(("a", "b", "c"), 2, committed={"a", "b"}, silent={"c"}).outcome()
        'done'
        >>> Tally(("a", "b", "c"), 2, committed={"a"}, failed={"b", "c"}).outcome()
        'abandoned'
        >>> Tally(("a", "b", "c"), 2, committed={"a"}, silent={"b", "c"}, is_late=True).outcome()
        'unattended'
        """
        enough = len(self.committed) >= self.quorum
        waited_for = [site for site in self.missing if site not in self.silent]
        if enough and (self.is_late or not waited_for):
            return "done"
        hopeless = len(self.committed) + len(self.missing) < self.quorum
        moves = self.is_movable and not waited_for
        if not (self.is_late or hopeless or moves):
            return "open"
        is_silence_alone = bool(self.missing) and not waited_for and not self.failed
        return "unattended" if is_silence_alone else "abandoned"


@dataclass(slots=True)
class Exchange:
    """What the coordinator keeps in memory of the open exchange; what is durable of it is in the history."""

    manifest: TaskManifest
    task: bytes
    opened_at: float
    quorum: int
    failed: dict[str, str] = field(default_factory=dict)
    """Sites that cannot do it, and why; a site that was revoked is one of them."""
    merging: tuple[Update, ...] | None = None
    """The updates that enter the result, fixed once the exchange has closed; none before."""
    merge_failures: int = 0
    merge_again_at: float | None = None
    merge_reason: str = ""
    cohort: frozenset[str] = field(init=False)
    listened_from: float = field(init=False)
    """From when on silence counts."""

    def __post_init__(self) -> None:
        self.cohort = frozenset(self.manifest.cohort)
        self.listened_from = self.opened_at

    @property
    def step(self) -> Step:
        """What is being done."""
        return Step(self.manifest.kind, self.manifest.round)

    @property
    def deadline(self) -> float:
        """When it ends, with a quorum or without."""
        return self.opened_at + self.manifest.deadline_seconds

    def awaits(self, site: str, opened: OpenExchange) -> bool:
        """Return whether the site still owes its result."""
        if self.merging is not None or site in self.failed or site not in self.cohort:
            return False
        return all(update.site != site for update in opened.updates)

    def missing(self, opened: OpenExchange | None) -> tuple[str, ...]:
        """Return the sites whose results are still awaited."""
        done = {update.site for update in opened.updates} if opened else set()
        return tuple(site for site in self.manifest.cohort if site not in done and site not in self.failed)

    def counted(self, opened: OpenExchange) -> tuple[Update, ...]:
        """Return the updates that would enter the result now, sorted by site."""
        return tuple(update for update in opened.updates if update.site not in self.failed)

    def tally(self, opened: OpenExchange, is_silent: Callable[[str], bool], now: float) -> Tally:
        """Return how the cohort stands now."""
        committed = {update.site for update in self.counted(opened)}
        is_movable = self.manifest.kind == "init"
        is_late = now >= self.deadline
        # silence decides nothing before there is a quorum, and asking after it takes time for each site
        decides = len(committed) >= self.quorum or is_movable or is_late
        return Tally(
            self.manifest.cohort,
            self.quorum,
            committed,
            self.failed.keys(),
            frozenset(filter(is_silent, self.missing(opened))) if decides else frozenset(),
            is_late=is_late,
            is_movable=is_movable,
        )
