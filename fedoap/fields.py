"""What the fields of configuration files may hold, and what their sections have in common."""

import re
from typing import Annotated, Final, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

NAME_PATTERN = r"^[a-z0-9][a-z0-9_-]{0,62}$"
PROXY_PATTERN = (
    r"^(?P<kind>socks5|http)://((?P<user>[^:@/\s]+):(?P<password>[^:@/\s]*)@)?"
    r"(?P<at>(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9.-]+):\d{1,5})$"
)
ENDPOINT_PATTERN = r"^tcp://(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9.*-]+):(\d{1,5}|\*)$"

METRICS_PATTERN = r"^(([A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\]):)?\d{1,5}$"
LARGEST_PORT: Final = 65535


def _like(pattern: str, words: str) -> AfterValidator:
    """Return a check that says in words what a text that does not match must be."""

    def check(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(f"{text!r} is not {words}")
        return text

    return AfterValidator(check)


def _real_port(endpoint: str) -> str:
    """Return the endpoint; of a larger port libzmq would take the lowest 16 bits, which is another one."""
    port = endpoint.rpartition(":")[2]
    if port != "*" and not 1 <= int(port) <= LARGEST_PORT:
        raise ValueError(f"port is {port}, but must be 1 to {LARGEST_PORT}, or * where the system may choose")
    return endpoint


def _one_host(endpoint: str) -> str:
    host = endpoint.removeprefix("tcp://").rpartition(":")[0]
    if "*" in host or host in ("0.0.0.0", "[::]"):  # noqa: S104 - nothing listens here
        raise ValueError(f"host is {host}, which nobody can dial; name the one that sites reach")
    return endpoint


def _metrics_port(address: str) -> str:
    port = address.rpartition(":")[2]
    if int(port) > LARGEST_PORT:
        raise ValueError(f"port is {port}, but must be at most {LARGEST_PORT}")
    return address


Name = Annotated[str, _like(NAME_PATTERN, "1 to 63 lower-case letters, digits, _ and -, the first a letter or digit")]
"""A site's or federation's name: lower-case letters, digits, `_` and `-`; safe as a folder's name."""

Endpoint = Annotated[
    str, _like(ENDPOINT_PATTERN, "tcp://HOST:PORT, an IPv6 address in brackets"), AfterValidator(_real_port)
]
Dialled = Annotated[Endpoint, AfterValidator(_one_host)]
"""An address that another machine is told to dial."""
MetricsAddress = Annotated[
    str, _like(METRICS_PATTERN, "HOST:PORT, or a port on 127.0.0.1"), AfterValidator(_metrics_port)
]
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]


class Frozen(BaseModel):
    """A section of a configuration file: immutable, and no key but those declared."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: object, info: ValidationInfo) -> object:
        assert info.field_name is not None
        annotation = cls.model_fields[info.field_name].annotation
        if isinstance(value, bool) and not _allows(annotation, bool) and _allows(annotation, int, float):
            raise ValueError(f"is {str(value).lower()}, but must be a number")
        return value


def _allows(annotation: object, *kinds: type) -> bool:
    return annotation in kinds or any(_allows(one, *kinds) for one in get_args(annotation))
