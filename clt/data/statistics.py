"""Mean and standard deviation of inputs and targets, per layer and dimension, in one streaming float64 pass."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from clt.data.index import STATISTICS_TENSORS, check_statistics, read_statistics, write_atomically

_CHUNK = 256  # rows converted to float64 at once: they fit a CPU's cache and fill a GPU


@dataclass(frozen=True)
class Statistics:
    """Mean and population standard deviation (ddof 0), (L, D) float64, over the rows of a store as they are stored."""

    input_mean: Tensor
    input_sd: Tensor
    target_mean: Tensor
    target_sd: Tensor
    rows: int

    def save(self, file: str | Path) -> None:
        """Write the statistics as safetensors."""
        tensors = {name: torch.as_tensor(getattr(self, name)).contiguous() for name in STATISTICS_TENSORS}
        write_atomically(Path(file), save(tensors))

    @classmethod
    def load(cls, file: str | Path, shape: tuple[int, int] | None = None) -> Statistics:
        """Read statistics of (L, D) = `shape`, or any. Raises UserError as `read_statistics`."""
        tensors = read_statistics(Path(file), "pt", shape)
        return cls(**{**tensors, "rows": int(tensors["rows"])})

    @classmethod
    def parse(cls, data: bytes, shape: tuple[int, int]) -> Statistics:
        """The statistics of (L, D) = `shape` in the bytes of such a file. Raises ValueError for anything else."""
        try:
            tensors = load(data)
        except (SafetensorError, KeyError, RuntimeError, TypeError) as error:  # the last three for unknown dtypes
            raise ValueError(f"no safetensors: {error}") from error
        check_statistics(tensors, shape)
        return cls(**{**tensors, "rows": int(tensors["rows"])})


@dataclass
class Moments:
    """Running row count, mean and sum of squared deviations, all of shape (2, L, D) float64."""

    rows: int
    mean: Tensor
    squares: Tensor

    @classmethod
    def zero(cls, n_layers: int, d_acts: int) -> Moments:
        """Moments of no rows."""
        return cls(0, *torch.zeros(2, 2, n_layers, d_acts, dtype=torch.float64))

    def add(self, rows: Tensor) -> None:
        """Add rows (n, 2, L, D) of any float dtype, on the moments' device."""
        if len(rows) == 0:
            return
        flat = rows.flatten(1)
        first = flat[0].double()  # values are shifted to near the mean, so that their squares lose no digits
        total, squares = torch.zeros_like(first), torch.zeros_like(first)
        buffer = first.new_empty(min(len(rows), _CHUNK), len(first))
        ones = first.new_ones(len(buffer))
        for chunk in flat.split(len(buffer)):
            wide, weights = buffer[: len(chunk)].copy_(chunk).sub_(first), ones[: len(chunk)]
            total += weights @ wide  # a matrix product: sums over rows are twice as slow
            squares += weights @ wide.square_()
        mean = total / len(rows)
        squares = (squares - len(rows) * mean.square()).clamp_(min=0).view_as(self.squares)
        # The pairwise update of Chan, Golub & LeVeque (1979).
        count = self.rows + len(rows)
        delta = (first + mean).view_as(self.mean) - self.mean
        self.mean = self.mean + delta * (len(rows) / count)
        self.squares = self.squares + squares + delta.square() * (self.rows * len(rows) / count)
        self.rows = count

    def statistics(self) -> Statistics:
        """The statistics of all rows added so far, on the CPU."""
        (input_mean, target_mean), (input_sd, target_sd) = self.mean.cpu(), (self.squares / self.rows).sqrt().cpu()
        return Statistics(input_mean, input_sd, target_mean, target_sd, self.rows)

    def to(self, device: torch.device | str) -> Moments:
        """A copy on `device`; rows added to one do not change the other."""
        return Moments(self.rows, self.mean.to(device, copy=True), self.squares.to(device, copy=True))
