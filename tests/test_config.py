"""Configs: YAML and overrides become typed values, and every mistake is named with its remedy."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from clt.cli import main
from clt.config import PRESETS, Config, config_hash, identity, load_config
from clt.errors import UserError
from clt.parsing import field_docs, to_yaml

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


def test_defaults_are_the_reference_run():
    config = load_config()
    assert (config.clt.d_features, config.train.batch_tokens, config.train.steps) == (6144, 4000, 2000)
    assert (config.optim.lr, config.loss.sparsity, config.loss.sparsity_scale) == (1e-3, 2e-4, 0.1)
    assert (config.clt.threshold, config.clt.bandwidth, config.lm.context) == (0.03, 1.0, 1024)
    assert (config.data.train_tokens, config.eval.every) == (10_000_000, 1000)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_load_and_hold_only_what_differs(path):
    config = dataclasses.asdict(load_config(path))
    defaults = dataclasses.asdict(Config())
    for section, values in yaml.safe_load(path.read_text()).items():
        for key, value in values.items():
            same = value == defaults[section][key]
            assert not same, f"{path.name}: {section}.{key} is the default"
            assert config[section][key] == value


def test_the_required_configs_are_there():
    assert {"quickstart", "gpt2", "gpt2-plt", "llama-3.2-1b", "smollm2-135m"} <= {path.stem for path in CONFIGS}


def test_every_field_has_a_one_line_doc():
    for section in dataclasses.fields(Config):
        cls = type(getattr(Config(), section.name))
        docs = field_docs(cls)
        assert docs.keys() == {f.name for f in dataclasses.fields(cls)}
        for name, doc in docs.items():
            assert "\n" not in doc, f"{section.name}.{name}"
            assert doc.endswith("."), f"{section.name}.{name}"


def test_a_url_with_a_password_is_refused_without_printing_it(capsys):
    with pytest.raises(SystemExit):
        main(["config", "data.url=http://me:hunter2@example.org:8000"])
    found = capsys.readouterr()
    assert "data.url has a user's name or password in it" in found.err
    assert "hunter2" not in found.out + found.err


@pytest.mark.parametrize("docs", [False, True])
def test_the_printed_config_reads_back(tmp_path, docs):
    config = load_config(None, ["lm.layers=[0, 2]", "optim.lr=3e-4", "text.source=a b.jsonl", "optim.clip_norm=null"])
    path = tmp_path / "resolved.yaml"
    path.write_text(to_yaml(config, docs=docs))
    assert load_config(path) == config


def test_overrides_win_over_the_file_and_are_typed(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("train: {steps: 7}\noptim: {lr: 1e-4}\n")  # YAML 1.1 reads 1e-4 as a string
    config = load_config(path, ["train.steps=9", "train.compile=false", "optim.betas=[0.8, 0.99]", "optim.eps=1"])
    assert (config.train.steps, config.optim.lr, config.train.compile) == (9, 1e-4, False)
    assert (config.optim.betas, config.optim.eps) == ([0.8, 0.99], 1.0)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stepz=5", r"unknown key 'train.stepz' in the command line: did you mean 'steps'\?"),
        ("d_features=3", r"unknown key 'd_features'.*did you mean 'clt.d_features'\?"),
        ("optimizer.lr=3", r"unknown key 'optimizer' in the command line: did you mean 'optim'\?"),
        ("train.compile=maybe", "train.compile in the command line is 'maybe'; wanted bool"),
        ("train.steps=2.5", "train.steps .* is 2.5; wanted int"),
        ("clt.activation=gelu", "clt.activation .* is 'gelu'; wanted one of jumprelu, relu"),
        ("clt.d_features=-1", "clt.d_features .* is -1; wanted a positive number"),
        ("loss.sparsity=-1", "loss.sparsity .* is -1; wanted zero or a positive number"),
        ("server.workers=129", "server.workers .* is 129; wanted 1 to 128 processes"),
        ("run.seed=-1", r"run.seed .* is -1; wanted a whole number from 0 to 2\^63 - 1"),
        ("data.seed=9223372036854775808", r"data.seed .* wanted a whole number from 0 to 2\^63 - 1"),
        ("optim.decay=2", "optim.decay .* is 2; wanted a share between 0 and 1"),
        ("optim.betas=[0.9]", r"optim.betas .* wanted two numbers in \[0, 1\)"),
        ("lm.layers=[3, 1]", r"lm.layers .* is \[3, 1\]; wanted ascending layer numbers"),
        ("clt.window=0", "clt.window in the command line is 0; wanted 2 or more layers"),
        ("clt={window: 2, cross_layer: false}", "clt.window is 2 but clt.cross_layer is false"),
        ("clt.k=3", "clt.k is 3 but clt.activation is jumprelu, which has no k"),
        ("clt={activation: topk, k: 9000}", "clt.k is 9000; wanted at most 6144, the features that clt.k chooses from"),
        ("clt={activation: topk, k: 9}", "loss.sparsity is 0.0002 but clt.activation is topk.*wanted loss.sparsity=0"),
        ("loss={target_l0: 9, sparsity: 0}", "loss.target_l0 is 9.0 but loss.sparsity is 0"),
        ("loss.aux=0.1", "loss.dead_window is None; wanted a number of tokens if and only if loss.aux is above 0"),
        ("loss.dead_window=100", "loss.dead_window is 100; wanted a number of tokens if and only if"),
        ("loss={aux: 0.1, dead_window: 9, aux_k: 9000}", "loss.aux_k is 9000; wanted at most clt.d_features=6144"),
        ("lm.input_site='h.{layer}.ln'", "lm.input_site and lm.output_site go together"),
        ("lm.input_site=h.0.ln", r"lm.input_site in the command line is 'h.0.ln'; wanted a path with \{layer\}"),
        ("lm=4", "lm in the command line is 4; wanted a mapping with keys of model, revision,"),
        ("train.steps.more=4", "unknown key 'train.steps.more' in the command line: did you mean 'steps'"),
        ("train.steps", "is not of the form section.key=value"),
        (
            "train.steps=[",
            "the value of override 'train.steps=.' cannot be read as YAML: line 1: expected the node content",
        ),
        ("train.steps=010", "YAML 1.1 reads 010 as int: write a decimal number"),
        ("run.dir=2024-01-01", "YAML 1.1 reads 2024-01-01 as timestamp: write .*, or put it in quotes if it is text"),
        ("x" * 10**5, r"override 'x{199}\.\. \(100002 characters\) is not of the form"),
        ("train.steps=" + "1" * 400, "YAML 1.1 reads 1{64} as int: write a decimal number of at most 64 digits"),
        ("train.steps=9223372036854775809", "train.steps .* is 9223372036854775809; wanted int"),
        ("train.steps=1.0e+30", r"train.steps .* is 1e\+30; wanted int"),
    ],
)
def test_mistakes_on_the_command_line(override, message):
    with pytest.raises(UserError, match=message):
        load_config(None, [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trian: {steps: 3}", r"unknown key 'trian' in .*c.yaml: did you mean 'train'\?"),
        ("train: {step: 3}", r"unknown key 'train.step' in .*c.yaml: did you mean 'steps'\?"),
        ("train: 3", "train in .*c.yaml is 3; wanted a mapping with keys of steps, batch_tokens,"),
        ("- 3", r"the top level in .*c.yaml is \[3\]; wanted a mapping with keys of run, lm,"),
        ("train: {steps: 3", "c.yaml cannot be read as YAML: line 1: expected ',' or '}', but got"),
        (
            "train: {steps: 3}\noptim: {lr: 1}\ntrain: {compile: false}",
            "line 3: the key 'train' is in line 1 too: keep",
        ),
        ("train:\n  steps: 3\n  'steps': 4", "line 3: the key 'steps' is in line 2 too"),
        ("train:\n  steps: 010", "line 2: YAML 1.1 reads 010 as int"),
        ("train: {steps: 80:00}", "line 1: YAML 1.1 reads 80:00 as int"),
        ("optim: {lr: 1:30.5}", "YAML 1.1 reads 1:30.5 as float"),
        ("train: {compile: no}", "YAML 1.1 reads no as bool: write true or false"),
        (
            "clt: {activation: topk, k: 9}\nloss: {target_l0: 9}",
            "loss.target_l0 is 9.0 but clt.activation is topk, .*; wanted loss.target_l0=null",
        ),
        ("on: {steps: 3}", "YAML 1.1 reads on as bool"),
        ("run: {dir: 2024-13-45}", "YAML 1.1 reads 2024-13-45 as timestamp"),
        ("run: {seed: !!int ten}", "the tag tag:yaml.org,2002:int is not read here: leave it out"),
        ("optim: {lr: " + "9" * 400 + "}", "as float|as int"),
        ("[" * 5000, "line 1: found more than 8 levels"),
        ("lm: {layers: &a [1, 2]}\ntext: {source: *a}", r"line 2: the alias \*a is not read here: write the value out"),
        ("train: {<<: {steps: 3}}", "YAML 1.1 reads << as merge"),
        ("? [1, 2]\n: 3", "a list or mapping is a key here"),
        ("train: " + "[1, 2, 3, " * 3 + "0" + "]" * 3 + "\n", "train in .*c.yaml is .1, 2"),
        ("lm: " + "x" * 10**5, r"lm in .* is 'x{199}\.\. \(100002 characters\); wanted a mapping"),
        ("train: {steps: " + "x" * 10**5 + "}", r"train.steps in .* is 'x{199}\.\. \(100002 characters\); wanted int"),
    ],
)
def test_mistakes_in_a_file(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        load_config(tmp_path / "c.yaml")
    assert len(str(caught.value)) < 1000
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("train: {steps: 0x10, compile: True}", {"train.steps": 16, "train.compile": True}),
        ("train: {steps: 1_000}\noptim: {lr: 1.5e-3, eps: 1e-9}", {"train.steps": 1000, "optim.lr": 1.5e-3}),
        ("run: {dir: '010'}\ntext: {source: \"2024-01-01\", subset: 'no'}", {"run.dir": "010", "text.subset": "no"}),
        ("\ufefflm: {revision: 08a, layers: [0, 2]}", {"lm.revision": "08a", "lm.layers": [0, 2]}),
    ],
)
def test_values_that_are_what_they_look_like(tmp_path, text, wanted):
    (tmp_path / "c.yaml").write_text(text)
    found = load_config(tmp_path / "c.yaml")
    for key, value in wanted.items():
        section, name = key.split(".")
        assert getattr(getattr(found, section), name) == value


def test_a_config_that_is_not_text(tmp_path):
    (tmp_path / "c.yaml").write_bytes(b"train: {steps: 3}\xff")
    with pytest.raises(UserError, match=r"config .*c.yaml cannot be read: .*0xff.*; wanted a file of UTF-8 text"):
        load_config(tmp_path / "c.yaml")


def test_missing_file():
    with pytest.raises(UserError, match=r"config nowhere.yaml does not exist; the shipped ones are configs/\*.yaml"):
        load_config("nowhere.yaml")


def test_the_hash_sees_what_changes_the_weights_and_nothing_else():
    base = config_hash(load_config())
    for free in ("run.dir=elsewhere", "log.every=3", "checkpoint.keep=9", "eval.every=5", "data.prefetch=2"):
        assert config_hash(load_config(None, [free])) == base, free
    seen = {base}
    for key, value in identity(load_config()).items():
        changed = load_config()
        section, name = key.split(".")
        setattr(getattr(changed, section), name, f"not {value}")
        seen.add(config_hash(changed))
    assert len(seen) == 1 + len(identity(load_config()))


def test_presets_lie_between_the_file_and_the_command_line(tmp_path):
    sizes = [load_config(None, [], preset).server.rows for preset in PRESETS]
    assert sizes == sorted(sizes)
    (tmp_path / "mine.yaml").write_text("server: {rows: 77}\nlm: {context: 99}\n")
    (tmp_path / "base.yaml").write_text("server: {rows: 1, workers: 3}\n")
    made = load_config(tmp_path / "base.yaml", ["lm.context=98"], tmp_path / "mine.yaml")
    assert (made.server.rows, made.server.workers, made.lm.context) == (77, 3, 98)
    with pytest.raises(UserError, match=r"larg does not exist; .* presets test, production, large-scale"):
        load_config(None, [], "larg")
