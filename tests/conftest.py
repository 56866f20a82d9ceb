"""A small language model of random weights with text for it, and activation stores extracted from it."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clt.config import Config, load_config

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for processes that tests start: threads of small models only wait


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long files come first: started last, one would keep the others waiting.

    They are those with a test that is allowed more time, and those of several ranks and of the server.
    """
    long = {item.path for item in items if item.get_closest_marker("timeout")}
    long |= {item.path for item in items if item.path.parent.name in ("distributed", "server")}
    items.sort(key=lambda item: item.path not in long)


@pytest.fixture(autouse=True)
def signals_as_they_were() -> Iterator[None]:
    """A run that was told to stop leaves its signals ignored; processes that later tests start would inherit that."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Threads of models this small only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture
def no_gpu_for_several_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide this machine's GPUs, from child processes too, when they are fewer than the four ranks that tests start."""
    if torch.cuda.device_count() < 4:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


OPTIONAL = "triton nnsight wandb starlette uvicorn httptools uvloop datasets gguf accelerate xdist"
HIDING = f"""
from importlib.machinery import PathFinder
find, hidden = PathFinder.find_spec, set({OPTIONAL.split()})
absent = lambda name: name.partition(".")[0] in hidden
PathFinder.find_spec = classmethod(lambda _, name, *rest: None if absent(name) else find(name, *rest))
"""


@pytest.fixture(scope="session")
def bare_environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of Python processes in which the optional packages are not installed."""
    folder = tmp_path_factory.mktemp("bare")
    (folder / "sitecustomize.py").write_text(HIDING)
    root = Path(__file__).parent.parent
    return os.environ | {"PYTHONPATH": f"{folder}:{root}"}


@pytest.fixture(scope="session")
def launch_env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The variables with which launch.sh takes this environment for one that it has installed itself."""
    root, venv = Path(__file__).parent.parent, tmp_path_factory.mktemp("venv")
    for entry in Path(sys.prefix).iterdir():
        (venv / entry.name).symlink_to(entry)
    (venv / "installed").unlink(missing_ok=True)
    wanted = hashlib.sha256(b"".join((root / name).read_bytes() for name in ("pyproject.toml", "constraints.txt")))
    (venv / "installed").write_text(f"test {wanted.hexdigest()[:16]}\n")
    return {"VENV": str(venv)}


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


@pytest.fixture(scope="session")
def lm_overrides(lm_path: Path) -> list[str]:
    """The keys that name that model and its text, and stores of 1000 and 150 rows in groups of 3 shards of 64."""
    return [
        f"lm.model={lm_path}", "lm.context=16", "lm.batch_windows=4",
        f"text.source={lm_path / 'text.jsonl'}", "text.heldout_documents=20",
        "data.train_tokens=1000", "data.heldout_tokens=150", "data.shard_rows=64", "data.open_shards=3",
    ]  # fmt: skip


@pytest.fixture
def config(lm_overrides: list[str], tmp_path: Path) -> Callable[..., Config]:
    """config(key=value strings) for extracting from that model into `tmp_path`/stores."""

    def make(*overrides: str) -> Config:
        return load_config(None, [*lm_overrides, f"data.store={tmp_path / 'stores'}", *overrides])

    return make


@pytest.fixture(scope="session")
def stores(lm_overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the extracted stores `train` and `heldout`; read it only."""
    from clt.data.extract import extract

    path = tmp_path_factory.mktemp("stores")
    config = load_config(None, [*lm_overrides, f"data.store={path}"])
    extract(config, "train", progress=False)
    extract(config, "heldout", progress=False)
    return path


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """small_disk(size) mounts a file system of that many bytes, or gives the one that is mounted that size."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(size: int) -> Path:
        how = f"remount,size={size}" if disk.is_mount() else f"size={size}"
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", how, "none", str(disk)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"a small file system cannot be mounted here: {done.stderr.strip()}")
        return disk

    yield mount
    if disk.is_mount():
        subprocess.run(["umount", "--lazy", str(disk)], check=True)  # whatever a failed test still has open


@pytest.fixture
def layers_at_once(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """The most layers of W_enc, and of W_dec, that were in memory at once of those that were read from files."""
    from clt.files import TensorFiles

    read, most = TensorFiles.read, {"W_enc": 0, "W_dec": 0}
    alive: dict[str, list[tuple[weakref.ref, int]]] = {"W_enc": [], "W_dec": []}

    def counted(self: TensorFiles, name: str, index: int | None = None, **options: Any) -> torch.Tensor:
        tensor, kind = read(self, name, index, **options), name.partition(".")[0]
        if kind in alive:
            layers = len(tensor) if kind == "W_enc" and index is None else 1
            alive[kind] = [(ref, n) for ref, n in alive[kind] if ref() is not None] + [(weakref.ref(tensor), layers)]
            most[kind] = max(most[kind], sum(n for _, n in alive[kind]))
        return tensor

    monkeypatch.setattr(TensorFiles, "read", counted)
    return most


@pytest.fixture(scope="session")
def train_overrides(lm_overrides: list[str], stores: Path) -> list[str]:
    """An empty config file and overrides for ten short steps on those stores; `run.dir` is left to the test.

    In float32 whatever the machine multiplies natively, so that weights can be compared closely.
    """
    defaults = stores / "defaults.yaml"
    defaults.touch()
    return [
        str(defaults), *lm_overrides, f"data.store={stores}", "clt.d_features=24", "train.steps=10",
        "train.batch_tokens=60", "train.compile=false", "train.precision=fp32", "eval.replacement_tokens=64",
        "log.every=5",
    ]  # fmt: skip


class Run:
    """What a short training run left behind."""

    def __init__(self, config: Config) -> None:
        from safetensors.torch import load_file

        from clt.train import checkpoint
        from clt.train.logger import read_metrics

        self.dir = Path(config.run.dir)
        last = checkpoint.steps(self.dir / "checkpoints")[-1]
        self.weights = load_file(self.dir / "checkpoints" / f"step_{last:08d}" / "model.safetensors")
        self.metrics = read_metrics(self.dir)
        self.summary = json.loads((self.dir / "summary.json").read_text())


@pytest.fixture(scope="session")
def train(train_overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """train(*overrides) -> Run: ten steps of train_ddp.main in this process, in a fresh run directory.

    With `plots=True` it ends with the plots too, which take eight times as long as the steps.
    """
    import train_ddp
    from clt.train import report

    def run(*overrides: str, plots: bool = False) -> Run:
        directory = tmp_path_factory.mktemp("run")
        config = load_config(train_overrides[0], [*train_overrides[1:], f"run.dir={directory}", *overrides])
        with pytest.MonkeyPatch.context() as patch:
            if not plots:
                patch.setattr(report, "write_plots", lambda *_: None)
            train_ddp.main(config, prepare=False)
        return Run(config)

    return run
