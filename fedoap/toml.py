"""Values as TOML, which the standard library reads but does not write."""

from collections.abc import Mapping


def to_toml(values: Mapping[str, object], prefix: str = "") -> str:
    """Return a mapping as TOML: first its values, then its tables; what is None is left out.

    >>> print(to_toml({"a": 1, "b": {"c": (True, 0.5), "d": None}}))
    a = 1
    <BLANKLINE>
    [b]
    c = [true, 0.5]
    """
    plain = [f"{key} = {_value(value)}" for key, value in values.items() if not _is_skipped(value)]
    tables = [
        f"\n[{prefix}{key}]\n{to_toml(value, f'{prefix}{key}.')}"
        for key, value in values.items()
        if isinstance(value, Mapping)
    ]
    return "\n".join(plain + tables)


def _is_skipped(value: object) -> bool:
    return value is None or isinstance(value, Mapping)


def _value(value: object) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case int() | float():
            return repr(value)
        case list() | tuple():
            return f"[{', '.join(_value(item) for item in value)}]"
        case _:
            text = str(value).replace("\\", "\\\\").replace('"', '\\"')
            return f'"{text}"'
