"""Quality figures against plain loops over rows, tokens and features."""

import json
import math
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from clt.config import load_config
from clt.data.statistics import Moments
from clt.data.store import DiscBuffer
from clt.lm.load import LanguageModel, load_language_model
from clt.lm.replacement import replaced_logits, run_with_mlps
from clt.model.spec import CLTConfig
from clt.model.transcoder import CrossLayerTranscoder
from clt.train import replacement
from clt.train.distributed import World
from clt.train.evaluation import (
    Evaluator,
    dead_features,
    evaluate_activations,
    evaluate_replacement,
    heldout_windows,
)


@pytest.fixture(scope="module")
def heldout(stores):
    return DiscBuffer(stores / "heldout")


@pytest.fixture(scope="module")
def transcoder(stores):
    torch.manual_seed(0)
    clt = CrossLayerTranscoder(3, 16, CLTConfig(d_features=24, window=2, skip=True))
    statistics = DiscBuffer(stores / "train").statistics
    clt.normalization.set(statistics.input_mean, statistics.input_sd, statistics.target_mean, statistics.target_sd)
    with torch.no_grad():
        clt.b_enc.sub_(0.3)
        clt.W_skip.normal_(0, 0.1)
    return clt


@torch.no_grad()
def test_activations_against_a_loop_over_rows(heldout, transcoder):
    result = evaluate_activations(transcoder, heldout, batch=64)
    rows = heldout[:].double()
    yhat = transcoder(rows[:, 0].float()).double()
    mean = rows[:, 1].mean(0)
    nmse = []
    for l in range(3):
        sse = sum(float((rows[b, 1, l] - yhat[b, l]).square().sum()) for b in range(len(rows)))
        sst = sum(float((rows[b, 1, l] - mean[l]).square().sum()) for b in range(len(rows)))
        nmse.append(sse / sst)
    assert result["nmse_per_layer"].tolist() == pytest.approx(nmse, rel=1e-5)
    assert result["fve_per_layer"].tolist() == pytest.approx([1 - x for x in nmse], rel=1e-5, abs=1e-5)
    assert result["nmse"].item() == pytest.approx(sum(nmse) / 3, rel=1e-5)
    assert result["fve"].item() == pytest.approx(1 - sum(nmse) / 3, rel=1e-5, abs=1e-5)
    on = transcoder.encode(rows[:, 0].float()) > 0
    assert 0 < on.double().mean() < 1
    assert torch.equal(result["density"], on.double().mean(0))
    assert result["l0_total"].item() == pytest.approx(on.sum((1, 2)).double().mean().item())
    assert result["l0_per_layer"].tolist() == pytest.approx(on.sum(2).double().mean(0).tolist())


@torch.no_grad()
@pytest.mark.parametrize("normalization", ["layer", "none"])
def test_a_layer_that_never_varies_has_no_fve_and_is_left_out_of_the_mean(heldout, normalization):
    """0.1 has no exact float16, and without normalisation its sum of squares is large: SST is then its rounding."""
    rows = heldout[:].clone()
    rows[:, 1, 1] = 0.1
    clt = CrossLayerTranscoder(3, 16, CLTConfig(d_features=24, normalization=normalization))
    moments = Moments.zero(3, 16)
    moments.add(rows[:100])
    statistics = moments.statistics()
    clt.normalization.set(statistics.input_mean, statistics.input_sd, statistics.target_mean, statistics.target_sd)
    result = evaluate_activations(clt, rows, batch=64)

    error, target = (rows[:, 1] - clt(rows[:, 0].float())).double(), rows[:, 1].double()
    nmse = [float(error[:, l].square().sum() / (target[:, l] - target[:, l].mean(0)).square().sum()) for l in (0, 2)]
    assert result["nmse_per_layer"].tolist() == pytest.approx([nmse[0], math.nan, nmse[1]], rel=1e-5, nan_ok=True)
    assert result["fve_per_layer"].isnan().tolist() == [False, True, False]
    assert result["nmse"].item() == pytest.approx(sum(nmse) / 2, rel=1e-5)
    assert result["fve"].item() == pytest.approx(1 - sum(nmse) / 2, rel=1e-5, abs=1e-5)


@torch.no_grad()
def test_predicting_the_mean_explains_nothing_and_the_truth_everything(heldout):
    rows = heldout[:].float()
    clt = CrossLayerTranscoder(3, 16, CLTConfig(d_features=4, normalization="none"))
    for weight in clt.W_dec:
        weight.zero_()
    clt.b_dec.copy_(rows[:, 1].mean(0))
    assert evaluate_activations(clt, heldout)["fve"].item() == pytest.approx(0, abs=1e-5)
    clt.normalization.output = lambda y, layer: rows[:, 1]  # type: ignore[method-assign]
    assert evaluate_activations(clt, heldout, batch=len(rows))["nmse"].item() == 0


def test_one_layers_features_are_held_at_a_time(heldout):
    """The most memory of an evaluation, in (B, F) float32: what one layer's activation function works in."""
    L, F, B = 3, 4096, 64
    clt = CrossLayerTranscoder(L, 16, CLTConfig(d_features=F))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        evaluate_activations(clt, heldout, batch=B)
    changes = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for change in sorted(changes, key=lambda e: e.start_ns()):
        held += change.nbytes()
        peak = max(peak, held)
    assert 2 < peak / (B * F * 4) < 5, "all layers' pre-activations and features would be 6 and more"


def test_ranks_together_give_what_one_gives(heldout, transcoder):
    alone = evaluate_activations(transcoder, heldout, batch=32)
    parts: list[torch.Tensor] = []

    def collect(tensor):
        parts.append(tensor)
        return tensor

    for rank in range(3):
        evaluate_activations(transcoder, heldout, batch=32, data=SimpleNamespace(rank=rank, size=3, sum=collect))
    total = sum(parts)
    last = SimpleNamespace(rank=2, size=3, sum=lambda t: total)
    together = evaluate_activations(transcoder, heldout, batch=32, data=last)
    for key in alone:
        torch.testing.assert_close(together[key], alone[key])


@pytest.fixture(scope="module")
def base_config(train_overrides):
    return load_config(train_overrides[0], train_overrides[1:])


@pytest.fixture(scope="module")
def lm(base_config):
    return load_language_model(base_config.lm)


def naive_replacement(lm, windows, replaced, ablated):
    """One window and one position at a time."""
    n = agree = kl = original_ce = replaced_ce = ablated_ce = 0.0
    for window, r, a in zip(windows, replaced, ablated):
        tokens = torch.from_numpy(window.tokens).long()
        logits = lm.model(input_ids=tokens[None]).logits[0]
        for t in range(len(tokens) - 1):
            if not (window.keep[t] and window.keep[t + 1]):
                continue
            p, q, m = (x[t].double().softmax(0) for x in (logits, r, a))
            n += 1
            agree += int(p.argmax() == q.argmax())
            kl += float((p * (p / q).log()).sum())
            original_ce -= math.log(p[tokens[t + 1]])
            replaced_ce -= math.log(q[tokens[t + 1]])
            ablated_ce -= math.log(m[tokens[t + 1]])
    return n, agree / n, kl / n, original_ce / n, replaced_ce / n, ablated_ce / n


@torch.no_grad()
@pytest.mark.parametrize("at_once", [1, 3, 9])
def test_replacement_against_a_loop_over_positions(base_config, stores, lm, transcoder, monkeypatch, at_once):
    windows = heldout_windows(base_config, lm)
    mean, parts = DiscBuffer(stores / "train").statistics.target_mean, []
    monkeypatch.setattr(replacement, "_LOGITS", at_once * base_config.lm.context * lm.model.config.vocab_size)
    result = evaluate_replacement(lm, transcoder, mean, windows, progress=lambda: parts.append(1))
    assert len(parts) == -(-len(windows) // min(at_once, 8))
    tokens = torch.from_numpy(np.stack([w.tokens for w in windows])).long()
    keep = torch.from_numpy(np.stack([w.keep for w in windows]))
    replaced = replaced_logits(lm, transcoder, tokens, keep)
    ablated = run_with_mlps(lm, tokens, keep, lambda l, x: mean[l].float().expand_as(x))
    n, top1, kl, original, replaced_ce, ablated_ce = naive_replacement(lm, windows, replaced, ablated)
    assert result["replacement_tokens"] == n
    assert n < tokens.numel()
    assert result["top1_agreement"] == pytest.approx(top1)
    assert result["kl"] == pytest.approx(kl, rel=1e-4, abs=1e-7)
    assert result["ce_original"] == pytest.approx(original, rel=1e-5)
    assert result["ce_replaced"] == pytest.approx(replaced_ce, rel=1e-5)
    assert result["ce_mean_ablated"] == pytest.approx(ablated_ce, rel=1e-5)
    recovered = (ablated_ce - replaced_ce) / (ablated_ce - original)
    assert result["ce_recovered"] == pytest.approx(recovered, rel=1e-2)


@contextmanager
def masked(lm, tokens):
    """The language model with logits of -inf for these tokens."""

    def mask(module, args, logits):
        return logits.index_fill(-1, torch.tensor(tokens), -math.inf)

    handle = lm.model.lm_head.register_forward_hook(mask)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def test_a_masked_vocabulary_counts_nothing(base_config, stores, lm, transcoder):
    """Logits of -inf for tokens that the text does not have: the sums are those over the other tokens."""
    windows = heldout_windows(base_config, lm)[:4]
    ids = torch.from_numpy(np.stack([w.tokens for w in windows])).long()
    keep = torch.from_numpy(np.stack([w.keep for w in windows]))
    unused = sorted({*range(lm.model.config.vocab_size)} - {*ids.flatten().tolist()})
    assert len(unused) > 10
    mean = DiscBuffer(stores / "train").statistics.target_mean
    with masked(lm, unused):
        found = evaluate_replacement(lm, transcoder, mean, windows)
        logits = lm.model(input_ids=ids).logits
        replaced = replaced_logits(lm, transcoder, ids, keep)
    used = ids.unique()
    kl, n = 0.0, 0
    for w, t in (keep[:, :-1] & keep[:, 1:]).nonzero().tolist():
        p, q = (x[w, t, used].double().softmax(0) for x in (logits, replaced))
        kl, n = kl + float((p * (p / q).log()).sum()), n + 1
    assert found["kl"] == pytest.approx(kl / n, rel=1e-4, abs=1e-7)
    assert all(math.isfinite(value) for value in found.values())


@torch.no_grad()
def test_what_has_no_value_is_none_in_the_numbers(base_config, stores, lm, transcoder):
    """A token of the text that is masked has an infinite cross-entropy; logits that are nan agree with nothing."""
    heldout, mean = DiscBuffer(stores / "heldout"), DiscBuffer(stores / "train").statistics.target_mean
    evaluate = Evaluator(base_config, heldout, mean, World(0, 1, torch.device("cpu")), torch.float32)
    last_fired = torch.ones(3, 24, dtype=torch.int64)

    def none(run=None):
        numbers = evaluate(transcoder, last_fired, 1, run=run).numbers
        json.dumps(numbers, allow_nan=False)
        return {key for key, value in numbers.items() if value is None}

    assert none() == set()
    infinite = {"ce_original", "ce_replaced", "ce_mean_ablated", "ce_recovered"}
    with masked(evaluate.lm, [int(evaluate.windows[0].tokens[3])]):
        assert none() == infinite

    def broken(lm, transcoder, tokens, keep):
        return torch.full_like(lm.model(input_ids=tokens).logits, math.nan)

    assert none(broken) == {"top1_agreement", "kl", "ce_replaced", "ce_recovered"}

    def certain(lm, transcoder, tokens, keep):
        logits = lm.model(input_ids=tokens).logits
        return logits.masked_fill(logits < logits.amax(-1, keepdim=True), -math.inf)

    assert none(certain) == {"kl", "ce_replaced", "ce_recovered"}


@torch.no_grad()
def test_a_perfect_replacement_recovers_everything(base_config, lm, transcoder):
    windows = heldout_windows(base_config, lm)[:4]

    def perfect(lm, transcoder, tokens, keep):
        return lm.model(input_ids=tokens).logits

    result = evaluate_replacement(lm, transcoder, torch.zeros(3, 16), windows, run=perfect)
    assert (result["top1_agreement"], result["kl"], result["ce_recovered"]) == (1.0, 0.0, 1.0)


@torch.no_grad()
@pytest.mark.parametrize("fails", [False, True])
def test_the_language_model_is_on_the_device_only_meanwhile(base_config, lm, transcoder, monkeypatch, fails):
    """It lies on another device, as far as it says; the transcoder's is the CPU."""
    windows, places = heldout_windows(base_config, lm)[:4], [torch.device("cuda", 3)]
    monkeypatch.setattr(LanguageModel, "device", property(lambda self: places[-1]))
    monkeypatch.setattr(lm.model, "to", places.append)

    def run(lm, transcoder, tokens, keep):
        assert lm.device == torch.device("cpu")
        if fails:
            raise KeyboardInterrupt
        return lm.model(input_ids=tokens).logits

    with pytest.raises(KeyboardInterrupt) if fails else nullcontext():
        evaluate_replacement(lm, transcoder, torch.zeros(3, 16), windows, run=run)
    assert places == [torch.device("cuda", 3), torch.device("cpu"), torch.device("cuda", 3)]


def test_dead_features():
    last_fired = torch.tensor([[0, 1, 5, 6, 7, 10]])  # after 10 steps of 100 tokens
    assert dead_features(last_fired, 10, 100, 400).tolist() == [[True, True, True, True, False, False]]
    assert dead_features(last_fired, 10, 100, 401).tolist() == [[True, True, True, False, False, False]]
    assert dead_features(last_fired, 10, 100, 10**9).tolist() == [[True] + [False] * 5], "a short run: since its start"
