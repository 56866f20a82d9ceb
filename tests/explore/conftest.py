"""A short run, what fires on 500 tokens of its held-out text, and the features made of that."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from clt.config import Config, load_config
from clt.explore.features import make_features
from clt.explore.files import Features
from clt.lm.load import LanguageModel, load_language_model
from clt.model.transcoder import CrossLayerTranscoder

TOKENS, T = 500, 16
WINDOWS = -(-TOKENS // T)


class Made(NamedTuple):
    config: Config
    run: Path
    lm: LanguageModel
    transcoder: CrossLayerTranscoder
    features: Features


@pytest.fixture(scope="session")
def made(train: Callable) -> Made:
    run = train("clt.d_features=10", "clt.window=2", "clt.skip=true").dir
    config = load_config(run / "config.yaml")
    features = make_features(config, run, 10, "heldout", TOKENS, progress=False)
    transcoder = CrossLayerTranscoder.from_pretrained(run / "checkpoints" / "step_00000010").requires_grad_(False)
    return Made(config, run, load_language_model(config.lm), transcoder, features)


@pytest.fixture
def bytes_of() -> Callable[[Path], dict[str, bytes]]:
    """The files of a directory by name."""
    return lambda directory: {file.name: file.read_bytes() for file in sorted(directory.iterdir())}


@pytest.fixture(scope="session")
def text(made: Made) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, documents and keep, each (windows, T), of the text that `made` read."""
    from itertools import islice

    from clt.lm.text import windows

    found = islice(windows(made.config.text, "heldout", made.lm, T), WINDOWS)
    return tuple(np.stack(arrays) for arrays in zip(*found))
