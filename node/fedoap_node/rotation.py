"""New keys for a site, vouched for by the old ones; whatever crashes, the site keeps a pair that the coordinator knows.

The new keys lie durably in `identity/next/` before the coordinator hears of them, so this site holds both
pairs, whether it took the new one or not. The site asks under the old key and, where that is refused, under
the new one; the same request gets the same answer. The certificate's arrival in `next/` decides: from then
on whoever reads the identity puts the new keys in the place of the old (`membership.py`).
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from fedoap.errors import RefusedError, StorageError
from fedoap.identity import (
    KEY_BYTES,
    ROTATE_CONTEXT,
    Certificate,
    curve_keys,
    read_private,
    rotate_payload,
    sign,
    signing_keys,
    write_private,
)
from fedoap.messages import PROTOCOL_VERSION, Rotate
from fedoap.sitefolder import SiteFolder
from fedoap_node.asking import Question, ask
from fedoap_node.files import write_durably
from fedoap_node.link import Address
from fedoap_node.membership import CERTIFICATE, CURVE_KEY, NEXT, SIGNING_KEY, Membership, is_rotating
from fedoap_node.tunnel import Proxy


def rotate(folder: SiteFolder, proxy: Proxy | None) -> Membership:
    """Return the site with new keys that the coordinator knows and that lie in their place.

    Raises:
        FedoapError: it could not be done, or not to the end; the next attempt, or a node that starts, goes on.
    """
    fresh = folder.identity / NEXT
    with _alone(folder):
        Membership.read(folder)  # takes up an earlier rotation that has its certificate
        try:
            fresh.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise StorageError(f"{fresh}: cannot be made: {error.strerror}") from None
        for name in (SIGNING_KEY, CURVE_KEY):
            if not (fresh / name).exists():
                write_private(fresh / name, os.urandom(KEY_BYTES))
    return settle(folder, proxy)


def settle(folder: SiteFolder, proxy: Proxy | None) -> Membership:
    """Return the site as it is, a rotation that was under way brought to its end.

    Raises:
        FedoapError: the coordinator cannot be reached, or knows neither key.
    """
    with _alone(folder):
        member = Membership.read(folder)
        if not is_rotating(folder.identity):
            return member
        fresh = folder.identity / NEXT
        keys = (curve_keys(read_private(fresh / CURVE_KEY)), signing_keys(read_private(fresh / SIGNING_KEY)))
        heir = replace(member, curve=keys[0], signing=keys[1])
        certificate = _certified(member, heir, proxy)
        heir.check(certificate)
        write_durably(fresh / CERTIFICATE, certificate.pack())
        return Membership.read(folder)


def _certified(member: Membership, heir: Membership, proxy: Proxy | None) -> Certificate:
    unknown = f"site {member.site}: neither its old nor its new key is enrolled at {member.endpoint}"
    question = Question(
        _request(member, heir),
        subject=f"site {member.site}",
        stranger=f"what answers at {member.endpoint} does not prove to be the coordinator",
        unknown_key=RefusedError("revoked", f"{unknown}; ask the federation's operator"),
        patience=1,
        advice="; the new keys wait in identity/next, and the old ones stay good; try again",
    )
    address = Address(member.endpoint, member.server_key, proxy)
    try:
        return ask(address, member.curve, question)
    except RefusedError as error:
        if error.code != "revoked":
            raise
    # an earlier answer was lost: the coordinator knows the new key only
    return ask(address, heir.curve, question)


def _request(member: Membership, heir: Membership) -> Rotate:
    old, new = (member.curve.public, member.signing.public), (heir.curve.public, heir.signing.public)
    payload = rotate_payload(member.federation, member.site, old, new, PROTOCOL_VERSION)
    signatures = (sign(one.signing.secret, ROTATE_CONTEXT, payload) for one in (member, heir))
    return Rotate(PROTOCOL_VERSION, *new, *signatures)


@contextmanager
def _alone(folder: SiteFolder) -> Iterator[None]:
    """Let one process at a time rotate; reading the identity, which is quick, has a lock of its own."""
    path = folder.state / "rotation"
    try:
        folder.state.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise StorageError(f"{path}: cannot be opened: {error.strerror}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
