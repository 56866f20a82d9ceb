"""What two real ranks add up while they compute: decoders' gradients by DDP, summed early and never copied; and y~."""

import json
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

from benchmarks import ranks
from clt.model.loss import Objective
from clt.model.spec import CLTConfig, LossConfig
from clt.model.transcoder import CrossLayerTranscoder
from clt.train.ddp import GradientMemory
from clt.train.distributed import Axis, sum_bucket

B, L, D, F = 1024, 6, 64, 256


def measure(folder: Path) -> None:
    """Six steps of this rank: what happened in each goes to a file of its own."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    spec = CLTConfig(d_features=F, skip=True)
    alone, objective = (Objective(CrossLayerTranscoder(L, D, spec), LossConfig()) for _ in range(2))
    objective.load_state_dict(alone.state_dict())
    events, buckets, steps = [], [], []

    def noted(*arguments):
        end = time.monotonic() + 60
        # The last layer waits for a sum: on a busy machine it may come before the thread that sums had its turn.
        while events.count("layer") == L - 1 and "begun" in events and "done" not in events and time.monotonic() < end:
            time.sleep(0.001)
        events.append("layer")
        return alone.kernels.gate_gradients(*arguments)

    def summed(group, bucket):
        buckets.append(bucket.buffer())
        events.append("begun")
        return sum_bucket(group, bucket).then(lambda done: (events.append("done"), done.value())[1])

    objective.kernels.gate_gradients = noted
    model = DDP(objective, bucket_cap_mb=0.001, gradient_as_bucket_view=True)
    model.register_comm_hook(dist.group.WORLD, summed)
    clt, terms, passed_on = objective.transcoder, {"sparsity": 0.1, "pre_activation": 0.0, "aux": 0.0}, []
    memory = objective.gradient_memory = GradientMemory(clt.parameters())
    written = (clt.W_enc, clt.W_skip, *clt.W_dec)
    for weight in written:
        weight.register_hook(lambda grad: passed_on.append(grad is not None))
    for step in range(6):
        events.clear(), buckets.clear(), passed_on.clear()
        batch = torch.randn(2, B, 2, L, D)
        (model(batch[rank], terms).total / 2).backward()
        alone.zero_grad()
        alone(batch.view(-1, 2, L, D), terms).total.backward()
        pairs = zip(alone.parameters(), objective.parameters())
        ends = [(b.data_ptr(), b.data_ptr() + b.nbytes) for b in buckets]
        steps.append(
            {
                "events": list(events),
                "error": max(((a.grad - b.grad).norm() / a.grad.norm()).item() for a, b in pairs if a.grad.any()),
                "copied": sum(passed_on),  # what autograd is given, it copies or DDP does
                "in_buckets": [
                    any(a <= w.grad.data_ptr() < z for a, z in ends) for w in (clt.W_enc, clt.W_skip, *clt.W_dec)
                ],
            }
        )
        memory.clear() if step else clt.zero_grad()  # after the first step DDP makes its buckets anew
    found = {"steps": steps, "shards": measure_shards(Axis(rank, 2, dist.group.WORLD))}
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def measure_shards(axis: Axis) -> dict:
    """A step of two feature shards that adds y~ up at the end, and one layer by layer as a GPU's would."""
    events, outcomes = [], []

    def begin(y: torch.Tensor):
        events.append("begun")
        wait = axis.begin_sum(y)
        return lambda: (events.append("waited"), wait())

    torch.manual_seed(1)
    batch = torch.randn(B, 2, L, D)
    for begin_sum in (None, begin):
        torch.manual_seed(0)
        spec = CLTConfig(d_features=F, skip=True)
        clt = CrossLayerTranscoder(L, D, spec, shard=(axis.rank, axis.size), sum_shards=axis.sum)
        objective = Objective(clt, LossConfig())
        gate, objective.begin_sum = objective.kernels.gate, begin_sum
        objective.kernels.gate = lambda *arguments, gate=gate: (events.append("layer"), gate(*arguments))[1]
        total = objective(batch, {"sparsity": 0.1, "pre_activation": 0.0, "aux": 0.0}).total
        total.backward()
        outcomes.append([total.detach(), *(p.grad for p in clt.parameters())])
    return {"events": events, "equal": [torch.equal(a, b) for a, b in zip(*outcomes, strict=True)]}


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    """What each of two ranks saw."""
    folder = tmp_path_factory.mktemp("ranks")
    ranks.run(measure, folder, processes=2)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture
def steps(found) -> list[list[dict]]:
    """What they saw in each of six steps."""
    return [rank["steps"] for rank in found]


def test_decoder_gradients_are_summed_while_earlier_layers_are_computed(steps):
    for rank in steps:
        for step in rank[1:]:  # DDP orders its buckets by the first backward pass
            events = step["events"]
            first_layer = len(events) - 1 - events[::-1].index("layer")  # the first is the last to be computed
            assert events.count("layer") == 6
            assert events[:first_layer].count("begun") >= 5
            assert events[first_layer:].count("begun") >= 1
            assert "done" in events[:first_layer]


def test_decoder_gradients_are_written_into_the_buckets(steps):
    """And are those of one process."""
    for rank in steps:
        assert all(step["error"] < 1e-5 for step in rank)
        assert all(all(step["in_buckets"]) for step in rank)
        assert [step["copied"] for step in rank] == [8, 8, 0, 0, 0, 0], "from the third step on, it is known where"


def test_reconstructions_are_summed_over_shards_while_later_layers_are_computed(found):
    """To the same bits as all at once: of two ranks, sums are the same in any order."""
    for rank in found:
        assert rank["shards"]["events"] == ["layer"] * L + ["layer", "begun"] * L + ["waited"] * L
        assert all(rank["shards"]["equal"])
        assert len(rank["shards"]["equal"]) == L + 6, "the loss, and each parameter's gradient"
