"""A run's configuration: typed dataclasses <- YAML <- `key=value` overrides.

The defaults are the reference run (GPT-2 small sizes and hyperparameters), so a file in `configs/` holds only what
differs. Sizes that another file knows (layers, width, rows) are never configured: they come from the store's index.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from clt.errors import UserError
from clt.model.spec import CLTConfig, LossConfig, check_loss, check_rule
from clt.parsing import merge_file, merge_text, names
from clt.ranges import (
    ASCENDING,
    DECAY_RATES,
    FREE,
    INPUT_SITE,
    NAME,
    NORM_OUTPUT,
    NOT_NEGATIVE,
    PORT,
    POSITIVE,
    SEED,
    SHARE,
    SITE,
    free,
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
    input_site: Annotated[str | None, INPUT_SITE] = None
    """Module whose *input* is read, or with `.output` its output; null: the norm before the MLP; `norm.output`."""
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


@dataclass
class DataConfig:
    """Activations at rest and how they are read."""

    source: Literal["store", "server"] = "store"
    """Read the run's own store, or rows that an activation server streams."""
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
    """Shards filled at once: rows are shuffled over these alone; an interrupted extraction repeats these at most."""
    block_rows: Annotated[int, POSITIVE] = 64
    """Contiguous rows read at once; a batch is made of blocks from random places, so its rows are not independent."""
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
    warmup: Annotated[float, SHARE] = 0.0
    """Share of the run's steps over which the learning rate rises linearly from 0."""
    decay: Annotated[float, SHARE] = 0.0
    """Share of the run's steps, at its end, over which the learning rate falls linearly to 0."""
    clip_norm: Annotated[float | None, POSITIVE] = 1.0
    """Clip the gradient's global norm to this; null does not clip."""
    decoder: Literal["torch", "fused", "lazy"] = "torch"
    """Adam of W_dec: `fused` takes one pass a row, on CUDA; `lazy` too, but rows without gradient wait till read."""


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
    kernels: Literal["dense", "sparse", "sampled"] = "dense"
    """`sparse` multiplies what fires or is near its threshold, while that is little; `sampled`: of the near, a part."""
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
    """How the ranks share the work. A run may resume in another layout."""

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
    """About how many rows (tokens) the shared buffer holds; it consists of blocks of 2 MB."""
    open_share: Annotated[float, SHARE] = 0.5
    """Share of the buffer over which new rows are scattered; a larger share mixes them better."""
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
    """File, readable by its owner alone, with the token that clients must send; null takes CLT_SERVER_TOKEN, if set."""
    max_batch: Annotated[int, POSITIVE] = 8192
    """Most rows in a batch. A JSON batch has at most 64 rows and 128 KB, a tensor 2 MB."""
    max_streams: Annotated[int, POSITIVE] = 64
    """Clients that receive rows at the same time, over all workers."""
    wait_seconds: Annotated[float, POSITIVE] = 30.0
    """Seconds that a request waits for its first rows before it is answered 503."""
    idle_seconds: Annotated[float, POSITIVE] = 60.0
    """Seconds that a client may take to read what it was sent (2 MB at most) before it is dropped."""


@dataclass
class Config:
    """Everything that determines a run."""

    run: RunConfig = field(default_factory=RunConfig)
    lm: LMConfig = field(default_factory=LMConfig)
    text: TextConfig = field(default_factory=TextConfig)
    data: DataConfig = field(default_factory=DataConfig)
    clt: CLTConfig = field(default_factory=CLTConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: Annotated[EvalConfig, FREE] = field(default_factory=EvalConfig)
    parallel: Annotated[ParallelConfig, FREE] = field(default_factory=ParallelConfig)
    checkpoint: Annotated[CheckpointConfig, FREE] = field(default_factory=CheckpointConfig)
    log: Annotated[LogConfig, FREE] = field(default_factory=LogConfig)
    profile: Annotated[ProfileConfig, FREE] = field(default_factory=ProfileConfig)
    server: Annotated[ServerConfig, FREE] = field(default_factory=ServerConfig)


PACKAGE = Path(__file__).parent
_CONFIGS = PACKAGE / "configs"  # where a wheel has them; in a checkout they lie beside the package
DEFAULT_CONFIG = (_CONFIGS if _CONFIGS.is_dir() else PACKAGE.parent / "configs") / "quickstart.yaml"
PRESETS = {name: PACKAGE / "server" / "presets" / f"{name}.yaml" for name in ("test", "production", "large-scale")}
"""Sizes of the activation server, by name."""
SERVER_VARIABLES = {f"CLT_SERVER_{name.upper()}": f"server.{name}" for name in names(ServerConfig)}
"""Variables of the environment that set a field, and which."""


def load_config(
    path: str | Path | None = None,
    overrides: Sequence[str] = (),
    preset: str | Path | None = None,
    environment: Sequence[str] = (),
) -> Config:
    """The defaults, over them a YAML file, a preset, and `section.key=value` overrides: the later wins.

    `preset` is one of PRESETS or another YAML file; `environment` are overrides below the others. Raises UserError for
    a missing file, an unknown key, and a value of the wrong type or out of range.
    """
    config = Config()
    for file in (path, PRESETS.get(str(preset), preset)):
        if file is None:
            continue
        if not Path(file).is_file():
            known = f"configs/*.yaml and the presets {', '.join(PRESETS)}"
            raise UserError(f"config {file} does not exist; the shipped ones are {known}")
        merge_file(config, file)
    for place, texts in (("the environment", environment), ("the command line", overrides)):
        for text in texts:
            merge_text(config, text, place)
    if config.data.source == "server" and config.data.url is None:
        raise UserError("data.source=server but data.url is null: set it to the server's, e.g. http://127.0.0.1:8000")
    if "@" in (config.data.url or "").partition("://")[2].partition("/")[0]:
        # It would be printed, and written into run directories and to W&B.
        raise UserError("data.url has a user's name or password in it; wanted http://HOST:PORT, and data.token_file")
    if (config.lm.input_site is None) != (config.lm.output_site is None) and config.lm.input_site != NORM_OUTPUT:
        raise UserError("lm.input_site and lm.output_site go together: set both, or neither")
    check_rule(config.clt)
    check_loss(config.loss, config.clt)
    dense_terms = [name for name in ("pre_activation", "aux") if getattr(config.loss, name)]
    if config.train.kernels != "dense" and dense_terms:
        term, value = f"loss.{dense_terms[0]}", getattr(config.loss, dense_terms[0])
        raise UserError(
            f"train.kernels is {config.train.kernels} but {term} is {value}, which has a gradient to features "
            f"that do not fire; wanted train.kernels=dense, or {term}=0"
        )
    if config.train.kernels == "sampled" and config.clt.activation != "jumprelu":
        raise UserError(
            f"train.kernels is sampled but clt.activation is {config.clt.activation}, which learns no thresholds, so "
            "there is nothing to sample; wanted train.kernels=sparse"
        )
    check_decoder(config)
    return config


def check_decoder(config: Config) -> None:
    """Raise UserError where `optim.decoder` does not go with the rest."""
    kind = config.optim.decoder
    if kind != "torch" and config.loss.aux:
        raise UserError(
            f"optim.decoder is {kind} but loss.aux is {config.loss.aux}, whose part of the gradient's norm it does not "
            "know; wanted optim.decoder=torch, or loss.aux=0"
        )
    if kind == "lazy" and config.train.kernels == "dense":
        raise UserError(
            "optim.decoder is lazy but train.kernels is dense, which reads all rows in every step; wanted "
            "train.kernels=sparse, or optim.decoder=fused"
        )
    if kind == "lazy" and config.clt.by_norm:
        raise UserError(
            "optim.decoder is lazy but clt.by_norm is true, which reads all rows' norms in every step; wanted "
            "optim.decoder=fused, or clt.by_norm=false"
        )


def environment_overrides() -> list[str]:
    """What SERVER_VARIABLES set, as overrides of a config. Raises UserError for a CLT_SERVER_ that sets nothing."""
    for name in os.environ:
        if name.startswith("CLT_SERVER_") and name not in {*SERVER_VARIABLES, "CLT_SERVER_TOKEN"}:
            known = ", ".join(["CLT_SERVER_TOKEN", *SERVER_VARIABLES])
            raise UserError(f"{name} in the environment sets nothing; known: {known}")
    return [f"{key}={os.environ[name]}" for name, key in SERVER_VARIABLES.items() if name in os.environ]


def environment_config() -> Config:
    """The config that CLT_CONFIG (a YAML file, or a preset over DEFAULT_CONFIG) and SERVER_VARIABLES ask for.

    Raises UserError as `load_config`.
    """
    path = os.environ.get("CLT_CONFIG", "test")
    file, preset = (DEFAULT_CONFIG, path) if path in PRESETS else (path, None)
    return load_config(file, preset=preset, environment=environment_overrides())


def identity(config: Config) -> dict[str, Any]:
    """The flat {key: value} of every field that determines the trained weights: of all that are not marked FREE."""
    return {
        f"{section}.{name}": value
        for section, fields in asdict(config).items()
        for name, value in fields.items()
        if section not in free(Config) and name not in free(type(getattr(config, section)))
    }


def config_hash(config: Config) -> str:
    """Twelve hexadecimal digits that two configurations share if and only if their identities are equal."""
    return digest(identity(config))[:12]


def digest(tree: Any) -> str:
    """64 hexadecimal digits that two trees of JSON share if and only if they are equal."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
