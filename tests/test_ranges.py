"""Ranges at their bounds, and values as their fields hold them."""

from dataclasses import dataclass
from typing import Annotated, Literal

import pytest

from clt import ranges
from clt.errors import UserError
from clt.ranges import FREE, NAME, POSITIVE, Range, fit, free, hints

NAN = float("nan")


@pytest.mark.parametrize(
    ("field_range", "inside", "outside"),
    [
        (ranges.POSITIVE, [1, 1e-30], [0, -1, NAN]),
        (ranges.NOT_NEGATIVE, [0, 0.0, 2], [-1e-30, NAN]),
        (ranges.SHARE, [0, 0.5, 1], [-0.001, 1.001, NAN]),
        (ranges.SEED, [0, 2**63 - 1], [-1, 2**63]),
        (ranges.PORT, [1, 65535], [0, 65536, -1]),
        (ranges.NAME, ["a", "gpt2-small_v1.0", "x" * 64], ["", "a/b", "a b", "x" * 65, "a\n"]),
        (ranges.DECAY_RATES, [[0, 0], [0.9, 0.999]], [[0.9], [0.9, 1.0], [-0.1, 0.9], [0.9, 0.9, 0.9], []]),
        (ranges.ASCENDING, [[0], [0, 2, 5]], [[], [2, 0], [1, 1], [-1, 0]]),
        (ranges.SITE, ["h.{layer}.mlp"], ["", "h.0.mlp", "h.{l}.mlp", "h.layer.mlp"]),
    ],
)
def test_the_bounds_of_each_range(field_range, inside, outside):
    assert [value for value in inside if not field_range.holds(value)] == []
    assert [value for value in outside if field_range.holds(value)] == []


EVEN = Range(lambda value: value % 2 == 0, "an even number")


@dataclass
class Section:
    bare: int = -1
    both: Annotated[int, FREE, POSITIVE, EVEN] = 2
    share: float = 0.5
    kind: Literal["a", "b"] = "a"
    marked: Annotated[Literal["a", "b"], FREE] = "b"
    name: Annotated[str | None, NAME, FREE] = None
    layers: list[int] | None = None
    path: str = "a"


def test_free_fields_are_those_that_are_marked():
    assert free(Section) == {"both", "marked", "name"}


@pytest.mark.parametrize(
    ("name", "value", "fitted"),
    [
        ("bare", 3.0, 3), ("share", 1, 1.0), ("share", "1e-3", 1e-3), ("name", None, None), ("name", "a-b", "a-b"),
        ("marked", "a", "a"), ("layers", [0, 2.0], [0, 2]), ("both", 4, 4),
    ],
)  # fmt: skip
def test_a_value_takes_the_type_of_its_field(name, value, fitted):
    found = fit(name, hints(Section)[name], value)
    assert (found, type(found)) == (fitted, type(fitted))


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("bare", 2.5, "int"),
        ("bare", True, "int"),
        ("bare", None, "int"),
        ("both", 0, "a positive number"),
        ("both", -3, "a positive number"),
        ("both", 3, "an even number"),
        ("share", NAN, "float"),
        ("share", "much", "float"),
        ("kind", "c", "one of a, b"),
        ("marked", "", "one of a, b"),
        ("name", "a b", "letters, digits, dots and dashes or null"),
        ("name", 3, "str or null"),
        ("layers", [0, "x"], "list[int] or null"),
        ("path", "a\0b", "text without the character NUL, which no name of a file can have"),
    ],
)
def test_a_value_outside_is_refused_with_what_was_wanted(name, value, wanted):
    with pytest.raises(UserError) as caught:
        fit(name, hints(Section)[name], value)
    assert str(caught.value) == f"{name} is {value!r}; wanted {wanted}"
