"""What checkpoints hold, and reading them: without pickle, and the same from every layout of the ranks.

checkpoints/step_00001000/
    config.json, model.safetensors   the transcoder, as `CrossLayerTranscoder.from_pretrained` reads it
    optimizer.safetensors            Adam's moments by parameter name, counters, loss scale, RNG state
    state.json                       step, hashes of config and data, W&B id, versions, checksums of the two above

Every rank writes its share into the same two files. Their bytes are those that one process would write, so a
checkpoint of any layout loads into any other.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
from safetensors import safe_open
from torch import Tensor

import clt
from clt.data.shards import checksum
from clt.errors import UserError, mismatches
from clt.files import read_object, reading, steps  # noqa: F401 - of those that a directory holds
from clt.model.transcoder import CrossLayerTranscoder, feature_dim
from clt.ranges import NOT_NEGATIVE
from clt.train import tensorfile
from clt.train.tensorfile import TensorSlice

FORMAT_VERSION = 2
MODEL, TRAINING = "model.safetensors", "optimizer.safetensors"
STATE_FIELDS = {
    "step": Annotated[int, NOT_NEGATIVE],
    "busy_seconds": Annotated[float, NOT_NEGATIVE],
    "wandb_id": str | None,
    "rows_by_segment": dict[str, int] | None,  # of a run that read from a server
    "checksums": dict[str, str] | None,  # by file name; older checkpoints have none
}

Slices = dict[str, dict[str, TensorSlice]]
"""What this process has of each file."""


def slices(
    transcoder: CrossLayerTranscoder,
    optimizer: torch.optim.Optimizer,
    tensors: dict[str, Tensor],
    replica: tuple[int, int] = (0, 1),
) -> Slices:
    """The tensors of a checkpoint as views of this process's tensors; replica i of n writes the i-th nth of its shard.

    tensors: training state beside the optimizer's; "last_fired" (L, F) is sharded like the features.
    """
    i, n = replica
    F, first = transcoder.d_features, transcoder.features.start
    a, b = F * i // n, F * (i + 1) // n
    whole = transcoder.config["d_features"]

    def cut(tensor: Tensor, dim: int | None) -> TensorSlice:
        if dim is None:
            return TensorSlice(tensor, tuple(tensor.shape), writes=first == 0 and i == 0)
        shape = tuple(whole if d == dim else size for d, size in enumerate(tensor.shape))
        return TensorSlice(tensor.narrow(dim, a, b - a), shape, dim, first + a)

    model = {name: cut(tensor, feature_dim(name)) for name, tensor in transcoder.state_dict().items()}
    training = {
        f"{name}.{key}": cut(value, feature_dim(name) if value.dim() else None)
        for name, parameter in transcoder.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    for name, tensor in (rng_states() | tensors).items():
        training[name] = cut(tensor, 1 if name == "last_fired" else None)
    return {MODEL: model, TRAINING: training}


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
    for name, file in slices(transcoder, optimizer, tensors | rng).items():
        tensorfile.read(checkpoint / name, file)
    torch.set_rng_state(rng["rng.cpu"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(rng["rng.cuda"])
    return state
