"""A store of known rows, and a small language model of random weights with text for it."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from clt.config import Config, load_config
from clt.data.store import DiscBuffer
from clt.data.writer import write_store

ROWS, SHARD_ROWS, L, D = 53, 10, 3, 4


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads of a model this small only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tensor() -> torch.Tensor:
    """(53, 2, 3, 4) float16 rows."""
    return torch.randn(ROWS, 2, L, D, generator=torch.Generator().manual_seed(0)).half()


@pytest.fixture
def columns() -> dict[str, np.ndarray]:
    return {"token": np.arange(ROWS, dtype="i4") * 3, "position": np.arange(ROWS, dtype="i4") % 7,
            "document": np.arange(ROWS, dtype="i8") + 2**40}  # fmt: skip


@pytest.fixture
def store(tmp_path: Path, tensor: torch.Tensor, columns: dict[str, np.ndarray]) -> Path:
    """A store of `tensor` in six shards, the last one ragged."""
    write_store(tmp_path / "store", tensor, SHARD_ROWS, columns)
    return tmp_path / "store"


@pytest.fixture
def buffer(store: Path) -> DiscBuffer:
    return DiscBuffer(store)


@pytest.fixture(scope="session")
def lm_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a random GPT-2 of three layers, a BPE tokenizer, and `text.jsonl` of 120 documents."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("lm")
    random = np.random.default_rng(0)
    words = ["".join(random.choice(list("abcdefghij"), random.integers(2, 7))) for _ in range(60)]
    texts = [" ".join(random.choice(words, random.integers(20, 60))) for _ in range(120)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    fast.save_pretrained(path)
    torch.manual_seed(0)
    size = GPT2Config(
        vocab_size=len(fast), n_positions=32, n_embd=16, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=0
    )
    GPT2LMHeadModel(size).save_pretrained(path)
    (path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def config(lm_path: Path, tmp_path: Path) -> Callable[..., Config]:
    """config(key=value strings): extraction from that model to `tmp_path`/stores, in groups of 3 shards of 64 rows."""

    def make(*overrides: str) -> Config:
        return load_config(
            None,
            [
                f"lm.model={lm_path}", "lm.context=16", "lm.batch_windows=4",
                f"text.source={lm_path / 'text.jsonl'}", "text.heldout_documents=20",
                f"data.store={tmp_path / 'stores'}", "data.train_tokens=1000", "data.heldout_tokens=150",
                "data.shard_rows=64", "data.open_shards=3", *overrides,
            ],
        )  # fmt: skip

    return make
