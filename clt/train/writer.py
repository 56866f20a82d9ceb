"""Writes checkpoints while training continues: atomic, by every rank its share, the newest kept."""

from __future__ import annotations

import errno
import math
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch

from clt.data.index import sync, write_json
from clt.data.shards import checksum, is_full_disk
from clt.errors import UserError, size_text
from clt.files import steps
from clt.train import distributed as dist
from clt.train import tensorfile
from clt.train.checkpoint import FORMAT_VERSION, MODEL, TRAINING, Slices, versions
from clt.train.distributed import World
from clt.train.spec import CheckpointConfig


class Checkpoints(AbstractContextManager["Checkpoints"]):
    """The checkpoints in a directory, as one rank sees them: at most one is being written, by a thread.

    Every rank calls `begin`. When all have `written`, they call `publish`; or all call `finish`. Only then does the
    checkpoint get its checksums and its name: a crash before leaves a `.tmp`, which the next checkpoint deletes.
    """

    def __init__(self, directory: Path, config: CheckpointConfig, world: World) -> None:
        """config: says which checkpoints are kept."""
        self.directory, self.config, self.world = directory, config, world
        self.writer = ThreadPoolExecutor(1, "clt-checkpoint")
        self.writing: Future[None] | None = None
        self.publishing: Future[None] | None = None
        self.stream = torch.cuda.Stream(world.device) if world.device.type == "cuda" else None
        self.copied: torch.Event | None = None

    def begin(self, slices: Slices, config: dict[str, Any], state: dict[str, Any]) -> None:
        """Start to write a checkpoint of `state["step"]`. On a GPU, call `wait_for_copy` before the tensors change.

        slices: what `checkpoint.slices` returned; config: the transcoder's; state: goes into state.json. Raises
        UserError, and keeps the earlier checkpoints, when it cannot be written.
        """
        self.finish()
        self.final = self.directory / f"step_{state['step']:08d}"
        self.partial = self.final.with_suffix(".tmp")
        dist.on_rank_zero(self.world, self._create, slices, config, state)
        if self.stream is not None:  # the next step's forward and backward pass run during the copy
            self.stream.wait_stream(torch.cuda.current_stream(self.world.device))
        with torch.cuda.stream(self.stream):  # no-op for None
            copies = {name: tensorfile.snapshot(file) for name, file in slices.items()}
        self.copied = self.stream.record_event() if self.stream is not None else None
        # The thread holds `slices`: until a temporary tensor is copied, its memory must not be used for another.
        self.writing = self.writer.submit(self._write, slices, copies, self.copied)

    def wait_for_copy(self) -> None:
        """Have the GPU's current stream, not the CPU, wait until the last checkpoint's tensors are copied."""
        if self.copied is not None:
            torch.cuda.current_stream(self.world.device).wait_event(self.copied)
            self.copied = None

    def _create(self, slices: Slices, config: dict[str, Any], state: dict[str, Any]) -> None:
        with self._errors_named():
            self.directory.mkdir(parents=True, exist_ok=True)
            self._delete_partial()
            wanted = sum(
                math.prod(s.shape) * s.tensor.element_size() for file in slices.values() for s in file.values()
            )
            if (free := shutil.disk_usage(self.directory).free) < wanted * 1.01:
                raise OSError(errno.ENOSPC, f"found {size_text(free)} free, wanted {size_text(wanted)}")
            self.partial.mkdir()
            for name, file in slices.items():
                tensorfile.create(self.partial / name, file)
            self.state = {**state, "format_version": FORMAT_VERSION, **versions()}
            write_json(self.partial / "config.json", config)

    def _write(self, slices: Slices, copies: Slices, copied: torch.Event | None) -> None:
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
        for step in steps(self.directory)[: -self.config.keep]:
            if not (self.config.keep_every and step % self.config.keep_every == 0):
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
