"""Checkpoints: atomic, without pickle, written while training continues, and the same from every layout of the ranks.

checkpoints/step_00001000/
    config.json, model.safetensors   the transcoder, as `CrossLayerTranscoder.from_pretrained` reads it
    optimizer.safetensors            Adam's moments by parameter name, counters, loss scale, RNG state
    state.json                       step, hashes of config and data, W&B id, versions, checksums of the two above

Every rank writes its share into the same two files. Their bytes are those that one process would write, so a
checkpoint of any layout loads into any other.
"""

from __future__ import annotations

import errno
import math
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
from safetensors import safe_open
from torch import Tensor

import clt
from clt.data.index import sync, write_json
from clt.data.shards import checksum, is_full_disk
from clt.errors import UserError, mismatches, size_text
from clt.files import read_object, reading, steps
from clt.model.transcoder import CrossLayerTranscoder, feature_dim
from clt.ranges import NOT_NEGATIVE
from clt.train import distributed as dist
from clt.train import tensorfile
from clt.train.distributed import World
from clt.train.tensorfile import Part

FORMAT_VERSION = 2
MODEL, TRAINING = "model.safetensors", "optimizer.safetensors"
STATE_FIELDS = {
    "step": Annotated[int, NOT_NEGATIVE],
    "busy_seconds": Annotated[float, NOT_NEGATIVE],
    "wandb_id": str | None,
    "rows_by_segment": dict[str, int] | None,  # of a run that read from a server
    "checksums": dict[str, str] | None,  # by file name; older checkpoints have none
}

Parts = dict[str, dict[str, Part]]
"""What this process has of each file."""


def parts(
    transcoder: CrossLayerTranscoder,
    optimizer: torch.optim.Optimizer,
    tensors: dict[str, Tensor],
    replica: tuple[int, int] = (0, 1),
) -> Parts:
    """The tensors of a checkpoint as views of this process's tensors; replica i of n writes the i-th nth of its shard.

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
        training[name] = part(tensor, 1 if name == "last_fired" else None)
    return {MODEL: model, TRAINING: training}


class Checkpoints(AbstractContextManager["Checkpoints"]):
    """The checkpoints in a directory, as one rank sees them: at most one is being written, by a thread.

    Every rank calls `begin`. When all have `written`, they call `publish`; or all call `finish`. Only then does the
    checkpoint get its checksums and its name: a crash before leaves a `.tmp`, which the next checkpoint deletes.
    """

    def __init__(self, directory: Path, keep: int, keep_every: int, world: World) -> None:
        """keep: how many of the newest are kept; keep_every: multiples of this step are kept for good (0: none)."""
        self.directory, self.keep, self.keep_every, self.world = directory, keep, keep_every, world
        self.writer = ThreadPoolExecutor(1, "clt-checkpoint")
        self.writing: Future[None] | None = None
        self.publishing: Future[None] | None = None
        self.stream = torch.cuda.Stream(world.device) if world.device.type == "cuda" else None
        self.copied: torch.Event | None = None

    def begin(self, parts: Parts, config: dict[str, Any], state: dict[str, Any]) -> None:
        """Start to write a checkpoint of `state["step"]`. On a GPU, call `wait_for_copy` before the tensors change.

        parts: what `parts` returned; config: the transcoder's; state: goes into state.json. Raises UserError, and keeps
        the earlier checkpoints, when it cannot be written.
        """
        self.finish()
        self.final = self.directory / f"step_{state['step']:08d}"
        self.partial = self.final.with_suffix(".tmp")
        dist.on_rank_zero(self.world, self._create, parts, config, state)
        if self.stream is not None:  # the next step's forward and backward pass run during the copy
            self.stream.wait_stream(torch.cuda.current_stream(self.world.device))
        with torch.cuda.stream(self.stream):  # no-op for None
            copies = {name: tensorfile.snapshot(file) for name, file in parts.items()}
        self.copied = self.stream.record_event() if self.stream is not None else None
        # The thread holds `parts`: until a temporary tensor is copied, its memory must not be used for another.
        self.writing = self.writer.submit(self._write, parts, copies, self.copied)

    def wait_for_copy(self) -> None:
        """Have the GPU's current stream, not the CPU, wait until the last checkpoint's tensors are copied."""
        if self.copied is not None:
            torch.cuda.current_stream(self.world.device).wait_event(self.copied)
            self.copied = None

    def _create(self, parts: Parts, config: dict[str, Any], state: dict[str, Any]) -> None:
        with self._errors_named():
            self.directory.mkdir(parents=True, exist_ok=True)
            self._delete_partial()
            wanted = sum(math.prod(p.shape) * p.tensor.element_size() for file in parts.values() for p in file.values())
            if (free := shutil.disk_usage(self.directory).free) < wanted * 1.01:
                raise OSError(errno.ENOSPC, f"found {size_text(free)} free, wanted {size_text(wanted)}")
            self.partial.mkdir()
            for name, file in parts.items():
                tensorfile.create(self.partial / name, file)
            self.state = {**state, "format_version": FORMAT_VERSION, **versions()}
            write_json(self.partial / "config.json", config)

    def _write(self, parts: Parts, copies: Parts, copied: torch.Event | None) -> None:
        if copied is not None:
            torch.cuda.set_device(self.world.device)  # a thread starts on GPU 0
            copied.synchronize()
        for name, file in copies.items():
            tensorfile.write(self.partial / name, file)

    @property
    def written(self) -> bool:
        """Whether this rank has written its share of the last checkpoint to the disk.

        Raises UserError when one could not be written.
        """
        if self.publishing is not None and self.publishing.done():
            with self._errors_named():
                self.publishing.result()  # an error ends the run now, and not when the next checkpoint is due
        if self.writing is None or not self.writing.done():
            return False
        with self._errors_named():
            self.writing.result()
        return True

    def publish(self) -> None:
        """Have the thread give the checkpoint its checksums and its name. Every rank must have `written`."""
        assert self.written
        self.writing = None
        if self.world.rank == 0:
            self.publishing = self.writer.submit(self._publish)

    def _publish(self) -> None:
        # Of what the files hold now, from every rank: while training goes on, and out of the page cache.
        checksums = {name: checksum(self.partial / name) for name in (MODEL, TRAINING)}
        write_json(self.partial / "state.json", self.state | {"checksums": checksums})
        sync(self.partial)
        self.partial.rename(self.final)
        sync(self.directory)
        for step in steps(self.directory)[: -self.keep]:
            if not (self.keep_every and step % self.keep_every == 0):
                old = self.directory / f"step_{step:08d}"
                # Half of one must not have the name of a whole one. What cannot be deleted now is, with the next.
                shutil.rmtree(old.rename(old.with_suffix(".tmp")), ignore_errors=True)

    def finish(self) -> None:
        """Wait until every rank has written the last checkpoint, if there is one, and it is published."""
        if self.writing is not None:
            wait([self.writing])
            assert self.written
            dist.count(self.world, True)
            self.publish()
        if self.publishing is not None:
            with self._errors_named():
                self.publishing.result()
            self.publishing = None

    @contextmanager
    def _errors_named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            found = steps(self.directory)
            kept = f"step {found[-1]} is kept" if found else "there is no earlier one"
            remedy = "Free disk space" if is_full_disk(error) else "Mend that"
            raise UserError(
                f"no checkpoint could be written to {self.directory}: {error}; {kept}. {remedy} and run again to go on."
            ) from error

    def _delete_partial(self) -> None:
        for leftover in self.directory.glob("step_*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)

    def __exit__(self, *_: object) -> None:
        """Leave nothing half-written when the run ends by an error."""
        self.writer.shutdown()
        if self.world.rank == 0:
            self._delete_partial()


def rng_states() -> dict[str, Tensor]:
    """The state of torch's generators. They are the same on every rank: nothing draws from them rank by rank."""
    states = {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["rng.cuda"] = torch.cuda.get_rng_state()
    return states


def versions() -> dict[str, str]:
    """Those that a run must have to go on from a checkpoint."""
    return {"clt_version": clt.__version__, "torch_version": torch.__version__}


def read_state(checkpoint: Path) -> dict[str, Any]:
    """state.json. Raises UserError when it is unreadable, of another format, or of another step."""
    file = checkpoint / "state.json"
    state = read_object(file, {}, _remedy(checkpoint))
    if state.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"checkpoint {checkpoint} has format version {state.get('format_version')}, this code reads "
            f"{FORMAT_VERSION}; resume with the code that wrote it (version {state.get('clt_version')})"
        )
    state = read_object(file, STATE_FIELDS, _remedy(checkpoint))
    if checkpoint.name != (name := f"step_{state['step']:08d}"):
        raise UserError(f"{file} is of {name}, wanted {checkpoint.name}: give the directory the name it had")
    return state


def _remedy(checkpoint: Path) -> str:
    return f"delete {checkpoint} to go on from the checkpoint before it"


def verify(checkpoint: Path, *names: str) -> None:
    """Raise UserError unless these files of a checkpoint have the checksums of state.json, where it has any."""
    for name, wanted in (read_state(checkpoint)["checksums"] or {}).items():
        if name in names:
            with reading(checkpoint / name, _remedy(checkpoint)):
                found = checksum(checkpoint / name, wanted.partition(":")[0])
                if found != wanted:
                    raise ValueError(
                        f"its checksum is {found}, wanted {wanted}: bytes have changed since it was written"
                    )


def read_tensor(checkpoint: Path, name: str) -> Tensor:
    """One tensor of the training state, e.g. "last_fired" (L, F). Raises UserError when it is missing or damaged."""
    path = checkpoint / TRAINING
    with reading(path, _remedy(checkpoint)), safe_open(path, "pt") as file:
        return file.get_tensor(name)


def load_transcoder(checkpoint: Path) -> CrossLayerTranscoder:
    """The trained transcoder alone, whole. Raises UserError when its files are missing or damaged."""
    verify(checkpoint, MODEL)
    return CrossLayerTranscoder.from_pretrained(checkpoint)


def restore(
    checkpoint: Path,
    transcoder: CrossLayerTranscoder,
    optimizer: torch.optim.Optimizer,
    tensors: dict[str, Tensor],
    expected: dict[str, Any],
) -> dict[str, Any]:
    """Load weights, optimizer, `tensors` and RNG in place (a shard loads its part); returns state.json.

    expected: what state.json must hold for the run to go on. Raises UserError that names what differs.
    """
    state = read_state(checkpoint)
    older = {"layers": transcoder.sites.layers}  # which older checkpoints do not say; `data_hash` is of their rows
    found = older | read_object(checkpoint / "config.json", {}, _remedy(checkpoint)) | state
    if odd := mismatches(found, transcoder.config | versions() | expected):
        raise UserError(
            f"checkpoint {checkpoint} is not one that this run can go on from: {odd}. Go back to the versions and the "
            "data that it was written with, or start again in another run.dir"
        )
    for parameter in filter(lambda parameter: parameter.requires_grad, transcoder.parameters()):
        moments = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device), **moments}
    rng = rng_states()
    for name, file in parts(transcoder, optimizer, tensors | rng).items():
        tensorfile.read(checkpoint / name, file)
    torch.set_rng_state(rng["rng.cpu"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(rng["rng.cuda"])
    return state
