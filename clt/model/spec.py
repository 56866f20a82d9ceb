"""What a transcoder and its objective are: the config sections `clt` and `loss`, which clt/model takes whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from clt.errors import UserError
from clt.ranges import ASCENDING, INPUT_SITE, NOT_NEGATIVE, POSITIVE, SHARE, SITE, WINDOW

BY_K = ("topk", "batchtopk")
"""The rules that choose how many features fire."""


@dataclass
class CLTConfig:
    """The cross-layer transcoder."""

    d_features: Annotated[int, POSITIVE] = 6144
    """Features per layer (F)."""
    activation: Literal["jumprelu", "relu", "topk", "batchtopk"] = "jumprelu"
    """The rule for the threshold: `jumprelu` learns one per feature, `relu` has 0, the others take the k largest."""
    k: Annotated[int | None, POSITIVE] = None
    """How many features fire per token: in each layer with `topk`, in all layers together with `batchtopk`."""
    k_start: Annotated[int | None, POSITIVE] = None
    """k at the start of a run, which falls linearly to `k`; null: `k` throughout."""
    k_ramp: Annotated[float, SHARE] = 0.5
    """Share of the run's steps over which k falls from `k_start`."""
    by_norm: bool = False
    """`topk` and `batchtopk` compare pre * ||W_dec|| instead of pre: features compete by what they write."""
    cross_layer: bool = True
    """Let a feature write to its own and all later layers; false makes one transcoder per layer."""
    window: Annotated[int | None, WINDOW] = None
    """Layers that a feature writes to, its own and the next; null: all later ones. One is `cross_layer: false`."""
    skip: bool = False
    """Add a matrix per layer from a layer's normalised input to its output, beside the features."""
    threshold: Annotated[float, POSITIVE] = 0.03
    """Initial threshold of jumprelu, in normalised pre-activation units; it never falls below 0.01, or below this."""
    bandwidth: Annotated[float, POSITIVE] = 1.0
    """Width of the rectangle of JumpReLU's straight-through gradient."""
    straight_through_pre: bool = True
    """Send the straight-through gradient to the pre-activation as well (Anthropic, January 2025)."""
    normalization: Literal["layer", "dim", "token", "none"] = "layer"
    """Statistics that inputs and targets are normalised by; `token` is by each input vector's own mean and sd."""


@dataclass(frozen=True)
class Sites:
    """Where a transcoder reads and writes in its language model, in the words of the config's section `lm`.

    Its own runs and imported ones are evaluated there.
    """

    input_site: Annotated[str | None, INPUT_SITE] = None
    """Null is the residual stream before the MLP's norm."""
    output_site: Annotated[str | None, SITE] = None
    """Null is the MLP's output as it is added to the residual stream."""
    model: str | None = None
    """The language model, by its hub id, where the transcoder was imported from files that name it."""
    layers: Annotated[list[int] | None, ASCENDING] = None
    """The layers of the language model that it is of; null is all of them (older checkpoints have none)."""


def check_rule(clt: CLTConfig, n_layers: int | None = None) -> None:
    """Raise UserError when values do not go together; null leaves out what depends on the layers."""
    if clt.window is not None and not clt.cross_layer:
        raise UserError(
            f"clt.window is {clt.window} but clt.cross_layer is false, so that a feature writes to one layer; wanted "
            "clt.window=null, or clt.cross_layer=true"
        )
    if clt.window is not None and n_layers is not None and clt.window > n_layers:
        raise UserError(f"clt.window is {clt.window}; wanted at most {n_layers}, the layers there are, or null for all")
    by_k = clt.activation in BY_K
    if not by_k and (field := next((f for f in ("k", "k_start", "by_norm") if getattr(clt, f)), None)):
        raise UserError(
            f"clt.{field} is {getattr(clt, field)} but clt.activation is {clt.activation}, which has no k; wanted "
            f"clt.activation={' or '.join(BY_K)}, or leave out clt.{field}"
        )
    if not by_k:
        return
    if clt.k is None:
        raise UserError(
            f"clt.k is null but clt.activation is {clt.activation}; wanted how many features fire per token"
        )
    most = clt.d_features * (1 if clt.activation == "topk" else n_layers or 2**63)
    for field, k in (("k", clt.k), ("k_start", clt.k_start or clt.k)):
        if k > most:
            raise UserError(f"clt.{field} is {k}; wanted at most {most}, the features that clt.k chooses from")
    if clt.k_start is not None and clt.k_start < clt.k:
        raise UserError(f"clt.k_start is {clt.k_start}; wanted at least clt.k={clt.k}, to which it falls")


@dataclass
class LossConfig:
    """The objective: MSE and the named terms, each a coefficient times a value."""

    sparsity: Annotated[float, NOT_NEGATIVE] = 2e-4
    """Coefficient lambda of the tanh sparsity penalty, at the end of its ramp."""
    sparsity_ramp: Annotated[float, SHARE] = 1.0
    """Share of the run's steps over which lambda rises linearly from 0."""
    target_l0: Annotated[float | None, POSITIVE] = None
    """L0 over all layers that a run shall end at: lambda is steered to it, from `sparsity` on; null keeps lambda."""
    sparsity_scale: Annotated[float, POSITIVE] = 0.1
    """c in tanh(c * decoder norm * activation)."""
    pre_activation: Annotated[float, NOT_NEGATIVE] = 0.0
    """Coefficient of the pre-activation loss: a sum over features and layers, times decoder norms; revives features."""
    pre_activation_kind: Literal["negative", "below_threshold", "dead"] = "below_threshold"
    """Penalise relu(-pre), or relu(threshold - pre) of all features or of dead ones; relu's threshold is 0."""
    aux: Annotated[float, NOT_NEGATIVE] = 0.0
    """Coefficient of AuxK: dead features learn from the error of the others. 0 leaves it out, 1/32 is usual."""
    aux_k: Annotated[int, POSITIVE] = 64
    """Dead features per token and layer that AuxK lets fire."""
    dead_window: Annotated[int | None, POSITIVE] = None
    """Tokens without firing after which a feature is dead for `aux` and `pre_activation_kind: dead`, which need it."""
    target_scale: Literal["layer", "none"] = "layer"
    """Measure the squared error in normalised target units (`layer`: every layer weighs the same) or in raw units."""


def needs_dead(loss: LossConfig) -> bool:
    """Whether a term of the loss is one of dead features."""
    return bool(loss.aux or (loss.pre_activation and loss.pre_activation_kind == "dead"))


def check_loss(loss: LossConfig, clt: CLTConfig, n_layers: int | None = None) -> None:
    """Raise UserError when values of the loss do not go together, or not with `clt`; n_layers as in `check_rule`."""
    for field in ("target_l0", "sparsity"):
        if clt.activation in BY_K and getattr(loss, field):
            raise UserError(
                f"loss.{field} is {getattr(loss, field)} but clt.activation is {clt.activation}, whose L0 is that of "
                f"clt.k alone; wanted loss.{field}={'null' if field == 'target_l0' else 0}"
            )
    if loss.target_l0 is not None and not loss.sparsity:
        raise UserError(
            f"loss.target_l0 is {loss.target_l0} but loss.sparsity is 0, so there is no coefficient to steer; wanted "
            "loss.sparsity above 0, to start from"
        )
    if needs_dead(loss) != (loss.dead_window is not None):
        raise UserError(
            f"loss.dead_window is {loss.dead_window}; wanted a number of tokens if and only if loss.aux is above 0, or "
            f"loss.pre_activation is with loss.pre_activation_kind=dead (found {loss.aux}, {loss.pre_activation} and "
            f"{loss.pre_activation_kind})"
        )
    if loss.aux and loss.aux_k > clt.d_features:
        raise UserError(f"loss.aux_k is {loss.aux_k}; wanted at most clt.d_features={clt.d_features}")
    if loss.target_l0 is not None and n_layers is not None and loss.target_l0 >= (most := n_layers * clt.d_features):
        raise UserError(f"loss.target_l0 is {loss.target_l0:g}; wanted less than {most}, the features of all layers")
