"""A run's configuration: typed dataclasses <- YAML <- `key=value` overrides.

The defaults are the reference run (GPT-2 small sizes and hyperparameters), so a file in `configs/` holds only what
differs. Sizes that another file knows (layers, width, rows) are never configured: they come from the store's index.
A section, with the checks of its values, stands in the `spec.py` of the package that it is for, or here.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from clt.data.spec import DataConfig, check_data
from clt.errors import UserError
from clt.lm.spec import LMConfig, TextConfig, check_lm
from clt.model.spec import CLTConfig, LossConfig, check_loss, check_rule
from clt.parsing import merge_file, merge_text, names
from clt.ranges import FREE, NAME, PORT, POSITIVE, SEED, SHARE, WORKERS, free
from clt.train.spec import (
    CheckpointConfig,
    EvalConfig,
    LogConfig,
    OptimConfig,
    ParallelConfig,
    ProfileConfig,
    TrainConfig,
    check_optim,
    check_train,
)


@dataclass
class RunConfig:
    """Where the run lies, and the seed of everything random in it."""

    dir: Annotated[str, FREE] = "runs/default"
    """Directory that receives the resolved config, metrics, checkpoints, summary and report."""
    seed: Annotated[int, SEED] = 0
    """Seed of the initial weights and of the order in which rows are read."""


@dataclass
class ServerConfig:
    """Activations over the network: the shared buffer, the generator that fills it, and the limits of its clients."""

    name: Annotated[str | None, NAME] = None
    """Name of the buffer in shared memory; null derives it from `data.store`."""
    source: Literal["model", "store"] = "model"
    """Fill the buffer by running the language model over the training text, or from the training store, endlessly."""
    rows: Annotated[int, POSITIVE] = 32_768
    """About how many rows (tokens) the shared buffer holds; it consists of blocks of 1.5 to 3 MB."""
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
    workers: Annotated[int, WORKERS] = 1
    """Serving processes on one buffer."""
    token_file: str | None = None
    """File, readable by its owner alone, with the token that clients must send; null takes CLT_SERVER_TOKEN, if set."""
    max_batch: Annotated[int, POSITIVE] = 8192
    """Most rows in a batch. A JSON batch has at most 64 rows and 128 KB, a tensor 2 MB."""
    max_streams: Annotated[int, POSITIVE] = 64
    """Clients that receive rows at the same time, over all workers."""
    wait_seconds: Annotated[float, POSITIVE] = 30.0
    """Seconds that a request waits for rows before it is answered 503, or a stream before it is ended."""
    idle_seconds: Annotated[float, POSITIVE] = 60.0
    """Seconds that a client may take to read what it was sent (a block at most) before it is dropped."""


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
    check_data(config.data)
    check_lm(config.lm)
    check_rule(config.clt)
    check_loss(config.loss, config.clt)
    check_train(config.train, config.loss, config.clt)
    check_optim(config.optim, config.train, config.loss, config.clt)
    return config


def environment_config() -> Config:
    """The config that CLT_CONFIG (a YAML file, or a preset over DEFAULT_CONFIG) and SERVER_VARIABLES ask for.

    Raises UserError as `load_config`.
    """
    path = os.environ.get("CLT_CONFIG", "test")
    file, preset = (DEFAULT_CONFIG, path) if path in PRESETS else (path, None)
    return load_config(file, preset=preset, environment=environment_overrides())


def environment_overrides() -> list[str]:
    """What SERVER_VARIABLES set, as overrides of a config. Raises UserError for a CLT_SERVER_ that sets nothing."""
    for name in os.environ:
        if name.startswith("CLT_SERVER_") and name not in {*SERVER_VARIABLES, "CLT_SERVER_TOKEN"}:
            known = ", ".join(["CLT_SERVER_TOKEN", *SERVER_VARIABLES])
            raise UserError(f"{name} in the environment sets nothing; known: {known}")
    return [f"{key}={os.environ[name]}" for name, key in SERVER_VARIABLES.items() if name in os.environ]


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
