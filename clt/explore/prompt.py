"""A prompt of the user: which features fire on its tokens, and what the model says next with its MLPs replaced."""

from __future__ import annotations

import threading
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clt.config import Config
from clt.data.check import changes
from clt.errors import UserError
from clt.explore.features import check
from clt.explore.table import Table, rounded
from clt.lm.fingerprint import fingerprints
from clt.lm.load import LanguageModel, bos_token, check_ids, load_language_model, special_ids
from clt.lm.replacement import Replaced, run_replaced
from clt.model.transcoder import CrossLayerTranscoder
from clt.train import checkpoint

MOST_TOKENS, MOST_CHANGES = 256, 64
_SHOWN, _NEXT = 16, 8  # features at a token, those that write most; tokens that may be next, of each model

Changes = dict[tuple[int, int], float]
"""(layer, feature) -> what its activations are multiplied by, at all tokens; 0 turns it off."""


class Prompts:
    """Answers prompts about a run, one at a time. Both models are loaded for the first one."""

    def __init__(self, config: Config, run: Path, table: Table) -> None:
        self.config, self.run, self.table = config, run, table
        self._lock = threading.Lock()  # the models are loaded once; the hooks of two passes would mix

    @torch.inference_mode()
    def answer(self, text: str, changes: Changes) -> dict[str, Any]:
        """Tokens, the features that fire on them, and the next tokens' probabilities, as docs/browse.md says.

        Raises UserError for a prompt without tokens or with too many, for a feature that is not there, and as
        `load_language_model`.
        """
        with self._lock:
            lm, transcoder = self._models
            for layer, feature in changes:
                if not (0 <= layer < transcoder.n_layers and 0 <= feature < transcoder.d_features):
                    raise UserError(f"there is no feature {feature} of layer {layer}; choose another one to change")
            ids, keep = tokenised(lm, text, min(MOST_TOKENS, self.config.lm.context))
            models = [lm.model(input_ids=ids.to(lm.device), use_cache=False).logits]
            runs = [run_replaced(lm, transcoder, ids, keep)]
            if changes:
                factors = factors_of(changes, transcoder)
                runs.append(run_replaced(lm, transcoder, ids, keep, lambda layer, a: a * factors[layer]))
            models += [run.logits for run in runs]
            return {
                "tokens": self.table.texts(ids[0].numpy()),
                "keep": keep[0].tolist(),
                "features": self._features(transcoder, keep, runs),
                **self._next(torch.cat(models)),
            }

    @cached_property
    def _models(self) -> tuple[LanguageModel, CrossLayerTranscoder]:
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # a server's log is no place for it
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        summary = self.table.features.summary
        path = self.run / "checkpoints" / f"step_{summary['step']:08d}"
        transcoder = checkpoint.load_transcoder(path).to(device).requires_grad_(False)
        now: dict[str, Any] = {"checksums": (checkpoint.read_state(path)["checksums"] or {}).get(checkpoint.MODEL)}
        now |= {kind: found for kind, found in fingerprints(self.config, summary["part"]).items() if "text" not in kind}
        if odd := changes(summary["identity"], now):
            raise UserError(
                f"files have changed since {self.table.features.directory} was made: {odd}; put "
                "them back, or delete the directory and make the features again"
            )
        lm = load_language_model(self.config.lm, device)
        check(self.config, summary["part"], lm, transcoder)
        return lm, transcoder

    def _features(self, transcoder: CrossLayerTranscoder, keep: Tensor, runs: list[Replaced]) -> list[dict[str, Any]]:
        """The features that write most at some token of some run, with the (token, activation) pairs of each run."""
        mask, L, F = keep[0].to(transcoder.b_dec.device), transcoder.n_layers, transcoder.d_features
        chosen: set[int] = set()
        for run in runs:
            values, places = [], []
            for layer, features in enumerate(run.features):
                strength = features[0] * transcoder.norm(layer) * mask[:, None]  # (T, F)
                top = strength.topk(min(_SHOWN, F), dim=1)
                values.append(top.values)
                places.append(top.indices + layer * F)
            best = torch.cat(values, 1).topk(min(_SHOWN, L * min(_SHOWN, F)), dim=1)  # (T, _SHOWN) of all layers
            chosen |= set(torch.cat(places, 1).gather(1, best.indices)[best.values > 0].tolist())
        return [
            {**self.table.row(*divmod(place, F)), "runs": [_firings(run, mask, *divmod(place, F)) for run in runs]}
            for place in sorted(chosen)
        ]

    def _next(self, logits: Tensor) -> dict[str, Any]:
        """For each token the likeliest next ones of m models (m, T, V), and KL(original || other) in nats."""
        log_p = logits.float().log_softmax(-1)
        p = log_p.exp()
        named = p[..., : len(self.table.features.vocabulary)]  # a padded unembedding has more
        likely = named.topk(min(_NEXT, named.shape[-1])).indices.transpose(0, 1).flatten(1)  # (T, m * _NEXT)
        tokens = []
        for at, ids in enumerate(likely.cpu()):
            ids = ids.unique()
            of_models = p[:, at, ids.to(p.device)].T.cpu()  # (n, m)
            order = of_models[:, 0].argsort(descending=True)
            texts = self.table.texts(ids[order].numpy())
            tokens.append([[text, *map(rounded, row)] for text, row in zip(texts, of_models[order].tolist())])
        kl = (p[0] * (log_p[0] - log_p[1:])).masked_fill(p[0] == 0, 0).sum(-1)  # (m - 1, T)
        return {"next": tokens, "kl": [[rounded(value) for value in row] for row in kl.T.tolist()]}


def tokenised(lm: LanguageModel, text: str, most: int) -> tuple[Tensor, Tensor]:
    """(1, T) ids of a prompt, which start as in training, and (1, T) where MLPs are replaced.

    The token that starts documents comes first, once, whether or not the text begins with it.
    Raises UserError for a prompt without tokens, and with more than `most` in all.
    """
    found = lm.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    start = [] if (bos := bos_token(lm.tokenizer)) is None else [bos]
    if start and found[:1] == start:
        found = found[1:]
    ids = np.array([*start, *found], np.int64)
    if not found or len(ids) > most:
        raise UserError(f"the prompt has {len(found)} tokens; wanted 1 to {most - len(start)}")
    check_ids(lm, ids)
    keep = ~np.isin(ids, special_ids(lm.tokenizer))
    keep[0] = False
    return torch.from_numpy(ids)[None], torch.from_numpy(keep)[None]


def factors_of(changes: Changes, transcoder: CrossLayerTranscoder) -> Tensor:
    """(L, F) factors, 1 where nothing is changed."""
    factors = transcoder.b_dec.new_ones(transcoder.n_layers, transcoder.d_features)
    for place, factor in changes.items():
        factors[place] = factor
    return factors


def _firings(run: Replaced, mask: Tensor, layer: int, feature: int) -> list[list[float | None]]:
    of_tokens = (run.features[layer][0, :, feature] * mask).tolist()
    return [[at, rounded(value)] for at, value in enumerate(of_tokens) if value]


def parse_changes(value: Any) -> Changes:
    """The changes in a request, [[layer, feature, factor], ..]. Raises ValueError for anything else."""
    wanted = f"wanted at most {MOST_CHANGES} of [layer, feature, factor]"
    if not isinstance(value, list) or len(value) > MOST_CHANGES:
        raise ValueError(f"changes: {wanted}")
    changes = {}
    for change in value:
        match change:
            case [int(layer), int(feature), int() | float() as factor] if abs(factor) <= 100:
                changes[layer, feature] = float(factor)
            case _:
                raise ValueError(f"changes: {wanted}, the factor from -100 to 100")
    return changes
