"""How good a transcoder is: on held-out activations, and in place of the language model's MLPs on held-out text.

The functions work on this rank's share of the rows and sum over `data`, the ranks that hold the same shard of the
transcoder, so every rank returns the global figures. They call `progress` after each batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from clt.config import Config
from clt.data.check import check_model
from clt.data.store import DiscBuffer
from clt.errors import UserError
from clt.files import or_null
from clt.lm.fingerprint import pinned
from clt.lm.load import load_language_model
from clt.lm.replacement import ablated_logits, replaced_logits
from clt.lm.text import windows
from clt.model.transcoder import CrossLayerTranscoder
from clt.train.distributed import ALONE, Axis, World

if TYPE_CHECKING:
    from clt.lm.load import LanguageModel
    from clt.lm.text import Window

Replace = Callable[["LanguageModel", CrossLayerTranscoder, Tensor, Tensor], Tensor]
"""Logits (N, T, V) with every chosen MLP replaced: of a language model, a transcoder, token ids and `keep` (N, T)."""
_LOGITS = 1 << 26  # at once, or those of one window: several float32 tensors are made of them
_ROUNDING = 1e-12  # of a layer's sum of squares: SST is a difference in float64, which leaves no less than that
_FLAT = 1e-6  # of a cross-entropy, which is made of float32 logits: a smaller effect of mean ablation is none


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


class Rows(Protocol):
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


def heldout_windows(config: Config, lm: LanguageModel) -> list[Window]:
    """The first windows of held-out text, `eval.replacement_tokens` in all (rounded up to whole windows).

    Raises UserError as `windows`, and when there is no next token to predict.
    """
    count = -(-config.eval.replacement_tokens // config.lm.context)
    found = list(islice(windows(config.text, "heldout", lm, config.lm.context), count))
    if not any((window.keep[:-1] & window.keep[1:]).any() for window in found):
        raise UserError(
            f"no window of lm.context={config.lm.context} held-out tokens has two neighbours that are not special "
            "tokens, so there is nothing to predict: raise lm.context, or set eval.replacement_tokens=0"
        )
    return found


@torch.no_grad()
def evaluate_activations(
    transcoder: CrossLayerTranscoder,
    buffer: Rows,
    *,
    autocast: torch.dtype = torch.float32,
    data: Axis = ALONE,
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


@torch.no_grad()
def evaluate_replacement(
    lm: LanguageModel,
    transcoder: CrossLayerTranscoder,
    mean_output: Tensor,
    windows: Sequence[Window],
    *,
    run: Replace | None = None,
    data: Axis = ALONE,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """The language model with every chosen MLP replaced at once by the transcoder, attention live, on held-out text.

    Predictions count where position and next token are both kept: position 0, special tokens and padding are masked
    (and keep their original MLP outputs). Mean ablation writes mean_output (L, D) instead. `run` computes the replaced
    logits (default: forward hooks). The language model is on the transcoder's device meanwhile.

    top1_agreement: share of predictions whose most likely token is the original's; kl: KL(original || replaced) in
    nats; ce_*: next-token cross-entropies in nats; ce_recovered = (ablated - replaced) / (ablated - original).
    What has no value is nan or inf: KL where a token that the original may predict has a replaced logit of -inf,
    cross-entropies where the next token has one, everything where logits are nan, and ce_recovered where mean ablation
    changes nothing.
    """
    run = run or replaced_logits
    sums = torch.zeros(6, dtype=torch.float64, device=transcoder.b_dec.device)
    vocabulary = lm.model.config.get_text_config().vocab_size
    batch = max(1, min(8, _LOGITS // (len(windows[0].tokens) * vocabulary)))
    with _moved(lm, transcoder.b_dec.device):
        for start in range(data.rank * batch, len(windows), data.size * batch):
            sums += _replacement_sums(lm, transcoder, mean_output, windows[start : start + batch], run)
            progress()
    n, *values = data.sum(sums).tolist()
    top1, original, replaced, ablated, kl = (value / n for value in values)
    gap = ablated - original if abs(ablated - original) > _FLAT * original else math.nan
    return {
        "top1_agreement": math.nan if math.isnan(kl) else top1,  # the largest of logits that are nan means nothing
        "kl": kl,
        "ce_original": original,
        "ce_replaced": replaced,
        "ce_mean_ablated": ablated,
        "ce_recovered": (ablated - replaced) / gap,
        "replacement_tokens": n,
    }


@contextmanager
def _moved(lm: LanguageModel, device: torch.device) -> Iterator[None]:
    """The language model on `device` for a while: between evaluations, training needs that memory."""
    home = lm.device
    lm.model.to(device)  # type: ignore[arg-type]
    try:
        yield
    finally:
        lm.model.to(home)  # type: ignore[arg-type]


def _replacement_sums(
    lm: LanguageModel, transcoder: CrossLayerTranscoder, mean_output: Tensor, windows: Sequence[Window], run: Replace
) -> Tensor:
    """Sums over the predictions of some windows (6,): count, agreements, three cross-entropies, KL divergence."""
    tokens = torch.from_numpy(np.stack([w.tokens for w in windows])).long().to(lm.device)
    keep = torch.from_numpy(np.stack([w.keep for w in windows])).to(lm.device)
    counted = (keep[:, :-1] & keep[:, 1:]).flatten()
    targets = tokens[:, 1:].flatten()[counted]

    def log_probabilities(logits: Tensor) -> Tensor:
        return logits[:, :-1].flatten(0, 1)[counted].float().log_softmax(-1)  # (counted, V)

    def cross_entropy(log_p: Tensor) -> Tensor:
        return -log_p.gather(1, targets.unsqueeze(1)).double().sum()

    ablated = cross_entropy(log_probabilities(ablated_logits(lm, mean_output, tokens, keep)))
    original = log_probabilities(lm.model(input_ids=tokens, use_cache=False).logits)
    replaced = log_probabilities(run(lm, transcoder, tokens, keep))
    agreeing = (original.argmax(1) == replaced.argmax(1)).sum().double()
    entropies = (cross_entropy(original), cross_entropy(replaced), ablated)
    difference = replaced.neg_().add_(original)  # in place: these are the largest tensors of an evaluation
    # 0 * log(0 / q) counts 0, also where q is 0: a masked vocabulary has logits of -inf.
    probabilities = original.exp_()
    divergence = (probabilities * difference).masked_fill_(probabilities == 0, 0).sum(-1).double().sum()
    return torch.stack([counted.sum().double(), agreeing, *entropies, divergence])


def dead_features(last_fired: Tensor, step: int, batch_tokens: int, window: int) -> Tensor:
    """Which features (L, F) fired on none of the last `window` training tokens (rounded up to whole steps).

    last_fired holds the number of steps done when each feature last fired, 0 for never. A run shorter than the window
    counts since its start.
    """
    return last_fired <= max(step - -(-window // batch_tokens), 0)
