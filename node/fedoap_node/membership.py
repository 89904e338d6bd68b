"""Who this site is in which federation: the `identity/` folder that joining leaves.

signing.key, curve.key    32 raw bytes each, mode 0600; made here, never sent
next/                     the keys by which `rotate` is about to replace them, and at last their certificate
federation.json           where the coordinator is, and the public keys to know it by
certificate               the federation's signed word that the keys are this site's
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, ValidationError

from fedoap.errors import IdentityError
from fedoap.fields import Endpoint, Frozen, Name
from fedoap.identity import Certificate, KeyPair, curve_keys, read_private, signing_keys, sync_folder, write_private
from fedoap.sitefolder import SiteFolder
from fedoap_node.files import remove, write_durably

SIGNING_KEY = "signing.key"
CURVE_KEY = "curve.key"
CERTIFICATE = "certificate"
NEXT = "next"
HexKey = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class FederationRecord(Frozen):
    """`federation.json`; a site may set `endpoint` anew when its coordinator moves."""

    federation: Name
    site: Name
    endpoint: Endpoint
    server_key: HexKey
    federation_key: HexKey


@dataclass(frozen=True, slots=True)
class Membership:
    """A site's place in a federation."""

    federation: str
    site: str
    endpoint: str
    server_key: bytes
    federation_key: bytes
    curve: KeyPair
    signing: KeyPair

    @classmethod
    def read(cls, folder: SiteFolder) -> Self:
        """Return what joining wrote, its certificate checked.

        Raises:
            IdentityError: a file is missing, altered or readable by others.
        """
        with _alone(folder.identity):
            _take_up(folder.identity)
            return cls._read(folder)

    @classmethod
    def _read(cls, folder: SiteFolder) -> Self:
        record = _record(folder.federation)
        if record.site != folder.name:
            raise IdentityError(f"{folder.identity}: is that of site {record.site}, but the folder is {folder.name}'s")
        curve = curve_keys(read_private(folder.identity / CURVE_KEY))
        signing = signing_keys(read_private(folder.identity / SIGNING_KEY))
        keys = (bytes.fromhex(record.server_key), bytes.fromhex(record.federation_key))
        member = cls(record.federation, record.site, record.endpoint, *keys, curve, signing)
        member.check(_certificate(folder.identity / CERTIFICATE))
        return member

    def check(self, certificate: Certificate) -> None:
        """Return if the certificate is the federation's word about this site's keys.

        Raises:
            IdentityError: it is not.
        """
        certificate.verify(self.federation_key)
        said = (certificate.federation, certificate.site, certificate.curve_key, certificate.signing_key)
        if said != (self.federation, self.site, self.curve.public, self.signing.public):
            raise IdentityError(f"certificate of {certificate.site}: is not about site {self.site} and its keys")

    def write(self, identity: Path) -> None:
        """Write the identity folder's files but the certificate.

        Raises:
            StorageError: the disk refuses.
        """
        write_private(identity / SIGNING_KEY, self.signing.secret)
        write_private(identity / CURVE_KEY, self.curve.secret)
        record = FederationRecord(
            federation=self.federation,
            site=self.site,
            endpoint=self.endpoint,
            server_key=self.server_key.hex(),
            federation_key=self.federation_key.hex(),
        )
        write_durably(identity / "federation.json", record.model_dump_json(indent=1).encode())


def is_rotating(identity: Path) -> bool:
    """Return whether new keys are there whose certificate has not come yet."""
    return all((identity / NEXT / name).exists() for name in (SIGNING_KEY, CURVE_KEY))


def _take_up(identity: Path) -> None:
    """Put new keys whose certificate has come in the place of the old; a crash on the way has it done again."""
    fresh = identity / NEXT
    if not (fresh / CERTIFICATE).exists():
        return
    for name in (SIGNING_KEY, CURVE_KEY):
        write_private(identity / name, read_private(fresh / name))
    write_durably(identity / CERTIFICATE, (fresh / CERTIFICATE).read_bytes())
    done = identity / f".{NEXT}"
    remove(done)
    fresh.rename(done)  # at once: keys without their certificate would pass for a rotation under way
    sync_folder(identity)
    remove(done)


@contextmanager
def _alone(identity: Path) -> Iterator[None]:
    """Let no other process of ours look at the folder while its files are exchanged."""
    try:
        descriptor = os.open(identity, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise IdentityError(f"{identity}: cannot be read: {error.strerror}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _record(path: Path) -> FederationRecord:
    try:
        return FederationRecord.model_validate_json(path.read_bytes())
    except OSError as error:
        raise IdentityError(f"{path}: cannot be read: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "content"
        raise IdentityError(f"{path}: {place}: {first['msg'].lower()}; it is not what joining wrote") from None


def _certificate(path: Path) -> Certificate:
    try:
        return Certificate.unpack(path.read_bytes())
    except OSError as error:
        raise IdentityError(f"{path}: cannot be read: {error.strerror}") from None
