"""What only a GPU can show; skipped without one."""

import warnings

import pytest
import torch
from safetensors.torch import load_file

from clt.lm.replacement import replaced_logits
from clt.model.spec import CLTConfig
from clt.model.transcoder import CrossLayerTranscoder
from clt.train import checkpoint, evaluation
from clt.train.distributed import World
from clt.train.logger import Logger
from clt.train.spec import CheckpointConfig
from clt.train.writer import Checkpoints

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("compiled", ["false", "true"])
def test_only_logging_waits_for_the_device(train, precision, compiled):
    """Ten more steps add not one synchronisation; logging in each of them does."""
    options = [f"train.precision={precision}", f"train.compile={compiled}", "train.accumulate=2"]
    options += ["eval.every=0", "eval.replacement_tokens=0", "checkpoint.every=0"]

    def waits(steps: int, every: int) -> int:
        torch._dynamo.reset()  # every run compiles anew, or none would after the eighth
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                train(*options, f"train.steps={steps}", f"log.every={every}")
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing CUDA operation" in str(warning.message) for warning in seen)

    waits(10, 100)  # what happens once in a process: compilation, libraries that load
    once = waits(10, 100)
    assert once > 0, "the evaluation at the end waits: the count works"
    assert waits(20, 100) == once
    assert waits(10, 1) >= once + 9


def test_a_checkpoint_is_of_the_weights_before_the_next_update(tmp_path):
    """Begun while the GPU has much to do, and the weights changed right after: only the update waits for the copy."""
    device = torch.device("cuda", 0)
    transcoder = CrossLayerTranscoder(2, 256, CLTConfig(d_features=8192)).to(device)
    optimizer = torch.optim.Adam(transcoder.parameters(), fused=True)
    before = {name: tensor.cpu().clone() for name, tensor in transcoder.state_dict().items()}
    with Checkpoints(tmp_path, CheckpointConfig(keep=1), World(0, 1, device)) as checkpoints:
        busy = torch.ones(8192, 8192, device=device)
        for _ in range(20):
            busy = busy @ busy
        checkpoints.begin(checkpoint.slices(transcoder, optimizer, {}), transcoder.config, {"step": 1})
        checkpoints.wait_for_copy()
        with torch.no_grad():
            for weight in transcoder.parameters():
                weight.fill_(7)
        checkpoints.finish()
    saved = load_file(tmp_path / "step_00000001" / "model.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in before.items())


def test_the_language_model_is_on_the_gpu_only_while_it_is_needed(train, monkeypatch):
    places, load, step, evaluate = {}, evaluation.load_language_model, Logger.step, evaluation.evaluate_replacement

    def loaded(*arguments):
        places["model"] = load(*arguments)
        return places["model"]

    def stepped(logger, number):
        places["step"] = places["model"].device.type
        step(logger, number)

    def evaluated(lm, *arguments, **options):
        def run(*arguments):
            places["run"] = lm.device.type
            return replaced_logits(*arguments)

        return evaluate(lm, *arguments, **options | {"run": run})

    monkeypatch.setattr(evaluation, "load_language_model", loaded)
    monkeypatch.setattr(Logger, "step", stepped)
    monkeypatch.setattr(evaluation, "evaluate_replacement", evaluated)
    train()
    assert (places["step"], places["run"]) == ("cpu", "cuda")
