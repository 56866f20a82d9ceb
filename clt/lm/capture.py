"""Capture the activations of a language model: the input and the output of every MLP block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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

    [..., 0, :, :] is x, what the input site of each MLP block holds; [..., 1, :, :] is y, the MLP's output as it is
    added to the residual stream; both in `dtype`, the model's if None. With `keep` (N, T) bool only the
    n kept tokens are returned, (n, 2, L, D), without another copy. Raises UserError for a hooked module that the
    forward pass does not call, and as `hooked` does.
    """
    input_ids = input_ids.to(lm.device)
    spans = [(0, input_ids.numel())] if keep is None else _spans(keep.reshape(-1))
    shape = (sum(end - start for start, end in spans), 2, len(lm.sites), lm.d_model)
    # Allocated outside inference mode, so that the caller may train on it.
    out = torch.empty(shape, dtype=dtype or lm.model.dtype, device=lm.device)  # (n, 2, L, D)
    missing = {(side, layer) for side in (0, 1) for layer in range(len(lm.sites))}

    def write(side: int, layer: int, value: Tensor) -> None:
        value, at = value.flatten(0, 1), 0  # (N * T, D)
        for start, end in spans:
            out[at : at + end - start, side, layer].copy_(value[start:end])
            at += end - start
        missing.discard((side, layer))
        if not missing:
            raise _Done

    try:
        with torch.inference_mode(), hooked(lm, input_ids.shape, partial(write, 0), partial(write, 1)):
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
    lm: LanguageModel,
    shape: Sequence[int],
    on_input: Callable[[int, Tensor], None],
    on_output: Callable[[int, Tensor], Tensor | None],
) -> Iterator[None]:
    """Call on_input(layer index, x (N, T, D)) and on_output(layer index, y (N, T, D)) as the hooked modules run.

    What `on_output` returns, unless it is None, replaces the module's output. shape: (N, T) of the ids. Raises
    UserError, in the forward pass, as `residual` does and for a layer whose output comes before its input.
    """
    entered: set[int] = set()

    def before(layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        enter(layer, module, args, args[0] if args else kwargs.get("hidden_states"))

    def enter(layer: int, module: nn.Module, args: tuple[Any, ...], x: Any) -> None:
        on_input(layer, residual(lm, shape, lm.sites[layer].input_path, x))
        entered.add(layer)

    def after(layer: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        site = lm.sites[layer]
        if layer not in entered:
            raise UserError(
                f"hook site {site.output_path!r} runs before {site.input_path!r}, so that is not what this MLP reads; "
                "choose other modules with lm.input_site and lm.output_site"
            )
        replaced = on_output(layer, residual(lm, shape, site.output_path, output))
        return None if replaced is None else put_back(output, replaced)

    handles = []
    try:
        for layer, site in enumerate(lm.sites):
            reads, writes = lm.model.get_submodule(site.input_module), lm.model.get_submodule(site.output_path)
            if site.reads_output:
                handles.append(reads.register_forward_hook(partial(enter, layer)))
            else:
                handles.append(reads.register_forward_pre_hook(partial(before, layer), with_kwargs=True))
            handles.append(writes.register_forward_hook(partial(after, layer)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def residual(lm: LanguageModel, shape: Sequence[int], path: str, value: Any) -> Tensor:
    """What the module `path` reads or returns for (N, T) ids, as (N, T, D); of a tuple the first.

    OPT's layers flatten the tokens: (N * T, D) is un-flattened. Raises UserError for another shape and for a dtype that
    is not floating point.
    """
    value = value[0] if isinstance(value, tuple) else value
    wanted = (*shape, lm.d_model)
    if isinstance(value, Tensor) and value.is_floating_point():
        if value.shape == wanted:
            return value
        if value.shape == (shape[0] * shape[1], lm.d_model):
            return value.reshape(wanted)
    found = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
    raise UserError(
        f"hook site {path!r}: found {found}, wanted {wanted} (windows, tokens, width) in floating point; choose "
        "another module with lm.input_site or lm.output_site"
    )


def put_back(output: Any, replaced: Tensor) -> Any:
    """A module's output with its tensor replaced by (N, T, D), in the shape it had; the rest of a tuple is kept."""
    if isinstance(output, tuple):
        return (replaced.reshape(output[0].shape), *output[1:])
    return replaced.reshape(output.shape)
