"""How good a transcoder is in place of the language model's MLPs, all at once, on held-out text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from clt.config import Config
from clt.errors import UserError
from clt.lm.load import LanguageModel
from clt.lm.replacement import ablated_logits, replaced_logits
from clt.lm.text import Window, windows
from clt.model.transcoder import CrossLayerTranscoder
from clt.train.distributed import ONE_RANK, Axis

Replace = Callable[[LanguageModel, CrossLayerTranscoder, Tensor, Tensor], Tensor]
"""Logits (N, T, V) with every chosen MLP replaced: of a language model, a transcoder, token ids and `keep` (N, T)."""
_LOGITS = 1 << 26  # at once, or those of one window: several float32 tensors are made of them
_FLAT = 1e-6  # of a cross-entropy, which is made of float32 logits: a smaller effect of mean ablation is none


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
def evaluate_replacement(
    lm: LanguageModel,
    transcoder: CrossLayerTranscoder,
    mean_output: Tensor,
    windows: Sequence[Window],
    *,
    run: Replace | None = None,
    data: Axis = ONE_RANK,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """The language model with every chosen MLP replaced at once by the transcoder, attention live, on held-out text.

    Predictions count where position and next token are both kept: position 0, special tokens and padding are masked
    (and keep their original MLP outputs). Mean ablation writes mean_output (L, D) instead. `run` computes the replaced
    logits (default: forward hooks). The language model is moved to the transcoder's device, and back at the end.

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
