"""What only a GPU can show; skipped without one."""

import warnings

import pytest
import torch

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
