"""Statistics reduced to the kind of normalisation."""

import pytest
import torch

from clt.model.spec import CLTConfig
from clt.model.transcoder import CrossLayerTranscoder


def test_statistics_reduce_to_one_sd_per_layer():
    clt = CrossLayerTranscoder(2, 3, CLTConfig(d_features=4))
    mean, sd = torch.randn(2, 3).double(), torch.tensor([[3.0, 4.0, 5.0], [1.0, 1.0, 1.0]]).double()
    clt.normalization.set(mean, sd, mean, sd)
    assert clt.normalization.input_sd[:, 0].tolist() == pytest.approx([(50 / 3) ** 0.5, 1.0])
    with pytest.raises(AssertionError, match="the statistics are of other activations"):
        clt.normalization.set(*[torch.ones(2, 4)] * 4)
