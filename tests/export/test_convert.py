"""TopK and BatchTopK as JumpReLU: every feature fires as often as before."""

import pytest
import torch

from clt.cli import main
from clt.export.convert import to_jumprelu
from clt.model.spec import CLTConfig, Sites
from clt.model.transcoder import CrossLayerTranscoder


@pytest.mark.parametrize("by_norm", [False, True])
@pytest.mark.parametrize(("activation", "k"), [("topk", 3), ("batchtopk", 8)])
@torch.no_grad()
def test_each_feature_fires_as_often_as_before(activation, k, by_norm):
    torch.manual_seed(0)
    spec = CLTConfig(d_features=300, activation=activation, k=k, by_norm=by_norm)
    clt = CrossLayerTranscoder(3, 8, spec, sites=Sites("norm.output"))
    clt.threshold.fill_(0.02 if by_norm else 0.1)
    clt.b_enc[0, 5], clt.b_enc[1, 7] = -100.0, 100.0  # one never fires, one always does
    x = torch.randn(5000, 3, 8)
    converted = to_jumprelu(clt, x)
    assert (converted.spec.activation, converted.spec.k, converted.spec.by_norm) == ("jumprelu", None, False)
    assert converted.sites == clt.sites
    before, after = ((each.encode(x) > 0).sum(0) for each in (clt, converted))
    assert torch.equal(before, after)
    assert (before[0, 5], before[1, 7]) == (0, 5000)
    assert (converted.threshold >= 0).all()
    for name, weight in clt.state_dict().items():
        if name != "threshold":
            assert torch.equal(weight, converted.state_dict()[name])
    folded = converted.fold()
    torch.testing.assert_close(folded(x[:50]), converted(x[:50]))


@torch.no_grad()
def test_a_batchtopk_without_norms_keeps_its_features():
    """It has one threshold already, so that nothing but the rows between two pre-activations can move."""
    torch.manual_seed(0)
    clt = CrossLayerTranscoder(2, 8, CLTConfig(d_features=64, activation="batchtopk", k=8))
    clt.threshold.fill_(0.2)
    x = torch.randn(4000, 2, 8)
    torch.testing.assert_close(to_jumprelu(clt, x).encode(x), clt.encode(x))


@pytest.mark.parametrize("rule", ["topk", "batchtopk"])
def test_the_command_converts_a_run_and_prints_its_figures_before_and_after(train, capsys, rule):
    run = train(f"clt.activation={rule}", "clt.k=6", "loss.sparsity=0.0", "eval.replacement_tokens=64")
    capsys.readouterr()
    main(["convert", str(run.dir), "--to", "jumprelu", "--rows", "100"])
    out = capsys.readouterr().out
    before, after = out.index(f"{rule}:\n"), out.index("\njumprelu:\n")
    for figure in ("fraction of variance explained", "L0, all layers", "share of that gap recovered"):
        assert before < out.index(figure) < after < out.rindex(figure)
    converted = CrossLayerTranscoder.from_pretrained(run.dir / "jumprelu_step_00000010")
    assert converted.spec.activation == "jumprelu"
    with pytest.raises(SystemExit):
        main(["convert", str(run.dir), "--to", "jumprelu"])
    assert "jumprelu_step_00000010 exists already; delete it to convert again" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["convert", str(train("eval.replacement_tokens=0").dir), "--to", "jumprelu"])
    assert "is a jumprelu run; wanted one of clt.activation=topk or batchtopk" in capsys.readouterr().err
