"""One seed, one world: a coordinator, its sites, and everything that happens between and to them."""

import hashlib
import random

from fedoap.config import FederationConfig
from fedoap.errors import MessageError
from fedoap.messages import FromCoordinator, FromSite, decode_from_coordinator, decode_from_site, encode
from fedoap.protocol.events import Answered, Connected, Disconnected, Malformed, Received
from fedoap.protocol.history import History, replay
from simulated.checks import Checks
from simulated.coordinator import CoordinatorProcess
from simulated.disk import Disk
from simulated.network import Clock, Faults, Network, Spell
from simulated.site import SiteProcess
from simulated.training import again

END_SECONDS = 50_000.0
NOTICED_SECONDS = 30.0
"""Heartbeats: so long until a site that is cut off knows it."""


class World:
    """Runs until the federation has finished."""

    def __init__(self, config: FederationConfig, seed: int, faults: Faults) -> None:
        self._rng, self._faults, self._config = random.Random(seed), faults, config
        self.clock = Clock()
        self.checks = Checks(config)
        self.network = Network(self.clock, self._rng, faults)
        self.coordinator = CoordinatorProcess(
            config,
            clock=self.clock,
            rng=self._rng,
            faults=faults,
            checks=self.checks,
            nonce=self._nonce,
            send=self._to_site,
            gone=self._coordinator_gone,
        )
        self.sites = {name: self._site(name, config) for name in config.sites}
        self._routes: dict[str, bytes] = {}
        self._owner: dict[bytes, str] = {}
        self._revoked: set[str] = set()
        self._nonces = 0
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
        for spell in self._faults.spells:
            self.clock.after(spell.at, lambda spell=spell: self._begin(spell))  # type: ignore[misc]
        self.coordinator.boot()
        for site in self.sites.values():
            site.boot()
            self._connect_later(site.name)
        waiting = list(self.sites.values())
        while waiting:
            self.clock.step()
            self.events += 1
            if waiting[-1].has_finished:
                waiting.pop()
            assert self.clock.now < END_SECONDS, f"no end in sight: {self._view()}"
        return self._end()

    def counts(self) -> dict[str, int]:
        """Return what happened in this world."""
        sites = self.sites.values()
        return {
            "schedules": 1,
            "events": self.events,
            "crashes": self.coordinator.crashes + sum(site.crashes for site in sites),
            "writes lost or torn": self.coordinator.disk.lost + sum(site.disk.lost for site in sites),
            "messages corrupted": self.network.corrupted,
            "keys revoked": sum(site.joins for site in sites),
        }

    def _end(self) -> History:
        history = replay(self.coordinator.records)
        self.coordinator.check_blobs()
        model, bank = again(self._config.plan, self.coordinator.records)
        assert (history.model, history.bank) == (model, bank), "the result is not that of the updates that counted"
        return history

    def _nonce(self, size: int) -> bytes:
        """Bytes that are fresh in this world; the same in every world, so that signatures can be remembered."""
        self._nonces += 1
        return hashlib.sha256(b"nonce %d" % self._nonces).digest()[:size]

    def _begin(self, spell: Spell) -> None:
        names = [name for number, name in enumerate(self.sites) if number in spell.whom]
        if spell.kind == "cut off":
            names = list(self.sites) if -1 in spell.whom else names
            self.network.cut_off.update(names)
            self.clock.after(NOTICED_SECONDS, lambda: self._notice(names))
            self.clock.after(spell.seconds, lambda: self.network.cut_off.difference_update(names))
            return
        if spell.kind == "revoked":
            self._revoke(names, spell.seconds)
            return
        disks = [self.sites[name].disk for name in names] + ([self.coordinator.disk] if -1 in spell.whom else [])
        _fill(disks, is_full=True)
        self.clock.after(spell.seconds, lambda: _fill(disks, is_full=False))

    def _revoke(self, names: list[str], seconds: float) -> None:
        """Revoke the keys of sites; each joins again after a while, with new keys and an empty folder."""
        gone = [name for name in names if name not in self._revoked]
        self._revoked.update(gone)
        self.coordinator.revoke(gone)
        self.clock.after(seconds, lambda: self._invite(gone))

    def _invite(self, names: list[str]) -> None:
        self._revoked.difference_update(names)
        for name in names:
            self.coordinator.enrol(name, self.sites[name].join_anew())
            self._routes.pop(name, None)
            self._connect_later(name)

    def _notice(self, names: list[str]) -> None:
        for name in names:
            if name in self.network.cut_off:
                self._cut(name)

    def _view(self) -> str:
        machine = self.coordinator.machine
        return "coordinator is down" if machine is None else str(machine.status())

    def _connect_later(self, name: str) -> None:
        self.clock.after(0.1 + self._rng.random() * self._faults.outage / 2, lambda: self._connect(name))

    def _connect(self, name: str) -> None:
        site = self.sites[name]
        if name in self._routes:
            return
        if site.machine is None or self.coordinator.machine is None or name in self.network.cut_off | self._revoked:
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
        packed, name = encode(message), self._owner[route]
        self.checks.sent(packed, body)

        def deliver(header: bytes, body: bytes) -> None:
            if self._routes.get(name) != route:
                return
            try:
                heard = decode_from_coordinator(header, len(body))
            except MessageError:
                return  # the node notes it and goes on
            self.checks.site_hears(route, heard)
            self.sites[name].handle(Answered(heard, body))

        self.network.carry(name, packed, body, deliver)

    def _to_coordinator(self, name: str, message: FromSite, body: bytes) -> None:
        route = self._routes.get(name)
        if route is None:
            return  # the connection broke under its hands
        packed, life = encode(message), self.coordinator.life
        self.checks.sent(packed, body)
        self.checks.site_says(route, message, len(body))
        if self._faults.cut and self._rng.random() < self._faults.cut:
            self.clock.after(0.0, lambda: self._cut(name))

        def deliver(header: bytes, body: bytes) -> None:
            if life == self.coordinator.life:
                self.coordinator.handle(_event(name, route, header, body))

        self.network.carry(name, packed, body, deliver)


def _fill(disks: list[Disk], *, is_full: bool) -> None:
    for disk in disks:
        disk.is_full = is_full


def _event(name: str, route: bytes, header: bytes, body: bytes) -> Received | Malformed:
    try:
        return Received(name, route, decode_from_site(header, len(body)), memoryview(body))
    except MessageError as error:
        return Malformed(name, route, str(error))
