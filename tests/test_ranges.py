"""Ranges at their bounds, and how a dataclass tells which of its fields are outside."""

from dataclasses import dataclass
from typing import Annotated, Literal

import pytest

from clt import ranges
from clt.ranges import FREE, NAME, POSITIVE, Range, marks, out_of_range

NAN = float("nan")


@pytest.mark.parametrize(
    ("field_range", "inside", "outside"),
    [
        (ranges.POSITIVE, [1, 1e-30], [0, -1, NAN]),
        (ranges.NOT_NEGATIVE, [0, 0.0, 2], [-1e-30, NAN]),
        (ranges.SHARE_OF_STEPS, [0, 0.5, 1], [-0.001, 1.001, NAN]),
        (ranges.SHARE_OF_BUFFER, [0, 0.5, 1], [-0.001, 1.001, NAN]),
        (ranges.SEED, [0, 2**63 - 1], [-1, 2**63]),
        (ranges.PORT, [1, 65535], [0, 65536, -1]),
        (ranges.NAME, [None, "a", "gpt2-small_v1.0", "x" * 64], ["", "a/b", "a b", "x" * 65, "a\n"]),
        (ranges.DECAY_RATES, [[0, 0], [0.9, 0.999]], [[0.9], [0.9, 1.0], [-0.1, 0.9], [0.9, 0.9, 0.9], []]),
        (ranges.POSITIVE_OR_NULL, [None, 0.5], [0, -1, NAN]),
        (ranges.ASCENDING, [None, [0], [0, 2, 5]], [[], [2, 0], [1, 1], [-1, 0]]),
        (ranges.SITE, [None, "h.{layer}.mlp"], ["", "h.0.mlp", "h.{l}.mlp", "h.layer.mlp"]),
    ],
)
def test_the_bounds_of_each_range(field_range, inside, outside):
    assert [value for value in inside if not field_range.holds(value)] == []
    assert [value for value in outside if field_range.holds(value)] == []


EVEN = Range(lambda value: value % 2 == 0, "an even number")


@dataclass
class Section:
    bare: int = -1
    positive: Annotated[int, POSITIVE] = 1
    both: Annotated[int, FREE, POSITIVE, EVEN] = 2
    kind: Literal["a", "b"] = "a"
    marked: Annotated[Literal["a", "b"], FREE] = "b"
    name: Annotated[str | None, NAME, FREE] = None


def test_marks_are_what_stands_at_the_fields():
    assert marks(Section) == {
        "bare": (),
        "positive": (POSITIVE,),
        "both": (FREE, POSITIVE, EVEN),
        "kind": (),
        "marked": (FREE,),
        "name": (NAME, FREE),
    }


def test_every_field_out_of_its_range_is_told_with_what_was_wanted():
    assert list(out_of_range(Section())) == []
    assert list(out_of_range(Section(bare=-9, positive=0, both=-3, kind="c", marked="", name="a b"))) == [
        ("positive", 0, "a positive number"),
        ("both", -3, "a positive number"),
        ("both", -3, "an even number"),
        ("kind", "c", "one of a, b"),
        ("marked", "", "one of a, b"),
        ("name", "a b", "letters, digits, dots and dashes, or null"),
    ]
