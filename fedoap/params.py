"""Which of the network's parameters stay at a site: a table of parts, by name.

Every parameter of `FedOAPNet` belongs to exactly one part of `PARTS`. `SELECTORS` name sets that cut
across the parts. A strategy lists parts and selectors; what they match is personal, all else shared.
Names are data, so this module needs no torch and the coordinator can use it.
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence

from fedoap.errors import ConfigError

PERSONAL_PREFIX = "personal."
"""Starts the names of personal parameters, which never occur in a message."""

CONTROL_PREFIX = "control."
"""Starts the names of control variates, which travel with the shared parameters and are none."""

PARTS: Mapping[str, tuple[str, ...]] = {
    "encoder": ("encoder.",),
    "bottleneck_q": ("bottleneck_q.",),
    "bottleneck_kv": ("bottleneck_kv.",),
    "query": ("attention.query.",),
    "key": ("attention.key.",),
    "value": ("attention.value.",),
    "gate": ("attention.gate",),
    "output": ("attention.output.", "attention.norm."),
    "decoder": ("decoder.",),
    "adapter": ("adapter.",),
    "head": ("head.",),
}
"""Each part's parameters, by how their names start."""

SELECTORS: Mapping[str, str] = {
    "all": r"",
    "norms": r"(?:.*[._])?norm\d*\.(?:weight|bias)$",
    "shallow": r"encoder\.[01]\.",
}
"""Sets across the parts, by a pattern that their names match: `norms` holds the scale and shift of each
norm layer, `shallow` the stem and the first down stage."""


def part_of(name: str) -> str:
    """Return the part that a parameter belongs to.

    >>> part_of("attention.norm.weight")
    'output'
    """
    for part, prefixes in PARTS.items():
        if name.startswith(prefixes):
            return part
    raise ConfigError(f"parameter {name} belongs to no part of fedoap.params.PARTS")


def is_personal(name: str, personal: Iterable[str]) -> bool:
    """Return whether one of the parts or selectors holds the parameter.

    >>> is_personal("encoder.0.norm1.bias", ["head", "norms"])
    True
    """
    return any(_holds(selector, name) for selector in personal)


def split(names: Iterable[str], personal: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the shared and the personal names, each sorted.

    Raises:
        ConfigError: an entry of `personal` is neither part nor selector.
    """
    check_parts(personal)
    ordered = sorted(names)
    mine = tuple(name for name in ordered if is_personal(name, personal))
    return tuple(name for name in ordered if name not in set(mine)), mine


def check_parts(personal: Iterable[str]) -> None:
    """Return if every entry is a part or a selector.

    Raises:
        ConfigError: naming the entry and the nearest known one.
    """
    known = [*PARTS, *SELECTORS]
    for entry in personal:
        if entry not in known:
            near = difflib.get_close_matches(entry, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            raise ConfigError(f"strategy.personal names {entry}, which is no part of the network; {hint}")


def check_matches(names: Sequence[str], personal: Iterable[str]) -> None:
    """Return if every entry matches at least one parameter of the network.

    Raises:
        ConfigError: an entry matches nothing, so that it would silently change nothing.
    """
    for entry in personal:
        if not any(_holds(entry, name) for name in names):
            raise ConfigError(f"strategy.personal names {entry}, but this network has no such parameter")


def _holds(entry: str, name: str) -> bool:
    if entry in PARTS:
        return name.startswith(PARTS[entry])
    return entry in SELECTORS and re.match(SELECTORS[entry], name) is not None
