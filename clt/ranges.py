"""What a config field may hold, written at the field: `steps: Annotated[int, POSITIVE] = 2000`."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Range:
    """The values that a field may have."""

    holds: Callable[[Any], bool]
    wanted: str
    """What the error message says was wanted."""


@dataclass(frozen=True)
class Free:
    """Marks a field, or a whole section, that does not change the numbers of a run: a resumed run may have another."""


FREE = Free()
POSITIVE = Range(lambda value: value > 0, "a positive number")
NOT_NEGATIVE = Range(lambda value: value >= 0, "zero or a positive number")
SHARE_OF_STEPS = Range(lambda value: 0 <= value <= 1, "a share of the run's steps between 0 and 1")
SHARE_OF_BUFFER = Range(lambda value: 0 <= value <= 1, "a share of the buffer between 0 and 1")
SEED = Range(lambda value: 0 <= value < 2**63, "a whole number from 0 to 2^63 - 1")
PORT = Range(lambda value: 0 < value < 65536, "a port number, 1 to 65535")
NAME = Range(
    lambda value: value is None or bool(re.fullmatch(r"[\w.-]{1,64}", value)),
    "letters, digits, dots and dashes, or null",
)
DECAY_RATES = Range(lambda value: len(value) == 2 and all(0 <= v < 1 for v in value), "two numbers in [0, 1)")
POSITIVE_OR_NULL = Range(lambda value: value is None or value > 0, "a positive number or null")
ASCENDING = Range(
    lambda value: value is None or bool(value and value == sorted(set(value)) and value[0] >= 0),
    "ascending layer numbers",
)
SITE = Range(lambda value: value is None or "{layer}" in value, "a path with {layer}, e.g. transformer.h.{layer}.mlp")


def marks(cls: type) -> dict[str, tuple[Any, ...]]:
    """What stands in the Annotated type of each field of a dataclass, by field name; () for a bare type."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: getattr(hints[field.name], "__metadata__", ()) for field in dataclasses.fields(cls)}


def out_of_range(node: Any) -> Iterator[tuple[str, Any, str]]:
    """The fields of a dataclass whose value is not in their range: name, value found, what was wanted.

    A field of a Literal type must be one of its choices.
    """
    hints = typing.get_type_hints(type(node))
    for name, of_field in marks(type(node)).items():
        value, choices = getattr(node, name), typing.get_args(hints[name])
        if typing.get_origin(hints[name]) is typing.Literal and value not in choices:
            yield name, value, f"one of {', '.join(map(str, choices))}"
        for mark in of_field:
            if isinstance(mark, Range) and not mark.holds(value):
                yield name, value, mark.wanted
