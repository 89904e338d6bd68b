"""Nested tables as TOML gives them: merged, and written key by key."""

from collections.abc import Mapping
from typing import TypeAlias

Table: TypeAlias = Mapping[str, object]


def changed(values: Table, changes: Table) -> dict[str, object]:
    """Return a table in which the changes stand, tables within merged likewise.

    >>> changed({"a": {"b": 1, "c": 2}, "d": [3]}, {"a": {"c": 4}, "d": []})
    {'a': {'b': 1, 'c': 4}, 'd': []}
    """
    result = dict(values)
    for key, change in changes.items():
        old = result.get(key)
        result[key] = changed(old, change) if isinstance(old, Mapping) and isinstance(change, Mapping) else change
    return result


def nested(dotted: Table) -> dict[str, object]:
    """Return a table of dotted keys as tables within tables.

    >>> nested({"a.b": 1, "a.c": 2, "d": 3})
    {'a': {'b': 1, 'c': 2}, 'd': 3}
    """
    result: dict[str, object] = {}
    for key, value in dotted.items():
        for part in reversed(key.split(".")):
            value = {part: value}  # noqa: PLW2901 - wrapped from the inside out
        assert isinstance(value, dict)
        result = changed(result, value)
    return result
