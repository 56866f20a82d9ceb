"""Load the language model that is explained: weights, tokenizer and hook sites."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from clt.config import PACKAGE
from clt.cpu import multiplies_bf16
from clt.errors import UserError, tell
from clt.lm.sites import Site, find_sites
from clt.lm.spec import LMConfig

if TYPE_CHECKING:
    import numpy as np
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

ASSETS = PACKAGE / "assets"  # the embedded language model and its text
MOST_LAYERS = 1000  # of a language model; published ones have up to about 200
# Causal masks, rotary frequencies and position numbers, which are computed: older releases of transformers saved them.
_OLD_BUFFER = re.compile(r"(^|\.)(attn|attention)\.(masked_)?bias$|rotary_emb\.inv_freq$|(^|\.)position_ids$")


@dataclass(frozen=True)
class LanguageModel:
    """A Hugging Face causal language model in eval mode, whose parameters require no gradient."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    sites: list[Site]  # the hooked modules, one pair per chosen layer
    layers: list[int]  # the chosen layers, ascending
    d_model: int  # residual width D
    name: str  # what `lm.model` said
    revision: str | None  # commit hash of a model from the hub; None for local files
    tokenizer_hash: str  # of `hash_tokenizer`

    @property
    def device(self) -> torch.device:
        return self.model.device


def load_language_model(config: LMConfig, device: torch.device | str = "cpu") -> LanguageModel:
    """Load `config.model` in `config.dtype` onto `device`, with the hook sites of `config.layers`.

    Raises UserError when the model, its tokenizer, a layer or a hook site cannot be found or loaded.
    """
    if config.dtype == "bfloat16" and torch.device(device).type == "cpu" and not multiplies_bf16():
        tell("warning: this CPU has no units for bfloat16, so the language model is slow; set lm.dtype=float32")
    source, gguf = locate(config.model)
    model, tokenizer = _load_pretrained(config, source, gguf)
    _fuse_gelu(model)
    model = model.to(device).eval().requires_grad_(False)  # type: ignore[arg-type]
    text_config = model.config.get_text_config()  # a multimodal model's language part
    layers = chosen_layers(config, text_config.num_hidden_layers)
    return LanguageModel(
        model=model,
        tokenizer=tokenizer,
        sites=find_sites(model, layers, config.input_site, config.output_site),
        layers=layers,
        d_model=text_config.hidden_size,
        name=config.model,
        revision=_commit(source, config.revision),
        tokenizer_hash=hash_tokenizer(tokenizer),
    )


def chosen_layers(config: LMConfig, count: int) -> list[int]:
    """The layers to explain, ascending, of a model that has `count`. Raises UserError for one that it lacks."""
    layers = list(range(count)) if config.layers is None else config.layers
    if layers[-1] >= count:  # they ascend
        raise UserError(
            f"lm.layers={layers} does not fit {config.model!r}, which has {count} layers: wanted numbers up to "
            f"{count - 1}, or null for all of them"
        )
    return layers


def _fuse_gelu(model: PreTrainedModel) -> None:
    """Replace GPT-2's activation, eight elementwise passes in transformers, by torch's single kernel for it."""
    from transformers.activations import NewGELUActivation

    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, torch.nn.GELU("tanh"))


def _commit(source: str, revision: str | None) -> str | None:
    """The commit of a hub model, as the local cache names it after loading; None for local files."""
    from huggingface_hub import try_to_load_from_cache

    if Path(source).exists():
        return None
    file = try_to_load_from_cache(source, "config.json", revision=revision)
    return Path(file).parent.name if isinstance(file, str) else None


def locate(name: str) -> tuple[str, str | None]:
    """Find `lm.model`: (directory or hub id, name of the .gguf file in that directory or None). Raises UserError."""
    if name == "embedded":
        return str(ASSETS / "model"), None
    path = _in_package(name) if name.startswith("package:") else Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"lm.model={name!r}: {path} does not exist; wanted an existing .gguf file")
        return str(path.parent), path.name
    if path.is_file():
        raise UserError(f"lm.model={name!r} is a file; wanted a model directory, a .gguf file or a hub id")
    return (str(path) if path.is_dir() else name), None


def _in_package(name: str) -> Path:
    """The path of `package:NAME/FILE`, without importing the package, which would run its code."""
    package, _, file = name.removeprefix("package:").partition("/")
    if not package or not file:
        raise UserError(f"lm.model={name!r} is not of the form package:NAME/FILE.gguf")
    # Only a top-level name is looked up: for a dotted one find_spec would import the parent.
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None:
        raise UserError(f"lm.model={name!r}: no installed package is called {package!r}; pip install it")
    for folder in spec.submodule_search_locations or []:
        if (Path(folder) / file).exists():
            return Path(folder) / file
    raise UserError(f"lm.model={name!r}: the installed package {package!r} has no file {file!r}")


def load_settings(
    config: LMConfig, source: str, gguf: str | None, *, local: bool = False
) -> tuple[PretrainedConfig, dict[str, Any]]:
    """The model's own config, as transformers has it, and the options for loading the rest of the model.

    source, gguf: of `locate`; local: without asking a hub. Raises UserError.
    """
    from transformers import AutoConfig

    options: dict[str, Any] = {"revision": config.revision, "trust_remote_code": False}
    if gguf is not None:
        options["gguf_file"] = gguf
        missing = [package for package in ("gguf", "accelerate") if importlib.util.find_spec(package) is None]
        if missing:
            raise UserError(
                f"lm.model={config.model!r} is a GGUF file and needs {' and '.join(missing)}: "
                "pip install 'clt-trainer[gguf]'"
            )
    with _loading("the config", config.model):
        settings = AutoConfig.from_pretrained(source, local_files_only=local, **options)
        count = settings.get_text_config().num_hidden_layers
    if type(count) is not int or not 1 <= count <= MOST_LAYERS:  # each is made before the weights are looked at
        raise UserError(
            f"the config of lm.model={config.model!r} asks for {count!r:.40} layers, wanted 1 to {MOST_LAYERS}: mend "
            "its config.json"
        )
    return settings, options


def _load_pretrained(
    config: LMConfig, source: str, gguf: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    settings, options = load_settings(config, source, gguf)
    with _loading("the model", config.model):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            config=settings,
            dtype=getattr(torch, config.dtype),
            use_safetensors=True,  # never a pickle, which can run code
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # `_check_weights` refuses them, and names them
            **options,
        )
    model, report = loaded
    _check_weights(config.model, report)
    with _loading("the tokenizer", config.model):
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        empty = not tokenizer("text", add_special_tokens=False)["input_ids"] or len(tokenizer) < 2
    if empty:  # transformers makes such a tokenizer of a directory that has none, and says nothing
        raise UserError(
            f"the tokenizer of lm.model={config.model!r} is empty: its files are missing from {source}; save it there "
            "with tokenizer.save_pretrained"
        )
    return model, tokenizer


@contextmanager
def _loading(what: str, name: str) -> Iterator[None]:
    """Raise UserError for whatever transformers raises: on files that it does not expect, it fails in many ways."""
    try:
        yield
    except Exception as error:
        raise UserError(
            f"{what} of lm.model={name!r} could not be loaded: {type(error).__name__}: {first_line(error)} Check the "
            "spelling and the files (weights: safetensors or GGUF, never a pickle); a gated model needs `hf auth "
            "login`, a hub id the network; without it give a local directory, a .gguf file or `embedded`"
        ) from error


def _check_weights(name: str, report: dict[str, Any]) -> None:
    """Raise UserError unless the files held exactly the model's tensors: transformers makes up those that are missing.

    report: what `from_pretrained` returns as its loading info. Buffers that older releases saved do not count.
    """
    missing = sorted(report["missing_keys"])
    unexpected = sorted(key for key in report["unexpected_keys"] if not _OLD_BUFFER.search(key))
    shapes = sorted(
        f"{key} (found {list(found)}, wanted {list(wanted)})" for key, found, wanted in report["mismatched_keys"]
    )
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    odd = [f"{len(keys)} {kind}: {_some(keys)}" for kind, keys in kinds.items() if keys]
    if not odd:
        return
    remedy = "save them again from a model of the class that its config.json names"
    # A training wrapper, such as torch.compile or DDP, puts its name before all keys.
    wrapped = next(((key, end) for key in unexpected for end in missing if key.endswith(end)), None)
    if wrapped is not None:
        prefix = wrapped[0].removesuffix(wrapped[1])
        remedy = (
            f"strip the prefix {prefix!r} from the keys, with load_file and save_file of safetensors.torch: "
            f"save_file({{k.removeprefix({prefix!r}): v for k, v in load_file(f).items()}}, f, {{'format': 'pt'}})"
        )
    raise UserError(f"the weights of lm.model={name!r} do not fit the model; {'; '.join(odd)}. Remedy: {remedy}")


def _some(keys: list[str]) -> str:
    """The first few keys."""
    return ", ".join(keys[:4]) + (", ..." if len(keys) > 4 else "")


def first_line(error: Exception) -> str:
    """The first line of another library's error, with the next one if it ends in a colon; at most 300 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])[:300]


def bos_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id that starts every document and window: bos, else eos, else None (the tokenizer has neither)."""
    return next((id for id in (tokenizer.bos_token_id, tokenizer.eos_token_id) if isinstance(id, int)), None)


def special_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of special tokens, ascending: those with a role, such as bos, and those only declared special."""
    added = (id for id, token in tokenizer.added_tokens_decoder.items() if token.special)
    return sorted({*tokenizer.all_special_ids, *added})


def check_ids(lm: LanguageModel, tokens: np.ndarray) -> None:
    """Raise UserError for a token id that the model has no embedding of: on a GPU it would end the process."""
    embedding: Any = lm.model.get_input_embeddings()
    rows, id = len(embedding.weight), int(tokens.max())
    if id >= rows:
        raise UserError(
            f"token {id} ({lm.tokenizer.convert_ids_to_tokens(id)!r}) of the text is beyond the {rows} rows of the "
            f"embedding of {lm.name!r}: its tokenizer is another model's, or has a token that was added without "
            "model.resize_token_embeddings; save the model with the tokenizer that it was trained with"
        )


def hash_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of everything that decides which ids a text becomes; equal for two loads of the same tokenizer."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = {"vocabulary": tokenizer.get_vocab()} if backend is None else json.loads(backend.to_str())
    for option in ("truncation", "padding"):  # set by the last call of the tokenizer; they do not define it
        content.pop(option, None)
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, special_ids(tokenizer)]
    return hashlib.sha256(json.dumps([content, special], sort_keys=True).encode()).hexdigest()
