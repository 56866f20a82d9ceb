"""The packed decoder against the masked square one of the papers."""

import pytest
import torch

from tests.model.naive import B, F, L, make


@pytest.mark.parametrize("options", [{}, {"cross_layer": False}], ids=str)
@torch.no_grad()
def test_dense_decoder_is_causal_and_decodes_the_same(options):
    clt = make(**options)
    dense, features = clt.dense_decoder(), torch.rand(B, L, F, dtype=torch.float64)
    y = torch.einsum("bsf,stfd->btd", features, dense) + clt.b_dec
    torch.testing.assert_close(y, clt.reconstruct(features.transpose(0, 1)))
    for s in range(L):
        assert not dense[s, :s].any(), "a feature writes to an earlier layer"
