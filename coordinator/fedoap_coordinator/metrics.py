"""Figures for Prometheus: counted by the daemon's loop, served as text by a thread that sees nothing else.

The loop replaces the server's `figures` by newer ones; they are frozen, so the thread needs no lock and
the loop waits for nobody. The text is that of prometheus.io/docs/instrumenting/exposition_formats (0.0.4).
"""

import socket
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar, TypeAlias, get_args

from fedoap import __version__
from fedoap.errors import ConfigError
from fedoap.protocol.status import RunState, SiteState, SiteStatus, Status

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
CLIENT_SECONDS = 5
_Request: TypeAlias = socket.socket | tuple[bytes, socket.socket]
Samples = list[tuple[dict[str, str], float]]


@dataclass(slots=True)
class Counts:
    """What has been counted since the daemon's start: bytes of bodies by site, refusals by code, merges."""

    received: Counter[str] = field(default_factory=Counter)
    sent: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    merges: int = 0
    merge_seconds: float = 0.0

    @property
    def moved(self) -> Counter[str]:
        """Bytes to and from each site."""
        return self.received + self.sent


@dataclass(frozen=True, slots=True)
class Figures:
    """One moment's figures."""

    status: Status
    received: Mapping[str, int]
    sent: Mapping[str, int]
    refused: Mapping[str, int]
    merges: int
    merge_seconds: float

    @classmethod
    def of(cls, status: Status, counts: Counts) -> "Figures":
        """Return the figures as they are now; later counts do not change them."""
        copies = (dict(counts.received), dict(counts.sent), dict(counts.refused))
        return cls(status, *copies, counts.merges, counts.merge_seconds)


class MetricsServer:
    """Serves the newest figures at `http://address/metrics` until `close`.

    Raises:
        ConfigError: nothing can listen at the address.
    """

    def __init__(self, wish: str) -> None:
        host, _, port = wish.rpartition(":")
        host = host.strip("[]") or "127.0.0.1"
        try:
            self._http = (_Server6 if ":" in host else _Server)((host, int(port)), _Handler)
        except OSError as error:
            raise ConfigError(
                f"coordinator.metrics is {wish}, but nothing can listen there: {error.strerror}"
            ) from None
        name = f"[{host}]" if ":" in host else str(self._http.server_address[0])
        self.address = f"{name}:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, name="metrics", daemon=True)
        self._thread.start()

    def show(self, figures: Figures) -> None:
        """Serve these figures from now on."""
        self._http.figures = figures

    def close(self) -> None:
        """Stop serving."""
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    figures: Figures | None = None

    def handle_error(self, request: _Request, client_address: object) -> None:
        """Say nothing of a client that hung up: the console is the federation's."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Handler(BaseHTTPRequestHandler):
    server_version, sys_version = "fedoap", ""
    timeout: ClassVar[int] = CLIENT_SECONDS  # a client that says nothing holds a thread no longer

    def do_GET(self) -> None:
        assert isinstance(self.server, _Server)
        figures = self.server.figures
        if self.path != "/metrics" or figures is None:
            self.send_error(404 if figures else 503)
            return
        body = exposition(figures).encode()
        self.send_response(200)
        self.send_header("Content-Type", CONTENT_TYPE)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing, for the same reason."""


def exposition(figures: Figures) -> str:
    """Return the figures as the text that Prometheus reads."""
    return "".join(
        line + "\n"
        for name, kind, text, samples in _families(figures)
        for line in (
            f"# HELP fedoap_{name} {text}",
            f"# TYPE fedoap_{name} {kind}",
            *(f"fedoap_{name}{_labels(labels)} {value:.15g}" for labels, value in samples),
        )
    )


def _families(figures: Figures) -> Iterator[tuple[str, str, str, Samples]]:
    status, none = figures.status, dict[str, str]()
    yield "info", "gauge", "Version of the coordinator's software.", [({"version": __version__}, 1)]
    yield "run_state", "gauge", "1 for the state of the run.", _one_of(get_args(RunState), status.state)
    yield (
        "round",
        "gauge",
        "Round under way or due next; the last one stays.",
        [(none, min(status.round, status.rounds))],
    )
    yield "rounds", "gauge", "Rounds of the run.", [(none, status.rounds)]
    yield "attempt", "gauge", "Attempt at the exchange under way, 0 where none is.", [(none, status.attempt)]
    yield "exchange_seconds", "gauge", "Age of the exchange under way.", [(none, status.seconds)]
    yield "deadline_seconds", "gauge", "Time until the exchange's deadline.", [(none, status.deadline_seconds)]
    yield (
        "site_state",
        "gauge",
        "1 for the state of each site.",
        [
            ({"site": site.name} | labels, value)
            for site in status.sites
            for labels, value in _one_of(get_args(SiteState), site.state)
        ],
    )
    heard = [({"site": one.name}, one.heard_seconds) for one in status.sites if one.heard_seconds is not None]
    yield "site_heard_seconds", "gauge", "Time since a site's last message.", heard
    yield (
        "site_software",
        "gauge",
        "What a site runs.",
        [({"site": one.name, "software": one.software}, 1) for one in status.sites if one.software],
    )
    yield "received_bytes_total", "counter", "Bodies of a site's messages.", _by_site(status.sites, figures.received)
    yield "sent_bytes_total", "counter", "Bodies of messages to a site.", _by_site(status.sites, figures.sent)
    yield "uploads_under_way", "gauge", "Sites that send a result now.", [(none, _in_state(status, "uploading"))]
    yield "uploads_waiting", "gauge", "Sites whose result waits its turn.", [(none, _in_state(status, "waiting"))]
    refused = [({"code": code}, float(count)) for code, count in sorted(figures.refused.items())]
    yield (
        "refused_total",
        "counter",
        "Refusals by code; `unknown_site` and `revoked` before the first word too.",
        refused,
    )
    yield "merges_total", "counter", "Exchanges merged, or whose merging failed.", [(none, figures.merges)]
    yield "merge_seconds_total", "counter", "Time that merging took in all.", [(none, figures.merge_seconds)]


def _one_of(states: tuple[str, ...], now: str) -> Samples:
    return [({"state": state}, float(state == now)) for state in states]


def _by_site(sites: tuple[SiteStatus, ...], counts: Mapping[str, int]) -> Samples:
    return [({"site": site.name}, counts.get(site.name, 0)) for site in sites]


def _in_state(status: Status, state: SiteState) -> int:
    return sum(site.state == state for site in status.sites)


def _labels(labels: dict[str, str]) -> str:
    inside = ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items())
    return f"{{{inside}}}" if inside else ""


def _escaped(value: str) -> str:
    r"""Return a label's value as the format wants it.

    >>> _escaped('a"b\\c')
    'a\\"b\\\\c'
    """
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
