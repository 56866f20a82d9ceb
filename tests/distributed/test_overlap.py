"""DDP sums the decoder gradients of the last layers while those of the first are still being computed."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

from clt.model.loss import Objective
from clt.model.source import Kernels
from clt.model.transcoder import CrossLayerTranscoder


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_decoder_gradients_are_summed_as_soon_as_their_layer_is_done() -> None:
    layers, events = 4, []
    objective = Objective(CrossLayerTranscoder(layers, 16, 64))
    gate, gate_gradients = objective.kernels

    def noted(*arguments):
        events.append("layer")
        return gate_gradients(*arguments)

    def summed(_: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        events.append("sum")
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    objective.kernels = Kernels(gate, noted)
    model = DDP(objective, bucket_cap_mb=0.001, gradient_as_bucket_view=True)
    model.register_comm_hook(None, summed)
    for _ in range(2):  # DDP orders its buckets by the first backward pass
        events.clear()
        model(torch.randn(8, 2, layers, 16), torch.tensor(0.1)).loss.backward()
    assert events.count("layer") == layers
    first_layer = len(events) - 1 - events[::-1].index("layer")
    assert events[:first_layer].count("sum") == layers - 1
    assert events[first_layer:].count("sum") >= 1
