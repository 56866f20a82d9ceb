"""The files of a report, the table of results, and what summary.json says."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from clt import cli
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
        "kl": None,  # has no value
        "seed": 3,
    }
    assert table(numbers).splitlines() == [
        "fraction of variance explained (held out)        0.5123",
        "L0, all layers                                    31.25",
        "L0 per layer                                    3.0 5.2",
        "KL(original || replaced), nats                     none",
        "training tokens/s                                12,346",
    ]


def test_the_end_of_a_run_is_numbers_plots_and_table(run_dir, capsys):
    quality = {"fve": 0.5, "fve_per_layer": [0.25, 0.75], "l0_per_layer": [3.0, 5.0]}
    evaluation = Evaluation(quality, TENSORS)
    conclude(run_dir, evaluation, "out/numbers.json", "out", wall_seconds=2.0)
    found = json.loads((run_dir / "out" / "numbers.json").read_text())
    assert found == quality | {"wall_seconds": 2.0}
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


def test_what_has_no_value_is_not_drawn_and_is_named(run_dir, drawn, capsys):
    with (run_dir / "metrics.jsonl").open("a") as log:  # a step that was skipped
        log.write('{"step": 3, "train_loss": null, "train_mse": null, "L0": null}\n')
    quality = {"fve": 0.25, "fve_per_layer": [0.25, None], "l0_per_layer": [3.0, 5.0], "kl": None}
    tensors = TENSORS | {"fve": torch.tensor(0.25), "fve_per_layer": torch.tensor([0.25, torch.nan])}
    conclude(run_dir, Evaluation(quality, tensors), "numbers.json", "plots")
    loss, l0 = drawn["training.png"]
    for line, last in zip((*loss.lines, *l0.lines), (0.7, 0.6, 8), strict=True):
        assert line.get_xydata().tolist()[1:] == [[2, last], [3, pytest.approx(torch.nan, nan_ok=True)]]
    assert heights(drawn["layers.png"][0]) == [0.25, pytest.approx(torch.nan, nan_ok=True)]
    shown = capsys.readouterr().out
    assert "Layer 1: the held-out targets never vary, so they have no FVE" in shown
    assert "No value: kl. " in shown


def strict(text):
    """JSON as its specification has it."""

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_a_run_on_one_layer_that_never_varies_ends_with_a_summary(train, lm_path, tmp_path, capsys):
    """Its MLP writes a constant. Nothing has an FVE, and mean ablation changes nothing."""
    copy = shutil.copytree(lm_path, tmp_path / "lm")
    weights = load_file(copy / "model.safetensors")
    weights["transformer.h.1.mlp.c_proj.weight"].zero_()
    weights["transformer.h.1.mlp.c_proj.bias"].fill_(0.5)
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    options = [f"lm.model={copy}", "lm.layers=[1]", f"data.store={tmp_path / 'stores'}", "eval.every=5"]
    run = train(*options, plots=True)
    texts = [(run.dir / "summary.json").read_text(), *(run.dir / "metrics.jsonl").read_text().splitlines()]
    summary, *lines = (strict(text) for text in texts)
    assert [summary[name] for name in ("fve", "nmse", "fve_per_layer", "ce_recovered")] == [None, None, [None], None]
    assert summary["ce_replaced"] == pytest.approx(summary["ce_mean_ablated"], rel=0.1)
    assert [(line["step"], line["eval_fve"], line["eval_fve/layer_0"]) for line in lines if "eval_fve" in line] == [
        (5, None, None), (10, None, None),
    ]  # fmt: skip
    again = train(*options, f"run.dir={run.dir}")  # a finished run is reported again
    assert again.summary["fve"] is None
    cli.main(["eval", str(run.dir)])
    found = strict((run.dir / "report_step_00000010" / "evaluation.json").read_text())
    assert (found["fve"], found["l0_total"]) == (None, summary["l0_total"])
    assert capsys.readouterr().out.count("Layer 0: the held-out targets never vary") == 3
