"""Figures for Prometheus: the text parses, the numbers are the run's, the server gives nothing else away."""

import re
import socket
import struct
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedoap.config import CoordinatorConfig, FederationConfig
from fedoap.errors import ConfigError
from fedoap.protocol.status import SiteStatus, Status
from fedoap_coordinator.metrics import CLIENT_SECONDS, CONTENT_TYPE, Counts, Figures, MetricsServer, exposition

SITES = (
    SiteStatus("hospital_a", "uploading", 1.5, received=10, size=20, software="fedoap 0.1.0"),
    SiteStatus("hospital_b", "waiting", 2.0, software='odd "name"\\'),
    SiteStatus("hospital_c", "absent"),
)
STATUS = Status("open", "for hospital_c", "train", 3, 20, 2, 60.0, 540.0, SITES)
SAMPLE = re.compile(r'^(fedoap_[a-z_]+)(?:\{((?:[a-z]+="(?:[^"\\\n]|\\["\\n])*",?)+)\})? (-?[0-9.e+]+|NaN)$')


def figures() -> Figures:
    counts = Counts(merges=4, merge_seconds=2.5)
    counts.received["hospital_a"] += 200_000_000
    counts.sent["hospital_a"] += 7
    counts.refused["late"] += 2
    return Figures.of(STATUS, counts)


def parsed(text: str) -> dict[str, float]:
    """Return the samples of a text that keeps to the exposition format, by name and labels."""
    assert text.endswith("\n")
    kinds: dict[str, str] = {}
    samples: dict[str, float] = {}
    for line in text.splitlines():
        if line.startswith("# HELP "):
            assert len(line.split(" ", 3)) == 4
        elif line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert name not in kinds, f"{name} has two groups of samples"
            assert kind in ("gauge", "counter")
            assert (kind == "counter") == name.endswith("_total")
            kinds[name] = kind
        else:
            found = SAMPLE.match(line)
            assert found, line
            assert found[1] == list(kinds)[-1], f"{found[1]} stands outside its group"
            key = line.rpartition(" ")[0]
            assert key not in samples, f"{key} is given twice"
            samples[key] = float(found[3])
    return samples


@pytest.mark.skipif(not socket.has_ipv6 or not Path("/proc/net/if_inet6").exists(), reason="no IPv6 here")
def test_an_ipv6_address_is_listened_at_and_named_as_one_writes_it() -> None:
    """Planted bug: the brackets taken for a part of the name."""
    wish = CoordinatorConfig(metrics="[::1]:0").metrics
    assert wish is not None
    server = MetricsServer(wish)
    try:
        server.show(figures())
        with urllib.request.urlopen(f"http://{server.address}/metrics", timeout=10) as answer:
            assert answer.status == 200
    finally:
        server.close()
    assert server.address.startswith("[::1]:")


@pytest.fixture
def server() -> Iterator[MetricsServer]:
    made = MetricsServer("127.0.0.1:0")
    yield made
    made.close()


def fetch(server: MetricsServer, path: str = "/metrics") -> tuple[str, str]:
    with urllib.request.urlopen(f"http://{server.address}{path}", timeout=5) as answer:
        return answer.headers["Content-Type"], answer.read().decode()


def test_the_text_keeps_to_the_format_and_holds_the_figures() -> None:
    """Planted bugs: a label's quote not escaped; samples of two families mixed; bytes rounded to six digits."""
    samples = parsed(exposition(figures()))

    assert samples["fedoap_round"] == 3
    assert samples["fedoap_attempt"] == 2
    assert samples['fedoap_run_state{state="open"}'] == 1
    assert samples['fedoap_run_state{state="merging"}'] == 0
    assert samples['fedoap_site_state{site="hospital_a",state="uploading"}'] == 1
    assert samples['fedoap_site_state{site="hospital_c",state="uploading"}'] == 0
    assert samples['fedoap_site_heard_seconds{site="hospital_b"}'] == 2.0
    assert 'fedoap_site_heard_seconds{site="hospital_c"}' not in samples
    assert samples[r'fedoap_site_software{site="hospital_b",software="odd \"name\"\\"}'] == 1
    assert samples['fedoap_received_bytes_total{site="hospital_a"}'] == 200_000_000
    assert samples['fedoap_sent_bytes_total{site="hospital_c"}'] == 0
    assert samples['fedoap_refused_total{code="late"}'] == 2
    assert (samples["fedoap_uploads_under_way"], samples["fedoap_uploads_waiting"]) == (1, 1)
    assert (samples["fedoap_merges_total"], samples["fedoap_merge_seconds_total"]) == (4, 2.5)


def test_bytes_are_exact_up_to_a_petabyte() -> None:
    counts = Counts()
    counts.received["hospital_a"] = 10**15 - 1

    assert f"{10**15 - 1}\n" in exposition(Figures.of(STATUS, counts))


def test_later_counts_do_not_change_figures_handed_over() -> None:
    """The serving thread reads them. Planted bug: the loop's own counters handed over."""
    counts = Counts()
    handed = Figures.of(STATUS, counts)
    counts.received["hospital_a"] += 1

    assert handed.received == {}


def test_the_newest_figures_are_served_and_nothing_else(server: MetricsServer) -> None:
    with pytest.raises(urllib.error.HTTPError, match="503"):
        fetch(server)

    server.show(figures())

    kind, text = fetch(server)
    assert (kind, text) == (CONTENT_TYPE, exposition(figures()))
    with pytest.raises(urllib.error.HTTPError, match="404"):
        fetch(server, "/../state/keys/curve.key")


def test_a_client_that_says_nothing_keeps_nobody_waiting(server: MetricsServer) -> None:
    """Planted bug: one thread for all."""
    server.show(figures())
    host, _, port = server.address.rpartition(":")
    with socket.create_connection((host, int(port))):
        began = time.monotonic()

        assert parsed(fetch(server)[1])
        assert time.monotonic() - began < CLIENT_SECONDS / 2


def test_a_client_that_hangs_up_writes_nothing_over_the_console(
    server: MetricsServer, capsys: pytest.CaptureFixture[str]
) -> None:
    """Planted bug: a traceback for each scan of the port."""
    host, _, port = server.address.rpartition(":")
    with socket.create_connection((host, int(port))) as client:
        client.sendall(b"GET ")
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    with pytest.raises(urllib.error.HTTPError, match="503"):  # by now the other thread has seen the reset
        fetch(server)
    time.sleep(0.1)

    assert capsys.readouterr().err == ""


def test_a_port_alone_is_this_machines_own() -> None:
    server = MetricsServer("0")
    address = server.address
    server.close()

    assert address.startswith("127.0.0.1:")


def test_a_port_that_is_taken_is_told(server: MetricsServer) -> None:
    with pytest.raises(
        ConfigError, match=r"coordinator\.metrics is 127.*, but nothing can listen there: Address already"
    ):
        MetricsServer(server.address)


def test_an_address_of_another_form_is_refused() -> None:
    with pytest.raises(ValueError, match=r"coordinator\.metrics"):
        FederationConfig.model_validate(
            {"federation": "f", "sites": ["a"], "coordinator": {"metrics": "http://127.0.0.1:9400"}}
        )
