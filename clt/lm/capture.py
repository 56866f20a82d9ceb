"""Capture the activations of a language model: the input and the output of every MLP block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clt.errors import UserError
from clt.lm.load import LanguageModel


class _Done(Exception):
    """Raised by the last hook to end the forward pass there."""


def capture(
    lm: LanguageModel, input_ids: Tensor, keep: np.ndarray | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """Run the model on (N, T) token ids up to its last hooked module; returns (N, T, 2, L, D) on its device.

    [..., 0, :, :] is x, the residual stream entering each MLP block (before its norm); [..., 1, :, :] is y, the MLP's
    output as it is added to the residual stream; both in `dtype`, the model's if None. With `keep` (N, T) bool only the
    n kept tokens are returned, (n, 2, L, D), without another copy. Raises UserError for a hooked module that the
    forward pass does not call.
    """
    input_ids = input_ids.to(lm.device)
    spans = [(0, input_ids.numel())] if keep is None else _spans(keep.reshape(-1))
    shape = (sum(end - start for start, end in spans), 2, len(lm.sites), lm.d_model)
    # Allocated outside inference mode, so that the caller may train on it.
    out = torch.empty(shape, dtype=dtype or lm.model.dtype, device=lm.device)  # (n, 2, L, D)
    missing = {(side, layer) for side in (0, 1) for layer in range(len(lm.sites))}

    def write(side: int, layer: int, value: Any) -> None:
        value, at = (value[0] if isinstance(value, tuple) else value).flatten(0, 1), 0  # (N * T, D)
        for start, end in spans:
            out[at : at + end - start, side, layer].copy_(value[start:end])
            at += end - start
        missing.discard((side, layer))
        if not missing:
            raise _Done

    try:
        with torch.inference_mode(), hooked(lm, partial(write, 0), partial(write, 1)):
            lm.model(input_ids=input_ids, use_cache=False)
    except _Done:
        return out if keep is not None else out.view(*input_ids.shape, *shape[1:])
    side, layer = min(missing)
    raise UserError(f"module {lm.sites[layer][1 + side]!r} never ran in the forward pass; choose another hook site")


def _spans(keep: np.ndarray) -> list[tuple[int, int]]:
    """The ranges [start, end) in which a mask (n,) is True: one per window, more if it has special tokens inside."""
    edges = np.flatnonzero(np.diff(keep, prepend=False, append=False)).tolist()
    return list(zip(edges[::2], edges[1::2]))


@contextmanager
def hooked(
    lm: LanguageModel, on_input: Callable[[int, Tensor], None], on_output: Callable[[int, Any], Any]
) -> Iterator[None]:
    """Call on_input(layer index, x (N, T, D)) and on_output(layer index, output) as the hooked modules run.

    What `on_output` returns, unless it is None, replaces the module's output.
    """

    def before(layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        on_input(layer, args[0] if args else kwargs["hidden_states"])

    def after(layer: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return on_output(layer, output)

    handles = []
    try:
        for layer, site in enumerate(lm.sites):
            reads, writes = lm.model.get_submodule(site.input_path), lm.model.get_submodule(site.output_path)
            handles.append(reads.register_forward_pre_hook(partial(before, layer), with_kwargs=True))
            handles.append(writes.register_forward_hook(partial(after, layer)))
        yield
    finally:
        for handle in handles:
            handle.remove()
