"""Load the language model that is explained: weights, tokenizer and hook sites."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from clt.config import PACKAGE, LMConfig
from clt.errors import UserError
from clt.lm.sites import Site, find_sites

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ASSETS = PACKAGE / "assets"  # the embedded language model and its text


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
    source, gguf = locate(config.model)
    model, tokenizer = _load_pretrained(config, source, gguf)
    _fuse_gelu(model)
    model = model.to(device).eval().requires_grad_(False)  # type: ignore[arg-type]
    text_config = model.config.get_text_config()  # a multimodal model's language part
    count = text_config.num_hidden_layers
    layers = list(range(count)) if config.layers is None else config.layers
    if layers[-1] >= count:  # they ascend
        raise UserError(
            f"lm.layers={layers} does not fit {config.model!r}, which has {count} layers: wanted numbers up to "
            f"{count - 1}, or null for all of them"
        )
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


def _load_pretrained(
    config: LMConfig, source: str, gguf: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"revision": config.revision, "trust_remote_code": False}
    if gguf is not None:
        options["gguf_file"] = gguf
        missing = [package for package in ("gguf", "accelerate") if importlib.util.find_spec(package) is None]
        if missing:
            raise UserError(
                f"lm.model={config.model!r} is a GGUF file and needs {' and '.join(missing)}: "
                "pip install 'clt-trainer[gguf]'"
            )
    what = "the model"
    try:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, config.dtype), **options)
        what = "the tokenizer"
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"{what} of lm.model={config.model!r} could not be loaded: {first_line(error)} Check the spelling; "
            "a gated model needs `hf auth login`, a hub id the network; without it give a local directory, a .gguf "
            "file or `embedded`"
        ) from error
    # Transformers makes an empty tokenizer of a directory that has none, and says nothing.
    if not tokenizer("text", add_special_tokens=False)["input_ids"] or len(tokenizer) < 2:
        raise UserError(
            f"the tokenizer of lm.model={config.model!r} is empty: its files are missing from {source}; save it there "
            "with tokenizer.save_pretrained"
        )
    return model, tokenizer


def first_line(error: Exception) -> str:
    """The first line of another library's error."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def bos_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id that starts every document and window: bos, else eos, else None (the tokenizer has neither)."""
    return next((id for id in (tokenizer.bos_token_id, tokenizer.eos_token_id) if isinstance(id, int)), None)


def hash_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of everything that decides which ids a text becomes; equal for two loads of the same tokenizer."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = {"vocabulary": tokenizer.get_vocab()} if backend is None else json.loads(backend.to_str())
    for option in ("truncation", "padding"):  # set by the last call of the tokenizer; they do not define it
        content.pop(option, None)
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, sorted(tokenizer.all_special_ids)]
    return hashlib.sha256(json.dumps([content, special], sort_keys=True).encode()).hexdigest()
