"""Compiles every launch of a sparse step for an H100, without one, and prints what each takes: see test_kernels.py.

The step runs on meta tensors of real sizes, and each launch is compiled for the types that it is called with.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from clt.model.kernels import AdamSteps, DecoderRows, RowGradient, by_token, gpu

TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
F, B, T, D = 32768, 4096, 12, 768


class Recorder:
    """In place of a kernel: compiles the launch instead."""

    found: list[dict] = []  # noqa: RUF012 - of all kernels

    def __init__(self, kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid):
        assert grid[0] < 2**31, grid
        assert max(grid[1:], default=1) < 2**16, grid

        def launch(*args, num_warps=4, enable_fp_fusion, **constants):
            names = self.kernel.arg_names
            given = dict(zip(names, args)) | constants
            signature, attributes = {}, {}
            for place, name in enumerate(names):
                value = given[name]
                if isinstance(value, Tensor):
                    signature[name] = TYPES[value.dtype]
                elif name.isupper():
                    signature[name] = "constexpr"
                elif isinstance(value, float):
                    signature[name] = "fp32"
                else:
                    signature[name] = "i32" if abs(value) < 2**31 else "i64"
                if isinstance(value, Tensor) or (signature[name] in ("i32", "i64") and value % 16 == 0):
                    attributes[(place,)] = [["tt.divisibility", 16]]
            constants = {name: value for name, value in given.items() if name.isupper()}
            options = {"num_warps": num_warps, "enable_fp_fusion": enable_fp_fusion}
            source = ASTSource(self.kernel, signature, constants, attributes)
            made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
            self.found.append({"kernel": self.kernel.__name__, "constants": constants} | resources(made.asm["cubin"]))

        return launch


def resources(cubin: bytes) -> dict[str, int]:
    """Registers and stack of a kernel's machine code. What does not fit into registers lies on the stack."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ((registers, stack, local),) = re.findall(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", done.stdout)
    return {"registers": int(registers), "spilled_bytes": int(stack) + int(local)}


def layer(narrow: torch.dtype) -> None:
    """The launches of one layer, forward and backward, by JumpReLU; and the selection by TopK in fp32."""
    of_features, product = torch.empty(F), torch.empty(F, B, dtype=narrow)
    for by_topk in (True, False):
        products, of_token = (product.float(), torch.empty(B)) if by_topk else (product, None)
        of_layer = (products, of_features, of_features, of_token)
        bandwidth, sample = (None, None) if by_topk else (1.0, 12345)
        counts = gpu.count(*of_layer, bandwidth)
        lists = gpu.select(*of_layer, of_features, bandwidth, counts, 100 * B, sample)
    W_dec, y = torch.empty(F, T, D), torch.empty(B, T, D)
    gpu.decode(y, W_dec, by_token(lists, B))
    written, x = torch.empty(B, T * D, dtype=narrow), torch.empty(B, T, D, dtype=narrow)[:, 0]
    dots = gpu.decoder_gradients(W_dec, W_dec, of_features, written, lists)
    grad = gpu.pair_gradients(lists, dots, of_features, torch.empty(()), True)
    gpu.encoder_gradient(torch.empty(D, F), x, lists, grad.pre)
    last, skip = torch.empty(F, dtype=torch.int32), torch.empty((), dtype=torch.bool)
    rows = DecoderRows(W_dec, W_dec, W_dec, of_features, torch.empty(F, T, D, dtype=narrow), last)
    steps = AdamSteps(torch.empty((), dtype=torch.int32), torch.empty(2000, 2), (0.9, 0.999), 1e-8)
    gpu.adam_rows(rows, steps, RowGradient(W_dec, of_features, torch.empty(()), skip), lazy=True)
    gpu.catch_up_rows(rows, steps, last > 0)


def main() -> None:
    for name, kernel in vars(gpu).copy().items():
        if isinstance(kernel, triton.JITFunction):
            setattr(gpu, name, Recorder(kernel))
    with torch.device("meta"):
        layer(torch.bfloat16)
    print(json.dumps(Recorder.found))


if __name__ == "__main__":
    main()
