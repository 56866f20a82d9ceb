"""Checkpoints: written whole or not at all, without pickle, and complete enough to go on from.

checkpoints/step_00001000/
    config.json, model.safetensors   the transcoder, as `CrossLayerTranscoder.from_pretrained` reads it
    optimizer.safetensors            Adam's moments by parameter name, the step each feature last fired, RNG state
    state.json                       step, config hash, W&B id, loss scale, versions
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import clt
from clt.data.index import sync
from clt.data.shards import is_full_disk
from clt.errors import UserError
from clt.model.transcoder import CrossLayerTranscoder

FORMAT_VERSION = 1


def save(
    directory: Path,
    transcoder: CrossLayerTranscoder,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Write `directory`/step_XXXXXXXX atomically, then delete all but the `keep` newest. `state` needs "step".

    Its tensors ("last_fired") and RNG go with the optimizer's, the rest into state.json. Raises UserError, leaving the
    earlier checkpoints as they are, when the disk has no room.
    """
    final = directory / f"step_{state['step']:08d}"
    partial = final.with_suffix(".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    tensors = optimizer_tensors(transcoder, optimizer) | {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    tensors |= {k: v for k, v in state.items() if isinstance(v, Tensor)}
    plain = {k: v for k, v in state.items() if not isinstance(v, Tensor)}
    plain |= {"format_version": FORMAT_VERSION, "clt_version": clt.__version__, "torch_version": torch.__version__}
    wanted = sum(t.nbytes for t in [*tensors.values(), *transcoder.state_dict().values()])
    directory.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(directory).free) < wanted * 1.01:
        raise UserError(_full(directory, f"found {free / 1e9:.3f} GB free, wanted {wanted / 1e9:.3f} GB"))
    try:
        transcoder.save_pretrained(partial)
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, partial / "optimizer.safetensors")
        (partial / "state.json").write_text(json.dumps(plain, indent=2) + "\n")
        for file in [*partial.iterdir(), partial]:
            sync(file)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        sync(directory)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and not is_full_disk(error):
            raise
        raise UserError(_full(directory, str(error))) from error
    for old in steps(directory)[:-keep]:
        shutil.rmtree(directory / f"step_{old:08d}")
    return final


def _full(directory: Path, cause: str) -> str:
    kept = f"step {steps(directory)[-1]} is kept" if steps(directory) else "there is no earlier one"
    return f"no checkpoint could be written to {directory}: {cause}; {kept}. Free disk space and run again to go on."


def steps(directory: Path) -> list[int]:
    """The steps that have a whole checkpoint, ascending."""
    names = (re.fullmatch(r"step_(\d{8})", path.name) for path in directory.glob("step_*"))
    return sorted(int(match[1]) for match in names if match)


def optimizer_tensors(transcoder: CrossLayerTranscoder, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Optimizer state by name: `W_dec.0.exp_avg`, .."""
    return {
        f"{name}.{key}": value
        for name, parameter in transcoder.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


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
        with safe_open(checkpoint / "optimizer.safetensors", "pt") as file:
            return file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise UserError(f"checkpoint {checkpoint} is damaged ({error})") from error


def load_transcoder(checkpoint: Path) -> CrossLayerTranscoder:
    """The trained transcoder alone. Raises UserError when its files are missing or damaged."""
    try:
        return CrossLayerTranscoder.from_pretrained(checkpoint)
    except ValueError as error:
        raise UserError(str(error)) from error


def restore(checkpoint: Path, transcoder: CrossLayerTranscoder, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Load weights, optimizer and RNG in place; returns the state (its tensors included) that `save` was given."""
    state = read_state(checkpoint)
    saved = load_transcoder(checkpoint)
    if saved.config != transcoder.config:
        raise UserError(f"checkpoint {checkpoint} is of {saved.config}, this run of {transcoder.config}")
    transcoder.load_state_dict(saved.state_dict())
    try:
        # Copies: what is loaded is a map of the file, and a mapped file cannot be deleted from a network file system.
        tensors = {name: tensor.clone() for name, tensor in load_file(checkpoint / "optimizer.safetensors").items()}
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"checkpoint {checkpoint} is damaged ({error}); delete it to go on from the one before"
        ) from error
    torch.set_rng_state(tensors.pop("rng.cpu"))
    if torch.cuda.is_available() and "rng.cuda" in tensors:
        torch.cuda.set_rng_state(tensors.pop("rng.cuda"))
    for name, parameter in transcoder.named_parameters():
        keys = [key for key in tensors if key.rpartition(".")[0] == name]
        if parameter.requires_grad and not keys:
            raise UserError(f"checkpoint {checkpoint} has no optimizer state of {name}; delete it to go on without it")
        # Adam's own step counter stays where the optimizer keeps it; everything else lives beside the parameter.
        optimizer.state[parameter] = {key.rpartition(".")[2]: tensors.pop(key).to(parameter.device) for key in keys}
    return state | tensors
