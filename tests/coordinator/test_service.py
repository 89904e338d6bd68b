"""The coordinator as a process of its own, and a scripted site that speaks to it."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import psutil
import pytest
import zmq
from click.testing import CliRunner
from zmq.utils.monitor import parse_monitor_message

from fedoap.identity import (
    ENROL_CONTEXT,
    HELLO_CONTEXT,
    Certificate,
    KeyPair,
    Token,
    curve_keys,
    enrol_payload,
    hello_payload,
    sign,
    signing_keys,
)
from fedoap.messages import (
    PROTOCOL_VERSION,
    Bye,
    Challenge,
    Enrol,
    Enrolled,
    FromCoordinator,
    FromSite,
    Get,
    Hello,
    Idle,
    Open,
    Refuse,
    Sync,
    Welcome,
    decode_from_coordinator,
    encode,
)
from fedoap_coordinator.cli import cli

Context: TypeAlias = "zmq.Context[zmq.Socket[bytes]]"
FED_TOML = """
federation = "demo"
sites = ["hospital_a", "hospital_b"]
[coordinator]
bind = "tcp://127.0.0.1:*"
"""


@dataclass
class House:
    """A folder with a fed.toml, and the commands run in it."""

    folder: Path
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "fedoap_coordinator", *words, "--config", str(self.folder / "fed.toml")]

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.command(*words), capture_output=True, text=True, timeout=30, check=False)

    def start(self) -> subprocess.Popen[bytes]:
        before = len(self.log())
        with (self.folder / "out").open("ab") as out:
            process = subprocess.Popen(self.command(), stdout=out, stderr=out)
        self.processes.append(process)
        until = time.monotonic() + 20
        while "ready" not in [entry["event"] for entry in self.log()[before:]]:
            assert process.poll() is None, self.output()
            assert time.monotonic() < until, self.output()
            time.sleep(0.02)
        return process

    def log(self) -> list[dict[str, str]]:
        path = self.folder / "state" / "log.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def output(self) -> str:
        return (self.folder / "out").read_text()

    def look(self, *words: str) -> str:
        """Return what a command prints, run within this process: that is faster."""
        result = CliRunner().invoke(cli, [*words, "--config", str(self.folder / "fed.toml")])
        assert result.exit_code == 0, result.output
        return result.stdout

    def await_status(self, text: str) -> None:
        until = time.monotonic() + 5
        while text not in (shown := self.look("status")):
            assert time.monotonic() < until, shown
            time.sleep(0.05)

    def invite(self, site: str) -> Token:
        return Token.decode(self.look("invite", site))


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    (tmp_path / "fed.toml").write_text(FED_TOML)
    house = House(tmp_path)
    yield house
    for process in house.processes:
        process.kill()
        process.wait()


@dataclass
class Client:
    """One connection to the coordinator."""

    dealer: "zmq.Socket[bytes]"

    def ask(self, message: FromSite, seconds: float = 5.0) -> tuple[FromCoordinator, bytes]:
        self.dealer.send_multipart([encode(message), b""])
        assert self.dealer.poll(int(seconds * 1000)), f"no answer to {message.type}"
        header, body = self.dealer.recv_multipart()
        return decode_from_coordinator(header, len(body)), body


@dataclass
class Clients:
    """Connects, and closes what it connected."""

    context: Context
    opened: list["zmq.Socket[bytes]"] = field(default_factory=list)

    def connect(self, token: Token, keys: KeyPair) -> Client:
        dealer = self.context.socket(zmq.DEALER)
        self.opened.append(dealer)
        dealer.linger = 0
        dealer.curve_serverkey = token.server_key
        dealer.curve_publickey, dealer.curve_secretkey = keys.public, keys.secret
        dealer.connect(token.endpoint)
        return Client(dealer)

    def invited(self, token: Token) -> Client:
        """Connect with the token's key, as soon as the daemon has noticed the invitation of another process."""
        keys = KeyPair(*token.curve_pair())
        until = time.monotonic() + 5
        while self.handshake(token, keys) != zmq.EVENT_HANDSHAKE_SUCCEEDED:
            assert time.monotonic() < until
            time.sleep(0.05)
        return self.connect(token, keys)

    def handshake(self, token: Token, keys: KeyPair) -> zmq.Event:
        """Return how a new connection's handshake ends."""
        dealer = self.context.socket(zmq.DEALER)
        monitor = dealer.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_HANDSHAKE_FAILED_AUTH)
        self.opened += [monitor, dealer]
        dealer.linger = 0
        dealer.curve_serverkey = token.server_key
        dealer.curve_publickey, dealer.curve_secretkey = keys.public, keys.secret
        dealer.connect(token.endpoint)
        assert monitor.poll(5000)
        outcome = zmq.Event(parse_monitor_message(monitor.recv_multipart())["event"])
        dealer.disable_monitor()
        return outcome


@pytest.fixture
def clients(context: Context) -> Iterator[Clients]:
    clients = Clients(context)
    yield clients
    for opened in clients.opened:
        opened.close()


CURVE, SIGNING = curve_keys(b"c" * 32), signing_keys(b"s" * 32)


def enrol(token: Token, client: Client, name: str = "") -> tuple[FromCoordinator, bytes]:
    keys = (CURVE.public, SIGNING.public)
    payload = enrol_payload(token.federation, token.site, token.curve_pair()[0], keys, PROTOCOL_VERSION)
    signature = sign(SIGNING.secret, ENROL_CONTEXT, payload)
    return client.ask(Enrol(PROTOCOL_VERSION, name or token.site, *keys, signature))


def hello(token: Token, client: Client) -> tuple[FromCoordinator, bytes]:
    challenge, _ = client.ask(Open(PROTOCOL_VERSION, "scripted site"))
    assert isinstance(challenge, Challenge)
    payload = hello_payload(challenge.nonce, token.federation, token.site, CURVE.public, PROTOCOL_VERSION)
    return client.ask(Hello(challenge.nonce, sign(SIGNING.secret, HELLO_CONTEXT, payload)))


@pytest.mark.slow
def test_a_site_joins_says_hello_is_revoked_and_joins_anew(house: House, clients: Clients) -> None:
    house.start()
    token = house.invite("hospital_a")
    invited = clients.invited(token)

    not_yet, _ = invited.ask(Sync(b""))
    assert isinstance(not_yet, Refuse)
    assert (not_yet.code, "lets you enrol and nothing else" in not_yet.reason) == ("token", True)

    enrolled, certificate = enrol(token, invited)
    assert enrolled == Enrolled("hospital_a")
    Certificate.unpack(certificate).verify(token.federation_key)

    site = clients.connect(token, CURVE)
    welcome, plan = hello(token, site)
    assert isinstance(welcome, Welcome)
    assert json.loads(plan)["federation"] == "demo"
    waiting, _ = site.ask(Sync(b""))
    assert isinstance(waiting, Idle)
    house.await_status("hospital_a: idle")

    assert house.run("revoke", "hospital_a").returncode == 0
    begun = time.monotonic()
    while not isinstance(site.ask(Sync(b""))[0], Refuse):
        assert time.monotonic() - begun < 1
    revoked, _ = site.ask(Sync(b""))
    assert isinstance(revoked, Refuse)
    assert revoked.code == "revoked"
    assert clients.handshake(token, CURVE) == zmq.EVENT_HANDSHAKE_FAILED_AUTH
    assert "hospital_a: revoked" in house.look("sites")

    used, _ = enrol(token, clients.invited(token))
    assert isinstance(used, Refuse)
    assert "used already" in used.reason
    second = house.invite("hospital_a")
    again, _ = enrol(second, clients.invited(second))
    assert again == Enrolled("hospital_a")
    assert isinstance(hello(second, clients.connect(second, CURVE))[0], Welcome)


@pytest.mark.slow
def test_it_ends_in_good_order_and_comes_back_on_the_same_port(house: House, clients: Clients) -> None:
    first = house.start()
    token = house.invite("hospital_a")
    enrol(token, clients.invited(token))
    site = clients.connect(token, CURVE)
    assert isinstance(hello(token, site)[0], Welcome)

    first.send_signal(signal.SIGTERM)
    assert first.wait(10) == 0
    assert "no coordinator runs" in house.look("status")
    assert [entry["event"] for entry in house.log()][-1] == "ended"
    assert house.output().splitlines()[-1].endswith("ended in good order")
    second = house.start()
    os.kill(second.pid, signal.SIGKILL)
    second.wait()
    house.start()

    assert {entry["endpoint"] for entry in house.log() if entry["event"] == "ready"} == {token.endpoint}
    while site.dealer.poll(100):
        site.dealer.recv_multipart()
    assert isinstance(hello(token, site)[0], Welcome)


@pytest.mark.slow
def test_a_coordinator_that_was_stopped_for_a_while_calls_nobody_silent(house: House, clients: Clients) -> None:
    """Planted bug: the time for which it could hear nobody counts against the sites."""
    (house.folder / "fed.toml").write_text(f"{FED_TOML}[rounds]\nsilence_seconds = 5.5\n")
    daemon = house.start()
    token = house.invite("hospital_a")
    enrol(token, clients.invited(token))
    hello(token, clients.connect(token, CURVE))

    daemon.send_signal(signal.SIGSTOP)
    time.sleep(6.5)
    daemon.send_signal(signal.SIGCONT)
    time.sleep(2.0)

    assert [entry["event"] for entry in house.log()].count("site_silent") == 0


@pytest.mark.slow
def test_a_second_coordinator_on_the_same_folder_is_refused_in_one_line(house: House) -> None:
    first = house.start()

    second = house.run()

    assert second.returncode == 2
    assert second.stderr == (
        f"fedoap-coordinator: {house.folder}/state: another coordinator, process {first.pid}, "
        "runs on this state folder\n"
    )
    assert first.poll() is None


@pytest.mark.slow
def test_malformed_messages_are_answered_and_a_refusal_is_logged_once_not_a_thousand_times(
    house: House, clients: Clients
) -> None:
    """Planted bug: a refused invitee's name is logged as it gives it, a new one each time."""
    daemon = house.start()
    token = house.invite("hospital_a")
    enrol(token, clients.invited(token))
    site = clients.connect(token, CURVE)
    hello(token, site)
    for number in range(1000):
        site.dealer.send_multipart([os.urandom(number % 50), b""] if number % 2 else [b"x"] * (1 + number % 7))
        while site.dealer.poll(0):
            site.dealer.recv_multipart()
    time.sleep(0.2)
    while site.dealer.poll(100):
        site.dealer.recv_multipart()

    invited = clients.invited(token)
    for number in range(100):
        enrol(token, invited, f"somebody_{number}")

    assert isinstance(site.ask(Sync(b""))[0], Idle)
    site.dealer.send_multipart([encode(Bye()), b""])
    assert 0 < sum(entry["event"] == "refused" for entry in house.log()) < 30
    assert daemon.poll() is None
    assert psutil.Process(daemon.pid).memory_info().rss < 150e6


@pytest.mark.slow
def test_status_and_metrics_tell_what_a_site_runs_and_who_was_refused(house: House, clients: Clients) -> None:
    (house.folder / "fed.toml").write_text(FED_TOML + 'metrics = "0"\n')
    house.start()
    token = house.invite("hospital_a")
    enrol(token, clients.invited(token))
    site = clients.connect(token, CURVE)
    hello(token, site)
    assert isinstance(site.ask(Get(bytes(32), 0, 1))[0], Refuse)
    address = next(entry["address"] for entry in house.log() if entry["event"] == "metrics")

    house.await_status("s ago, scripted site")
    until = time.monotonic() + 5
    while 'fedoap_refused_total{code="no_blob"} 1' not in (shown := metrics(address)):
        assert time.monotonic() < until, shown

    assert 'fedoap_site_state{site="hospital_a",state="idle"} 1' in shown
    assert 'fedoap_site_software{site="hospital_a",software="scripted site"} 1' in shown
    assert "round 0 of 20: quorum is 2, but only 1 of 2 sites are enrolled" in house.look("status")


def metrics(address: str) -> str:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as answer:
        return str(answer.read().decode())
