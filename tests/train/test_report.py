"""The files of a report, the table of results, and what summary.json says."""

import json
from types import SimpleNamespace

import pytest
import torch

from clt.config import config_hash, load_config
from clt.train.distributed import World
from clt.train.evaluation import Evaluation
from clt.train.report import conclude, summary, table, write_plots

TENSORS = {
    "fve": torch.tensor(0.5, dtype=torch.float64),
    "fve_per_layer": torch.tensor([0.25, 0.75], dtype=torch.float64),
    "l0_per_layer": torch.tensor([3.0, 5.0], dtype=torch.float64),
    "density": torch.tensor([[0.5, 0.0, 0.01], [0.2, 0.2, 0.0]], dtype=torch.float64),
}
PNG = b"\x89PNG"


@pytest.fixture
def run_dir(tmp_path):
    lines = [
        {"step": 1, "train_loss": 0.9, "train_mse": 0.8, "L0": 9.0},
        {"step": 2, "train_loss": 0.7, "train_mse": 0.6, "L0": 8.0},
        {"step": 2, "eval_fve": 0.5},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


@pytest.fixture
def drawn(monkeypatch):
    """The axes of every figure that is saved, by the name of its file."""
    from matplotlib.figure import Figure

    axes, save = {}, Figure.savefig

    def saved(figure, file, **options):
        axes[file.name] = figure.axes
        save(figure, file, **options)

    monkeypatch.setattr(Figure, "savefig", saved)
    return axes


def heights(axes):
    return [bar.get_height() for bar in axes.patches]


def test_the_plots_show_the_log_and_the_evaluation(run_dir, drawn):
    write_plots(run_dir, TENSORS, "plots")
    files = sorted((run_dir / "plots").iterdir())
    assert [file.name for file in files] == ["density.png", "layers.png", "training.png"]
    assert all(file.read_bytes().startswith(PNG) for file in files)

    loss, l0 = drawn["training.png"]
    assert {line.get_label(): line.get_xydata().tolist() for line in loss.lines} == {
        "loss": [[1, 0.9], [2, 0.7]],
        "MSE (normalised)": [[1, 0.8], [2, 0.6]],
    }
    assert [line.get_xydata().tolist() for line in l0.lines] == [[[1, 9], [2, 8]]]
    fve, l0_per_layer = drawn["layers.png"]
    assert heights(fve) == [0.25, 0.75]
    assert fve.get_legend().get_texts()[0].get_text() == "all layers 0.500"
    assert heights(l0_per_layer) == [3, 5]
    (density,) = drawn["density.png"]
    assert sum(heights(density)) == 4, "features that never fire have no logarithm"
    assert density.get_title() == "Feature density (2 of 6 never fire here)"


def test_features_that_never_fire_do_not_stop_the_report(run_dir):
    write_plots(run_dir, TENSORS | {"density": torch.zeros(2, 3)})
    assert (run_dir / "report" / "density.png").read_bytes().startswith(PNG)


def test_the_table_has_a_row_for_each_number_that_is_there():
    numbers = {
        "l0_per_layer": [3.0, 5.25],
        "fve": 0.51234567,
        "l0_total": 31.25,
        "tokens_per_second": 12345.6,
        "kl": None,
        "seed": 3,
    }
    assert table(numbers).splitlines() == [
        "fraction of variance explained (held out)        0.5123",
        "L0, all layers                                    31.25",
        "L0 per layer                                    3.0 5.2",
        "training tokens/s                                12,346",
    ]


def test_the_end_of_a_run_is_numbers_plots_and_table(run_dir, capsys):
    evaluation = Evaluation({"fve": 0.5, "l0_per_layer": [3.0, 5.0]}, TENSORS)
    conclude(run_dir, evaluation, "out/numbers.json", "out", wall_seconds=2.0)
    found = json.loads((run_dir / "out" / "numbers.json").read_text())
    assert found == {"fve": 0.5, "l0_per_layer": [3.0, 5.0], "wall_seconds": 2.0}
    assert (run_dir / "out" / "layers.png").exists()
    shown = capsys.readouterr().out
    assert table(found) in shown
    assert shown.endswith(f"The results are in {run_dir}: out/numbers.json, out/\n")


def test_the_summary_counts_tokens_of_all_ranks():
    config = load_config(None, ["train.steps=10", "train.batch_tokens=60", "eval.dead_window=200"])
    state = SimpleNamespace(world=World(0, 4, torch.device("cpu")), busy_seconds=3.0)
    found = summary(config, state, torch.bfloat16, wall_seconds=5.0)
    assert found == {
        "dead_window_tokens": 200, "tokens_per_second": 200.0, "wall_seconds": 5.0, "steps": 10, "train_tokens": 600,
        "world_size": 4, "device": "cpu", "precision": "bfloat16", "torch_version": torch.__version__,
        "config_hash": config_hash(config),
    }  # fmt: skip
    config.eval.dead_window = 1000
    assert summary(config, state, torch.float32, 5.0)["dead_window_tokens"] == 600, "a short run is all of the window"
