"""One seed, one world: a coordinator, its sites, and everything that happens between and to them."""

import random

from fedoap.config import FederationConfig
from fedoap.errors import MessageError
from fedoap.messages import FromCoordinator, FromSite, decode_from_coordinator, decode_from_site, encode
from fedoap.protocol.events import Answered, Connected, Disconnected, Malformed, Received
from fedoap.protocol.history import History, replay
from simulated.checks import Checks
from simulated.coordinator import CoordinatorProcess
from simulated.network import Clock, Faults, Network
from simulated.site import SiteProcess

END_SECONDS = 50_000.0


class World:
    """Runs until the federation has finished."""

    def __init__(self, config: FederationConfig, seed: int, faults: Faults) -> None:
        self._rng, self._faults = random.Random(seed), faults
        self.clock = Clock()
        self.checks = Checks(config)
        self._network = Network(self.clock, self._rng, faults)
        self.coordinator = CoordinatorProcess(
            config,
            clock=self.clock,
            rng=self._rng,
            faults=faults,
            checks=self.checks,
            send=self._to_site,
            gone=self._coordinator_gone,
        )
        self.sites = {name: self._site(name, config) for name in config.sites}
        self._routes: dict[str, bytes] = {}
        self._owner: dict[bytes, str] = {}
        self.events = 0

    def _site(self, name: str, config: FederationConfig) -> SiteProcess:
        return SiteProcess(
            name,
            config.plan,
            clock=self.clock,
            rng=self._rng,
            faults=self._faults,
            say=self._to_coordinator,
            gone=self._site_gone,
        )

    def run(self) -> History:
        """Return the history of a federation that has finished.

        Raises:
            AssertionError: an invariant does not hold, or there is no end.
        """
        self.coordinator.boot()
        for site in self.sites.values():
            site.boot()
            self._connect_later(site.name)
        while not self._is_over():
            self.clock.step()
            self.events += 1
            assert self.clock.now < END_SECONDS, f"no end in sight: {self._view()}"
        return replay(self.coordinator.records)

    def _is_over(self) -> bool:
        return all("finished" in site.left for site in self.sites.values())

    def _view(self) -> str:
        machine = self.coordinator.machine
        return "coordinator is down" if machine is None else str(machine.status())

    def _connect_later(self, name: str) -> None:
        self.clock.after(0.1 + self._rng.random() * self._faults.outage / 2, lambda: self._connect(name))

    def _connect(self, name: str) -> None:
        site = self.sites[name]
        if name in self._routes:
            return
        if site.machine is None or self.coordinator.machine is None:
            self._connect_later(name)
            return
        route = self._rng.randbytes(5)
        self._routes[name], self._owner[route] = route, name
        site.handle(Connected())

    def _cut(self, name: str) -> None:
        if self._routes.pop(name, None) is not None:
            self.sites[name].handle(Disconnected())
            self._connect_later(name)

    def _coordinator_gone(self) -> None:
        for name in list(self._routes):
            self._cut(name)

    def _site_gone(self, name: str) -> None:
        self._routes.pop(name, None)
        self._connect_later(name)

    def _to_site(self, route: bytes, message: FromCoordinator, body: bytes) -> None:
        header, name = encode(message), self._owner[route]
        self.checks.sent(header, body)

        def deliver() -> None:
            if self._routes.get(name) == route:
                self.sites[name].handle(Answered(decode_from_coordinator(header, len(body)), body))

        self._network.carry(deliver)

    def _to_coordinator(self, name: str, message: FromSite, body: bytes) -> None:
        route = self._routes.get(name)
        if route is None:
            return  # the connection broke under its hands
        header, life = encode(message), self.coordinator.life
        self.checks.sent(header, body)
        self.checks.site_says(route, message, len(body))
        if self._rng.random() < self._faults.cut:
            self.clock.after(0.0, lambda: self._cut(name))

        def deliver() -> None:
            if life == self.coordinator.life:
                self.coordinator.handle(_event(name, route, header, body))

        self._network.carry(deliver)


def _event(name: str, route: bytes, header: bytes, body: bytes) -> Received | Malformed:
    try:
        return Received(name, route, decode_from_site(header, len(body)), memoryview(body))
    except MessageError as error:
        return Malformed(name, route, str(error))
