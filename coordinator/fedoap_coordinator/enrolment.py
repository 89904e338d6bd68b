"""How a site becomes a member: invitations, and the answer to whoever presents one.

The operator's `invite` prints a token and keeps only the public half of the CURVE key that follows
from its secret. A connection under that key may send `Enrol` and nothing else. A token that was used,
withdrawn or has expired still opens a connection, so that the site can be told which it is.
"""

import difflib
import math
from dataclasses import dataclass
from datetime import timedelta

from fedoap.config import FederationConfig
from fedoap.errors import ConfigError
from fedoap.identity import (
    ENROL_CONTEXT,
    ROTATE_CONTEXT,
    Certificate,
    Member,
    Token,
    enrol_payload,
    is_signed,
    rotate_payload,
)
from fedoap.messages import PROTOCOL_VERSION, Enrol, Enrolled, RefusalCode, Refuse, Rotate
from fedoap_coordinator.folder import Keys, invited_endpoint
from fedoap_coordinator.ledger import Ledger
from fedoap_coordinator.rows import Invite

SECONDS_PER_HOUR = 3600
SECONDS_PER_DAY = 24 * SECONDS_PER_HOUR
KEYS_A_DAY = 10
"""Every former key is remembered for ever, so a site that asks without end must not fill the ledger."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the invited site is told; `joined` where the roster changed."""

    message: Enrolled | Refuse
    body: bytes = b""
    joined: bool = False


@dataclass(frozen=True, slots=True)
class Enrolment:
    """Invites sites and takes them in; `now` is Unix time in seconds."""

    config: FederationConfig
    ledger: Ledger
    keys: Keys

    def invite(self, site: str, expires: int, now: float, secret: bytes) -> Token:
        """Return a new token for a site of the federation; its earlier unused ones are withdrawn.

        Raises:
            ConfigError: the site is not one of the configuration's, or the address is not known yet.
        """
        check_site(self.config, site)
        endpoint, federation = invited_endpoint(self.config.coordinator), self.config.federation
        token = Token(federation, site, endpoint, self.keys.curve.public, self.keys.signing.public, expires, secret)
        self.ledger.add_invite(token.curve_pair()[0], site, now, expires)
        return token

    def answer(self, token_key: bytes, message: Enrol, now: float) -> Answer:
        """Return the answer to a new site; where it is `Enrolled`, the roster durably holds its keys.

        A site whose first answer was lost asks again under its used token: the same keys get the same answer.
        """
        given = next((one for one in self.ledger.invites() if one.token_key == token_key), None)
        new = Member(message.site, message.curve_key, message.signing_key)
        if given is None or given.site != new.name:
            return _no("token", f"this token does not invite {new.name}; ask the operator for one that does")
        objection = self._objection(given, new, message)
        if objection:
            return objection
        if given.used and self.ledger.roster().active(new.name) == new:
            return self._yes(new)
        if given.used or given.withdrawn or now >= given.expires:
            return _unusable(given, now)
        if not self.ledger.enrol(token_key, new, now):
            return _no(
                "token", f"the invitation of {new.name} was withdrawn a moment ago; ask the operator for another"
            )
        return self._yes(new, joined=True)

    def rotate(self, site: str, message: Rotate, now: float) -> Answer:
        """Return the answer to a member that wants new keys; where it is `Enrolled`, the roster durably holds them.

        A site whose first answer was lost asks again under its new key, and gets the same answer.
        """
        roster, new = self.ledger.roster(), Member(site, message.curve_key, message.signing_key)
        old = roster.active(site)
        if old is None:
            return _no("revoked", f"the key of site {site} was revoked")
        if old == new:
            return self._yes(new)
        old_keys, new_keys = (old.curve_key, old.signing_key), (new.curve_key, new.signing_key)
        payload = rotate_payload(self.config.federation, site, old_keys, new_keys, message.protocol)
        if message.protocol != PROTOCOL_VERSION:
            return self._other_version(message.protocol)
        if not is_signed(old.signing_key, message.signature, ROTATE_CONTEXT, payload):
            return _no("bad_signature", f"the request is not signed by the key that site {site} enrolled")
        if not is_signed(new.signing_key, message.proof, ROTATE_CONTEXT, payload):
            return _no("bad_signature", "the request is not signed by the new key that it presents")
        if set(new_keys) & (set(old_keys) | self._taken(site)):
            return _no("exists", "one of these keys is in use already; each must be new")
        if self.ledger.count_keys(site, now - SECONDS_PER_DAY) >= KEYS_A_DAY:
            why = f"site {site} was given {KEYS_A_DAY} keys within a day; those that it has stay good"
            return _no("too_often", f"{why}: try again tomorrow, and have it revoked if this was not you")
        if not self.ledger.rotate(old, new, now):
            return _no("revoked", f"the key of site {site} was revoked or replaced a moment ago")
        return self._yes(new, joined=True)

    def _taken(self, site: str) -> set[bytes]:
        """Return the keys that a site may not present: other members' and tokens'."""
        others = [member for member in self.ledger.roster().members if member.name != site]
        members = {key for one in others for key in (one.curve_key, one.signing_key)}
        return members | {one.token_key for one in self.ledger.invites()}

    def _other_version(self, protocol: int) -> Answer:
        spoken = f"the site speaks protocol {protocol}, the coordinator {PROTOCOL_VERSION}"
        return _no("version", f"{spoken}; upgrade the older of the two")

    def _objection(self, given: Invite, new: Member, message: Enrol) -> Answer | None:
        keys = (new.curve_key, new.signing_key)
        payload = enrol_payload(self.config.federation, new.name, given.token_key, keys, message.protocol)
        if message.protocol != PROTOCOL_VERSION:
            return self._other_version(message.protocol)
        if not is_signed(new.signing_key, message.signature, ENROL_CONTEXT, payload):
            return _no("bad_signature", "the request is not signed by the key that it presents; join again")
        if self._taken(new.name) & set(keys):
            return _no("exists", "one of these keys belongs to another; each site makes its own: join again")
        return None

    def _yes(self, member: Member, *, joined: bool = False) -> Answer:
        keys = (member.curve_key, member.signing_key)
        certificate = Certificate.issue(self.keys.signing.secret, self.config.federation, member.name, keys)
        return Answer(Enrolled(member.name), certificate.pack(), joined)


def check_site(config: FederationConfig, site: str) -> None:
    """Return if the site is one of the configuration's.

    Raises:
        ConfigError: it is not, and which name is nearest.
    """
    if site not in config.sites:
        near = difflib.get_close_matches(site, config.sites, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"site is {site}, but the configuration lists {', '.join(config.sites)}{hint}")


def _unusable(given: Invite, now: float) -> Answer:
    if given.used:
        why = f"this token was used already; if it was not {given.site} that used it, have {given.site} revoked at once"
    elif given.withdrawn:
        why = f"this token was withdrawn, or a newer one was made for {given.site}; use that"
    else:
        ago = timedelta(seconds=math.ceil(now - given.expires))
        why = f"this token expired {ago} ago by the coordinator's clock"
    return _no("token", f"{why}; a new one is made by: fedoap-coordinator invite {given.site}")


def _no(code: RefusalCode, reason: str) -> Answer:
    return Answer(Refuse(code, reason))
