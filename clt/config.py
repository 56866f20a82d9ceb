"""A run's configuration: typed dataclasses <- YAML <- `key=value` overrides.

The defaults are the reference run (GPT-2 small sizes and hyperparameters), so a file in `configs/` holds only what
differs. Sizes that another file knows (layers, width, rows) are never configured: they come from the store's index.
"""

from __future__ import annotations

import hashlib
import json
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from clt.errors import UserError
from clt.model.spec import CLTConfig, LossConfig
from clt.parsing import merge, names, override
from clt.ranges import (
    ASCENDING,
    DECAY_RATES,
    FREE,
    NAME,
    NOT_NEGATIVE,
    PORT,
    POSITIVE,
    POSITIVE_OR_NULL,
    SEED,
    SHARE_OF_BUFFER,
    SHARE_OF_STEPS,
    SITE,
    marks,
    out_of_range,
)

StorageDtype = Literal["float16", "bfloat16", "float32"]


@dataclass
class RunConfig:
    """Where the run lies, and the seed of everything random in it."""

    dir: Annotated[str, FREE] = "runs/default"
    """Directory that receives the resolved config, metrics, checkpoints, summary and report."""
    seed: Annotated[int, SEED] = 0
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
    layers: Annotated[list[int] | None, ASCENDING] = None
    """Layers to explain, in ascending order; null takes all of them."""
    input_site: Annotated[str | None, SITE] = None
    """Module whose *input* is the residual before the MLP, e.g. `transformer.h.{layer}.ln_2`; null detects it."""
    output_site: Annotated[str | None, SITE] = None
    """Module whose *output* is added to the residual, e.g. `transformer.h.{layer}.mlp`; null detects it."""
    context: Annotated[int, POSITIVE] = 1024
    """Tokens per window of text, the special token at its start included."""
    batch_windows: Annotated[int, POSITIVE] = 8
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
    heldout_documents: Annotated[int, POSITIVE] = 1000
    """How many of the source's first documents are held out (and skipped in training) when `heldout` is null."""


@dataclass
class DataConfig:
    """Activations at rest and how they are read."""

    source: Literal["store", "server"] = "store"
    """Read a store of one's own, or what an activation server streams."""
    url: Annotated[str | None, FREE] = None
    """The server of `source: server`, e.g. http://127.0.0.1:8000."""
    token_file: Annotated[str | None, FREE] = None
    """File with the bearer token that the server asks for; null takes CLT_SERVER_TOKEN, or sends none."""

    store: Annotated[str, FREE] = "stores/default"
    """Directory of the activation stores: `train/` and `heldout/` below it."""
    train_tokens: Annotated[int, POSITIVE] = 10_000_000
    """Rows (tokens) to extract for training."""
    heldout_tokens: Annotated[int, POSITIVE] = 100_000
    """Rows (tokens) to extract from held-out text."""
    dtype: StorageDtype = "float16"
    """Dtype of the stored activations."""
    shard_rows: Annotated[int, POSITIVE] = 32_768
    """Rows in a shard file."""
    open_shards: Annotated[int, POSITIVE] = 8
    """Shards filled at once: rows are shuffled over them, and an interrupted extraction repeats at most these."""
    block_rows: Annotated[int, POSITIVE] = 64
    """Contiguous rows read at once; a batch is made of blocks from random places of the store."""
    seed: Annotated[int, SEED] = 0
    """Seed of the shuffle that the store is written in."""
    prefetch: Annotated[int, POSITIVE, FREE] = 4
    """Batches that the background reader keeps ready."""


@dataclass
class OptimConfig:
    """Adam and its schedule."""

    lr: Annotated[float, POSITIVE] = 1e-3
    """Peak learning rate."""
    betas: Annotated[list[float], DECAY_RATES] = field(default_factory=lambda: [0.9, 0.999])
    """Adam's two moment decay rates."""
    eps: Annotated[float, NOT_NEGATIVE] = 1e-8
    """Adam's epsilon."""
    warmup: Annotated[float, SHARE_OF_STEPS] = 0.0
    """Share of the run's steps over which the learning rate rises linearly from 0."""
    decay: Annotated[float, SHARE_OF_STEPS] = 0.0
    """Share of the run's steps, at its end, over which the learning rate falls linearly to 0."""
    clip_norm: Annotated[float | None, POSITIVE_OR_NULL] = 1.0
    """Clip the gradient's global norm to this; null does not clip."""


@dataclass
class TrainConfig:
    """The training loop."""

    steps: Annotated[int, POSITIVE] = 2000
    """Optimizer steps."""
    batch_tokens: Annotated[int, POSITIVE] = 4000
    """Tokens per optimizer step over all ranks."""
    accumulate: Annotated[int, POSITIVE] = 1
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

    every: Annotated[int, NOT_NEGATIVE] = 1000
    """Steps between evaluations; 0 evaluates only at the end."""
    replacement_tokens: Annotated[int, NOT_NEGATIVE] = 32_768
    """Held-out tokens on which the replacement model is compared with the original; 0 leaves it out."""
    dead_window: Annotated[int, POSITIVE] = 1_000_000
    """A feature is dead when it fired on none of this many most recent training tokens."""


@dataclass
class ParallelConfig:
    """How the ranks share the work. Not part of what a run computes: a run may go on in another layout."""

    feature_shards: Annotated[int, POSITIVE] = 1
    """Ranks that the features of one transcoder are split over; the other factor of the ranks splits the batch."""
    timeout_seconds: Annotated[float, POSITIVE] = 1800.0
    """A rank that makes no progress for this long ends the job, with a message that names it."""


@dataclass
class CheckpointConfig:
    """Checkpoints and resumption."""

    every: Annotated[int, NOT_NEGATIVE] = 1000
    """Steps between checkpoints; 0 writes only the last."""
    keep: Annotated[int, POSITIVE] = 2
    """Newest checkpoints that are kept; older ones are deleted."""
    keep_every: Annotated[int, NOT_NEGATIVE] = 0
    """Checkpoints whose step is a multiple of this are kept for good; 0 keeps none."""
    resume: bool = True
    """Continue from the newest checkpoint of the run directory; false refuses to start in one that holds a run."""
    grace_seconds: Annotated[float, POSITIVE] = 240.0
    """Time to write a checkpoint after SIGTERM or SIGUSR1; launch.sh gives its ranks 300 s, torchrun alone 30 s."""


@dataclass
class LogConfig:
    """Metrics."""

    every: Annotated[int, POSITIVE] = 10
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
    start: Annotated[int, POSITIVE] = 10
    """First step recorded, counted from 0 at the start of this process."""
    steps: Annotated[int, POSITIVE] = 3
    """Steps recorded."""


@dataclass
class ServerConfig:
    """Activations over the network: the shared buffer, the generator that fills it, and the limits of its clients."""

    name: Annotated[str | None, NAME] = None
    """Name of the buffer in shared memory; null derives it from `data.store`."""
    source: Literal["model", "store"] = "model"
    """Fill the buffer by running the language model over the training text, or from the training store, endlessly."""
    rows: Annotated[int, POSITIVE] = 32_768
    """Rows (tokens) that the shared buffer holds, about: it consists of blocks of 2 MB."""
    open_share: Annotated[float, SHARE_OF_BUFFER] = 0.5
    """Share of the buffer over which new rows are scattered: the larger, the better they are mixed."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """Where the language model runs; `auto` takes a GPU if there is one."""
    statistics_tokens: Annotated[int, POSITIVE] = 100_000
    """Rows (tokens) that the statistics of `source: model` are computed from, once."""
    host: str = "127.0.0.1"
    """Address to listen on; anything but the loopback should have a `token_file`."""
    port: Annotated[int, PORT] = 8000
    """Port to listen on."""
    workers: Annotated[int, POSITIVE] = 1
    """Serving processes, 1 to 128 on one buffer."""
    token_file: str | None = None
    """File, its owner's alone, with the bearer token that clients must send; null: CLT_SERVER_TOKEN, or none."""
    max_batch: Annotated[int, POSITIVE] = 8192
    """Rows in a batch at most; as a tensor 16 MB or a block, in JSON 128 KB, 64 rows at most."""
    max_streams: Annotated[int, POSITIVE] = 64
    """Clients that are sent rows at once, over all workers."""
    wait_seconds: Annotated[float, POSITIVE] = 30.0
    """How long a request waits for its first rows before it is told to come again."""
    idle_seconds: Annotated[float, POSITIVE] = 60.0
    """How long a client may take to read what it was sent, 2 MB at most, before it is dropped."""


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
    eval: Annotated[EvalConfig, FREE] = field(default_factory=EvalConfig)
    """Evaluation."""
    parallel: Annotated[ParallelConfig, FREE] = field(default_factory=ParallelConfig)
    """Ranks."""
    checkpoint: Annotated[CheckpointConfig, FREE] = field(default_factory=CheckpointConfig)
    """Checkpoints."""
    log: Annotated[LogConfig, FREE] = field(default_factory=LogConfig)
    """Metrics."""
    profile: Annotated[ProfileConfig, FREE] = field(default_factory=ProfileConfig)
    """Profiler."""
    server: Annotated[ServerConfig, FREE] = field(default_factory=ServerConfig)
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
    _check(config, lambda key: given.get(key, files or "the defaults"))
    return config


_PACKAGE = Path(__file__).parent
_CONFIGS = _PACKAGE / "configs"  # where a wheel has them; in a checkout they lie beside the package
DEFAULT_CONFIG = (_CONFIGS if _CONFIGS.is_dir() else _PACKAGE.parent / "configs") / "quickstart.yaml"
PRESETS = {name: _PACKAGE / "server" / "presets" / f"{name}.yaml" for name in ("test", "production", "large-scale")}
"""Sizes of the activation server, by name."""


def _check(config: Config, where: typing.Callable[[str], str]) -> None:
    """Check every field's range, and what two fields must agree on; `where` says where a key's value came from."""
    for section in names(config):
        for name, found, wanted in out_of_range(getattr(config, section)):
            key = f"{section}.{name}"
            raise UserError(f"{key} in {where(key)} is {found!r}; wanted {wanted}")
    if config.data.source == "server" and config.data.url is None:
        raise UserError("data.source=server but data.url is null: set it to the server's, e.g. http://127.0.0.1:8000")
    if (config.lm.input_site is None) != (config.lm.output_site is None):
        raise UserError("lm.input_site and lm.output_site go together: set both, or neither")


def identity(config: Config) -> dict[str, Any]:
    """The flat {key: value} of every field that determines the trained weights: of all that are not marked FREE."""
    return {
        f"{section}.{name}": getattr(getattr(config, section), name)
        for section, of_section in marks(Config).items()
        if FREE not in of_section
        for name, of_field in marks(type(getattr(config, section))).items()
        if FREE not in of_field
    }


def config_hash(config: Config) -> str:
    """Twelve hexadecimal digits that two configurations share if and only if their identities are equal."""
    return hashlib.sha256(json.dumps(identity(config), sort_keys=True).encode()).hexdigest()[:12]
