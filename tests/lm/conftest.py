"""Tiny random models of every supported architecture, with a real byte-level tokenizer."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn

from clt.config import LMConfig
from clt.lm.load import LanguageModel, load_language_model

BOS = "<|endoftext|>"
D = 16
_SIZES = {"hidden_size": D, "num_hidden_layers": 3, "num_attention_heads": 2, "max_position_embeddings": 64}
_GATED = {**_SIZES, "intermediate_size": 24, "num_key_value_heads": 1, "head_dim": 8}
_IDS = {"bos_token_id": 256, "eos_token_id": 256, "pad_token_id": None, "vocab_size": 257}
CONFIGS: dict[str, transformers.PretrainedConfig] = {
    "gpt2": transformers.GPT2Config(n_embd=D, n_layer=3, n_head=2, n_positions=64, **_IDS),
    "opt": transformers.OPTConfig(
        **_SIZES, ffn_dim=24, word_embed_proj_dim=D, dropout=0.0, **{**_IDS, "pad_token_id": 0}
    ),
    "llama": transformers.LlamaConfig(**_GATED, **_IDS),
    "mistral": transformers.MistralConfig(**_GATED, **_IDS),
    "qwen2": transformers.Qwen2Config(**{k: v for k, v in _GATED.items() if k != "head_dim"}, **_IDS),
    "qwen3": transformers.Qwen3Config(**_GATED, **_IDS),
    "gemma2": transformers.Gemma2Config(**_GATED, **_IDS),
    "gemma3_text": transformers.Gemma3TextConfig(**_GATED, **_IDS),
    "neox_parallel": transformers.GPTNeoXConfig(
        **_SIZES, intermediate_size=24, use_parallel_residual=True, **{**_IDS, "pad_token_id": 0}
    ),
    "neox_sequential": transformers.GPTNeoXConfig(
        **_SIZES, intermediate_size=24, use_parallel_residual=False, **{**_IDS, "pad_token_id": 0}
    ),
}
ARCHITECTURES = list(CONFIGS)


def byte_tokenizer(**special: str) -> transformers.PreTrainedTokenizerFast:
    """A byte-level tokenizer: ids 0..255 are bytes, the special tokens come after them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def randomise(model: torch.nn.Module) -> None:
    """Weights large enough that every part of a block matters; norms away from their trivial initial values."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = (1 + 0.3 * noise if "norm" in name or "ln_" in name else 0.3 * noise).to(parameter.dtype)


def blocks(lm: LanguageModel) -> nn.ModuleList:
    base = lm.model.base_model
    kind = lm.model.config.model_type
    return base.decoder.layers if kind == "opt" else base.h if kind == "gpt2" else base.layers


def mlp_branch(lm: LanguageModel, block: nn.Module, x: Tensor) -> Tensor:
    """norm -> mlp (-> post-norm), written out per architecture."""
    kind = lm.model.config.model_type
    if kind == "gpt2":
        return block.mlp(block.ln_2(x))
    if kind == "opt":
        return block.fc2(torch.relu(block.fc1(block.final_layer_norm(x))))
    if kind.startswith("gemma"):
        return block.post_feedforward_layernorm(block.mlp(block.pre_feedforward_layernorm(x)))
    return block.mlp(block.post_attention_layernorm(x))


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> Path:
    lines = "".join(json.dumps({"id": index, field: text}) + "\n" for index, text in enumerate(texts))
    if path.suffix == ".gz":
        with gzip.open(path, "wt") as file:
            file.write(lines)
    else:
        path.write_text(lines)
    return path


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function: architecture -> directory of a saved tiny model and its tokenizer."""
    made: dict[str, Path] = {}

    def directory(architecture: str) -> Path:
        if architecture not in made:
            made[architecture] = tmp_path_factory.mktemp(architecture)
            model = transformers.AutoModelForCausalLM.from_config(CONFIGS[architecture])
            randomise(model)
            model.save_pretrained(made[architecture])
            byte_tokenizer(bos_token=BOS, eos_token=BOS).save_pretrained(made[architecture])
        return made[architecture]

    return directory


@pytest.fixture(scope="session")
def tiny(model_directory: Callable[[str], Path]) -> Callable[..., LanguageModel]:
    """A function: (architecture, any field of LMConfig) -> the tiny model, loaded as a user's would be."""

    def load(architecture: str, **fields: object) -> LanguageModel:
        config = LMConfig(model=str(model_directory(architecture)))
        for name, value in fields.items():
            setattr(config, name, value)
        return load_language_model(config)

    return load


@pytest.fixture(params=ARCHITECTURES)
def lm(request: pytest.FixtureRequest, tiny: Callable[..., LanguageModel]) -> LanguageModel:
    """Every architecture in turn."""
    return tiny(request.param)


@pytest.fixture
def input_ids() -> torch.Tensor:
    """(3, 10) ids, a BOS first in every row."""
    ids = torch.randint(0, 256, (3, 10), generator=torch.Generator().manual_seed(1))
    ids[:, 0] = 256
    return ids
