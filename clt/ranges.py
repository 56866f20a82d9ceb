"""What a config field may hold, written at the field: `steps: Annotated[int, POSITIVE] = 2000`."""

from __future__ import annotations

import functools
import math
import re
import typing
from collections.abc import Callable
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

from clt.errors import UserError, shown

FREE = object()
"""Marks a field, or a whole section, that does not change the numbers of a run: a resumed run may have another."""


class Range(NamedTuple):
    """The values that a field may have, besides null where its type allows it."""

    holds: Callable[[Any], bool]
    wanted: str


MOST_WORKERS = 128
"""Serving processes of one shared buffer."""
POSITIVE = Range(lambda value: value > 0, "a positive number")
NOT_NEGATIVE = Range(lambda value: value >= 0, "zero or a positive number")
WINDOW = Range(lambda value: value >= 2, "2 or more layers (one is cross_layer=false)")
SHARE = Range(lambda value: 0 <= value <= 1, "a share between 0 and 1")
SEED = Range(lambda value: 0 <= value < 2**63, "a whole number from 0 to 2^63 - 1")
PORT = Range(lambda value: 0 < value < 65536, "a port number, 1 to 65535")
WORKERS = Range(lambda value: 0 < value <= MOST_WORKERS, f"1 to {MOST_WORKERS} processes")
NAME = Range(lambda value: re.fullmatch(r"[\w.-]{1,64}", value) is not None, "letters, digits, dots and dashes")
DECAY_RATES = Range(lambda value: len(value) == 2 and all(0 <= v < 1 for v in value), "two numbers in [0, 1)")
ASCENDING = Range(
    lambda value: bool(value) and value == sorted(set(value)) and value[0] >= 0, "ascending layer numbers"
)
OUTPUT = ".output"
"""Behind an input site: the transcoder reads the module's output, not its input."""
NORM_OUTPUT = "norm.output"
"""The input site that is the output of the norm before the MLP, whatever its name."""
SITE = Range(lambda value: "{layer}" in value, "a path with {layer}, e.g. transformer.h.{layer}.mlp")
INPUT_SITE = Range(lambda value: SITE.holds(value) or value == NORM_OUTPUT, f"{SITE.wanted}, or {NORM_OUTPUT}")


@functools.cache
def hints(cls: type) -> dict[str, Any]:
    """The types of a dataclass' fields, with their ranges, by field name."""
    return typing.get_type_hints(cls, include_extras=True)


def free(cls: type) -> set[str]:
    """The fields of a dataclass that are marked FREE."""
    return {name for name, hint in hints(cls).items() if FREE in get_args(hint)}


def fit(name: str, hint: Any, value: Any) -> Any:
    """The value as a field of this type and range holds it, or UserError: NAME is VALUE; wanted this or that."""
    base, *marks = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    kind, *null = get_args(base) if isinstance(base, UnionType) else (base,)  # the only union is with null
    if value is None and null:
        return None
    fitted = _typed(kind, value)
    if fitted is None:
        unmet = [_describe(kind)]
    else:
        unmet = [mark.wanted for mark in marks if isinstance(mark, Range) and not mark.holds(fitted)]
    if isinstance(fitted, str) and "\0" in fitted:
        unmet.append("text without the character NUL, which no name of a file can have")
    if unmet:
        raise UserError(f"{name} is {shown(value)}; wanted {unmet[0]}{' or null' if null else ''}")
    return fitted


def _describe(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    return str(kind) if get_args(kind) else kind.__name__


def _typed(kind: Any, value: Any) -> Any:
    """The value as this type, or None. YAML reads 1e-3 as a string and 1 as an int: both may be floats."""
    if get_origin(kind) is Literal:
        return value if value in get_args(kind) else None
    if get_origin(kind) is list and isinstance(value, list):
        items = [_typed(get_args(kind)[0], item) for item in value]
        return None if None in items else items
    if typing.is_typeddict(kind):
        fields = typing.get_type_hints(kind)
        if not isinstance(value, dict) or value.keys() != fields.keys():
            return None
        items = {name: _typed(field, value[name]) for name, field in fields.items()}
        return None if None in items.values() else items
    if get_origin(kind) is dict and isinstance(value, dict):
        items = {name: _typed(get_args(kind)[1], item) for name, item in value.items()}
        return None if None in items.values() else items
    if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            number = float(value)
        except (ValueError, OverflowError):  # an int beyond a float's range
            return None
        return number if math.isfinite(number) else None
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if kind is int and type(value) is int and abs(value) > 2**63:  # 64 bits hold every count
        return None
    return value if type(value) is kind else None
