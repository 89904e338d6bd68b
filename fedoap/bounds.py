"""What a message's field may hold, read off its annotation: `Annotated[int, Range(0, 9)]`, `Literal["a", "b"]`."""

from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias, get_args, get_origin

from fedoap.errors import MessageError


@dataclass(frozen=True, slots=True)
class Length:
    """Bounds of a byte string's length, or of a text's, which must be printable: it may go to a terminal."""

    low: int
    high: int


@dataclass(frozen=True, slots=True)
class Range:
    """Bounds of a number, both included."""

    low: float
    high: float


Check: TypeAlias = tuple[type, Length | Range | tuple[str, ...] | None]


def check(place: str, value: object, wanted: Check) -> None:
    """Return if the value is of the type wanted and within its bounds.

    Raises:
        MessageError: naming the place, the value and the expectation.
    """
    kind, bound = wanted
    if type(value) is not kind:
        raise MessageError(f"{place} is a {type(value).__name__}, but must be a {kind.__name__}")
    match bound:
        case Length(low, high) if isinstance(value, str | bytes) and not low <= len(value) <= high:
            raise MessageError(f"{place} has length {len(value)}, but must have {low} to {high}")
        case Length() if isinstance(value, str) and not value.isprintable():
            raise MessageError(f"{place} holds a character that cannot be printed")
        case Range(low, high) if isinstance(value, int | float) and not low <= value <= high:
            raise MessageError(f"{place} is {value}, but must lie in {low} to {high}")
        case tuple() if value not in bound:
            raise MessageError(f"{place} is {repr(value)[:60]}, which is not known")
        case _:
            return


def rule(hint: object) -> Check:
    """Return what a field's annotation lets through."""
    if get_origin(hint) is Literal:
        return str, get_args(hint)
    assert get_origin(hint) is Annotated, hint
    kind, bound = get_args(hint)
    return kind, bound
