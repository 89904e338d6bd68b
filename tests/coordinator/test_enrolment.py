"""Joining: a token lets one site in once, and whoever is refused learns what to do."""

from dataclasses import dataclass, replace
from itertools import pairwise

import pytest

from fedoap.config import FederationConfig
from fedoap.errors import ConfigError
from fedoap.identity import (
    ENROL_CONTEXT,
    ROTATE_CONTEXT,
    Certificate,
    KeyPair,
    Token,
    curve_keys,
    enrol_payload,
    rotate_payload,
    sign,
    signing_keys,
)
from fedoap.messages import PROTOCOL_VERSION, Enrol, Enrolled, Refuse, Rotate
from fedoap_coordinator.enrolment import KEYS_A_DAY, SECONDS_PER_DAY, Answer, Enrolment
from fedoap_coordinator.folder import Keys, prepare, write_endpoint
from fedoap_coordinator.ledger import Ledger

NOW = 1_700_000_000.0
EXPIRES = int(NOW) + 3600


@dataclass
class Desk:
    """Invites and answers, with the keys of the sites that ask."""

    enrolment: Enrolment
    keys: Keys

    def invite(self, site: str = "hospital_a", now: float = NOW) -> Token:
        return self.enrolment.invite(site, EXPIRES, now, f"{site}{now}".encode().ljust(16, b".")[-16:])

    def ask(self, token: Token, request: Enrol, now: float = NOW) -> Answer:
        return self.enrolment.answer(token.curve_pair()[0], request, now)


@pytest.fixture
def desk(config: FederationConfig, ledger: Ledger) -> Desk:
    keys = prepare(config.coordinator.state)
    write_endpoint(config.coordinator.state, "tcp://127.0.0.1:4321")
    return Desk(Enrolment(config, ledger, keys), keys)


def request(token: Token, seed: bytes = b"1", signer: KeyPair | None = None) -> Enrol:
    curve, signing = curve_keys(seed * 32), signing_keys(seed * 32)
    keys = (curve.public, signing.public)
    payload = enrol_payload(token.federation, token.site, token.curve_pair()[0], keys, PROTOCOL_VERSION)
    signature = sign((signer or signing).secret, ENROL_CONTEXT, payload)
    return Enrol(PROTOCOL_VERSION, token.site, *keys, signature)


def refusal(answer: Answer) -> Refuse:
    assert isinstance(answer.message, Refuse)
    assert not answer.joined
    return answer.message


def test_a_token_names_the_real_port_and_the_federations_keys(desk: Desk) -> None:
    token = desk.invite()

    assert token.endpoint == "tcp://fed.example.org:4321"
    assert (token.server_key, token.federation_key) == (desk.keys.curve.public, desk.keys.signing.public)
    assert token.expires == EXPIRES


def test_only_the_public_half_of_the_tokens_key_is_kept(desk: Desk) -> None:
    token = desk.invite()
    public, secret = token.curve_pair()

    kept = desk.enrolment.ledger.path.read_bytes() + desk.enrolment.ledger.path.with_name("fed.sqlite-wal").read_bytes()

    assert public in kept
    assert secret not in kept
    assert token.secret not in kept


def test_a_site_with_a_token_joins_and_gets_a_certificate_that_holds(desk: Desk) -> None:
    token = desk.invite()

    answer = desk.ask(token, request(token))

    assert answer.message == Enrolled("hospital_a")
    assert answer.joined
    certificate = Certificate.unpack(answer.body)
    certificate.verify(token.federation_key)
    member = desk.enrolment.ledger.roster().active("hospital_a")
    assert member is not None
    assert (member.curve_key, member.signing_key) == (certificate.curve_key, certificate.signing_key)


def test_a_site_whose_answer_was_lost_gets_the_same_answer_even_after_the_token_expired(desk: Desk) -> None:
    token = desk.invite()
    first = desk.ask(token, request(token))

    again = desk.ask(token, request(token), now=EXPIRES + 1.0)

    assert again == replace(first, joined=False)
    assert desk.enrolment.ledger.roster().epoch == 1


def test_a_used_token_lets_no_other_keys_in(desk: Desk) -> None:
    token = desk.invite()
    desk.ask(token, request(token))

    refused = refusal(desk.ask(token, request(token, seed=b"2")))

    assert refused.code == "token"
    assert "was used already" in refused.reason
    assert "fedoap-coordinator invite hospital_a" in refused.reason


def test_an_expired_token_is_refused_and_says_since_when(desk: Desk) -> None:
    token = desk.invite()

    refused = refusal(desk.ask(token, request(token), now=EXPIRES + 7200.0))

    assert refused.code == "token"
    assert "expired 2:00:00 ago" in refused.reason


def test_an_older_token_is_void_once_a_newer_one_is_made(desk: Desk) -> None:
    older, newer = desk.invite(), desk.invite(now=NOW + 1)

    refused = refusal(desk.ask(older, request(older)))

    assert "a newer one was made for hospital_a" in refused.reason
    assert desk.ask(newer, request(newer)).joined


def test_a_token_serves_the_site_that_it_names_only(desk: Desk) -> None:
    token = desk.invite()
    forged = replace(request(token), site="hospital_b")

    assert refusal(desk.ask(token, forged)).reason.startswith("this token does not invite hospital_b")


def test_a_request_not_signed_by_the_key_that_it_presents_is_refused(desk: Desk) -> None:
    token = desk.invite()

    assert refusal(desk.ask(token, request(token, signer=signing_keys(b"9" * 32)))).code == "bad_signature"


def test_a_request_made_for_another_token_is_refused(desk: Desk) -> None:
    older = request(desk.invite())
    newer = desk.invite(now=NOW + 1)

    assert refusal(desk.ask(newer, older)).code == "bad_signature"


def test_another_version_of_the_protocol_is_refused_by_name(desk: Desk) -> None:
    token = desk.invite()

    refused = refusal(desk.ask(token, replace(request(token), protocol=7)))

    assert (refused.code, "protocol 7, the coordinator 2" in refused.reason) == ("version", True)


def test_a_site_with_anothers_keys_is_refused(desk: Desk) -> None:
    token, other = desk.invite(), desk.invite("hospital_b")
    desk.ask(token, request(token))

    assert refusal(desk.ask(other, request(other))).code == "exists"


def test_a_revoked_site_joins_anew_with_a_new_token_only(desk: Desk) -> None:
    token = desk.invite()
    desk.ask(token, request(token))
    desk.enrolment.ledger.revoke("hospital_a", NOW)
    newer = desk.invite(now=NOW + 1)

    assert refusal(desk.ask(token, request(token))).code == "token"
    assert desk.ask(newer, request(newer, seed=b"2")).joined


def test_a_site_outside_the_configuration_is_not_invited(desk: Desk) -> None:
    with pytest.raises(ConfigError, match=r"site is hospitl_a, but .* did you mean hospital_a\?"):
        desk.invite("hospitl_a")


def test_inviting_before_the_first_start_needs_a_port(config: FederationConfig, ledger: Ledger) -> None:
    keys = prepare(config.coordinator.state)

    with pytest.raises(ConfigError, match="whose port is chosen at the start"):
        Enrolment(config, ledger, keys).invite("hospital_a", EXPIRES, NOW, b"s" * 16)


def rotation(old: bytes = b"1", new: bytes = b"2", *, signer: bytes = b"", prover: bytes = b"") -> Rotate:
    """Return hospital_a's request for new keys, of seeds; signed and proved by those of others if so asked."""
    keys = [(curve_keys(seed * 32).public, signing_keys(seed * 32).public) for seed in (old, new)]
    payload = rotate_payload("demo", "hospital_a", keys[0], keys[1], PROTOCOL_VERSION)
    signatures = (sign(signing_keys(by * 32).secret, ROTATE_CONTEXT, payload) for by in (signer or old, prover or new))
    return Rotate(PROTOCOL_VERSION, *keys[1], *signatures)


def test_a_member_gets_new_keys_and_a_certificate_and_the_same_answer_again(desk: Desk) -> None:
    """Planted bug: the second request refused, so that a lost answer shuts the site out."""
    token = desk.invite()
    desk.ask(token, request(token))
    before = desk.enrolment.ledger.roster()

    first = desk.enrolment.rotate("hospital_a", rotation(), NOW)
    again = desk.enrolment.rotate("hospital_a", rotation(), NOW)

    roster = desk.enrolment.ledger.roster()
    member = roster.active("hospital_a")
    assert member is not None
    assert (member.curve_key, member.signing_key) == (curve_keys(b"2" * 32).public, signing_keys(b"2" * 32).public)
    assert roster.epoch == before.epoch + 1
    assert (first.message, first.joined, again.joined) == (Enrolled("hospital_a"), True, False)
    assert first.body == again.body
    Certificate.unpack(first.body).verify(token.federation_key)


@pytest.mark.parametrize(
    ("asked", "code"),
    [
        (rotation(signer=b"9"), "bad_signature"),
        (rotation(prover=b"9"), "bad_signature"),
        (rotation(old=b"9"), "bad_signature"),
        (replace(rotation(), curve_key=curve_keys(b"8" * 32).public), "bad_signature"),
        (replace(rotation(), protocol=PROTOCOL_VERSION + 1), "version"),
        (rotation(new=b"b"), "exists"),
    ],
)
def test_new_keys_are_vouched_for_by_the_old_and_by_themselves(desk: Desk, asked: Rotate, code: str) -> None:
    """Planted bugs: the signature, the proof, keys of other sites not looked at."""
    token, other = desk.invite(), desk.invite("hospital_b")
    desk.ask(token, request(token))
    desk.ask(other, request(other, b"b"))
    before = desk.enrolment.ledger.roster()

    assert refusal(desk.enrolment.rotate("hospital_a", asked, NOW)).code == code
    assert desk.enrolment.ledger.roster() == before


def test_a_revoked_site_gets_no_new_keys(desk: Desk) -> None:
    token = desk.invite()
    desk.ask(token, request(token))
    desk.enrolment.ledger.revoke("hospital_a", NOW)

    assert refusal(desk.enrolment.rotate("hospital_a", rotation(), NOW)).code == "revoked"


def test_a_site_cannot_fill_the_ledger_with_keys(desk: Desk) -> None:
    """Planted bug: no limit."""
    token = desk.invite()
    desk.ask(token, request(token))
    seeds = [b"1", *(bytes([number]) for number in range(100, 100 + KEYS_A_DAY))]
    steps = [rotation(old, new) for old, new in pairwise(seeds)]

    answers = [desk.enrolment.rotate("hospital_a", step, NOW + at) for at, step in enumerate(steps)]
    repeated = desk.enrolment.rotate("hospital_a", steps[-2], NOW + 60)
    tomorrow = desk.enrolment.rotate("hospital_a", steps[-1], NOW + 2 * SECONDS_PER_DAY)

    assert [one.joined for one in answers] == [True] * (KEYS_A_DAY - 1) + [False]
    assert refusal(answers[-1]).code == "too_often"
    assert isinstance(repeated.message, Enrolled)
    assert tomorrow.joined


def test_keys_that_were_replaced_are_remembered(desk: Desk) -> None:
    """Results of earlier rounds are signed by them. Planted bug: forgotten when a site joins anew."""
    token = desk.invite()
    desk.ask(token, request(token))
    desk.enrolment.rotate("hospital_a", rotation(), NOW + 1)
    newer = desk.invite(now=NOW + 2)
    desk.ask(newer, request(newer, b"3"), NOW + 3)

    rows = desk.enrolment.ledger._run("select site, signing_key from site_keys order by since").fetchall()
    assert rows[:2] == [("hospital_a", signing_keys(b"1" * 32).public), ("hospital_a", signing_keys(b"2" * 32).public)]
    assert len(rows) == 3
