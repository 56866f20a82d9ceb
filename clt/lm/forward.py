"""The forward loop: run the language model on text, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from clt.config import Config
from clt.errors import UserError
from clt.lm.capture import capture
from clt.lm.documents import Part
from clt.lm.load import LanguageModel
from clt.lm.text import Window, windows


@dataclass(frozen=True)
class Rows:
    """Activations of n tokens, and the place of each token in the text."""

    activations: Tensor  # (n, 2, L, D): the inputs of the MLPs are [:, 0], their outputs [:, 1]
    token: np.ndarray  # (n,) int32
    position: np.ndarray  # (n,) int32 place in the window
    document: np.ndarray  # (n,) int64 number within the part of the text

    def __len__(self) -> int:
        return len(self.token)

    def __getitem__(self, rows: slice) -> Rows:
        return Rows(self.activations[rows], self.token[rows], self.position[rows], self.document[rows])

    def copy_into(self, views: list[memoryview]) -> None:
        """Copy the bytes of each row's activations (CPU) into its own of n views."""
        data = self.activations.contiguous().view(len(self), -1).view(torch.uint8).numpy()
        for view, row in zip(views, data, strict=True):
            view[:] = row.data


def forward_text(config: Config, part: Part, lm: LanguageModel, skip: int = 0) -> Iterator[tuple[list[Window], Rows]]:
    """Run the model on one part of the text from window `skip` on, `lm.batch_windows` windows a pass.

    Yields the windows of each pass and their kept rows, on the model's device in `data.dtype`; values that overflow it
    are for `check_finite` to find. Raises UserError as `windows` does.
    """
    stream = windows(config.text, part, lm, config.lm.context, skip)
    while batch := list(islice(stream, config.lm.batch_windows)):
        tokens, documents, keep = (np.stack(arrays) for arrays in zip(*batch))  # (N, T)
        positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
        activations = capture(lm, torch.from_numpy(tokens).long(), keep, getattr(torch, config.data.dtype))
        yield batch, Rows(activations, tokens[keep], positions[keep], documents[keep])


def check_finite(lm: LanguageModel, batch: list[Window], rows: Rows) -> None:
    """Raise UserError for values of a pass that are not finite; runs the model again to tell layer and value."""
    if rows.activations.isfinite().all():
        return
    tokens, documents, keep = (np.stack(arrays) for arrays in zip(*batch))
    exact, dtype = capture(lm, torch.from_numpy(tokens).long(), keep), rows.activations.dtype
    # By layer, then input before output, as the model computes them: the first one causes the later ones.
    layer, side, row, dim = (~exact.to(dtype).isfinite()).transpose(0, 2).nonzero()[0].tolist()
    value, document = exact[row, side, layer, dim].item(), documents[keep][row]
    where = f"{('input', 'target')[side]} activation {value:g} at layer {lm.layers[layer]} (document {document})"
    if np.isfinite(value):
        raise UserError(
            f"{where} overflows {str(dtype).removeprefix('torch.')}, which ends at {torch.finfo(dtype).max:g}: "
            "set data.dtype=bfloat16 or data.dtype=float32"
        )
    raise UserError(f"{where} is not finite in the language model itself: set lm.dtype=bfloat16 or lm.dtype=float32")
