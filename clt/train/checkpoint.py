"""Checkpoints: written whole or not at all, without pickle, while training goes on, and free of the ranks' layout.

checkpoints/step_00001000/
    config.json, model.safetensors   the transcoder, as `CrossLayerTranscoder.from_pretrained` reads it
    optimizer.safetensors            Adam's moments by parameter name, counters, loss scale, RNG state
    state.json                       step, hashes of config and data, W&B id, versions

Every rank writes its share into the same two files. They have the bytes that one process would have written, so a
checkpoint of any layout loads into any other.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

import clt
from clt.data.index import sync
from clt.data.shards import is_full_disk
from clt.errors import UserError
from clt.model.transcoder import CrossLayerTranscoder, feature_dim
from clt.train import distributed as dist
from clt.train import tensorfile
from clt.train.distributed import World
from clt.train.tensorfile import Part

FORMAT_VERSION = 2
MODEL, TRAINING = "model.safetensors", "optimizer.safetensors"
SHARDED_TRAINING = ("last_fired",)  # (L, F): its second dimension counts features

Parts = dict[str, dict[str, Part]]
"""What this process has of each file."""


def parts(
    transcoder: CrossLayerTranscoder,
    optimizer: torch.optim.Optimizer,
    tensors: dict[str, Tensor],
    replica: tuple[int, int] = (0, 1),
) -> Parts:
    """The tensors of a checkpoint as views of this process's own; of a shard, `replica` (i, n) writes the i-th nth.

    tensors: training state beside the optimizer's; "last_fired" (L, F) is sharded like the features.
    """
    i, n = replica
    F, first = transcoder.d_features, transcoder.features.start
    a, b = F * i // n, F * (i + 1) // n
    whole = transcoder.config["d_features"]

    def part(tensor: Tensor, dim: int | None) -> Part:
        if dim is None:
            return Part(tensor, tuple(tensor.shape), writes=first == 0 and i == 0)
        shape = tuple(whole if d == dim else size for d, size in enumerate(tensor.shape))
        return Part(tensor.narrow(dim, a, b - a), shape, dim, first + a)

    model = {name: part(tensor, feature_dim(name)) for name, tensor in transcoder.state_dict().items()}
    training = {
        f"{name}.{key}": part(value, feature_dim(name) if value.dim() else None)
        for name, parameter in transcoder.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    for name, tensor in (rng_states() | tensors).items():
        training[name] = part(tensor, 1 if name in SHARDED_TRAINING else None)
    return {MODEL: model, TRAINING: training}


class Checkpoints:
    """The checkpoints in a directory, as one rank sees them: at most one is being written, by a thread.

    Every rank calls `begin`; later, when every rank has `written`, rank 0 calls `publish` (or all call `finish`). Only
    then does the checkpoint have its name: a crash before leaves a `.tmp` behind, which the next one clears away.
    """

    def __init__(self, directory: Path, keep: int, keep_every: int, world: World) -> None:
        """keep: how many of the newest stay; keep_every: steps whose multiples stay for good, or 0."""
        self.directory, self.keep, self.keep_every, self.world = directory, keep, keep_every, world
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None

    def begin(self, parts: Parts, config: dict[str, Any], state: dict[str, Any]) -> None:
        """Start to write a checkpoint of `state["step"]`; the tensors may change as soon as this returns
        (on a GPU: by what comes later in the current stream).

        parts: what `parts` returned; config: the transcoder's; state: goes into state.json. Raises UserError, leaving
        the earlier checkpoints as they are, when the disk has no room.
        """
        self.finish()
        self.final = self.directory / f"step_{state['step']:08d}"
        self.partial = self.final.with_suffix(".tmp")
        dist.on_rank_zero(self.world, lambda: self._create(parts, config, state))
        copies = {name: tensorfile.snapshot(file) for name, file in parts.items()}
        # Not in a stream of their own: the next update has to come after them, and a step is short beside them.
        cuda = self.world.device.type == "cuda"
        copied = torch.cuda.current_stream(self.world.device).record_event() if cuda else None
        self.thread = threading.Thread(target=self._write, args=(copies, copied), name="clt-checkpoint")
        self.thread.start()

    def _create(self, parts: Parts, config: dict[str, Any], state: dict[str, Any]) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        for leftover in self.directory.glob("step_*.tmp"):
            shutil.rmtree(leftover)
        wanted = sum(math.prod(p.shape) * p.tensor.element_size() for file in parts.values() for p in file.values())
        if (free := shutil.disk_usage(self.directory).free) < wanted * 1.01:
            raise UserError(self._message(f"found {free / 1e9:.3f} GB free, wanted {wanted / 1e9:.3f} GB"))
        try:
            self.partial.mkdir()
            for name, file in parts.items():
                tensorfile.create(self.partial / name, file)
            (self.partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            state = {**state, "format_version": FORMAT_VERSION, **versions()}
            (self.partial / "state.json").write_text(json.dumps(state, indent=2) + "\n")
            for name in ("config.json", "state.json"):
                sync(self.partial / name)
        except OSError as error:
            raise self._failure(error) from error

    def _write(self, copies: Parts, copied: torch.cuda.Event | None) -> None:
        try:
            if copied is not None:
                torch.cuda.set_device(self.world.device)  # a thread starts on GPU 0
                copied.synchronize()
            for name, file in copies.items():
                tensorfile.write(self.partial / name, file)
        except BaseException as error:  # noqa: BLE001 - raised again in the main thread, by `written`
            self.error = error

    @property
    def written(self) -> bool:
        """Whether this rank's share of the checkpoint begun last is on the disk.

        Raises UserError on a full disk, and whatever else has kept it from there.
        """
        if self.thread is None or self.thread.is_alive():
            return False
        if self.error is not None:
            raise self._failure(self.error)
        return True

    def publish(self) -> None:
        """Give the checkpoint its name, and delete the old ones. Every rank must have `written`."""
        assert self.written
        self.thread = None
        if self.world.rank != 0:
            return
        sync(self.partial)
        self.partial.rename(self.final)
        sync(self.directory)
        for step in steps(self.directory)[: -self.keep]:
            if not (self.keep_every and step % self.keep_every == 0):
                old = self.directory / f"step_{step:08d}"
                shutil.rmtree(old.rename(old.with_suffix(".tmp")))  # half of one must not have the name of a whole one

    def finish(self) -> None:
        """Wait until the checkpoint begun last, if any, is written by every rank, and publish it."""
        if self.thread is None:
            return
        self.thread.join()
        assert self.written
        dist.barrier(self.world)
        self.publish()

    def _failure(self, error: BaseException) -> BaseException:
        if self.world.rank == 0:
            shutil.rmtree(self.partial, ignore_errors=True)
        full = isinstance(error, OSError) and is_full_disk(error)
        return UserError(self._message(str(error))) if full else error

    def _message(self, cause: str) -> str:
        found = steps(self.directory)
        kept = f"step {found[-1]} is kept" if found else "there is no earlier one"
        return (
            f"no checkpoint could be written to {self.directory}: {cause}; {kept}. "
            "Free disk space and run again to go on."
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Leave nothing half-written when the run ends by an error."""
        if self.thread is not None:
            self.thread.join()
            if self.world.rank == 0:
                shutil.rmtree(self.partial, ignore_errors=True)


def rng_states() -> dict[str, Tensor]:
    """The state of torch's generators. They are the same on every rank: nothing draws from them rank by rank."""
    states = {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["rng.cuda"] = torch.cuda.get_rng_state()
    return states


def versions() -> dict[str, str]:
    """What a checkpoint was written by."""
    return {"clt_version": clt.__version__, "torch_version": torch.__version__}


def steps(directory: Path) -> list[int]:
    """The steps that have a whole checkpoint, ascending."""
    names = (re.fullmatch(r"step_(\d{8})", path.name) for path in directory.glob("step_*"))
    return sorted(int(match[1]) for match in names if match)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """state.json. Raises UserError when it is unreadable or of another format."""
    try:
        state = json.loads((checkpoint / "state.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(
            f"checkpoint {checkpoint} is damaged ({error}); delete it to go on from the one before"
        ) from error
    if state.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"checkpoint {checkpoint} has format version {state.get('format_version')}, this code reads "
            f"{FORMAT_VERSION}; resume with the code that wrote it (version {state.get('clt_version')})"
        )
    return state


def read_tensor(checkpoint: Path, name: str) -> Tensor:
    """One tensor of the training state, e.g. "last_fired" (L, F). Raises UserError when it is missing or damaged."""
    try:
        with safe_open(checkpoint / TRAINING, "pt") as file:
            return file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise UserError(f"checkpoint {checkpoint} is damaged ({error})") from error


def load_transcoder(checkpoint: Path) -> CrossLayerTranscoder:
    """The trained transcoder alone, whole. Raises UserError when its files are missing or damaged."""
    try:
        return CrossLayerTranscoder.from_pretrained(checkpoint)
    except ValueError as error:
        raise UserError(str(error)) from error


def restore(
    checkpoint: Path,
    transcoder: CrossLayerTranscoder,
    optimizer: torch.optim.Optimizer,
    tensors: dict[str, Tensor],
    expected: dict[str, Any],
) -> dict[str, Any]:
    """Load weights, optimizer, `tensors` and RNG in place, of a shard its own part; returns state.json.

    expected: what state.json must hold for the run to go on. Raises UserError that says what differs.
    """
    state = read_state(checkpoint)
    try:
        config = json.loads((checkpoint / "config.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(
            f"checkpoint {checkpoint} is damaged ({error}); delete it to go on from the one before"
        ) from error
    pairs = {f"the transcoder's {key}": (config.get(key), value) for key, value in transcoder.config.items()}
    pairs |= {key: (state.get(key), value) for key, value in expected.items()}
    odd = [f"{key}: found {found!r}, wanted {wanted!r}" for key, (found, wanted) in pairs.items() if found != wanted]
    if odd:
        raise UserError(
            f"checkpoint {checkpoint} is not one that this run can go on from: {'; '.join(odd)}. Go back to the "
            "versions and the data that it was written with, or start again in another run.dir"
        )
    for parameter in optimizer.param_groups[0]["params"]:
        moments = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device), **moments}
    rng = rng_states()
    for name, file in parts(transcoder, optimizer, tensors | rng).items():
        tensorfile.read(checkpoint / name, file)
    torch.set_rng_state(rng["rng.cpu"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(rng["rng.cuda"])
    return state
