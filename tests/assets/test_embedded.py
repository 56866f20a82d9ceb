"""The embedded model and text: small, loadable with plain transformers, intact, and better than a trigram."""

import gzip
import hashlib
import json

import pytest
import torch
import transformers

from clt.assets.reproduce import EOT, MODEL, TEXT, WINDOW, heldout_windows, read_docs, tidy, window_nats

CARD = json.loads((MODEL / "card.json").read_text())


def test_model_is_small() -> None:
    assert sum(p.stat().st_size for p in MODEL.iterdir()) < 8_000_000


def test_loads_with_plain_transformers() -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL)
    assert type(model) is transformers.GPT2LMHeadModel
    c = model.config
    assert (c.n_layer, c.n_embd, c.n_head, c.n_positions) == (4, 128, 4, WINDOW)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert sum(p.numel() for p in model.parameters()) == CARD["parameters"]
    tok = transformers.AutoTokenizer.from_pretrained(MODEL)
    assert len(tok) == c.vocab_size
    assert tok.bos_token == tok.eos_token == EOT
    assert tok.bos_token_id == c.bos_token_id == c.eos_token_id == 0
    assert tok(EOT).input_ids == [0]


@pytest.mark.parametrize("text", ["", " Two  spaces\n\nand\ttabs ", "naïve “quotes” — 鯨 🐋", "don't , stop ."])
def test_tokenizer_round_trips(text: str) -> None:
    tok = transformers.AutoTokenizer.from_pretrained(MODEL)
    assert tok.decode(tok(text).input_ids) == text


def test_beats_the_trigram_on_heldout_text() -> None:
    windows = heldout_windows()
    assert int((windows[:, 1:] >= 0).sum()) == CARD["heldout_tokens"]
    # 20 windows spread over the held-out documents; the card's figures are for all of them.
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL).eval()
    loss = window_nats(model, windows[15::30][:20]).mean().item()
    assert CARD["heldout_nats_per_token"] < CARD["trigram_nats_per_token"]
    assert loss < CARD["trigram_nats_per_token"]
    assert loss == pytest.approx(CARD["heldout_nats_per_token"], abs=0.25)


def test_heldout_documents_are_not_trained_on() -> None:
    train, heldout = list(read_docs("train")), list(read_docs("heldout"))
    assert not {d["id"] for d in train} & {d["id"] for d in heldout}
    assert not {d["text"] for d in train} & {d["text"] for d in heldout}
    assert {d["id"].split("/")[0] for d in heldout} == {"sotu", "moby-dick"}
    size = {name: sum(len(d["text"].encode()) for d in docs) for name, docs in (("train", train), ("held", heldout))}
    assert 0.03 < size["held"] / (size["train"] + size["held"]) < 0.07
    assert size["held"] == CARD["heldout_bytes"]
    assert all(d["text"] == tidy(d["text"]) for d in train + heldout)


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_text_is_the_recorded_one(split: str) -> None:
    packed = (TEXT / f"{split}.jsonl.gz").read_bytes()
    assert packed[4:8] == bytes(4)  # the gzip header carries no time
    assert hashlib.sha256(gzip.decompress(packed)).hexdigest() == CARD[f"{split}_sha256"]
