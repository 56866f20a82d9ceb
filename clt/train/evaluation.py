"""How good a transcoder is: on held-out activations, and (replacement.py) in place of the language model's MLPs.

`evaluate_activations` and `evaluate_replacement` work on this rank's share of the rows and sum over `data`, the ranks
that hold the same shard of the transcoder: each returns the global figures. They call `progress` after each batch.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from clt.config import Config
from clt.data.check import check_files, check_model
from clt.data.index import STATISTICS
from clt.data.statistics import Statistics
from clt.data.store import DiscBuffer
from clt.errors import UserError
from clt.files import or_null
from clt.lm.fingerprint import pinned
from clt.lm.load import LanguageModel, load_language_model
from clt.model.transcoder import CrossLayerTranscoder
from clt.train import checkpoint
from clt.train.distributed import ONE_RANK, Axis, World, accumulate_in_float32
from clt.train.optim import autocast_dtype
from clt.train.replacement import Replace, evaluate_replacement, heldout_windows
from clt.train.run import open_store

_ROUNDING = 1e-12  # of a layer's sum of squares: SST is a difference in float64, which leaves no less than that


class Evaluation(NamedTuple):
    """Quality as numbers for logs and summary.json, and as the tensors of `evaluate_activations` for plots.

    A number without a value is None; in a tensor it is nan.
    """

    numbers: dict[str, Any]
    tensors: dict[str, Tensor]

    @classmethod
    def of(cls, tensors: dict[str, Tensor], more: dict[str, Any]) -> Evaluation:
        """Those tensors, all but `density` as numbers too, and `more` numbers."""
        numbers = {
            key: [or_null(value) for value in tensor.tolist()] if tensor.dim() else or_null(tensor.item())
            for key, tensor in tensors.items()
            if key != "density"
        }
        return cls(numbers | more, tensors)


class HeldoutActivations(Protocol):
    """Held-out activations: slices of rows are (n, 2, L, D), inputs and targets."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice, /) -> Tensor: ...


class Evaluator:
    """Evaluates transcoders on the held-out rows and, unless `eval.replacement_tokens` is 0, on held-out text.

    Raises UserError when the language model is not that of the rows, or when there is too little held-out text.
    """

    def __init__(self, config: Config, heldout: DiscBuffer, mean_output: Tensor, world: World, dtype: torch.dtype):
        """mean_output: (L, D), what mean ablation writes; dtype: of the matrix products."""
        self.config, self.heldout, self.world, self.dtype = config, heldout, world, dtype
        self.mean_output = mean_output.to(world.device)
        self.lm: LanguageModel | None = None
        if config.eval.replacement_tokens:
            self.lm = load_language_model(config.lm)  # on the CPU: evaluation moves it to the device and back
            check_model(heldout.index, self.lm)
            self.windows = heldout_windows(pinned(config, "heldout", heldout.index.fingerprints or {}), self.lm)

    def __call__(
        self,
        transcoder: CrossLayerTranscoder,
        last_fired: Tensor,
        step: int,
        progress: Callable[[], None] = lambda: None,
        run: Replace | None = None,
    ) -> Evaluation:
        """Evaluate the transcoder after `step` steps; all ranks must call it.

        last_fired: (L, F), as for `dead_features`; run: as for `evaluate_replacement`.
        """
        data, feature, config = self.world.data, self.world.feature, self.config
        share: dict[str, Any] = {"data": data, "progress": progress}
        tensors = evaluate_activations(transcoder, self.heldout, autocast=self.dtype, **share)
        numbers, _ = Evaluation.of(tensors, {})
        if (k := config.clt.k) is not None:
            wanted = k * (transcoder.n_layers if config.clt.activation == "topk" else 1)
            numbers["l0_over_k"] = numbers["l0_total"] / wanted
        if self.lm is not None:
            found = evaluate_replacement(self.lm, transcoder, self.mean_output, self.windows, run=run, **share)
            numbers |= {key: or_null(value) for key, value in found.items()}
        last_fired = data.max(last_fired.clone())
        dead = dead_features(last_fired, step, config.train.batch_tokens, config.eval.dead_window)
        numbers["dead_fraction"] = feature.sum(dead.double().mean()).item() / feature.size
        return Evaluation(numbers, tensors)


class SavedRun:
    """A checkpoint of a run, and what evaluates it. Raises UserError when something is missing or does not fit."""

    def __init__(self, config: Config, directory: Path, step: int) -> None:
        self.config, self.directory, self.step = config, directory, step
        accumulate_in_float32()  # as in training
        world = World(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        path = directory / "checkpoints" / f"step_{step:08d}"
        self.transcoder = checkpoint.load_transcoder(path).to(world.device)
        heldout = open_store(config, "heldout")
        found = (heldout.index.n_layers, heldout.index.d_acts)
        if found != (wanted := (self.transcoder.n_layers, self.transcoder.d_acts)):
            raise UserError(
                f"{heldout.path} holds activations of (L, D) = {found}, the checkpoint was trained on {wanted}; "
                "extract the stores from the run's language model again"
            )
        if config.eval.replacement_tokens:
            check_files(heldout.index, config)
        # Of the training set only its mean outputs are wanted; its shards may be gone.
        mean_output = Statistics.load(Path(config.data.store) / "train" / STATISTICS).target_mean
        dtype = autocast_dtype(config.train.precision, world.device)
        self.evaluator = Evaluator(config, heldout, mean_output, world, dtype)
        self.last_fired = checkpoint.read_tensor(path, "last_fired").to(world.device)

    def evaluate(self, transcoder: CrossLayerTranscoder, run: Replace | None = None) -> Evaluation:
        """The figures of a transcoder of this run; run: as for `evaluate_replacement`."""
        return self.evaluator(transcoder, self.last_fired, self.step, run=run)


@torch.no_grad()
def evaluate_activations(
    transcoder: CrossLayerTranscoder,
    buffer: HeldoutActivations,
    *,
    autocast: torch.dtype = torch.float32,
    data: Axis = ONE_RANK,
    progress: Callable[[], None] = lambda: None,
    batch: int = 1024,
) -> dict[str, Tensor]:
    """Reconstruction and sparsity on the rows of a held-out store, `batch` at a time.

    With y the targets and yhat the reconstruction, both in the model's units:

        SSE_l = sum over rows and dims of (y - yhat)^2      SST_l = the same of (y - mean of y over these rows)^2
        nmse_per_layer = SSE_l / SST_l                      fve_per_layer = 1 - nmse_per_layer
        nmse = mean over layers of nmse_per_layer           fve = 1 - nmse: every layer weighs the same

    A layer whose targets never vary (SST 0) has neither: both are nan, and the mean is that of the other layers.

    Returns float64 tensors: fve, nmse, l0_total (); fve_per_layer, nmse_per_layer, l0_per_layer (L,); density (L, F),
    the share of rows on which each feature fires. Raises UserError when a value is not finite.
    """
    L, D, device = transcoder.n_layers, transcoder.d_acts, transcoder.b_dec.device
    sse, square = (torch.zeros(L, dtype=torch.float64, device=device) for _ in range(2))
    total = torch.zeros(L, D, dtype=torch.float64, device=device)
    fired = torch.zeros(L, transcoder.config["d_features"], dtype=torch.float64, device=device)
    for start in range(data.rank * batch, len(buffer), data.size * batch):
        rows = buffer[start : start + batch].to(device)
        with torch.autocast(device.type, autocast, enabled=autocast != torch.float32):
            reconstruction = _reconstruct(transcoder, rows[:, 0], fired[:, transcoder.features])
        # Sums of squares about the training mean, which is near this one: nothing cancels in SST.
        target = rows[:, 1].double() - transcoder.normalization.target_mean
        sse += (rows[:, 1].double() - reconstruction).square().sum((0, 2))
        square += target.square().sum((0, 2))
        total += target.sum(0)
        progress()
    sums = data.sum(torch.cat([sse, square, total.flatten(), fired.flatten()]))
    if not sums.isfinite().all():
        where = ("", "")
        if isinstance(buffer, DiscBuffer):
            where = (f" in {buffer.path}", f"look for bad rows with `clt inspect --verify {buffer.path}`, or ")
        raise UserError(
            f"an activation{where[0]}, or its reconstruction, is nan or inf; {where[1]}use train.precision=fp32"
        )
    sse, square, total, fired = sums.split([L, L, L * D, fired.numel()])
    fired = transcoder.sum_shards(fired.view(L, -1).contiguous())
    rows = len(buffer)
    sst = square - total.view(L, D).square().sum(1) / rows
    density = fired / rows
    varies = sst > _ROUNDING * square
    nmse_per_layer = (sse / sst).where(varies, torch.nan)
    nmse = nmse_per_layer[varies].mean()
    return {
        "fve": 1 - nmse,
        "nmse": nmse,
        "l0_total": density.sum(),
        "fve_per_layer": 1 - nmse_per_layer,
        "nmse_per_layer": nmse_per_layer,
        "l0_per_layer": density.sum(1),
        "density": density,
    }


def _reconstruct(transcoder: CrossLayerTranscoder, x: Tensor, fired: Tensor) -> Tensor:
    """x (B, L, D) -> yhat (B, L, D), both in model units; adds to `fired` (L, F) how often each feature fires.

    Layer by layer: the features of all layers of a wide transcoder would take gigabytes.
    """
    y = torch.zeros(x.shape, dtype=transcoder.b_dec.dtype, device=x.device)
    for s in range(transcoder.n_layers):
        features = transcoder.encode_layer(x[:, s], s)
        fired[s] += (features > 0).sum(0)
        transcoder.write_layer(features, y, s)
    return transcoder.finish(y, x)


def dead_features(last_fired: Tensor, step: int, batch_tokens: int, window: int) -> Tensor:
    """Which features (L, F) fired on none of the last `window` training tokens (rounded up to whole steps).

    last_fired holds the number of steps done when each feature last fired, 0 for never. A run shorter than the window
    counts since its start.
    """
    return last_fired <= max(step - -(-window // batch_tokens), 0)
