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


CODE = """
import sys
import clt
from clt.config import LMConfig, load_config
from clt.lm.load import load_language_model
from clt.model.transcoder import CrossLayerTranscoder

print(clt.__file__)
print(load_config(None, [], "production").server.rows)
print(CrossLayerTranscoder.from_pretrained(sys.argv[1]).spec)
print(load_language_model(LMConfig()).d_model)
"""


def test_what_is_installed_works_in_an_empty_folder(tmp_path):
    site, empty, trained = tmp_path / "site", tmp_path / "empty", tmp_path / "trained"
    empty.mkdir()
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    if "No matching distribution found for setuptools" in done.stderr:
        pytest.skip("no registry to take the build backend from")
    assert done.returncode == 0, done.stderr

    def run(*arguments: object) -> str:
        env = os.environ | {"PYTHONPATH": str(site)}
        command = [sys.executable, *map(str, arguments)]
        result = subprocess.run(command, cwd=empty, env=env, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout

    assert "COMMAND" in run("-m", "clt.cli", "--help")
    assert run("-m", "clt.cli", "config") == to_yaml(load_config(DEFAULT_CONFIG), docs=True)
    CrossLayerTranscoder(2, 4, CLTConfig(d_features=8)).save_pretrained(trained)
    place, rows, spec, width = run("-c", CODE, trained).splitlines()
    assert Path(place).is_relative_to(site)
    assert int(rows) == load_config(None, [], "production").server.rows
    assert "d_features=8" in spec
    assert int(width) > 0
