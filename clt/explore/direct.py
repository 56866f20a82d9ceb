"""What a feature does to the logits directly: all that it writes, through the final norm and the unembedding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from clt.errors import UserError
from clt.lm.load import LanguageModel, special_ids
from clt.model.transcoder import CrossLayerTranscoder

_LOGITS = 1 << 26  # at once, in float32
_FINAL_NORMS = (
    "transformer.ln_f",  # GPT-2
    "model.norm",
    "model.decoder.final_layer_norm",  # OPT
    "gpt_neox.final_layer_norm",
    "model.language_model.norm",  # Gemma 3, multimodal
)


class Logits(NamedTuple):
    """Tokens by the change of their logits, for each of F features: numpy, the largest change first."""

    top: np.ndarray  # (F, m) ids
    top_values: np.ndarray  # (F, m)
    bottom: np.ndarray  # (F, m), the most suppressed first
    bottom_values: np.ndarray


def final_norm(lm: LanguageModel) -> str | None:
    """The path of the norm before the unembedding; None for a model that has none, or an unknown one."""
    names = dict(lm.model.named_modules(remove_duplicate=False))
    return next((path for path in _FINAL_NORMS if names.get(path) is not None), None)


def softcap(lm: LanguageModel) -> float | None:
    """c, where the model's logits are c * tanh(logits / c). It keeps their order."""
    return getattr(lm.model.config.get_text_config(), "final_logit_softcapping", None)


@torch.no_grad()
def direct_logits(lm: LanguageModel, transcoder: CrossLayerTranscoder, count: int) -> Iterator[Logits]:
    """For each layer the `count` tokens whose logits its features raise most, and lower most.

    A feature of layer s that is 1 adds d = sum_t W_dec[s -> t] * sd_out[t] to the last residual stream, and up to the
    norm's scale, which depends on the token, unembed @ (gain * (d - mean(d))) to the logits; an RMS norm leaves out the
    mean. The model's later attention and MLPs are not followed, nor is its softcap. Tokens without a text are left out.
    Raises UserError when the unembedding does not read the residual stream.
    """
    unembed: Any = lm.model.get_output_embeddings()
    weight = unembed.weight.float()[: len(lm.tokenizer)]  # (V, D)
    if weight.shape[1] != lm.d_model:
        raise UserError(
            f"the unembedding of {lm.name!r} reads {weight.shape[1]} numbers, wanted the residual stream's {lm.d_model}"
        )
    weight = weight * _gain(lm)
    if isinstance(_norm(lm), nn.LayerNorm):
        weight = weight - weight.mean(1, keepdim=True)
    block = max(1, _LOGITS // len(weight))
    for s, decoder in enumerate(transcoder.W_dec):  # (F, T, D)
        sd = transcoder.normalization.target_sd[s : s + decoder.shape[1]]
        parts = []
        for features in (decoder * sd).sum(1).split(block):
            logits = features.to(weight.device) @ weight.T
            top, bottom = logits.topk(count), logits.topk(count, largest=False)
            parts.append((top.indices, top.values, bottom.indices, bottom.values))
        yield Logits(*(torch.cat(arrays).cpu().numpy() for arrays in zip(*parts)))


def _norm(lm: LanguageModel) -> nn.Module | None:
    path = final_norm(lm)
    return None if path is None else lm.model.get_submodule(path)


def _gain(lm: LanguageModel) -> Tensor | float:
    """What the final norm multiplies each dimension by, (D,)."""
    norm = _norm(lm)
    if norm is None:
        return 1.0
    if isinstance(norm, nn.LayerNorm):
        return 1.0 if norm.weight is None else norm.weight.float()
    # The root mean square of ones is 1: an RMS norm turns them into its gain, which with Gemma is not its weight.
    return norm(torch.ones(lm.d_model, device=lm.device, dtype=lm.model.dtype)).float()


def token_texts(lm: LanguageModel) -> list[str]:
    """The text of every token id, in the way of circuit-tracer's page.

    It shows line ends and tabs as ⏎, ↵ and →, and puts bytes, which stand as `\\xe2`, together to characters.
    """
    tokenizer: Any = lm.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    bytewise = backend is not None and '"ByteLevel"' in backend.to_str()
    special, alphabet = set(special_ids(tokenizer)), _byte_of_character()
    texts = []
    for id, token in enumerate(tokenizer.convert_ids_to_tokens(range(len(tokenizer)))):
        token = "" if token is None else token
        if id not in special and bytewise and all(character in alphabet for character in token):
            token = bytes(alphabet[character] for character in token).decode(errors="backslashreplace")
        elif id not in special:
            token = token.replace("▁", " ")  # SentencePiece's space
            if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                token = bytes([int(token[3:5], 16)]).decode(errors="backslashreplace")
        texts.append(token.replace("\n", "⏎").replace("\t", "→").replace("\r", "↵"))
    return texts


def _byte_of_character() -> dict[str, int]:
    """The characters by which byte-level tokenizers write bytes: printable ones as they are, the others from 256 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
