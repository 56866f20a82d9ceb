"""Capture the activations of a language model: the input and the output of every MLP block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clt.errors import UserError
from clt.lm.load import LanguageModel


class _Done(Exception):
    """Raised by the last hook to end the forward pass there."""


def capture(
    lm: LanguageModel, input_ids: Tensor, keep: np.ndarray | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """Run the model on (N, T) token ids up to its last hooked module; returns (N, T, 2, L, D) on its device.

    [..., 0, :, :] is x, the residual stream entering each MLP block (before its norm); [..., 1, :, :] is y, the MLP's
    output as it is added to the residual stream; both in `dtype`, the model's if None. There is no padding. With `keep`
    (N, T) bool only the n kept tokens are returned, (n, 2, L, D), without another copy. Raises UserError for a hooked
    module that the forward pass does not call.
    """
    model, layers = lm.model, range(len(lm.sites))
    input_ids = input_ids.to(model.device)
    spans = [(0, input_ids.numel())] if keep is None else _spans(keep.reshape(-1))
    shape = (sum(end - start for start, end in spans), 2, len(layers), lm.d_model)
    # Allocated outside inference mode, so that the caller may train on it.
    out = torch.empty(shape, dtype=dtype or model.dtype, device=model.device)  # (n, 2, L, D)
    missing = {(side, layer) for side in (0, 1) for layer in layers}

    def write(side: int, layer: int, value: Tensor) -> None:
        value, at = value.flatten(0, 1), 0  # (N * T, D)
        for start, end in spans:
            out[at : at + end - start, side, layer].copy_(value[start:end])
            at += end - start
        missing.discard((side, layer))
        if not missing:
            raise _Done

    def on_input(layer: int) -> Callable[..., None]:
        return lambda module, args, kwargs: write(0, layer, site_input(args, kwargs))

    def on_output(layer: int) -> Callable[..., None]:
        return lambda module, args, output: write(1, layer, output[0] if isinstance(output, tuple) else output)

    handles = []
    try:
        for layer, site in enumerate(lm.sites):
            reads, writes = model.get_submodule(site.input_path), model.get_submodule(site.output_path)
            handles.append(reads.register_forward_pre_hook(on_input(layer), with_kwargs=True))
            handles.append(writes.register_forward_hook(on_output(layer)))
        with torch.inference_mode():
            model(input_ids=input_ids, use_cache=False)
    except _Done:
        return out if keep is not None else out.view(*input_ids.shape, *shape[1:])
    finally:
        for handle in handles:
            handle.remove()
    side, layer = min(missing)
    site = lm.sites[layer][1 + side]
    raise UserError(f"module {site!r} never ran in the model's forward pass; choose another hook site")


def _spans(keep: np.ndarray) -> list[tuple[int, int]]:
    """The ranges [start, end) in which a mask (n,) is True: one per window, more if it has special tokens inside."""
    edges = np.flatnonzero(np.diff(keep, prepend=False, append=False)).tolist()
    return list(zip(edges[::2], edges[1::2]))


def site_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The residual stream among a module's arguments: the first positional one, or `hidden_states`."""
    return args[0] if args else kwargs["hidden_states"]
