"""What is explained, and on which text: the config sections `lm` and `text`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from clt.errors import UserError
from clt.ranges import ASCENDING, FREE, INPUT_SITE, NORM_OUTPUT, POSITIVE, SITE

Dtype = Literal["float16", "bfloat16", "float32"]


@dataclass
class LMConfig:
    """The language model being explained."""

    model: str = "embedded"
    """`embedded`, a hub id, a local directory, a .gguf file, or `package:NAME/FILE.gguf` in an installed package."""
    revision: str | None = None
    """Hub revision (branch, tag or commit); null takes the default branch."""
    dtype: Dtype = "float32"
    """Dtype the language model computes in."""
    layers: Annotated[list[int] | None, ASCENDING] = None
    """Layers to explain, in ascending order; null takes all of them."""
    input_site: Annotated[str | None, INPUT_SITE] = None
    """Module whose *input* is read, or with `.output` its output; null: the norm before the MLP; `norm.output`."""
    output_site: Annotated[str | None, SITE] = None
    """Module whose *output* is added to the residual, e.g. `transformer.h.{layer}.mlp`; null detects it."""
    context: Annotated[int, POSITIVE] = 1024
    """Tokens per window of text, the special token at its start included."""
    batch_windows: Annotated[int, POSITIVE] = 8
    """Windows per forward pass of the language model."""


def check_lm(lm: LMConfig) -> None:
    """Raise UserError when one of the two sites is given alone."""
    if (lm.input_site is None) != (lm.output_site is None) and lm.input_site != NORM_OUTPUT:
        raise UserError("lm.input_site and lm.output_site go together: set both, or neither")


@dataclass
class TextConfig:
    """The text whose activations are extracted, and the text kept apart from it for evaluation."""

    source: str = "embedded"
    """`embedded`, a .txt/.jsonl file (also .gz) or a directory of them and of links, or a hub dataset id (streamed)."""
    subset: str | None = None
    """Configuration name of a hub dataset."""
    revision: Annotated[str | None, FREE] = None  # stores record the commit that was read
    """Hub revision (branch, tag or commit) of a hub dataset; null takes the default branch."""
    split: str = "train"
    """Split of a hub dataset that training text is taken from."""
    field: str = "text"
    """Field of a .jsonl record or dataset row that holds the text."""
    heldout: str | None = None
    """Held-out text: a path, left out of `source`, or another split of the hub dataset; null: its first documents."""
    heldout_documents: Annotated[int, POSITIVE] = 1000
    """How many of the source's first documents are held out (and skipped in training) when `heldout` is null."""
