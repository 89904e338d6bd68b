"""Joining: a one-time token becomes a site's folder with keys that were made here.

The site's keys travel nowhere but in their public halves, under the CURVE key that the token stands
for. The folder is written beside its place and renamed into it last: a join that fails leaves nothing.
"""

import datetime as dt
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from fedoap.config import Modality, SiteData, SiteNetwork
from fedoap.errors import ConfigError, IdentityError, RefusedError, StorageError
from fedoap.identity import (
    ENROL_CONTEXT,
    Certificate,
    KeyPair,
    Token,
    curve_keys,
    enrol_payload,
    fingerprint,
    sign,
    signing_keys,
    sync_folder,
)
from fedoap.messages import PROTOCOL_VERSION, Enrol
from fedoap.segmentation.datalist import check_form
from fedoap.sitefolder import SiteFolder, home_for_joining
from fedoap_node.asking import Question, ask
from fedoap_node.files import sync_tree, write_durably
from fedoap_node.link import Address
from fedoap_node.membership import CERTIFICATE, Membership
from fedoap_node.tunnel import Proxy


@dataclass(frozen=True, slots=True)
class Joined:
    """A site that has just joined; both fingerprints are shown on the coordinator's side as well."""

    folder: SiteFolder
    federation: str
    site_fingerprint: str
    federation_fingerprint: str


def join(
    text: str, home: Path | None = None, data: Path | None = None, modality: Modality = "mr", proxy: str | None = None
) -> Joined:
    """Return a site that has joined the token's federation, its folder written; it dials through the proxy, if any.

    Raises:
        FedoapError: the token, the datalist, the coordinator or the disk is at fault. Nothing is left behind, and
            the token stays good until the coordinator accepts it: all else is checked first.
    """
    token, way = Token.decode(text), _proxy(proxy)
    if data is not None:
        check_form(SiteData(datalist=data.absolute(), modality=modality))
    folder = SiteFolder(home_for_joining(home) / token.site)
    if folder.path.exists():
        raise IdentityError(f"site {token.site}: has joined already, {folder.path} is there; use another --home")
    curve, signing = curve_keys(os.urandom(32)), signing_keys(os.urandom(32))
    keys = (token.server_key, token.federation_key)
    member = Membership(token.federation, token.site, token.endpoint, *keys, curve, signing)
    with _drafted(folder) as draft:
        draft.config.touch(0o600)  # a proxy's password may stand there
        draft.config.write_text(site_toml(data, modality, proxy), encoding="utf-8")
        member.write(draft.identity)
        write_durably(draft.identity / CERTIFICATE, _enrol(token, member, way).pack())
    prints = (fingerprint(signing.public), fingerprint(token.federation_key))
    return Joined(folder, token.federation, *prints)


def site_toml(data: Path | None, modality: Modality, proxy: str | None = None) -> str:
    """Return a `site.toml` that names the data, every other key in a comment with its default."""
    named = json.dumps(str(data.absolute()) if data else "datalist.json")
    mark = "" if data else "# "
    way = f"proxy = {json.dumps(proxy)}" if proxy else '# proxy = "http://proxy.example.org:3128"'
    return f"""\
# This site's data and hardware. Relative paths start at this file's folder.

{mark}[data]
{mark}datalist = {named}  # MONAI/Decathlon JSON with lists `training`, `validation` and `test`
{mark}modality = "{modality}"  # mr, ct, ultrasound or photo: defaults of intensity scaling and augmentation
# root = "images"  # folder that the datalist's paths start at; its own folder where not given
# spacing_mm = [1.0, 1.0]  # resample to this voxel spacing; images are only resized where not given
# crop = false  # cut off the dark margin around what the image shows
# window = [-100.0, 250.0]  # intensities mapped to [0, 1]; by modality where not given
# channels = [0]  # channels of the image to use
# max_training_cases = 20  # for trials

[network]
{way}  # the node dials out through it: http:// (CONNECT) or socks5://, USER:PASSWORD@ before the host

[worker]
# device = "auto"  # auto, cpu, cuda or cuda:N
# gpus = 1  # GPUs to train on together
# threads = 0  # CPU threads; 0 lets PyTorch choose
# keep_warm = false  # let no worker wait, its imports done, for the next task; saves memory, costs seconds a task
# stay_seconds = 60.0  # how long the worker keeps its images and GPU for another task; 0: each task a new one
"""


def _proxy(url: str | None) -> Proxy | None:
    try:
        return Proxy.parse(url) if SiteNetwork(proxy=url).proxy and url else None
    except ValidationError as error:
        raise ConfigError(f"--proxy {error.errors()[0]['ctx']['error']}") from None


def _enrol(token: Token, member: Membership, proxy: Proxy | None) -> Certificate:
    keys = KeyPair(*token.curve_pair())
    there, whose = f"{token.endpoint}: what answers there", "another federation's coordinator, or a proxy on the way"
    question = Question(
        _request(token, member, keys.public),
        subject=f"token of {token.site}",
        stranger=f"{there} does not hold the key that the token names; {whose}",
        unknown_key=RefusedError("token", f"token of {token.site}: {_why_refused(token)}; ask for a new one"),
    )
    certificate = ask(Address(token.endpoint, token.server_key, proxy), keys, question)
    member.check(certificate)
    return certificate


def _request(token: Token, member: Membership, token_key: bytes) -> Enrol:
    keys = (member.curve.public, member.signing.public)
    payload = enrol_payload(token.federation, token.site, token_key, keys, PROTOCOL_VERSION)
    signature = sign(member.signing.secret, ENROL_CONTEXT, payload)
    return Enrol(PROTOCOL_VERSION, token.site, *keys, signature)


def _why_refused(token: Token) -> str:
    if time.time() > token.expires:
        return f"expired on {dt.datetime.fromtimestamp(token.expires, dt.UTC):%Y-%m-%d %H:%M} UTC"
    return "was used before, or replaced by a newer one, or withdrawn"


@contextmanager
def _drafted(folder: SiteFolder) -> Iterator[SiteFolder]:
    """Yield a folder beside the site's; it takes the site's place if the block succeeds, else it is removed."""
    home = folder.path.parent
    fresh = [place for place in (home, *home.parents) if not place.exists()]
    try:
        home.mkdir(parents=True, exist_ok=True)
        draft = SiteFolder(Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=home)))
        draft.identity.mkdir(mode=0o700)
    except OSError as error:
        raise StorageError(f"{home}: cannot be written: {error.strerror}") from None
    try:
        yield draft
        sync_tree(draft.path)
        draft.path.rename(folder.path)
        sync_folder(home)
    except BaseException:
        shutil.rmtree(draft.path, ignore_errors=True)
        with suppress(OSError):
            for place in fresh:
                place.rmdir()
        raise
