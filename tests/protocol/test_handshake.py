import pytest

from desk import Desk, code_of
from federation_builders import FEDERATION_SECRET, curve, public, roster, secret
from fedoap.identity import HELLO_CONTEXT, hello_payload, is_signed
from fedoap.messages import (
    PROTOCOL_VERSION,
    Bye,
    Challenge,
    FromCoordinator,
    Hello,
    Idle,
    Open,
    Refuse,
    Sync,
    Welcome,
)
from fedoap.protocol.events import (
    Answered,
    Connected,
    Disconnected,
    Learned,
    Leave,
    Malformed,
    Note,
    RosterChanged,
    Say,
    Send,
    SiteEffect,
    Stopping,
    Tick,
)
from fedoap.protocol.site import Site

NONCE = bytes(range(32))
PLAN = Desk().config.plan


def _site() -> Site:
    return Site("demo", "alpha", public(FEDERATION_SECRET), secret("alpha"), curve("alpha"), software="test")


def _said(effects: list[SiteEffect]) -> list[object]:
    return [effect.message for effect in effects if isinstance(effect, Say)]


def _open(desk: Desk, site: str = "alpha", route: bytes = b"") -> bytes:
    (challenge,) = desk.say(site, Open(PROTOCOL_VERSION, "test"), route=route)
    assert isinstance(challenge, Challenge)
    return challenge.nonce


def test_a_site_that_signs_the_challenge_is_welcome_and_learns_the_plan() -> None:
    desk = Desk()
    nonce = _open(desk)

    effects = desk.handle_say("alpha", desk.hello("alpha", nonce))

    (send,) = [one for one in effects if isinstance(one, Send)]
    assert send.message == Welcome("alpha", desk.config.plan.digest)
    assert send.body == desk.config.plan.to_bytes()


def test_another_protocol_version_is_refused_with_both_versions_named() -> None:
    (answer,) = Desk().say("alpha", Open(PROTOCOL_VERSION + 1, "fedoap 9"))

    assert isinstance(answer, Refuse)
    assert answer.code == "version"
    assert answer.reason == "site alpha speaks protocol 3 (fedoap 9), but the coordinator speaks 2 (desk)"


def test_a_hello_signed_for_another_protocol_version_is_refused() -> None:
    desk = Desk()
    nonce = _open(desk)

    assert code_of(desk.say("alpha", desk.hello("alpha", nonce, protocol=PROTOCOL_VERSION + 1))) == "bad_signature"


def test_a_hello_signed_by_another_key_is_refused() -> None:
    desk = Desk()
    nonce = _open(desk)

    assert code_of(desk.say("alpha", desk.hello("alpha", nonce, key="beta"))) == "bad_signature"


def test_a_hello_replayed_on_another_connection_is_refused() -> None:
    desk = Desk()
    hello = desk.hello("alpha", _open(desk))
    desk.say("alpha", hello)
    _open(desk, route=b"second")

    assert code_of(desk.say("alpha", hello, route=b"second")) == "not_joined"


def test_nothing_but_open_and_hello_is_heard_before_the_welcome() -> None:
    desk = Desk()
    _open(desk)

    assert code_of(desk.say("alpha", Sync(b""))) == "not_joined"


def test_open_and_hello_said_twice_are_answered_the_same_way() -> None:
    desk = Desk()
    hello = desk.hello("alpha", _open(desk))
    first = desk.say("alpha", hello)

    assert desk.hello("alpha", _open(desk)) == hello
    assert desk.say("alpha", hello) == first


def test_the_newest_signed_hello_wins_and_the_older_connection_is_told() -> None:
    desk = Desk()
    desk.join("alpha", route=b"old")
    nonce = _open(desk, route=b"new")

    effects = desk.handle_say("alpha", desk.hello("alpha", nonce), route=b"new")

    told = {one.route: one.message for one in effects if isinstance(one, Send)}
    assert isinstance(told[b"new"], Welcome)
    assert isinstance(refusal := told[b"old"], Refuse)
    assert refusal.code == "superseded"
    assert code_of(desk.say("alpha", Sync(b""), route=b"old")) == "superseded"
    assert isinstance(desk.say("alpha", Sync(b""), route=b"new")[0], Idle)


def test_an_older_challenge_answered_late_takes_nothing_away() -> None:
    desk = Desk()
    old = _open(desk, route=b"old")
    desk.join("alpha", route=b"new")

    assert code_of(desk.say("alpha", desk.hello("alpha", old), route=b"old")) == "superseded"
    assert isinstance(desk.say("alpha", Sync(b""), route=b"new")[0], Idle)


def test_an_unknown_site_is_refused() -> None:
    assert code_of(Desk().say("mallory", Open(PROTOCOL_VERSION, "test"))) == "unknown_site"


def test_an_enrolled_site_that_the_configuration_does_not_list_is_refused() -> None:
    desk = Desk(roster=roster(sites=("alpha", "omega")))

    assert code_of(desk.say("omega", Open(PROTOCOL_VERSION, "test"))) == "unknown_site"


def test_a_revoked_sites_next_message_is_refused_and_it_is_told_at_once() -> None:
    desk = Desk()
    desk.join("alpha")

    effects = desk.handle(RosterChanged(roster("alpha")))

    assert Send(b"alpha", Refuse("revoked", "the key of site alpha was revoked")) in effects
    assert code_of(desk.say("alpha", Sync(b""))) == "revoked"
    assert code_of(desk.say("alpha", Open(PROTOCOL_VERSION, "test"))) == "revoked"


def test_a_malformed_message_is_answered_with_its_reason_and_noted_once() -> None:
    desk = Desk()
    desk.join("alpha")

    first = desk.handle(Malformed("alpha", b"alpha", "header is 9999 bytes"))
    second = desk.handle(Malformed("alpha", b"alpha", "header is 9999 bytes"))

    assert Send(b"alpha", Refuse("malformed", "header is 9999 bytes")) in first
    assert Note("refused", {"site": "alpha", "code": "malformed", "reason": "header is 9999 bytes"}) in first
    assert second == [Send(b"alpha", Refuse("malformed", "header is 9999 bytes"))]


def test_a_malformed_message_of_a_stranger_is_answered_unknown_site() -> None:
    (send, _) = Desk().handle(Malformed("mallory", b"m", "header is 9999 bytes"))

    assert isinstance(send, Send)
    assert isinstance(send.message, Refuse)
    assert send.message.code == "unknown_site"


def test_a_site_that_said_bye_has_to_open_again() -> None:
    desk = Desk()
    desk.join("alpha")
    desk.say("alpha", Bye())

    assert code_of(desk.say("alpha", Sync(b""))) == "not_joined"


def test_a_site_that_left_is_absent_but_was_heard() -> None:
    """Planted bug: the time of its last message forgotten with its connection, as if it had never come."""
    desk = Desk()
    desk.join("alpha")
    desk.say("alpha", Bye())
    desk.wait(7.0)

    alpha, beta, _ = desk.machine.status().sites

    assert (alpha.state, beta.state) == ("absent", "absent")
    assert alpha.heard_seconds == pytest.approx(7.0)
    assert beta.heard_seconds is None


def test_a_coordinator_that_stops_says_so_to_everyone() -> None:
    desk = Desk()
    desk.join("alpha", "beta")

    effects = desk.handle(Stopping())

    assert [one.route for one in effects if isinstance(one, Send)] == [b"alpha", b"beta"]
    assert code_of(desk.say("alpha", Sync(b""))) == "stopping"


def test_a_site_proves_itself_on_the_connections_challenge() -> None:
    site = _site()
    assert _said(site.handle(Connected(), 0.0)) == [Open(PROTOCOL_VERSION, "test")]

    (hello,) = _said(site.handle(Answered(Challenge(PROTOCOL_VERSION, "desk", NONCE)), 0.1))

    assert isinstance(hello, Hello)
    payload = hello_payload(NONCE, "demo", "alpha", curve("alpha"), PROTOCOL_VERSION)
    assert is_signed(public(secret("alpha")), hello.signature, HELLO_CONTEXT, payload)


def test_a_site_without_an_answer_opens_again_with_growing_pauses() -> None:
    site = _site()
    site.handle(Connected(), 0.0)

    opened = [now for now in range(1, 70) if _said(site.handle(Tick(), float(now)))]

    assert opened == [1, 3, 7, 15, 31, 61]


def test_a_site_leaves_when_the_coordinator_speaks_another_version() -> None:
    site = _site()
    site.handle(Connected(), 0.0)

    effects = site.handle(Answered(Challenge(7, "fedoap 9", NONCE)), 0.1)

    reason = "the coordinator speaks protocol 7 (fedoap 9), but this site speaks 2 (test)"
    assert effects == [Leave("version", reason)]


def _greet(site: Site, welcome: FromCoordinator, body: bytes, now: float = 0.0) -> list[SiteEffect]:
    site.handle(Connected(), now)
    site.handle(Answered(Challenge(PROTOCOL_VERSION, "desk", NONCE)), now)
    return site.handle(Answered(welcome, body), now)


def test_a_welcome_site_keeps_the_plan_and_asks_at_once_what_is_due() -> None:
    effects = _greet(_site(), Welcome("alpha", PLAN.digest), PLAN.to_bytes())

    assert effects == [Learned(PLAN.to_bytes()), Say(Sync(b""))]


def test_a_site_leaves_when_the_plan_is_another_federations() -> None:
    other = PLAN.model_copy(update={"federation": "other"})

    effects = _greet(_site(), Welcome("alpha", other.digest), other.to_bytes())

    assert effects == [Leave("plan", "plan is federation other's, but this site belongs to demo")]


def test_a_site_leaves_when_the_plan_is_garbled() -> None:
    (leave,) = _greet(_site(), Welcome("alpha", PLAN.digest), PLAN.to_bytes() + b" ")

    assert isinstance(leave, Leave)
    assert leave.code == "plan"


def test_a_site_whose_key_was_revoked_leaves_and_says_no_more() -> None:
    site = _site()
    _greet(site, Welcome("alpha", PLAN.digest), PLAN.to_bytes())

    assert site.handle(Answered(Refuse("revoked", "gone")), 1.0) == [Leave("revoked", "gone")]
    assert site.handle(Tick(), 100.0) == []


def test_a_site_that_the_coordinator_does_not_know_any_more_opens_again() -> None:
    site = _site()
    _greet(site, Welcome("alpha", PLAN.digest), PLAN.to_bytes())
    site.handle(Answered(Refuse("not_joined", "say hello first")), 6.0)

    assert _said(site.handle(Tick(), 7.0)) == [Open(PROTOCOL_VERSION, "test")]


def test_a_site_comes_back_after_its_connection_broke() -> None:
    site = _site()
    _greet(site, Welcome("alpha", PLAN.digest), PLAN.to_bytes())
    site.handle(Disconnected(), 1.0)

    assert site.handle(Tick(), 100.0) == []
    assert _greet(site, Welcome("alpha", PLAN.digest), PLAN.to_bytes(), 101.0) == [Say(Sync(b""))]
