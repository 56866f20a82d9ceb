"""The Triton kernels against their torch references, run by Triton's interpreter: see test_kernels.py.

TRITON_INTERPRET=1 python -m pytest tests/model/interpreted.py
"""

import pytest
import torch

from clt.model.kernels import AdamSteps, DecoderRows, RowGradient, by_token, gpu, reference, sampling
from tests.model.test_kernels import sizes

F, B, T, D = 18, 50, 2, 20
NAN = float("nan")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory that nobody has written to is nan, or an index far out of range."""
    empty = torch.empty

    def nan(*shape, **options):
        memory = empty(*shape, **options)
        return memory.fill_(NAN if memory.is_floating_point() else 10**8)

    def of_type(tensor, *shape, **options):
        return nan(*shape, **{"dtype": tensor.dtype, "device": tensor.device} | options)

    monkeypatch.setattr(torch, "empty", nan)
    monkeypatch.setattr(torch, "empty_like", lambda tensor: of_type(tensor, tensor.shape))
    monkeypatch.setattr(torch.Tensor, "new_empty", of_type)
    # Small, so that lists have several pieces and rows several ranges of columns.
    for name, value in {"PIECE": 8, "COLUMNS": 16, "PAIRS": 4, "TOKENS": 32}.items():
        monkeypatch.setattr(gpu, name, value)


def inputs(seed=0):
    """product, strided (F, B), with a feature that always fires and two that never do; bias, limit, norm (F,)."""
    torch.manual_seed(seed)
    product = torch.randn(F, B + 3)[:, :B] - 1
    product[4], product[5], product[F - 1] = 5, -50, -50
    return product, 0.1 * torch.randn(F), 0.3 * torch.rand(F), torch.rand(F) + 0.5


RULES = {"relu": (False, None), "jumprelu": (False, 1.0), "topk": (True, None)}


def lists_of(kernels, rule, capacity=F * B, sample=None):
    product, bias, limit, norm = inputs()
    of_tokens, bandwidth = RULES[rule]
    of_token, limit = (torch.rand(B), norm) if of_tokens else (None, limit)
    of_layer = (product, bias, limit, of_token)
    counts = kernels.count(*of_layer, bandwidth)
    return counts, kernels.select(*of_layer, 0.7 * norm, bandwidth, counts, capacity, sample)


def assert_close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_select(rule):
    torch.manual_seed(1)
    (counts, found), (of_reference, wanted) = (lists_of(kernels, rule) for kernels in (gpu, reference))
    count = len(wanted.tokens)
    assert torch.equal(counts, of_reference.int())
    assert counts.sum() == count > 50
    for name in ("offsets", "penalty", "shrink", "active"):
        assert_close(getattr(found, name), getattr(wanted, name))
    for name in ("tokens", "features", "values", "through"):
        mine = getattr(found, name)
        assert_close(None if mine is None else mine[:count], getattr(wanted, name))
    assert found.values[count:].eq(0).all()


def test_pairs_beyond_the_capacity_are_left_out():
    torch.manual_seed(1)
    (_, found), (_, wanted) = (lists_of(kernels, "jumprelu", capacity=41) for kernels in (gpu, reference))
    for name, of_found in found._asdict().items():  # sums are of all pairs
        assert_close(of_found, getattr(wanted, name))


def test_a_sample_of_the_pairs_that_do_not_fire():
    """Over all places where it may begin, each pair is listed as often as it should be, and none beyond the room."""
    counts, exact = lists_of(reference, "jumprelu")
    fired, others = counts.sum(1).tolist()
    room = 7
    every = int(sampling(counts.sum(1), fired + room, 0, B)[0])
    assert others > 3 * room
    sums = torch.zeros(2, F, B)
    for first in range(every):
        of_sample = ("jumprelu", fired + room, -(-first * 2**24 // every))
        _, wanted = lists_of(reference, *of_sample)
        count = int(wanted.offsets[-1])
        assert fired <= count <= fired + room
        sums[0].index_put_((wanted.features.long(), wanted.tokens.long()), wanted.through / every, accumulate=True)
        if first % 8 == 3:  # the interpreter takes a second
            _, found = lists_of(gpu, *of_sample)
            for name in ("offsets", "penalty", "shrink", "active"):
                assert_close(getattr(found, name), getattr(wanted, name))
            for name in ("tokens", "features", "values", "through"):
                assert_close(getattr(found, name)[:count], getattr(wanted, name))
    sums[1].index_put_((exact.features.long(), exact.tokens.long()), exact.through, accumulate=True)
    assert_close(*sums)


def weights():
    torch.manual_seed(2)
    return torch.randn(F, T, D)


def rows_of(weight):
    copy, last = torch.full_like(weight, NAN, dtype=torch.float16), torch.zeros(F, dtype=torch.int32)
    return DecoderRows(weight, torch.zeros_like(weight), torch.zeros_like(weight), torch.full((F,), NAN), copy, last)


@pytest.fixture
def pairs():
    """The reference's, in room for more, as the kernels see them: what lies beyond is nan or out of range."""
    torch.manual_seed(1)
    _, exact = lists_of(reference, "jumprelu")
    more = 64

    def room(tensor, value):
        return torch.cat([tensor, torch.full((more,), value, dtype=tensor.dtype)])

    values, through = room(exact.values, 0.0), room(exact.through, NAN)
    return exact, exact._replace(
        tokens=room(exact.tokens, 10**8), features=room(exact.features, 0), values=values, through=through
    )


def test_decode(pairs):
    """Into a strided part of y~, which keeps the rest."""
    exact, roomy = pairs
    y = torch.randn(B, T + 2, D)
    found, wanted = y.clone(), y.clone()
    gpu.decode(found[:, 1 : 1 + T], weights(), by_token(roomy, B))
    reference.decode(wanted[:, 1 : 1 + T], weights(), by_token(exact, B))
    assert_close(found, wanted)
    assert torch.equal(found[:, [0, -1]], y[:, [0, -1]])


def test_decoder_gradients(pairs):
    exact, roomy = pairs
    torch.manual_seed(3)
    through_norm, written = torch.rand(F), torch.randn(B, T * D + 5)[:, : T * D]
    through_norm[exact.offsets.diff() == 0] = 0
    found, wanted, again = (torch.full((F, T, D), NAN) for _ in range(3))
    dots = gpu.decoder_gradients(found, weights(), through_norm, written, roomy)
    of_reference = reference.decoder_gradients(wanted, weights(), through_norm, written, exact)
    assert_close(found, wanted)
    assert_close(dots.sum(0)[: len(exact.tokens)], of_reference[0])
    assert dots.shape == (3, len(roomy.tokens)), "T * D = 40 columns, 16 at once"
    assert exact.offsets.diff().max() > 5 * gpu.PIECE
    assert exact.offsets.diff().min() == 0
    gpu.decoder_gradients(again, weights(), through_norm, written.bfloat16(), roomy)
    reference.decoder_gradients(wanted, weights(), through_norm, written.bfloat16().float(), exact)
    assert_close(again, wanted)


@pytest.mark.parametrize("through_pre", [True, False])
def test_pair_gradients(pairs, through_pre):
    exact, roomy = pairs
    count = len(exact.tokens)
    torch.manual_seed(4)
    addends, scale = torch.randn(3, count + 64), torch.rand(F)
    addends[:, count:] = NAN
    found = gpu.pair_gradients(roomy, addends, scale, torch.tensor(0.3), through_pre)
    wanted = reference.pair_gradients(exact, addends[:, :count], scale, torch.tensor(0.3), through_pre)
    assert_close(found.pre[:count], wanted.pre)
    assert_close(found.bias, wanted.bias)
    assert_close(found.threshold, wanted.threshold)


def test_encoder_gradient(pairs):
    exact, roomy = pairs
    torch.manual_seed(5)
    x, grad = torch.randn(B, 3, D)[:, 1], torch.randn(len(roomy.tokens))
    found, wanted = torch.full((2, D, F), NAN)
    gpu.encoder_gradient(found, x, roomy, grad)
    reference.encoder_gradient(wanted, x, exact, grad[: len(exact.tokens)])
    assert_close(found, wanted)


def test_adam_rows():
    """With a skipped step, rows without a gradient, and one that has it through its norm alone. Lazily or not, in the
    end the bits are the same.

    The narrow copy is of float16: the interpreter rounds bfloat16 towards zero, as no GPU does.
    """
    found, wanted, at_once = (rows_of(weights()) for _ in range(3))
    table, every = sizes(4, 0.01, (0.9, 0.99), torch.float32), torch.ones(F, dtype=torch.bool)

    def steps(number):
        return AdamSteps(torch.tensor(number, dtype=torch.int32), table, (0.9, 0.99), 1e-8)

    for each, kernels in ((found, gpu), (wanted, reference), (at_once, gpu)):
        kernels.catch_up_rows(each, steps(0), every)  # fills norms and copies
    for number, skip in ((1, False), (2, True), (2, False), (3, False), (4, False)):
        torch.manual_seed(number + skip)
        grad, through = torch.randn(F, T, D), torch.randn(F)
        grad[number : number + 9], through[number : number + 8] = 0, 0
        gradient = RowGradient(grad, through, torch.tensor(1.7), torch.tensor(skip))
        before = found._replace(**{name: tensor.clone() for name, tensor in found._asdict().items()})
        gpu.adam_rows(found, steps(number), gradient, True)
        reference.adam_rows(wanted, steps(number), gradient, True)
        gpu.adam_rows(at_once, steps(number), gradient, False)
        assert_close(found._replace(narrow=None), wanted._replace(narrow=None))
        assert torch.equal(found.narrow, found.weight.half())
        assert all(torch.equal(a, b) for a, b in zip(found, before)) == skip
        assert found.last.min() < number - skip
        assert at_once.last.eq(number - skip).all()
    gpu.catch_up_rows(found, steps(4), every)
    assert all(torch.equal(a, b) for a, b in zip(found, at_once))


@pytest.mark.parametrize("rule", ["jumprelu", "topk by norm"])
def test_the_whole_step(monkeypatch, rule):
    """Against the dense step, in float32; then the same bits again."""
    from clt.model import sparse
    from clt.model.spec import LossConfig
    from tests.model.naive import batch, make
    from tests.model.test_sparse import RULES, assert_same, step

    clt, loss, data = make(**RULES[rule]).float(), LossConfig(sparsity_scale=0.7), batch().float()
    dense = step(clt, data, None, loss)
    monkeypatch.setattr(sparse, "kernels_for", lambda device: gpu)
    found, again = (step(clt, data, 60, loss) for _ in range(2))
    assert_same(found, dense, rtol=2e-5)
    assert all(torch.equal(gradient, again[1][name]) for name, gradient in found[1].items())
