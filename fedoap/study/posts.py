"""What goes to and fro between the machines of a federation in one process: events, addressed."""

from dataclasses import dataclass
from typing import TypeAlias

from fedoap.protocol.events import CoordinatorEvent, SiteEvent


@dataclass(frozen=True, slots=True)
class ToCoordinator:
    """An event for the coordinator's machine."""

    event: CoordinatorEvent


@dataclass(frozen=True, slots=True)
class ToSite:
    """An event for one site's machine."""

    site: str
    event: SiteEvent


Post: TypeAlias = ToCoordinator | ToSite
