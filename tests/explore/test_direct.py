"""Logits by the direct path, against the model's own norm and unembedding; and the texts of tokens."""

from dataclasses import replace

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from clt.config import LMConfig
from clt.errors import UserError
from clt.explore.direct import direct_logits, final_norm, softcap, token_texts
from clt.lm.load import load_language_model
from clt.model.spec import CLTConfig
from clt.model.transcoder import CrossLayerTranscoder

D, V, L, F = 16, 64, 2, 6
SIZES = {"vocab_size": V, "hidden_size": D, "num_hidden_layers": L, "num_attention_heads": 2}
GATED = {**SIZES, "intermediate_size": 24, "num_key_value_heads": 2, "head_dim": 8}
CONFIGS = {
    "gpt2": transformers.GPT2Config(vocab_size=V, n_embd=D, n_layer=L, n_head=2, n_positions=32),
    "llama": transformers.LlamaConfig(**GATED),
    "gemma2": transformers.Gemma2Config(**GATED, final_logit_softcapping=30.0),
    "opt": transformers.OPTConfig(**SIZES, ffn_dim=24, word_embed_proj_dim=D),
    "neox": transformers.GPTNeoXConfig(**SIZES, intermediate_size=24),
}
NORMS = {"gpt2": "transformer.ln_f", "opt": "model.decoder.final_layer_norm", "neox": "gpt_neox.final_layer_norm"}


def tokenizer(vocabulary: list[str], pre_tokenizer=None) -> transformers.PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({token: id for id, token in enumerate(vocabulary)}, unk_token=vocabulary[0]))
    if pre_tokenizer is not None:
        backend.pre_tokenizer = pre_tokenizer
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=vocabulary[0])


@pytest.fixture(params=list(CONFIGS))
def lm(request, tmp_path):
    """A model of each kind of final norm, with random gains; five rows of the unembedding have no token."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[request.param])
    model.get_submodule(NORMS.get(request.param, "model.norm")).weight.data.normal_()
    model.get_output_embeddings().weight.data.normal_()
    model.save_pretrained(tmp_path)
    tokenizer([f"t{id}" for id in range(V - 5)]).save_pretrained(tmp_path)
    return load_language_model(LMConfig(model=str(tmp_path)))


def test_the_direct_path_is_that_through_the_models_own_modules(lm):
    kind = lm.model.config.model_type
    path = NORMS.get("neox" if kind == "gpt_neox" else kind, "model.norm")
    assert final_norm(lm) == path
    assert softcap(lm) == (30.0 if kind == "gemma2" else None)
    transcoder = CrossLayerTranscoder(L, D, CLTConfig(d_features=F))
    generator = torch.Generator().manual_seed(1)
    transcoder.normalization.target_sd.copy_(torch.rand(L, 1, generator=generator) + 0.5)
    norm, unembed = lm.model.get_submodule(path), lm.model.get_output_embeddings()
    bias = getattr(norm, "bias", None)
    offset = 0 if bias is None else unembed.weight @ bias
    for s, found in enumerate(direct_logits(lm, transcoder, 4)):
        for f in range(F):
            written = torch.zeros(D)
            for t in range(s, L):
                written += transcoder.W_dec[s][f, t - s].detach() * transcoder.normalization.target_sd[t]
            spread = written - written.mean() if isinstance(norm, torch.nn.LayerNorm) else written
            # Large enough that the norm's epsilon does not count; its scale is undone.
            logits = ((unembed(norm(1e4 * written)) - offset) * spread.square().mean().sqrt())[: V - 5]
            for ids, values, largest in ((found.top[f], found.top_values[f], True), (found.bottom[f], found.bottom_values[f], False)):  # fmt: skip  # noqa: E501
                wanted = logits.topk(4, largest=largest)
                assert ids.tolist() == wanted.indices.tolist()
                torch.testing.assert_close(torch.from_numpy(values), wanted.values, rtol=1e-4, atol=1e-5)


def test_an_unembedding_of_another_width_is_refused(lm):
    transcoder = CrossLayerTranscoder(L, D, CLTConfig(d_features=F))
    with pytest.raises(UserError, match="reads 16 numbers, wanted the residual stream's 17"):
        next(direct_logits(replace(lm, d_model=17), transcoder, 4))


def texts_of(vocabulary, pre_tokenizer=None):
    class LM:
        tokenizer = None

    LM.tokenizer = tokenizer(vocabulary, pre_tokenizer)
    return token_texts(LM)  # type: ignore[arg-type]


def test_texts_of_a_byte_level_vocabulary():
    """Ġ is a space, Ċ a line end; â alone is the first of the three bytes of a dash."""
    found = texts_of(["<s>", "the", "Ġthe", "Ċ", "ĉ", "â", "âĢĶ", "aâ", "é"], pre_tokenizers.ByteLevel())
    assert found == ["<s>", "the", " the", "⏎", "→", "\\xe2", "—", "a\\xe2", "\\xe9"]


def test_texts_of_a_sentencepiece_vocabulary():
    found = texts_of(["<s>", "the", "▁the", "<0x0A>", "<0xE2>", "é", "▁▁x"])
    assert found == ["<s>", "the", " the", "⏎", "\\xe2", "é", "  x"]
