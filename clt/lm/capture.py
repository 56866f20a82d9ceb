"""Activations of a language model: what goes into every MLP block and what comes out of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clt.errors import UserError
from clt.lm.load import LanguageModel


class _Done(Exception):
    """Raised by the hook that fires last: the rest of the model need not run."""


class Capture:
    """Reads (x, y) of every chosen layer in one forward pass that ends with the last hooked module."""

    def __init__(self, lm: LanguageModel) -> None:
        self.lm = lm
        self._modules = [
            (lm.model.get_submodule(site.input_path), lm.model.get_submodule(site.output_path)) for site in lm.sites
        ]

    def __call__(self, input_ids: Tensor, keep: np.ndarray | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Run the model on (N, T) token ids; returns (N, T, 2, L, D) in `dtype` (the model's if None), on its device.

        [..., 0, :, :] is x, the residual stream entering each MLP block (before its norm); [..., 1, :, :] is y, the
        MLP's output as it is added to the residual stream. No padding: every row is a whole window of text. With `keep`
        (N, T) bool only those n rows, (n, 2, L, D): each value is written once, to where it stays.
        """
        model = self.lm.model
        input_ids = input_ids.to(model.device)
        runs = [(0, input_ids.numel())] if keep is None else _runs(keep.reshape(-1))
        shape = (sum(end - start for start, end in runs), 2, len(self._modules), self.lm.d_model)
        # Made outside inference mode, so that the caller may train on it.
        out = torch.empty(shape, dtype=dtype or model.dtype, device=model.device)  # (n, 2, L, D)
        waiting = {(kind, index) for kind in (0, 1) for index in range(len(self._modules))}
        handles = []
        try:
            for index, (reads, writes) in enumerate(self._modules):
                store_x, store_y = (_writer(out, kind, index, runs, waiting) for kind in (0, 1))
                handles.append(reads.register_forward_pre_hook(_on_input(store_x), with_kwargs=True))
                handles.append(writes.register_forward_hook(_on_output(store_y)))
            with torch.inference_mode():
                model(input_ids=input_ids, use_cache=False)
        except _Done:
            return out if keep is not None else out.view(*input_ids.shape, *shape[1:])
        finally:
            for handle in handles:
                handle.remove()
        kind, index = min(waiting)
        site = self.lm.sites[index]
        raise UserError(f"module {site[1 + kind]!r} never ran in the model's forward pass; choose another hook site")


def _runs(keep: np.ndarray) -> list[tuple[int, int]]:
    """The stretches [start, end) of a mask (n,) that are True. Few: a window is one, but for special tokens inside."""
    edges = np.flatnonzero(np.diff(keep, prepend=False, append=False)).tolist()
    return list(zip(edges[::2], edges[1::2]))


def _writer(
    out: Tensor, kind: int, index: int, runs: list[tuple[int, int]], waiting: set[tuple[int, int]]
) -> Callable[[Tensor], None]:
    def write(value: Tensor) -> None:
        value, at = value.flatten(0, 1), 0  # (N * T, D)
        for start, end in runs:
            out[at : at + end - start, kind, index].copy_(value[start:end])
            at += end - start
        waiting.discard((kind, index))
        if not waiting:
            raise _Done

    return write


def _on_input(write: Callable[[Tensor], None]) -> Callable[..., None]:
    def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        write(site_input(args, kwargs))

    return hook


def _on_output(write: Callable[[Tensor], None]) -> Callable[..., None]:
    def hook(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        write(output[0] if isinstance(output, tuple) else output)

    return hook


def site_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The residual stream among a module's arguments: the first positional one, or `hidden_states`."""
    return args[0] if args else kwargs["hidden_states"]
