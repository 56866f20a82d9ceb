"""A run's configuration: typed dataclasses <- YAML <- `key=value` overrides.

The defaults are the reference run (GPT-2 small sizes and hyperparameters), so a file in `configs/` holds only what
differs. Sizes that another file knows (layers, width, rows) are never configured: they come from the store's index.
"""

from __future__ import annotations

import hashlib
import json
import re
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from clt.errors import UserError
from clt.parsing import merge, names, override

StorageDtype = Literal["float16", "bfloat16", "float32"]


@dataclass
class RunConfig:
    """Where the run lies, and the seed of everything random in it."""

    dir: str = "runs/default"
    """Directory that receives the resolved config, metrics, checkpoints, summary and report."""
    seed: int = 0
    """Seed of the initial weights and of the order in which rows are read."""


@dataclass
class LMConfig:
    """The language model being explained."""

    model: str = "embedded"
    """`embedded`, a hub id, a local directory, a .gguf file, or `package:NAME/FILE.gguf` in an installed package."""
    revision: str | None = None
    """Hub revision (branch, tag or commit); null takes the default branch."""
    dtype: StorageDtype = "float32"
    """Dtype the language model computes in."""
    layers: list[int] | None = None
    """Layers to explain, in ascending order; null takes all of them."""
    input_site: str | None = None
    """Module whose *input* is the residual before the MLP, e.g. `transformer.h.{layer}.ln_2`; null detects it."""
    output_site: str | None = None
    """Module whose *output* is added to the residual, e.g. `transformer.h.{layer}.mlp`; null detects it."""
    context: int = 1024
    """Tokens per window of text, the special token at its start included."""
    batch_windows: int = 8
    """Windows per forward pass of the language model."""


@dataclass
class TextConfig:
    """The text whose activations are extracted, and the text kept apart from it for evaluation."""

    source: str = "embedded"
    """`embedded`, a .txt/.jsonl file (also .gz) or a directory of them, or a hub dataset id (streamed)."""
    subset: str | None = None
    """Configuration name of a hub dataset."""
    split: str = "train"
    """Split of a hub dataset that training text is taken from."""
    field: str = "text"
    """Field of a .jsonl record or dataset row that holds the text."""
    heldout: str | None = None
    """Held-out text: a path, or another split of the hub dataset; null takes the source's first documents."""
    heldout_documents: int = 1000
    """How many of the source's first documents are held out (and skipped in training) when `heldout` is null."""


@dataclass
class DataConfig:
    """Activations at rest and how they are read."""

    source: Literal["store", "server"] = "store"
    """Read a store of one's own, or what an activation server streams."""
    url: str | None = None
    """The server of `source: server`, e.g. http://127.0.0.1:8000."""
    token_file: str | None = None
    """File with the bearer token that the server asks for; null takes CLT_SERVER_TOKEN, or sends none."""

    store: str = "stores/default"
    """Directory of the activation stores: `train/` and `heldout/` below it."""
    train_tokens: int = 10_000_000
    """Rows (tokens) to extract for training."""
    heldout_tokens: int = 100_000
    """Rows (tokens) to extract from held-out text."""
    dtype: StorageDtype = "float16"
    """Dtype of the stored activations."""
    shard_rows: int = 32_768
    """Rows in a shard file."""
    open_shards: int = 8
    """Shards filled at once: rows are shuffled over them, and an interrupted extraction repeats at most these."""
    block_rows: int = 64
    """Contiguous rows read at once; a batch is made of blocks from random places of the store."""
    seed: int = 0
    """Seed of the shuffle that the store is written in."""
    prefetch: int = 4
    """Batches that the background reader keeps ready."""


@dataclass
class CLTConfig:
    """The cross-layer transcoder."""

    d_features: int = 6144
    """Features per layer (F)."""
    activation: Literal["jumprelu", "relu"] = "jumprelu"
    """The features' activation function."""
    cross_layer: bool = True
    """Let a feature write to its own and all later layers; false makes one transcoder per layer."""
    threshold: float = 0.03
    """Initial JumpReLU threshold, in normalised pre-activation units."""
    bandwidth: float = 1.0
    """Width of the rectangle of JumpReLU's straight-through gradient."""
    straight_through_pre: bool = False
    """Send the straight-through gradient to the pre-activation as well (Anthropic, January 2025)."""
    normalization: Literal["layer", "dim", "token", "none"] = "layer"
    """Statistics that inputs and targets are normalised by; `token` is by each input vector's own mean and sd."""


@dataclass
class LossConfig:
    """The objective: MSE + sparsity + pre-activation loss."""

    sparsity: float = 2e-4
    """Coefficient lambda of the tanh sparsity penalty, at the end of its ramp."""
    sparsity_ramp: float = 1.0
    """Share of the run's steps over which lambda rises linearly from 0."""
    sparsity_scale: float = 0.1
    """c in tanh(c * decoder norm * activation)."""
    pre_activation: float = 0.0
    """Coefficient of the pre-activation loss, which revives dead features; 0 leaves it out."""
    pre_activation_kind: Literal["negative", "below_threshold"] = "below_threshold"
    """Penalise relu(-pre), or relu(threshold - pre)."""
    target_scale: Literal["layer", "none"] = "layer"
    """Measure the squared error in normalised target units (`layer`: every layer weighs the same) or in raw units."""


@dataclass
class OptimConfig:
    """Adam and its schedule."""

    lr: float = 1e-3
    """Peak learning rate."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """Adam's two moment decay rates."""
    eps: float = 1e-8
    """Adam's epsilon."""
    warmup: float = 0.0
    """Share of the run's steps over which the learning rate rises linearly from 0."""
    decay: float = 0.0
    """Share of the run's steps, at its end, over which the learning rate falls linearly to 0."""
    clip_norm: float | None = 1.0
    """Clip the gradient's global norm to this; null does not clip."""


@dataclass
class TrainConfig:
    """The training loop."""

    steps: int = 2000
    """Optimizer steps."""
    batch_tokens: int = 4000
    """Tokens per optimizer step over all ranks."""
    accumulate: int = 1
    """Micro-batches that a rank splits its share of a batch into."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Autocast dtype; `auto` is bf16 where the hardware multiplies bf16 matrices natively, else fp32."""
    compile: bool = True
    """Compile what a step does element by element; its matrix products are library calls either way."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """At a loss or gradient that is not finite: stop the run, or leave out that step and go on."""


@dataclass
class EvalConfig:
    """Evaluation during and after training."""

    every: int = 1000
    """Steps between evaluations; 0 evaluates only at the end."""
    replacement_tokens: int = 32_768
    """Held-out tokens on which the replacement model is compared with the original; 0 leaves it out."""
    dead_window: int = 1_000_000
    """A feature is dead when it fired on none of this many most recent training tokens."""


@dataclass
class ParallelConfig:
    """How the ranks share the work. Not part of what a run computes: a run may go on in another layout."""

    feature_shards: int = 1
    """Ranks that the features of one transcoder are split over; the other factor of the ranks splits the batch."""
    timeout_seconds: float = 1800.0
    """A rank that makes no progress for this long ends the job, with a message that names it."""


@dataclass
class CheckpointConfig:
    """Checkpoints and resumption."""

    every: int = 1000
    """Steps between checkpoints; 0 writes only the last."""
    keep: int = 2
    """Newest checkpoints that are kept; older ones are deleted."""
    keep_every: int = 0
    """Checkpoints whose step is a multiple of this are kept for good; 0 keeps none."""
    resume: bool = True
    """Continue from the newest checkpoint of the run directory; false refuses to start in one that holds a run."""
    grace_seconds: float = 240.0
    """Time to write a checkpoint after SIGTERM or SIGUSR1; launch.sh gives its ranks 300 s, torchrun alone 30 s."""


@dataclass
class LogConfig:
    """Metrics."""

    every: int = 10
    """Steps between metric lines. The loop waits for the device there, at evaluations and at checkpoints alone."""
    wandb: bool = False
    """Also log to Weights & Biases."""
    wandb_project: str = "clt"
    """Weights & Biases project."""
    wandb_entity: str | None = None
    """Weights & Biases team or user; null takes the login's default."""
    wandb_mode: Literal["online", "offline"] = "online"
    """`offline` writes the W&B files locally for `wandb sync`."""


@dataclass
class ProfileConfig:
    """TensorBoard-readable profiler traces."""

    enabled: bool = False
    """Record a trace of a few steps into `<run>/profile`."""
    start: int = 10
    """First step recorded, counted from 0 at the start of this process."""
    steps: int = 3
    """Steps recorded."""


@dataclass
class ServerConfig:
    """Activations over the network: the shared buffer, the generator that fills it, and the limits of its clients."""

    name: str | None = None
    """Name of the buffer in shared memory, 1 to 64 letters, digits, dots, dashes; null derives it from `data.store`."""
    source: Literal["model", "store"] = "model"
    """Fill the buffer by running the language model over the training text, or from the training store, endlessly."""
    rows: int = 32_768
    """Rows (tokens) that the shared buffer holds, about: it consists of blocks of 2 MB. 1 or more."""
    open_share: float = 0.5
    """Share of the buffer over which new rows are scattered: the larger, the better they are mixed. 0 to 1."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """Where the language model runs; `auto` takes a GPU if there is one."""
    statistics_tokens: int = 100_000
    """Rows (tokens) that the statistics of `source: model` are computed from, once. 1 or more."""
    host: str = "127.0.0.1"
    """Address to listen on; anything but the loopback should have a `token_file`."""
    port: int = 8000
    """Port to listen on, 1 to 65535."""
    workers: int = 1
    """Serving processes, 1 to 128 on one buffer."""
    token_file: str | None = None
    """File with the bearer token that clients must send, readable by its owner alone; null asks for none (or takes
    CLT_SERVER_TOKEN)."""
    max_batch: int = 8192
    """Rows in a batch at most, 1 or more; in JSON 64, as a tensor 16 MB or a block."""
    max_streams: int = 64
    """Clients that are sent rows at once, over all workers. 1 or more."""
    wait_seconds: float = 30.0
    """How long a request waits for rows before it is told to come again. Above 0."""
    idle_seconds: float = 60.0
    """How long a client may take to read what it was sent, 2 MB at most, before it is dropped. Above 0."""


@dataclass
class Config:
    """Everything a run is determined by."""

    run: RunConfig = field(default_factory=RunConfig)
    """Run directory and seed."""
    lm: LMConfig = field(default_factory=LMConfig)
    """Language model."""
    text: TextConfig = field(default_factory=TextConfig)
    """Text."""
    data: DataConfig = field(default_factory=DataConfig)
    """Activation store and reader."""
    clt: CLTConfig = field(default_factory=CLTConfig)
    """Cross-layer transcoder."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Objective."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer and schedule."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Training loop."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Evaluation."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Ranks."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoints."""
    log: LogConfig = field(default_factory=LogConfig)
    """Metrics."""
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    """Profiler."""
    server: ServerConfig = field(default_factory=ServerConfig)
    """Activation server."""


def load_config(
    path: str | Path | None = None,
    overrides: typing.Sequence[str] = (),
    preset: str | Path | None = None,
    environment: typing.Sequence[str] = (),
) -> Config:
    """Read a YAML file over the defaults, a preset over it, and `section.key=value` overrides over all.

    `preset` is one of PRESETS or another YAML file; `environment` are overrides below the others. Raises UserError for
    a missing file, an unknown key (naming the nearest), a value of the wrong type or out of range.
    """
    config = Config()
    if path is not None:
        if not Path(path).is_file():
            raise UserError(f"config {path} does not exist; the shipped ones are configs/*.yaml")
        merge(config, path)
    if preset is not None:
        file = PRESETS.get(str(preset), Path(preset))
        if not file.is_file():
            raise UserError(f"{preset} is neither a preset ({', '.join(PRESETS)}) nor an existing YAML file")
        merge(config, file)
    places = (("the environment", environment), ("the command line", overrides))
    given = {override(config, text, place): place for place, texts in places for text in texts}
    files = " and ".join(str(name) for name in (path, preset) if name is not None)
    _validate(config, lambda key: given.get(key, files or "the defaults"))
    return config


PRESETS = {
    name: Path(__file__).parent / "server" / "presets" / f"{name}.yaml"
    for name in ("test", "production", "large-scale")
}
"""Sizes of the activation server, by name."""


POSITIVE = (
    "lm.context lm.batch_windows data.train_tokens data.heldout_tokens data.shard_rows data.open_shards "
    "data.block_rows data.prefetch clt.d_features clt.bandwidth optim.lr train.steps train.batch_tokens "
    "train.accumulate checkpoint.keep log.every profile.start profile.steps text.heldout_documents loss.sparsity_scale "
    "eval.dead_window parallel.feature_shards parallel.timeout_seconds checkpoint.grace_seconds "
    "server.rows server.statistics_tokens server.workers server.max_batch server.max_streams server.wait_seconds "
    "server.idle_seconds"
).split()
NOT_NEGATIVE = (
    "loss.sparsity loss.pre_activation eval.every eval.replacement_tokens checkpoint.every "
    "checkpoint.keep_every clt.threshold optim.eps"
).split()
SHARES = "loss.sparsity_ramp optim.warmup optim.decay".split()


def _validate(config: Config, where: typing.Callable[[str], str]) -> None:
    """Check ranges; `where` says which file or command line a key's value came from."""

    def check(keys: typing.Sequence[str], holds: typing.Callable[[Any], bool], wanted: str) -> None:
        for key in keys:
            section, name = key.split(".")
            value = getattr(getattr(config, section), name)
            if not holds(value):
                raise UserError(f"{key} in {where(key)} is {value!r}; wanted {wanted}")

    check(POSITIVE, lambda v: v > 0, "a positive number")
    check(NOT_NEGATIVE, lambda v: v >= 0, "zero or a positive number")
    check(SHARES, lambda v: 0 <= v <= 1, "a share of the run's steps between 0 and 1")
    check(["server.open_share"], lambda v: 0 <= v <= 1, "a share of the buffer between 0 and 1")
    check(["run.seed", "data.seed"], lambda v: 0 <= v < 2**63, "a whole number from 0 to 2^63 - 1")
    check(["server.port"], lambda v: 0 < v < 65536, "a port number, 1 to 65535")
    named = re.compile(r"[\w.-]{1,64}")
    check(["server.name"], lambda v: v is None or bool(named.fullmatch(v)), "letters, digits, dots and dashes, or null")
    check(["optim.betas"], lambda v: len(v) == 2 and all(0 <= b < 1 for b in v), "two numbers in [0, 1)")
    check(["optim.clip_norm"], lambda v: v is None or v > 0, "a positive number or null")
    check(["lm.layers"], lambda v: v is None or (v and v == sorted(set(v)) and v[0] >= 0), "ascending layer numbers")
    sites = ["lm.input_site", "lm.output_site"]
    check(sites, lambda v: v is None or "{layer}" in v, "a path with {layer}, e.g. transformer.h.{layer}.mlp")
    if config.data.source == "server" and config.data.url is None:
        raise UserError("data.source=server but data.url is null: set it to the server's, e.g. http://127.0.0.1:8000")
    if (config.lm.input_site is None) != (config.lm.output_site is None):
        raise UserError("lm.input_site and lm.output_site go together: set both, or neither")


# What may differ when a run goes on: none of these changes the numbers that the run computes.
_FREE = {"run.dir", "log", "profile", "parallel", "checkpoint", "eval", "server"}
_FREE |= {"data.prefetch", "data.store", "data.url", "data.token_file"}


def identity(config: Config) -> dict[str, Any]:
    """The flat {key: value} of every field that determines the trained weights."""
    flat = {
        f"{section}.{name}": getattr(getattr(config, section), name)
        for section in names(config)
        for name in names(getattr(config, section))
    }
    return {key: value for key, value in flat.items() if key not in _FREE and key.split(".")[0] not in _FREE}


def config_hash(config: Config) -> str:
    """Twelve hexadecimal digits that two configurations share if and only if their identities are equal."""
    return hashlib.sha256(json.dumps(identity(config), sort_keys=True).encode()).hexdigest()[:12]
