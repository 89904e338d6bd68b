"""TOML files read into checked models, and values written as TOML, which the standard library does not."""

import difflib
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from fedoap.errors import ConfigError

ModelT = TypeVar("ModelT", bound=BaseModel)


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
            return json.dumps(str(value), ensure_ascii=False)  # TOML's strings have the escapes of JSON


def load_toml(path: Path, model: type[ModelT]) -> ModelT:
    """Return a file's values as the model, paths as they stand.

    Raises:
        ConfigError: naming file, key, value and expectation.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from None
    except RecursionError:
        raise ConfigError(f"{path}: is nested too deeply to be read") from None
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{path}: {first_line(error, model)}") from None


def first_line(error: ValidationError, model: type[BaseModel]) -> str:
    """Return the first fault as key, value and expectation; a misspelt key comes with the nearest right one."""
    faults = error.errors(include_url=False)
    # a misspelt key is missing under its right name too: the misspelling is what to tell
    first = next((fault for fault in faults if fault["type"] == "extra_forbidden"), faults[0])
    key = ".".join(str(part) for part in first["loc"])
    match first["type"]:
        case "extra_forbidden":
            near = difflib.get_close_matches(key, _keys(model), n=1)
            return f"unknown key {key}" + (f"; did you mean {near[0]}?" if near else "")
        case "missing":
            return f"{key} is missing"
        case "value_error":
            return f"{key}: {first['ctx']['error']}" if key else str(first["ctx"]["error"])
        case "tuple_type":
            return f"{key} is {first['input']!r}, but must be a list"
        case "too_short":
            return f"{key} is {first['input']!r}, but must name {first['ctx']['min_length']} at least"
        case "model_type":
            return f"{key} is {first['input']!r}, but must be a table: [{key}]"
        case _:
            text = first["msg"][0].lower() + first["msg"][1:]
            return f"{key} is {first['input']!r}, but {text}"


def _keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                keys += _keys(kind, f"{prefix}{name}.")
    return keys
