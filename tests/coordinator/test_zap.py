"""The ways in which ZAP fails open, and that ours does not."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol, TypeAlias

import pytest
import zmq

from fedoap.errors import IdentityError
from fedoap.identity import KeyPair, Member, Roster, curve_keys
from fedoap.messages import Bye, encode
from fedoap_coordinator import port as port_module
from fedoap_coordinator.port import Arrived, Port
from fedoap_coordinator.rows import Invite
from fedoap_coordinator.zap import DOMAIN, Doors, Invitee, Site, Zap

Context: TypeAlias = "zmq.Context[zmq.Socket[bytes]]"
SERVER = curve_keys(b"k" * 32)
NOBODY = Doors({}, {})


def new_keys() -> KeyPair:
    return curve_keys(os.urandom(32))


def no_blob(blob: bytes, at: int, size: int) -> bytes | None:
    return None


def members(**keys: KeyPair) -> Roster:
    return Roster(1, tuple(Member(name, pair.public, b"s" * 32) for name, pair in keys.items()))


def say(dealer: "zmq.Socket[bytes]") -> None:
    dealer.send_multipart([encode(Bye()), b""])


@dataclass
class Server:
    """A coordinator's port and ZAP handler with nothing behind them."""

    port: Port
    zap: Zap
    endpoint: str

    def hear(self, milliseconds: int = 2000) -> list[Arrived]:
        return list(self.port.receive()) if self.port.socket.poll(milliseconds) else []

    def user_of(self, arrived: Arrived) -> object:
        return self.zap.doors.peers.get(arrived.user)


class Dial(Protocol):
    def __call__(self, endpoint: str, keys: KeyPair, routing_id: bytes = b"") -> "zmq.Socket[bytes]": ...


@pytest.fixture
def dial(context: Context) -> Iterator[Dial]:
    dialled = []

    def connect(endpoint: str, keys: KeyPair, routing_id: bytes = b"") -> "zmq.Socket[bytes]":
        dealer = context.socket(zmq.DEALER)
        dialled.append(dealer)
        dealer.linger = 0
        dealer.curve_serverkey = SERVER.public
        dealer.curve_publickey, dealer.curve_secretkey = keys.public, keys.secret
        if routing_id:
            dealer.routing_id = routing_id
        dealer.connect(endpoint)
        return dealer

    yield connect
    for dealer in dialled:
        dealer.close()


@pytest.fixture
def server(context: Context) -> Iterator[Server]:
    zap = Zap(context, NOBODY)
    zap.start()
    port = Port(context, SERVER, no_blob)
    yield Server(port, zap, port.bind("tcp://127.0.0.1:*", None))
    port.close()
    zap.stop()


@pytest.mark.parametrize(
    ("domain", "enforce", "let_in"),
    [(b"", False, True), (b"fedoap", False, True), (b"", True, True), (b"fedoap", True, False)],
)
def test_without_a_handler_libzmq_lets_a_stranger_in_unless_both_options_are_set(
    context: Context, dial: Dial, domain: bytes, enforce: bool, let_in: bool
) -> None:
    router = context.socket(zmq.ROUTER)
    router.curve_server = True
    router.curve_publickey, router.curve_secretkey = SERVER.public, SERVER.secret
    if domain:
        router.zap_domain = domain
    router.zap_enforce_domain = enforce
    port = router.bind_to_random_port("tcp://127.0.0.1")

    dealer = dial(f"tcp://127.0.0.1:{port}", new_keys())
    say(dealer)

    assert bool(router.poll(2000 if let_in else 400)) is let_in
    router.close()


def test_our_port_lets_nobody_in_when_no_handler_runs(context: Context, dial: Dial) -> None:
    port = Port(context, SERVER, no_blob)
    endpoint = port.bind("tcp://127.0.0.1:*", None)

    say(dial(endpoint, new_keys()))

    assert not port.socket.poll(400)
    port.close()


def test_our_port_lets_nobody_in_when_the_handlers_thread_has_died(dial: Dial, server: Server) -> None:
    site = new_keys()
    server.zap.doors = Doors.of(members(hospital_a=site), ())
    server.zap.pipe.send(b"TERMINATE")
    server.zap.thread.join()

    say(dial(server.endpoint, site))

    assert server.hear(400) == []
    with pytest.raises(IdentityError, match="the handler's thread died"):
        server.zap.check()


def test_an_unknown_key_is_refused_and_a_members_is_known_by_name(dial: Dial, server: Server) -> None:
    site = new_keys()
    server.zap.doors = Doors.of(members(hospital_a=site), ())
    say(dial(server.endpoint, new_keys()))
    say(dial(server.endpoint, site))

    heard = server.hear()

    assert [server.user_of(one) for one in heard] == [Site("hospital_a")]
    assert server.hear(300) == []


def test_a_revoked_key_is_nobody_on_its_live_connection_and_cannot_connect_anew(dial: Dial, server: Server) -> None:
    site = new_keys()
    roster = members(hospital_a=site)
    server.zap.doors = Doors.of(roster, ())
    live = dial(server.endpoint, site)
    say(live)
    before = [server.user_of(one) for one in server.hear()]

    server.zap.doors = Doors.of(replace(roster, members=(replace(roster.members[0], revoked=True),)), ())
    say(live)
    say(dial(server.endpoint, site))
    after = [server.user_of(one) for one in server.hear()]

    assert (before, after) == ([Site("hospital_a")], [None])
    assert server.hear(300) == []


def test_the_former_key_of_a_site_that_joined_anew_is_nobody(dial: Dial, server: Server) -> None:
    former, present = new_keys(), new_keys()
    server.zap.doors = Doors.of(members(hospital_a=former), ())
    live = dial(server.endpoint, former)
    say(live)
    server.hear()

    server.zap.doors = Doors.of(members(hospital_a=present), ())
    say(live)

    assert [server.user_of(one) for one in server.hear()] == [None]


def test_a_site_that_takes_anothers_routing_id_gets_neither_its_name_nor_its_answers(
    dial: Dial, server: Server
) -> None:
    owner, thief = new_keys(), new_keys()
    server.zap.doors = Doors.of(members(hospital_a=owner, hospital_b=thief), ())
    honest = dial(server.endpoint, owner, b"hospital_a")
    say(honest)
    (first,) = server.hear()

    robber = dial(server.endpoint, thief, b"hospital_a")
    say(robber)

    assert server.hear(400) == []
    assert server.port.send(first.route, Bye())  # type: ignore[arg-type]
    assert honest.poll(2000)
    assert not robber.poll(100)


def test_with_handover_on_a_thief_would_get_the_answers(
    dial: Dial, server: Server, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the test above looks for, at a port with the defect planted."""

    def configure(socket: "zmq.Socket[bytes]", keys: KeyPair) -> None:
        right(socket, keys)
        socket.router_handover = True

    right = port_module._configure
    monkeypatch.setattr(port_module, "_configure", configure)
    open_handed = Port(context, SERVER, no_blob)
    endpoint = open_handed.bind("tcp://127.0.0.1:*", None)
    owner, thief = new_keys(), new_keys()
    server.zap.doors = Doors.of(members(hospital_a=owner, hospital_b=thief), ())
    say(dial(endpoint, owner, b"hospital_a"))
    assert open_handed.socket.poll(2000)
    (first,) = open_handed.receive()
    robber = dial(endpoint, thief, b"hospital_a")
    say(robber)
    assert open_handed.socket.poll(2000)

    assert open_handed.send(first.route, Bye())  # type: ignore[arg-type]

    assert robber.poll(2000)
    open_handed.close()


def test_without_a_domain_that_is_enforced_a_stranger_would_be_let_in(
    dial: Dial, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted defect to `our_port_lets_nobody_in_when_no_handler_runs`."""

    def configure(socket: "zmq.Socket[bytes]", keys: KeyPair) -> None:
        right(socket, keys)
        socket.zap_enforce_domain = False

    right = port_module._configure
    monkeypatch.setattr(port_module, "_configure", configure)
    port = Port(context, SERVER, no_blob)
    say(dial(port.bind("tcp://127.0.0.1:*", None), new_keys()))

    assert port.socket.poll(2000)
    port.close()


def test_a_site_that_names_itself_another_is_known_by_its_key(dial: Dial, server: Server) -> None:
    thief = new_keys()
    server.zap.doors = Doors.of(members(hospital_a=new_keys(), hospital_b=thief), ())

    say(dial(server.endpoint, thief, b"hospital_a"))

    assert [server.user_of(one) for one in server.hear()] == [Site("hospital_b")]


def test_a_tokens_key_is_an_invitee_used_or_not() -> None:
    invites = (Invite(b"t" * 32, "hospital_a", 100, used=True, withdrawn=False),)

    doors = Doors.of(Roster(0, ()), invites)

    assert doors.peers[doors.users[b"t" * 32]] == Invitee(b"t" * 32)
    assert doors.users[b"t" * 32].startswith("enrol:hospital_a:")


def test_a_site_cannot_be_named_so_that_it_passes_for_an_invitee() -> None:
    doors = Doors.of(members(enrol=new_keys()), ())

    assert list(doors.peers.values()) == [Site("enrol")]
    assert not any(user.startswith("enrol:hospital") for user in doors.peers)


def test_a_key_withdrawn_between_question_and_answer_has_no_user(server: Server) -> None:
    assert server.zap.curve_user_id(b"k" * 32) == ""
    assert server.zap.callback("other domain", b"0" * 40) is False


def test_the_self_test_passes_at_a_sound_port_and_leaves_no_key_behind(server: Server) -> None:
    server.zap.prove(server.endpoint, SERVER.public)

    assert server.zap._probe is None
    assert server.hear(100) == []


def test_the_self_test_finds_a_port_that_lets_strangers_in(server: Server) -> None:
    """The port has a context of its own: libzmq may ask a handler of the same context for a while after its end."""
    with zmq.Context() as elsewhere, elsewhere.socket(zmq.ROUTER) as open_door:
        open_door.curve_server = True
        open_door.curve_publickey, open_door.curve_secretkey = SERVER.public, SERVER.secret
        port = open_door.bind_to_random_port("tcp://127.0.0.1")

        with pytest.raises(IdentityError, match=r"an unknown key was not refused .*handshake_succeeded"):
            server.zap.prove(f"tcp://127.0.0.1:{port}", SERVER.public)


def test_the_self_test_does_not_pass_at_a_port_that_refuses_everybody(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(domain: str, key: bytes) -> bool:
        return False

    monkeypatch.setattr(server.zap, "callback", refuse)

    with pytest.raises(IdentityError, match=r"a known key was not let in"):
        server.zap.prove(server.endpoint, SERVER.public)


def test_the_self_test_does_not_pass_where_nobody_answers(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedoap_coordinator.zap.PROVE_MILLISECONDS", 200)

    with pytest.raises(IdentityError, match=r"an unknown key was not refused .*no answer"):
        server.zap.prove("tcp://127.0.0.1:1", SERVER.public)


def test_the_domain_is_the_one_the_handler_answers_for(server: Server) -> None:
    assert server.port.socket.zap_domain == DOMAIN.encode()
    assert server.port.socket.zap_enforce_domain
