"""What the machines of a federation in one process send each other: events with an address."""

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
