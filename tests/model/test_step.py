"""The step's gradients, precisions, shards and compiled kernels."""

import threading

import pytest
import torch

from clt.config import OptimConfig
from clt.model import loss as loss_module
from clt.model.loss import Objective
from clt.model.spec import LossConfig
from clt.model.step import make_kernels, multiply_into
from clt.model.transcoder import feature_dim
from clt.train.ddp import GradientMemory
from clt.train.optim import make_adam
from tests.model.naive import B, F, L, batch, coefficients, losses, make


@pytest.mark.parametrize(
    "options", [{}, {"cross_layer": False}, {"normalization": "token", "skip": True}, {"window": 2}], ids=str
)
def test_gradients_of_everything_but_the_threshold(options):
    """gradcheck perturbs by 1e-6, far less than any pre-activation's distance from its threshold here."""
    clt, data = make(straight_through_pre=False, **options), batch()[:4]
    loss = LossConfig(sparsity_scale=0.7, pre_activation=0.1, pre_activation_kind="negative")
    objective = Objective(clt, loss)
    names = [name for name, _ in objective.named_parameters() if "threshold" not in name]
    values = [dict(objective.named_parameters())[name].detach().clone().requires_grad_() for name in names]

    def total(*values):
        return torch.func.functional_call(objective, dict(zip(names, values)), (data, coefficients(loss))).total

    assert torch.autograd.gradcheck(total, values, atol=1e-8)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("on_gpu", [False, True])
def test_the_compiled_step_in_bf16_is_the_eager_one(monkeypatch, on_gpu):
    """From a float16 store, twice: the second step writes the decoder's gradients where the first one's were.

    on_gpu: laid out as there, with the decoder's own Adam; compiled is then what only such a step calls.
    """
    monkeypatch.setattr(loss_module, "reads_transposed", lambda x: on_gpu)
    data, gradients = batch().half(), []
    for compile in (False, True):
        clt = make(skip=True).float()
        loss = LossConfig(pre_activation=0.1)
        objective = Objective(clt, loss, compile=compile and not on_gpu)
        if on_gpu:
            named, config = dict(clt.named_parameters()), OptimConfig(decoder="fused")
            objective.row_adam = make_adam(named, config, 1, torch.bfloat16)[1]
        if on_gpu and compile:
            for name in ("gate_into", "gate_gradients"):
                setattr(objective.kernels, name, getattr(make_kernels(True), name))
        memory = objective.gradient_memory = GradientMemory(objective.parameters())
        for _ in range(2):
            memory.clear()
            with torch.autocast("cpu", torch.bfloat16):
                total = objective(data, coefficients(loss)).total
            total.backward()
        gradients.append({name: p.grad for name, p in objective.named_parameters()})
    assert ("row_adam.sums.0" in gradients[0]) == on_gpu
    for name, eager in gradients[0].items():
        error = (gradients[1][name] - eager).norm() / eager.norm()
        assert error < torch.finfo(torch.bfloat16).eps, f"{name}: relative difference {error:.2e}"


GPU_VARIANTS = {
    "jumprelu": {},
    "per layer": {"cross_layer": False},
    "window and skip": {"window": 2, "skip": True},
    "token": {"normalization": "token", "straight_through_pre": False},
    "topk by norm": {"activation": "topk", "k": 2, "by_norm": True},
    "batchtopk": {"activation": "batchtopk", "k": 4},
}


@pytest.mark.parametrize("variant", GPU_VARIANTS)
def test_products_laid_out_as_on_a_gpu_give_the_same_step(monkeypatch, variant):
    """In float64, with every term; the second step writes its gradients where the first one's were."""
    found, dead = [], torch.arange(F).expand(L, F) < 3
    for on_gpu in (False, True):
        monkeypatch.setattr(loss_module, "reads_transposed", lambda x, answer=on_gpu: answer)
        clt, loss = make(**GPU_VARIANTS[variant]), LossConfig(pre_activation=0.1, aux=0.1, aux_k=2)
        objective = Objective(clt, loss)
        memory, strides = GradientMemory(clt.parameters()), []
        objective.gradient_memory = memory
        gradients = objective.kernels.gate_gradients

        def noted(product, *arguments, strides=strides, gradients=gradients):
            strides.append(product.stride())
            return gradients(product, *arguments)

        objective.kernels.gate_gradients = noted
        for seed in (1, 2):
            memory.clear()
            losses = objective(batch(seed), coefficients(loss), dead=dead)
            losses.total.backward()
        assert set(strides) == {(1, F) if on_gpu else (B, 1)}
        grads = {name: p.grad for name, p in clt.named_parameters() if p.grad is not None}
        found.append([losses.total, losses.mse_per_layer, losses.l0_per_layer, losses.fired, grads])
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_shards_add_up_in_float32(precision):
    """The loss of the last of two shards, to whose partial reconstruction the first one's is added."""
    data, partials, terms = batch().float(), [], []

    def add(partial):
        partials.append(partial.detach().clone())
        return partial.copy_(torch.stack(partials).double().sum(0))

    whole = make(d_features=2 * F, skip=True).float()
    for part in range(2):
        shard = make(d_features=2 * F, skip=True, shard=(part, 2), sum_shards=add).float()
        for name, value in whole.state_dict().items():
            dim, of_shard = feature_dim(name), slice(part * F, (part + 1) * F)
            mine = value if dim is None else value.transpose(0, dim)[of_shard].transpose(0, dim)
            shard.state_dict()[name].copy_(mine)
        with torch.autocast("cpu", precision):
            terms.append(losses(shard, data))
    assert [partial.dtype for partial in partials] == [torch.float32] * 2
    exact = losses(whole, data)
    torch.testing.assert_close(terms[1].values["mse"], exact.values["mse"], rtol=8 * torch.finfo(precision).eps, atol=0)
    penalty = sum(each.values["sparsity"] for each in terms)
    torch.testing.assert_close(penalty, exact.values["sparsity"], rtol=8 * torch.finfo(precision).eps, atol=0)


def test_a_frozen_decoder_stays_as_it_is():
    clt, loss = make(skip=True), LossConfig()
    objective = Objective(clt, loss)
    memory = objective.gradient_memory = GradientMemory(clt.parameters())
    objective(batch(), coefficients(loss)).total.backward()
    memory.clear()
    for weight in (*clt.W_dec, clt.W_skip):
        weight.requires_grad_(False)
    objective(batch(), coefficients(loss)).total.backward()
    assert all(weight.grad is None for weight in (*clt.W_dec, clt.W_skip))
    assert clt.W_enc.grad.abs().sum() > 0


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_autocast_is_within_the_rounding_of_its_dtype(precision):
    clt, data = make(skip=True).float(), batch().float()
    exact = losses(clt, data)
    exact.total.backward()
    gradients = {name: p.grad.clone() for name, p in clt.named_parameters()}
    clt.zero_grad()
    with torch.autocast("cpu", precision):
        rounded = losses(clt, data)
    assert rounded.total.dtype == torch.float32
    rounded.total.backward()
    rounding = torch.finfo(precision).eps
    torch.testing.assert_close(rounded.total, exact.total, rtol=8 * rounding, atol=0)
    for name, p in clt.named_parameters():
        assert p.grad.dtype == torch.float32
        error = (p.grad - gradients[name]).norm() / gradients[name].norm()
        assert error < 16 * rounding, f"{name}: relative gradient error {error:.2e}"


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_evaluation_fires_what_training_fires_under_autocast(precision):
    """Both add the bias to the rounded product in float32: rounding the sum too would move features over thresholds."""
    clt, data = make(d_features=512).float(), batch().float().repeat(64, 1, 1, 1)
    data += 0.1 * torch.randn(data.shape, generator=torch.Generator().manual_seed(2))
    with torch.autocast("cpu", precision):
        trained = losses(clt, data).l0_per_layer
        evaluated = (clt.encode(data[:, 0]) > 0).sum(2).float().mean(0)
    assert torch.equal(trained, evaluated)
    with torch.autocast("cpu", precision):
        x = clt.normalization.input(data[:, 0, 0], 0)
        rounded = (x @ clt.W_enc[0] + clt.b_enc[0]).to(precision)
        exact = clt.encode_layer(data[:, 0, 0], 0)
    assert not torch.equal(rounded > clt.threshold[0, 0], exact > 0), "else this cannot fail"


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_a_wide_result_is_rounded_once(precision):
    """As shards need it: a partial y~ that was rounded to the factors' dtype first would be off by its epsilon."""
    features, weights = torch.rand(32, 3 * 40).to(precision), torch.randn(3, 40, 16).to(precision)
    exact = features.double() @ weights.double().flatten(0, 1)
    for dtype, eps in ((torch.float32, 2**-20), (precision, torch.finfo(precision).eps)):
        out = torch.full((32, 2, 16), float("nan"), dtype=dtype)
        multiply_into(out[:, 1], features, weights)
        error = (out[:, 1].double() - exact).abs().max() / exact.abs().max()
        assert error < eps, dtype
        if dtype == precision:
            assert error > 2**-20, "narrow results are worse: the bound can fail"


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_reductions_are_pinned_in_whichever_thread_compiles_them(monkeypatch, tmp_path):
    """Inductor's settings are per thread, and the backward pass of CUDA compiles in autograd's."""
    from torch._inductor import config
    from torch._inductor.graph import GraphLowering

    seen, run = [], GraphLowering.run

    def recorded(graph, *arguments):
        seen.append((threading.get_ident(), config.dynamic_scale_rblock, config.deterministic))
        return run(graph, *arguments)

    monkeypatch.setattr(GraphLowering, "run", recorded)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # what lies in the cache is not compiled again
    torch._dynamo.reset()
    kernels, grad_y = make_kernels(compile=True), torch.randn(5, 3, 7)
    sums = [kernels.sum_over_tokens(grad_y, torch.float32)]
    thread = threading.Thread(target=lambda: sums.append(kernels.transposed(grad_y[0])))
    thread.start()
    thread.join()
    torch.testing.assert_close(sums, [grad_y.sum(0), grad_y[0].t()])
    assert [(rblock, fixed) for _, rblock, fixed in seen] == [(False, True)] * 2
    assert len({ident for ident, _, _ in seen}) == 2
    assert config.dynamic_scale_rblock, "elsewhere it is inductor's default"
