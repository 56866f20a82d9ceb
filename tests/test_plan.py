"""What `clt plan` says of a config, against what the run builds; and what it refuses."""

import re
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from clt import cli, costs
from clt.config import LMConfig, load_config
from clt.data.store import DiscBuffer
from clt.errors import UserError
from clt.lm.capture import capture
from clt.lm.load import load_language_model
from clt.lm.shape import ModelShape, read_shape
from clt.plan import Machine, layouts, make_job, need, plan, time_text
from clt.train.distributed import Axis
from clt.train.run import build

GEMMA = ModelShape(26, 2304)
RULES = [
    [],
    ["clt.skip=true", "clt.window=2"],
    ["clt.cross_layer=false", "clt.activation=relu", "data.dtype=float32", "train.precision=fp32"],
    ["clt.activation=topk", "clt.k=4", "clt.k_start=8", "loss.sparsity=0", "clt.by_norm=true"],
    ["clt.activation=batchtopk", "clt.k=8", "loss.sparsity=0", "loss.aux=0.03", "loss.aux_k=4", "loss.dead_window=99"],
]


@pytest.mark.parametrize("overrides", RULES, ids=" ".join)
@pytest.mark.parametrize("shards", [1, 2])
def test_a_job_is_what_the_run_builds(overrides, shards, stores):
    config = load_config(None, ["clt.d_features=32", "train.compile=false", *overrides])
    store = DiscBuffer(stores / "train")
    built = build(config, store.index, store.statistics, Axis(0, shards)).transcoder
    job = replace(make_job(config, ModelShape(store.index.n_layers, store.index.d_acts)), feature=shards)
    trained = sum(p.numel() for p in built.parameters() if p.requires_grad)
    assert sum(p.numel() for p in built.parameters()) == costs.parameters(job)
    assert trained == costs.trained_parameters(job)
    assert costs.state_bytes(job) == 4 * costs.parameters(job) + 12 * trained + 4 * len(optimized(built))
    assert costs.batch_bytes(job) == 4 * 4000 * job.n_layers * job.d_acts * getattr(torch, config.data.dtype).itemsize
    assert (job.k, job.aux_k) == (8 if config.clt.k else 0, 4 if config.loss.aux else 0)


def optimized(transcoder: torch.nn.Module) -> list[torch.Tensor]:
    return [p for p in transcoder.parameters() if p.requires_grad]


def test_the_shape_of_a_model_is_read_without_its_weights(tmp_path):
    lm = load_language_model(LMConfig(context=64))
    shape = read_shape(LMConfig(context=64))
    assert shape[:3] == (4, lm.d_model, sum(p.numel() for p in lm.model.parameters()))
    with FlopCounterMode(display=False) as counter:
        capture(lm, torch.zeros(1, 64, dtype=torch.int64))
    attention = 4 * 4 * 64 * lm.d_model  # is not counted on a CPU
    assert counter.get_total_flops() / 64 == pytest.approx(shape.flops_per_token - attention, rel=0.01)
    lm.model.config.save_pretrained(tmp_path)  # and nothing else
    assert read_shape(LMConfig(model=str(tmp_path), context=64)) == shape
    half = read_shape(LMConfig(model=str(tmp_path), context=64, layers=[1]))
    assert (half.n_layers, half.flops_per_token) == (1, shape.flops_per_token // 2)


def test_a_shape_that_is_not_at_hand(tmp_path):
    for name in ("nobody/nothing", "no such directory/x/y"):
        with pytest.raises(UserError, match=r"config.json of .* is not on this machine: .* --layers and --width"):
            read_shape(LMConfig(model=name))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="could not be loaded"):
        read_shape(LMConfig(model=str(tmp_path)))
    with pytest.raises(UserError, match=r"lm.layers=\[4\] does not fit 'embedded', which has 4 layers"):
        read_shape(LMConfig(layers=[4]))


def test_what_does_not_fit_is_refused_and_each_remedy_fits():
    options = ["clt.d_features=16384", "train.batch_tokens=16384", "eval.replacement_tokens=0"]
    cases = [(None, []), (8, []), (8, ["data.dtype=float32", "train.batch_tokens=262144"]), (2, [])]
    for gpus, more in cases:
        config, machine = load_config(None, [*options, *more]), Machine(gpus)
        _, refusal = plan(config, GEMMA, machine)
        assert refusal is not None
        assert "a rank of" in refusal
        remedies = refusal.partition("Wanted one of: ")[2].split("; ")
        assert remedies != [""]
        for remedy in remedies:
            changed = load_config(None, [*options, *more, *re.findall(r"[\w.]+=\d+", remedy)])
            count = changed.parallel.feature_shards if "on " in remedy else gpus
            assert plan(changed, GEMMA, replace(machine, gpus=count))[1] is None, (gpus, remedy)


def test_the_smallest_layout_is_the_first_that_fits():
    config = load_config(None, ["clt.d_features=16384", "train.batch_tokens=16384", "parallel.feature_shards=8"])
    job, machine = make_job(config, GEMMA), Machine(gpus=8)
    text, refusal = plan(config, GEMMA, machine)
    assert refusal is None
    (marked,) = re.findall(r"(\d) x (\d).*the smallest that fits", text)
    fits = {(j.data, j.feature): need(j, 0) <= 80e9 for j in layouts(job, 8)}
    assert fits == {(8, 1): False, (4, 2): False, (2, 4): tuple(map(int, marked)) == (2, 4), (1, 8): True}
    assert need(job, 0) == costs.state_bytes(job) + costs.backward_bytes(job) + costs.batch_bytes(job)


def test_the_language_model_counts_where_it_is_evaluated():
    big = ModelShape(12, 768, 30_000_000_000, 1)
    _, refusal = plan(load_config(None, []), big, Machine())
    assert refusal is not None
    assert "eval.replacement_tokens=0" in refusal
    assert plan(load_config(None, ["eval.replacement_tokens=0"]), big, Machine())[1] is None
    assert plan(load_config(None, ["lm.dtype=bfloat16"]), big, Machine())[1] is None


def test_feature_shards_that_do_not_divide():
    for overrides, gpus in ((["parallel.feature_shards=3"], 8), (["parallel.feature_shards=4", "clt.d_features=6"], 8)):
        with pytest.raises(UserError, match=r"parallel.feature_shards=.* wanted whole numbers"):
            plan(load_config(None, overrides), GEMMA, Machine(gpus))


def test_times_have_a_unit_that_suits():
    assert [time_text(s) for s in (0.5, 89, 90, 7200, 200_000)] == [
        "0.5 s",
        "89 s",
        "1.5 minutes",
        "2.0 hours",
        "2.3 days",
    ]


def test_the_command(capsys):
    cli.main(["plan", "configs/gpt2.yaml", "--layers", "12", "--width", "768", "--gpus", "4"])
    lines = capsys.readouterr().out.splitlines()
    assert "store           10,100,000 rows, 372.5 GB" in lines
    assert sum("as configured" in line for line in lines) == 1
    for words, said in (
        (["--memory", "4"], "Wanted one of: parallel.feature_shards="),
        (["--layers", "3"], "--layers and --width go together"),
        (["--gpus", "0"], "--gpus is 0; wanted a positive number"),
        (["lm.model=nobody/nothing"], "--layers and --width"),
    ):
        shape = [] if "--layers" in words or "lm.model" in words[0] else ["--layers", "12", "--width", "768"]
        with pytest.raises(SystemExit) as end:
            cli.main(["plan", "configs/gpt2.yaml", *words, *shape])
        assert end.value.code == 2
        assert said in capsys.readouterr().err
