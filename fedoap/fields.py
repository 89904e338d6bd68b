"""What the fields of configuration files may hold, and what their sections have in common."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

NAME_PATTERN = r"^[a-z0-9][a-z0-9_-]{0,62}$"
PROXY_PATTERN = (
    r"^(?P<kind>socks5|http)://((?P<user>[^:@/\s]+):(?P<password>[^:@/\s]*)@)?"
    r"(?P<at>(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9.-]+):\d{1,5})$"
)
ENDPOINT_PATTERN = r"^tcp://(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9.*-]+):(\d{1,5}|\*)$"

Name = Annotated[str, Field(pattern=NAME_PATTERN)]
"""A site's or federation's name: lower-case letters, digits, `_` and `-`; safe as a folder's name."""

Endpoint = Annotated[str, Field(pattern=ENDPOINT_PATTERN)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]


class Frozen(BaseModel):
    """A section of a configuration file: immutable, and no key but those declared."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
