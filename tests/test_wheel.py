"""What `pip install .` puts on a machine without this checkout: the commands and a trained transcoder work there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from clt.config import DEFAULT_CONFIG, load_config
from clt.model.spec import CLTConfig
from clt.model.transcoder import CrossLayerTranscoder
from clt.parsing import to_yaml

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """run(*python arguments) in an empty folder, where only the installed files are clt."""
    site, empty = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("empty")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    if "No matching distribution found for setuptools" in done.stderr:
        pytest.skip("no registry to take the build backend from")
    assert done.returncode == 0, done.stderr

    def run(*arguments: str) -> str:
        env = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
        result = subprocess.run([sys.executable, *arguments], cwd=empty, env=env, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout

    assert Path(run("-c", "import clt; print(clt.__file__)").strip()).is_relative_to(site)
    return run


def test_the_commands_find_the_default_config_and_the_presets(installed):
    assert installed("-m", "clt.cli", "config") == to_yaml(load_config(DEFAULT_CONFIG), docs=True)
    assert "COMMAND" in installed("-m", "clt.cli", "--help")
    code = "from clt.config import load_config; print(load_config(None, [], 'production').server.rows)"
    assert int(installed("-c", code)) == load_config(None, [], "production").server.rows


def test_a_trained_transcoder_opens(installed, tmp_path):
    CrossLayerTranscoder(2, 4, CLTConfig(d_features=8)).save_pretrained(tmp_path)
    code = (
        f"from clt.model.transcoder import CrossLayerTranscoder as T; print(T.from_pretrained({str(tmp_path)!r}).spec)"
    )
    assert "d_features=8" in installed("-c", code)


def test_the_embedded_language_model_opens(installed):
    code = "from clt.config import LMConfig\nfrom clt.lm.load import load_language_model\n"
    assert int(installed("-c", code + "print(load_language_model(LMConfig()).d_model)")) > 0
