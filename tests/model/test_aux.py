"""AuxK against its definition, by autograd through a naive loop in float64."""

import pytest
import torch

from clt.model.loss import Objective
from clt.model.spec import LossConfig
from tests.model.naive import B, F, L, batch, losses, make, naive_features, naive_normalized, naive_reconstruction

K = 2
DEAD = torch.tensor([[True] * 4 + [False] * 3, [False] * 7, [True] + [False] * 6])  # more than K, none, fewer


def naive_aux(clt, data, unit):
    """The loss of dead features alone; what the others leave is a constant."""
    with torch.no_grad():
        features = naive_features(clt, data[:, 0])[1]
        left = naive_normalized(clt, data[:, 1], "target") - naive_reconstruction(clt, features, data[:, 0])
    x, written = naive_normalized(clt, data[:, 0], "input"), torch.zeros_like(left)
    pre = torch.einsum("bld,ldf->blf", x, clt.W_enc) + clt.b_enc
    for b in range(B):
        for s in range(L):
            dead = [f for f in range(F) if DEAD[s, f] and pre[b, s, f] > 0]
            for f in sorted(dead, key=lambda f, b=b, s=s: -pre[b, s, f].item())[:K]:
                for t in range(s, L):
                    written[b, t] += pre[b, s, f] * clt.W_dec[s][f, t - s]
    share = sum(min(1, DEAD[s].sum().item() / K) for s in range(L)) / L
    return share * ((left - written) * unit).square().mean()


@pytest.mark.parametrize("target_scale", ["layer", "none"])
def test_aux_is_what_dead_features_leave_of_the_error(target_scale):
    """Its value, its gradients, and that a feature which is alive gets none of them."""
    clt, data, loss = make(), batch(), {"aux_k": K, "target_scale": target_scale}
    parameters = dict(clt.named_parameters())

    def gradients(total):
        clt.zero_grad()
        total.backward()
        return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in parameters.items()}

    found, without = losses(clt, data, dead=DEAD, aux=0.5, **loss), losses(clt, data, **loss)
    wanted = naive_aux(clt, data, clt.normalization.target_sd if target_scale == "none" else 1.0)
    torch.testing.assert_close(found.values["aux"], wanted.detach())
    torch.testing.assert_close(found.total, without.total + 0.5 * wanted)
    ours, base, theirs = (gradients(total) for total in (found.total, without.total, 0.5 * wanted))
    for name in parameters:
        torch.testing.assert_close(ours[name] - base[name], theirs[name], msg=f"the gradient to {name}")
    assert torch.equal(ours["W_enc"][0][:, 4:], base["W_enc"][0][:, 4:])
    assert not torch.equal(ours["W_enc"][0][:, :4], base["W_enc"][0][:, :4])


def test_shards_split_the_value_and_keep_the_gradient():
    """Two shards that hold the same half each: their sum over shards is twice what they write."""
    whole = make()

    def doubled(tensor):
        return tensor.mul_(2)

    data, config = batch(), LossConfig(aux=1.0, aux_k=2 * F)  # all that are dead fire
    half = make(shard=(0, 1), sum_shards=doubled)
    half.shards = 2
    half.gather_shards = lambda rows: torch.cat([rows, rows])
    half.load_state_dict(whole.state_dict())
    twice = make(d_features=2 * F)
    twice.normalization.load_state_dict(whole.normalization.state_dict())
    with torch.no_grad():
        for name, weight in whole.named_parameters():
            dim = {"W_enc": 2, "b_enc": 1, "threshold": 2, "W_dec": 0}.get(name.partition(".")[0])
            own = twice.get_parameter(name)
            own.copy_(weight if dim is None else torch.cat([weight, weight], dim))
            half.get_parameter(name).copy_(weight)
    terms = {"sparsity": 0.0, "pre_activation": 0.0, "aux": 1.0}
    of_half = Objective(half, config)(data, terms, dead=DEAD)
    of_whole = Objective(twice, config)(data, terms, dead=torch.cat([DEAD, DEAD], 1))
    torch.testing.assert_close(2 * of_half.values["aux"], of_whole.values["aux"])
    of_half.total.backward()
    of_whole.total.backward()
    torch.testing.assert_close(half.W_enc.grad, twice.W_enc.grad[:, :, :F])
    torch.testing.assert_close(half.W_dec[0].grad, twice.W_dec[0].grad[:F])
    assert len(half.W_dec) == L
