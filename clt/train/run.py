"""A run's parts, built from its config."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

import torch

from clt.config import Config, config_hash, identity, load_config
from clt.data.check import changes, check_store
from clt.data.extract import extract_all
from clt.data.index import INDEX, StoreIndex, content_hash, read_index, write_atomically
from clt.data.lock import locked
from clt.data.statistics import Statistics
from clt.data.store import DiscBuffer
from clt.errors import UserError, mismatches, tell
from clt.lm.shape import ModelShape, read_shape
from clt.memory import free_memory
from clt.model.loss import Objective
from clt.model.spec import Sites, check_loss, check_rule
from clt.model.transcoder import CrossLayerTranscoder
from clt.parsing import to_yaml
from clt.plan import Machine, shortage
from clt.train import distributed as dist
from clt.train.distributed import ONE_RANK, Axis, World
from clt.train.logger import check_wandb
from clt.train.optim import autocast_dtype
from clt.train.source import ServerSource, StoreSource

if TYPE_CHECKING:
    from clt.lm.documents import Part


def check_run(config: Config, world: World) -> None:
    """Raise UserError for what would stop the run later: its directory, W&B, and too little memory."""
    check_run_dir(config)
    check_wandb(config)
    check_memory(config, world)


def check_memory(config: Config, world: World) -> None:
    """Raise UserError when the run is sure to need more memory than there is, and warn when it probably does.

    Also when `clt` or `loss` ask for more than the layers have.

    The sizes are those of the store or, where it has to be extracted, of the language model's config. With a server's
    rows they are not known before the first run.
    """
    heldout = Path(config.data.store) / "heldout"
    if (heldout / INDEX).is_file():
        index = read_index(heldout)
        shape = ModelShape(index.n_layers, index.d_acts)
    elif config.data.source == "store":
        shape = read_shape(config.lm, ask_hub=True)
    else:
        return
    check_rule(config.clt, shape.n_layers)
    check_loss(config.loss, config.clt, shape.n_layers)
    if cpu := world.device.type == "cpu":
        memory = min(free_memory().values()) / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    else:
        memory = torch.cuda.get_device_properties(world.device).total_memory
    if autocast_dtype(config.train.precision, world.device) == torch.float32:  # `auto` may be; the plan counts as bf16
        config = replace(config, train=replace(config.train, precision="fp32"))
    found, sure = shortage(config, shape, Machine(world.size, memory / 1e9, cpu=cpu))
    if sure:
        raise UserError(f"the run does not fit: {found}")
    if found is not None:
        tell(f"warning: the run may not fit: {found}")


def make_stores(config: Config) -> None:
    """Extract the missing stores, or fetch a server's held-out rows, on all cores: the other ranks wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(threads, len(os.sched_getaffinity(0))))
    if config.data.source == "server":
        from clt.server.remote import fetch_heldout

        fetch_heldout(config)
    else:
        extract_all(config)
    torch.set_num_threads(threads)


def open_source(config: Config, world: World) -> tuple[StoreSource, DiscBuffer]:
    """The source of the training rows, and the held-out store.

    Raises UserError as `open_store`, when they are not of one model, and when the server does not answer.
    """
    source: StoreSource
    if config.data.source == "server":
        from clt.server.remote import open_server

        source = ServerSource(open_server(config), config, world)
    else:
        source = StoreSource(open_store(config, "train"), config, world)
    heldout = open_store(config, "heldout")
    names = ("n_layers", "d_acts", "layers", "input_sites", "output_sites", "revision", "tokenizer_hash")
    found, wanted = ({name: getattr(index, name) for name in names} for index in (heldout.index, source.index))
    if odd := mismatches(found, wanted) or changes(heldout.index.fingerprints, source.index.fingerprints):
        raise UserError(
            f"the stores {heldout.path} and {source.store.path} are not of one language model: {odd}; "
            "delete the wrong one to extract it again, or set data.store to another directory"
        )
    check_rule(config.clt, source.index.n_layers)
    check_loss(config.loss, config.clt, source.index.n_layers)
    return source, heldout


def open_store(config: Config, part: Part) -> DiscBuffer:
    """The store of one part. Raises UserError when it is missing, damaged or of another config."""
    store = DiscBuffer(Path(config.data.store) / part)
    check_store(store.index, config)
    return store


def build(config: Config, index: StoreIndex, statistics: Statistics, feature: Axis = ONE_RANK) -> Objective:
    """The transcoder, or this rank's shard of it, in its objective: weights by `run.seed`, sizes from the store."""
    if config.clt.d_features % feature.size:
        raise UserError(
            f"clt.d_features={config.clt.d_features} cannot be split into parallel.feature_shards={feature.size} equal "
            "shards: choose a multiple of it"
        )
    torch.manual_seed(config.run.seed)
    shard = (feature.rank, feature.size)
    sites = Sites(config.lm.input_site, config.lm.output_site, layers=index.some_layers)
    transcoder = CrossLayerTranscoder(
        index.n_layers, index.d_acts, config.clt, sites=sites, shard=shard, sum_shards=feature.sum
    )
    transcoder.normalization.set(
        statistics.input_mean, statistics.input_sd, statistics.target_mean, statistics.target_sd
    )
    return Objective(transcoder, config.loss, compile=config.train.compile)


def check_run_dir(config: Config) -> None:
    """Raise UserError when `run.dir` holds a run of another config or one that must not be resumed, or is not to be
    written. Writes nothing."""
    directory = Path(config.run.dir).absolute()
    path = directory / "config.yaml"
    try:
        there = next(place for place in (directory, *directory.parents) if place.exists() or place.is_symlink())
        with TemporaryFile(dir=there):  # modes, read-only file systems and quotas: the system knows
            pass
        if not path.exists():
            return
    except OSError as error:
        raise UserError(
            f"run.dir={config.run.dir} cannot be written ({error.strerror}): change its mode or its owner, or choose "
            "another run.dir"
        ) from error
    if odd := mismatches(identity(load_config(path)), identity(config)):
        raise UserError(
            f"run directory {config.run.dir} holds a run of another config ({odd}); "
            "choose another run.dir, or delete this one"
        )
    if not config.checkpoint.resume:
        raise UserError(
            f"run directory {config.run.dir} already holds this run and checkpoint.resume is false; "
            "choose another run.dir, delete this one, or set checkpoint.resume=true"
        )


@contextmanager
def sole_use(config: Config, world: World) -> Iterator[None]:
    """Create `run.dir`, and keep other runs out of it. Raises UserError that names the process that is in it."""

    def enter() -> None:
        Path(config.run.dir).mkdir(parents=True, exist_ok=True)
        lock.enter_context(locked(Path(config.run.dir), "used", "run.dir"))

    with ExitStack() as lock:
        dist.on_rank_zero(world, enter)
        yield


def claim_run_dir(config: Config) -> None:
    """Write the resolved config.yaml into `run.dir`, the mark that `check_run_dir` reads."""
    write_atomically(Path(config.run.dir) / "config.yaml", to_yaml(config).encode())


def run_identity(config: Config, index: StoreIndex, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What must be equal, besides versions, for a run to go on from a checkpoint: config, data, precision, device."""
    hashes = {"config_hash": config_hash(config), "data_hash": content_hash(index)}
    return hashes | {"precision": str(dtype), "device": device.type}
