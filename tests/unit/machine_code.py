"""Compiles our Triton kernels to a Hopper GPU's machine code, without a GPU; prints their names, a line each.

Run as a process of its own, without TRITON_INTERPRET. Another Triton than the installed one is tried by
putting it first on PYTHONPATH: the GPUs' torch brings 3.6, whose launcher takes less than later ones.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from chiar_megatron.operators.kernels import spectral
from chiar_megatron.operators.kernels.add_rows import add_rows
from chiar_megatron.operators.kernels.bias_gelu import bias_gelu
from chiar_megatron.operators.kernels.cross_entropy import cross_entropy
from chiar_megatron.operators.kernels.residual_norm import NormParameters, residual_norm
from chiar_megatron.operators.kernels.rotary import join_rotated_back, split_and_rotate
from chiar_megatron.operators.kernels.rotated_attention import rotated_attention
from chiar_megatron.operators.kernels.routed_update import UpdateParameters, routed_update
from chiar_megatron.operators.kernels.select_rows import select_rows
from chiar_megatron.operators.rows import TokenRows

HOPPER = GPUTarget("cuda", 90, 32)
ROWS, TOKENS, SEQUENCE, HEADS, WIDTH = 192, 512, 256, 4, 1024
memory = partial(torch.empty, dtype=torch.bfloat16, requires_grad=True)  # that nobody reads


class Driver:
    """What compilation asks of a GPU's driver."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return HOPPER

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def compile_instead_of_running() -> None:
    """From here on a launch compiles its kernel, and says so."""
    driver.set_active(Driver())
    run = JITFunction.run

    def compiled(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        check_launcher(kernel)
        module = self.fn.__module__.rpartition(".")[2]
        print(f"{module}.{self.fn.__name__}", len(kernel.asm["cubin"]), flush=True)
        return kernel

    JITFunction.run = compiled


def check_launcher(kernel: Any) -> None:
    """Triton 3.6 writes a C launcher for a kernel's arguments when it is first run, which may fail."""
    if not hasattr(nvidia, "make_launcher"):
        return
    source, metadata = kernel.src, kernel.metadata
    constants = {
        (source.fn.arg_names.index(name),) if isinstance(name, str) else name: value
        for name, value in source.constants.items()
    }
    nvidia.make_launcher(constants, dict(source.signature), getattr(metadata, "tensordesc_meta", None))


def attention(size: int) -> None:
    """Of one head size, with its rotation and a bias, forward and backward."""
    angles = (torch.empty(SEQUENCE, size // 2), torch.empty(SEQUENCE, size // 2))
    ranges = (torch.zeros(ROWS, dtype=torch.int32), torch.zeros(ROWS, dtype=torch.int32))
    q, kv, bias = memory(ROWS, HEADS, size), memory(TOKENS, HEADS, 2, size), memory(HEADS * 3 * size)
    rotated_attention(q, kv, angles, ranges, bias=bias).sum().backward()
    parts = (
        *split_and_rotate(memory(2, SEQUENCE, HEADS, 3, size), *angles),
        memory(2, SEQUENCE, HEADS, size),
    )
    join_rotated_back((parts[0], parts[1], parts[2]), *angles, bias)


def tokens() -> None:
    """What works on whole tokens, forward and backward."""
    x, weight, bias = memory(TOKENS, WIDTH), memory(WIDTH), memory(WIDTH)
    norm = NormParameters(weight, bias, 1e-5)
    bias_gelu(x, bias).sum().backward()
    residual_norm(x, x, bias, norm)[0].sum().backward()
    cross_entropy(x, torch.zeros(TOKENS, dtype=torch.int64), WIDTH, 0.0)[0].sum().backward()
    spectral._products = lambda *_: "tf32"  # as on a GPU, where these tensors are not
    spectral.spectral_mixing(x, weight).sum().backward()
    spectral.spectral_entropy(x.detach())
    spectral.entropy_and_mixing(x.detach(), weight.detach())
    light, scores = torch.zeros(TOKENS, dtype=torch.bool), torch.empty(TOKENS)
    kept, slot, index, rest, counts, _ = select_rows(light, scores, ROWS)
    rows = TokenRows(index, torch.zeros(ROWS, dtype=torch.bool), slot, kept, rest, counts[1:])
    add_rows(x.detach(), memory(ROWS, WIDTH).detach(), index, rows.valid_R)
    parameters = UpdateParameters(weight, bias, norm, norm)
    routed_update(x, memory(ROWS, WIDTH), rows, parameters)[0].sum().backward()


if __name__ == "__main__":
    print("triton", triton.__version__)
    compile_instead_of_running()
    for head_size in (64, 128):
        attention(head_size)
    tokens()
