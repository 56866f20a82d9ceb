"""What a transcoder and its objective are: the config sections `clt` and `loss`, which clt/model takes whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from clt.errors import UserError
from clt.ranges import NOT_NEGATIVE, POSITIVE, SHARE, WINDOW


@dataclass
class CLTConfig:
    """The cross-layer transcoder."""

    d_features: Annotated[int, POSITIVE] = 6144
    """Features per layer (F)."""
    activation: Literal["jumprelu", "relu"] = "jumprelu"
    """The rule for the threshold above which a feature fires: `jumprelu` learns one per feature, `relu` has 0."""
    cross_layer: bool = True
    """Let a feature write to its own and all later layers; false makes one transcoder per layer."""
    window: Annotated[int | None, WINDOW] = None
    """Layers that a feature writes to, its own and the next; null: all later ones. One is `cross_layer: false`."""
    skip: bool = False
    """Add a matrix per layer from a layer's normalised input to its output, beside the features."""
    threshold: Annotated[float, NOT_NEGATIVE] = 0.03
    """Initial threshold of jumprelu, in normalised pre-activation units."""
    bandwidth: Annotated[float, POSITIVE] = 1.0
    """Width of the rectangle of JumpReLU's straight-through gradient."""
    straight_through_pre: bool = False
    """Send the straight-through gradient to the pre-activation as well (Anthropic, January 2025)."""
    normalization: Literal["layer", "dim", "token", "none"] = "layer"
    """Statistics that inputs and targets are normalised by; `token` is by each input vector's own mean and sd."""


def check_rule(clt: CLTConfig, n_layers: int | None = None) -> None:
    """Raise UserError when values do not go together; null leaves out what depends on the layers."""
    if clt.window is not None and not clt.cross_layer:
        raise UserError(
            f"clt.window is {clt.window} but clt.cross_layer is false, so that a feature writes to one layer; wanted "
            "clt.window=null, or clt.cross_layer=true"
        )


@dataclass
class LossConfig:
    """The objective: MSE and the named terms, each a coefficient times a value."""

    sparsity: Annotated[float, NOT_NEGATIVE] = 2e-4
    """Coefficient lambda of the tanh sparsity penalty, at the end of its ramp."""
    sparsity_ramp: Annotated[float, SHARE] = 1.0
    """Share of the run's steps over which lambda rises linearly from 0."""
    sparsity_scale: Annotated[float, POSITIVE] = 0.1
    """c in tanh(c * decoder norm * activation)."""
    pre_activation: Annotated[float, NOT_NEGATIVE] = 0.0
    """Coefficient of the pre-activation loss, which revives dead features; 0 leaves it out."""
    pre_activation_kind: Literal["negative", "below_threshold"] = "below_threshold"
    """Penalise relu(-pre), or relu(threshold - pre); relu's threshold is 0, so that both are the same for it."""
    target_scale: Literal["layer", "none"] = "layer"
    """Measure the squared error in normalised target units (`layer`: every layer weighs the same) or in raw units."""
