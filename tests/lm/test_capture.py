"""Captured activations against the block's own equation, recomputed without hooks."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from clt.errors import UserError
from clt.lm.capture import capture
from clt.lm.load import LanguageModel
from clt.lm.replacement import run_with_mlps
from clt.lm.sites import Site
from tests.lm.conftest import blocks, hooks, mlp_branch


def residual_stream(lm: LanguageModel, ids: Tensor) -> list[Tensor]:
    """The stream before block 0 and after every block, by `output_hidden_states` with the final norm taken out."""
    base = lm.model.base_model.decoder if lm.model.config.model_type == "opt" else lm.model.base_model
    name = next(n for n in ("ln_f", "norm", "final_layer_norm") if hasattr(base, n))
    norm = getattr(base, name)
    setattr(base, name, nn.Identity())
    try:
        with torch.no_grad():
            return list(base(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states)
    finally:
        setattr(base, name, norm)


def test_x_and_y_satisfy_the_equation_of_the_block(lm: LanguageModel, input_ids: Tensor) -> None:
    captured = capture(lm, input_ids)
    stream = residual_stream(lm, input_ids)
    parallel = getattr(lm.model.config, "use_parallel_residual", False)
    assert captured.shape == (3, 10, 2, 3, lm.d_model)
    with torch.no_grad():
        for layer, block in enumerate(blocks(lm)):
            x, y = captured[:, :, 0, layer], captured[:, :, 1, layer]
            assert torch.allclose(y, mlp_branch(lm, block, x), atol=1e-5, rtol=1e-4)
            assert y.abs().mean() > 1e-3
            if parallel:
                # x is the layer's input, and what is left of its output besides y is the attention's.
                assert torch.equal(x, stream[layer])
                attention = block.attention(
                    block.input_layernorm(x),
                    attention_mask=None,
                    position_embeddings=lm.model.base_model.rotary_emb(x, torch.arange(10)[None]),
                )[0]
                assert torch.allclose(stream[layer + 1], x + attention + y, atol=1e-4, rtol=1e-4)
            else:
                assert torch.allclose(stream[layer + 1], x + y, atol=1e-5, rtol=1e-4)
                assert not torch.allclose(x, stream[layer], atol=1e-3)


def test_nothing_after_the_last_hooked_module_runs(tiny: Callable[..., LanguageModel], input_ids: Tensor) -> None:
    lm = tiny("llama", layers=[0, 1])
    expected = capture(lm, input_ids)

    def poisoned(*args: object, **kwargs: object) -> None:
        raise AssertionError("ran past the last hooked module")

    for module in (lm.model.lm_head, blocks(lm)[2], lm.model.base_model.norm):
        module.register_forward_pre_hook(poisoned)
    assert torch.equal(capture(lm, input_ids), expected)


def test_a_subset_of_layers_is_that_part_of_all_layers(tiny: Callable[..., LanguageModel], input_ids: Tensor) -> None:
    every = capture(tiny("gpt2"), input_ids)
    some = capture(tiny("gpt2", layers=[0, 2]), input_ids)
    assert torch.equal(some, every[:, :, :, [0, 2]])


def test_batched_equals_one_by_one(lm: LanguageModel, input_ids: Tensor) -> None:
    one_by_one = torch.cat([capture(lm, row[None]) for row in input_ids])
    assert torch.allclose(capture(lm, input_ids), one_by_one, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_comes_in_the_dtype_of_the_model(tiny: Callable[..., LanguageModel], input_ids: Tensor, dtype: str) -> None:
    low = capture(tiny("gpt2", dtype=dtype), input_ids)
    full = capture(tiny("gpt2"), input_ids)
    assert low.dtype == getattr(torch, dtype)
    assert torch.nn.functional.cosine_similarity(low.float(), full, dim=-1).min() > 0.99


def test_int32_ids_as_windows_hold_them(tiny: Callable[..., LanguageModel], input_ids: Tensor) -> None:
    lm = tiny("gpt2")
    assert torch.equal(capture(lm, input_ids.int()), capture(lm, input_ids))


def test_the_result_can_be_trained_on(tiny: Callable[..., LanguageModel], input_ids: Tensor) -> None:
    captured = capture(tiny("gpt2"), input_ids)
    weight = torch.ones(captured.shape[-1], requires_grad=True)
    (captured * weight).sum().backward()
    assert weight.grad is not None


def test_leaves_the_model_as_it_was(lm: LanguageModel, input_ids: Tensor) -> None:
    with torch.no_grad():
        before = lm.model(input_ids).logits
    capture(lm, input_ids)
    assert hooks(lm.model) == 0
    with torch.no_grad():
        assert torch.equal(lm.model(input_ids).logits, before)


def test_hooks_are_removed_after_an_exception(tiny: Callable[..., LanguageModel]) -> None:
    lm = tiny("gpt2")
    with pytest.raises(IndexError):
        capture(lm, torch.full((1, 4), 10_000))
    assert hooks(lm.model) == 0


def test_a_site_that_never_runs_is_named(tiny: Callable[..., LanguageModel], input_ids: Tensor) -> None:
    lm = tiny("gpt2")
    lm.model.spare = nn.Linear(1, 1)
    lm.sites[1] = Site(1, "transformer.h.1.ln_2", "spare")
    with pytest.raises(UserError, match="'spare' never ran"):
        capture(lm, input_ids)
    assert hooks(lm.model) == 0


class Wrapped(nn.Module):
    """An MLP that takes its input by keyword and returns a tuple, as some remote models do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, None]:
        return self.inner(hidden_states), None


def test_keyword_inputs_and_tuple_outputs(tiny: Callable[..., LanguageModel], input_ids: Tensor) -> None:
    lm = tiny("gpt2")
    expected = capture(lm, input_ids)
    for block in blocks(lm):
        wrapped = Wrapped(nn.Sequential(block.ln_2, block.mlp))
        block.site = wrapped
        block.ln_2 = nn.Identity()
        block.mlp = ByKeyword(wrapped)
    lm.sites[:] = [Site(layer, f"transformer.h.{layer}.site", f"transformer.h.{layer}.site") for layer in range(3)]
    assert torch.allclose(capture(lm, input_ids), expected, atol=1e-6)


class ByKeyword(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(hidden_states=x)[0]


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
def test_kept_rows_in_storage_dtype_are_those_of_the_whole(
    tiny: Callable[..., LanguageModel], input_ids: Tensor, dtype: torch.dtype | None
) -> None:
    lm, keep = tiny("gpt2"), torch.ones_like(input_ids, dtype=torch.bool)
    keep[:, 0] = keep[0, 3:6] = keep[1, -1] = keep[2] = False
    whole = capture(lm, input_ids)
    assert torch.equal(capture(lm, input_ids, keep.numpy(), dtype), whole[keep].to(dtype or whole.dtype))
    assert capture(lm, input_ids, keep.numpy() & False).shape == (0, *whole.shape[2:])


def test_flattened_tokens_whose_shape_would_broadcast(tiny: Callable[..., LanguageModel]) -> None:
    lm = tiny("opt")
    ids = torch.randint(0, 256, (2, lm.d_model + 1), generator=torch.Generator().manual_seed(1))
    keep = torch.ones_like(ids, dtype=torch.bool)
    keep[:, 0] = False
    captured = capture(lm, ids, keep.numpy())
    with torch.no_grad():
        for layer, block in enumerate(blocks(lm)):
            expected = mlp_branch(lm, block, captured[:, 0, layer])
            assert torch.allclose(captured[:, 1, layer], expected, atol=1e-5, rtol=1e-4)


class Changed(nn.Module):
    """Returns something else than its inner module does."""

    def __init__(self, inner: nn.Module, change: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.inner, self.change = inner, change

    def forward(self, x: Tensor) -> object:
        return self.change(self.inner(x))


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda y: y[..., :8], r"\(3, 10, 8\) torch\.float32"),
        (lambda y: y[..., :1], r"\(3, 10, 1\) torch\.float32"),
        (lambda y: y[:, -1], r"\(3, 16\) torch\.float32"),
        (lambda y: y.transpose(0, 1), r"\(10, 3, 16\) torch\.float32"),
        (lambda y: y.int(), r"\(3, 10, 16\) torch\.int32"),
        (lambda y: {"output": y}, "dict"),
    ],
)
def test_values_of_another_shape_or_dtype_are_refused_by_site(
    tiny: Callable[..., LanguageModel], input_ids: Tensor, change: Callable[[Tensor], object], found: str
) -> None:
    lm = tiny("gpt2")
    blocks(lm)[1].mlp = Changed(blocks(lm)[1].mlp, change)
    message = rf"hook site 'transformer\.h\.1\.mlp': found {found}, wanted \(3, 10, 16\)"
    with pytest.raises(UserError, match=message):
        capture(lm, input_ids)
    with pytest.raises(UserError, match=message):
        run_with_mlps(lm, input_ids, input_ids != 256, lambda layer, x: x)
    assert hooks(lm.model) == 0


def test_an_output_before_its_input_is_refused(tiny: Callable[..., LanguageModel], input_ids: Tensor) -> None:
    lm = tiny("opt")
    for block in blocks(lm):
        block.do_layer_norm_before = False  # as in OPT-350m
    with pytest.raises(UserError, match=r"layers\.0\.fc2' runs before 'model\.decoder\.layers\.0\.final_layer_norm'"):
        capture(lm, input_ids)
