"""`clt eval --transcoder` and `--compare`: the figures of any transcoder on the text of a config."""

import dataclasses
import json

import pytest
import torch

from clt.cli import main
from clt.data.statistics import Moments, Statistics
from clt.errors import UserError
from clt.lm.capture import capture
from clt.lm.load import load_language_model
from clt.model.spec import CLTConfig, Sites
from clt.model.transcoder import CrossLayerTranscoder
from clt.train.compare import LiveRows, decoder_mass, evaluate_transcoders
from clt.train.evaluation import evaluate_activations, evaluate_replacement, heldout_windows


@pytest.fixture
def saved(tmp_path):
    """saved(name, sites, **fields of CLTConfig) -> a transcoder of random weights, and its directory."""

    def save(name, sites=Sites(), n_layers=3, **options):  # noqa: B008 - frozen
        torch.manual_seed(0)
        clt = CrossLayerTranscoder(n_layers, 16, CLTConfig(d_features=20, **options), sites=sites)
        with torch.no_grad():
            clt.b_enc.normal_(0, 0.5)
            clt.b_dec.normal_(0, 0.1)
            clt.normalization.input_sd.fill_(0.05)
            clt.normalization.target_sd.uniform_(0.5, 2)
        clt.save_pretrained(tmp_path / name)
        return clt, str(tmp_path / name)

    return save


def test_live_rows_are_the_kept_tokens_of_the_windows(config):
    config = config("eval.replacement_tokens=100")
    lm = load_language_model(config.lm)
    windows = heldout_windows(config, lm)
    windows[2] = windows[2]._replace(keep=windows[2].keep & False)  # one without any
    rows = LiveRows(lm, windows)
    whole = torch.cat([
        capture(lm, torch.from_numpy(w.tokens)[None].long(), w.keep[None], torch.float32) for w in windows
    ])  # fmt: skip
    assert len(rows) == len(whole) > 60
    for start, stop in ((0, len(whole)), (0, 1), (7, 40), (14, 15), (15, 16), (len(whole) - 1, len(whole) + 5)):
        torch.testing.assert_close(rows[start:stop], whole[start:stop])


@torch.no_grad()
@pytest.mark.parametrize(
    ("sites", "options"),
    [
        (Sites(), {"window": 2, "skip": True}),
        (Sites("norm.output"), {"activation": "topk", "k": 4}),
        (Sites("transformer.h.{layer}.ln_2.output", "transformer.h.{layer}.mlp"), {"cross_layer": False}),
    ],
    ids=["residual", "norm.output", "paths"],
)
def test_the_figures_are_the_evaluators_own_at_the_transcoders_sites(config, saved, sites, options):
    """Compared with the whole transcoder on rows and a language model that are hooked by hand."""
    clt, directory = saved("a", sites, **options)
    config = config("eval.replacement_tokens=64", "train.precision=fp32")
    numbers, tensors = evaluate_transcoders(config, [directory])[directory]
    read = sites.input_site and "transformer.h.{layer}.ln_2.output"
    by_hand = dataclasses.replace(config.lm, input_site=read, output_site=read and "transformer.h.{layer}.mlp")
    lm = load_language_model(by_hand)
    windows = heldout_windows(config, lm)
    rows = torch.cat([
        capture(lm, torch.from_numpy(w.tokens)[None].long(), w.keep[None], torch.float32) for w in windows
    ])  # fmt: skip
    whole = evaluate_activations(clt, rows)
    for name, tensor in whole.items():
        torch.testing.assert_close(tensors[name], tensor, rtol=1e-6, atol=1e-6)
    assert 2 < numbers["l0_total"] < 50
    assert numbers["never_fired"] == (whole["density"] == 0).double().mean().item()
    assert numbers["dense_fraction"] == (whole["density"] > 0.1).double().mean().item()
    replaced = evaluate_replacement(lm, clt, rows[:, 1].mean(0), windows)
    for name, value in replaced.items():
        assert numbers[name] == pytest.approx(value, rel=1e-4), name
    assert sum(numbers["decoder_mass"]) == pytest.approx(100)


def test_one_layer_of_one_transcoder_is_in_memory_at_a_time(config, saved, layers_at_once):
    """In the passes over rows, decoder mass and the replaced model: a transcoder may be larger than the memory."""
    several = [saved(name, activation="topk", k=4, by_norm=True, skip=True)[1] for name in ("a", "b")]
    found = evaluate_transcoders(config("eval.replacement_tokens=64"), several)
    assert all(numbers["l0_total"] == pytest.approx(12, abs=0.5) for numbers, _ in found.values())
    assert layers_at_once == {"W_enc": 1, "W_dec": 1}


def test_each_transcoder_is_evaluated_at_its_own_layers(config, saved):
    """Whatever the config's; which stand for those that an older one does not say."""
    known, of_config = saved("known", Sites(layers=[0, 2]), n_layers=2)[1], saved("older", n_layers=2)[1]
    config = config("eval.replacement_tokens=64", "lm.layers=[0, 2]")
    found = evaluate_transcoders(config, [known, of_config, saved("all")[1]])
    assert [numbers["layers"] for numbers, _ in found.values()] == [[0, 2], [0, 2], [0, 1, 2]]
    assert found[known].numbers == found[of_config].numbers
    config.lm.layers = [1, 2]
    again = evaluate_transcoders(config, [known, of_config])
    assert again[known].numbers == found[known].numbers
    assert again[of_config].numbers["fve_per_layer"] != found[of_config].numbers["fve_per_layer"]


def test_a_run_on_some_layers_says_so_in_its_checkpoints(train, config, tmp_path):
    """And of an older one, whose config.json does not, they are the run's."""
    run = train("lm.layers=[1, 2]", f"data.store={tmp_path / 'stores'}", "data.train_tokens=400", "train.steps=2")
    file = run.dir / "checkpoints" / "step_00000002" / "config.json"
    tree = json.loads(file.read_text())
    assert tree.pop("layers") == [1, 2]
    file.write_text(json.dumps(tree))
    found = evaluate_transcoders(config("eval.replacement_tokens=64"), [str(file.parent)])
    assert found[str(file.parent)].numbers["layers"] == [1, 2]
    train(
        "lm.layers=[1, 2]", f"data.store={tmp_path / 'stores'}", "data.train_tokens=400", "train.steps=2",
        f"run.dir={run.dir}",
    )  # fmt: skip


@torch.no_grad()
def test_decoder_mass_is_by_distance_in_each_layers_own_scale():
    clt = CrossLayerTranscoder(3, 2, CLTConfig(d_features=2, normalization="layer"))
    for weight in clt.W_dec:
        weight.zero_()
    clt.W_dec[0][0] = torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]])
    clt.W_dec[1][1] = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    clt.normalization.target_sd.copy_(torch.tensor([[2.0], [1.0], [1.0]]))
    sd = torch.tensor([[2.0, 2.0], [2.0, 2.0], [1.0, 1.0]], dtype=torch.float64)
    statistics = Statistics(sd, sd, sd, sd, 1)
    which = torch.tensor([[True, False], [False, True], [False, False]])
    # Feature 0 of layer 0 writes 3 to its layer and 4 / 2 to the next; feature 1 of layer 1 writes 1 / 2 and 1.
    wanted = [(9 / 13 + 0.25 / 1.25) / 2, (4 / 13 + 1 / 1.25) / 2, 0]
    assert decoder_mass(clt, statistics, which).tolist() == pytest.approx(wanted)
    assert decoder_mass(clt, statistics, which & False).tolist() == [0, 0, 0]


def test_a_run_that_reads_the_norms_output_is_compared_where_it_was_trained(train, config, tmp_path, capsys):
    """One run of each site, by the command, which tells them side by side."""
    store = tmp_path / "stores"
    runs = [
        train("lm.input_site=norm.output", f"data.store={store}", "data.train_tokens=400", "clt.d_features=16"),
        train("clt.d_features=16"),
    ]
    found = json.loads((runs[0].dir / "checkpoints" / "step_00000010" / "config.json").read_text())
    assert (found["input_site"], found["output_site"], found["model"]) == ("norm.output", None, None)
    capsys.readouterr()
    (tmp_path / "empty.yaml").touch()
    base = config()
    words = [f"lm.model={base.lm.model}", "lm.context=16", f"text.source={base.text.source}", "train.precision=fp32"]
    words += ["text.heldout_documents=20", "eval.replacement_tokens=64"]
    main(["eval", str(tmp_path / "empty.yaml"), *words, "--compare", *(str(run.dir) for run in runs),
          "--out", str(tmp_path / "out")])  # fmt: skip
    out = capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert list(results) == [str(run.dir) for run in runs]
    for run in runs:
        assert str(run.dir) in out.splitlines()[0]
        # The replacement model is evaluated on the same windows as at the end of the run.
        for name in ("kl", "ce_replaced", "top1_agreement", "replacement_tokens"):
            assert results[str(run.dir)][name] == pytest.approx(run.summary[name], rel=1e-4), name
    assert (tmp_path / "out" / "comparison.png").stat().st_size > 10_000
    assert "decoder mass by distance in layers, %" in out


def test_what_cannot_be_evaluated(config, saved, tmp_path, capsys):
    _, directory = saved("a")
    _, narrow = saved("narrow", n_layers=2)
    with pytest.raises(UserError, match=r"the transcoder has 2 layers of width 16, .* has 3 of width 16; set lm.model"):
        evaluate_transcoders(config("eval.replacement_tokens=64"), [narrow])
    _, deep = saved("deep", Sites(layers=[2, 5]), n_layers=2)
    with pytest.raises(UserError, match=r"lm.layers=\[2, 5\] does not fit .*, which has 3 layers"):
        evaluate_transcoders(config("eval.replacement_tokens=64"), [deep])
    with pytest.raises(UserError, match=rf"{directory} and {directory}/ are the same transcoder; name it once"):
        evaluate_transcoders(config("eval.replacement_tokens=64"), [directory, f"{directory}/"])
    with pytest.raises(UserError, match=r"eval\.replacement_tokens is 0; wanted the number"):
        evaluate_transcoders(config("eval.replacement_tokens=0"), [directory])
    with pytest.raises(UserError, match=r"absent/config.json cannot be read \(No such file"):
        evaluate_transcoders(config(), [str(tmp_path / "absent")])
    for words, message in (
        (["--transcoder", directory, "--step", "3"], "--step is of a run; leave it out with --transcoder"),
        ([], "found nothing; wanted one run directory, or --transcoder"),
        (["a", "b"], "found a b; wanted one run directory"),
        (["--transcoder", directory], "found no CONFIG; wanted the YAML file"),
        (["--compare", directory, "c.yaml"], "c.yaml is no transcoder; put CONFIG and overrides before --compare"),
        (["c.yaml", "--transcoder", directory, "--out", str(tmp_path)], "has evaluation.json of another evaluation"),
    ):
        (tmp_path / "evaluation.json").touch()
        with pytest.raises(SystemExit):
            main(["eval", *words])
        assert message in capsys.readouterr().err


def test_moments_of_live_rows_are_those_of_all_rows(config):
    """Mean ablation writes the mean of the same tokens."""
    config = config("eval.replacement_tokens=64")
    lm = load_language_model(config.lm)
    rows = LiveRows(lm, heldout_windows(config, lm))
    moments = Moments.zero(3, 16)
    for start in range(0, len(rows), 11):
        moments.add(rows[start : start + 11])
    torch.testing.assert_close(moments.statistics().target_mean, rows[0 : len(rows)][:, 1].double().mean(0))
