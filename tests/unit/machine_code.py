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
from triton.runtime import driver
from triton.runtime.jit import JITFunction

HOPPER = GPUTarget("cuda", 90, 32)
ROWS, TOKENS, SEQUENCE, HEADS = 192, 512, 256, 4
half, tokens_of = torch.bfloat16, partial(torch.empty, TOKENS)


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
        print(self.fn.__name__, len(kernel.asm["cubin"]), flush=True)
        return kernel

    JITFunction.run = compiled


def check_launcher(kernel: Any) -> None:
    """Triton 3.6 writes a C launcher for a kernel's arguments when it is first run, which may fail."""
    from triton.backends.nvidia import driver as nvidia

    if not hasattr(nvidia, "make_launcher"):
        return
    source, metadata = kernel.src, kernel.metadata
    constants = {
        (source.fn.arg_names.index(name),) if isinstance(name, str) else name: value
        for name, value in source.constants.items()
    }
    nvidia.make_launcher(constants, dict(source.signature), getattr(metadata, "tensordesc_meta", None))


def main() -> None:
    """Every op once, forward and backward, on memory that nobody reads."""
    compile_instead_of_running()
    for size in (64, 128):
        attention(size)
    tokens()


def attention(size: int) -> None:
    """Routed attention with its rotation, of one head size."""
    from chiar_megatron.operators.kernels import rotated_attention  # noqa: F401  registers the ops

    ops = torch.ops.chiar_megatron
    q = torch.empty(ROWS, HEADS, size, dtype=half)
    kv = torch.empty(TOKENS, HEADS, 2, size, dtype=half)
    ranges = [torch.zeros(ROWS, dtype=torch.int32)] * 2
    angles = [torch.empty(length, size // 2) for length in (ROWS, ROWS, SEQUENCE, SEQUENCE)]
    saved = list(ops.rotated_attention(q, kv, ranges, angles, None, 0.0))
    ops.rotated_attention_backward(q, kv, saved, ranges, angles, None, 0.0)


def tokens() -> None:
    """What works on whole tokens: spectral, norms, GELU, rows, loss, rotation."""
    from chiar_megatron.operators.kernels import bias_gelu, cross_entropy, residual_norm, rotary, select_rows

    x = torch.empty(TOKENS, 1024, dtype=half, requires_grad=True)
    weight, bias = (torch.empty(1024, dtype=half, requires_grad=True) for _ in range(2))
    select_rows.select_rows(torch.zeros(TOKENS, dtype=torch.bool), tokens_of(), ROWS)
    bias_gelu.bias_gelu(x, bias).backward(x.detach())
    norm = residual_norm.NormParameters(weight, bias, 1e-5)
    residual_norm.residual_norm(x, x, bias, norm)[0].backward(x.detach())
    cross_entropy.cross_entropy(x, torch.zeros(TOKENS, dtype=torch.int64), 1000, 0.0)[0].sum().backward()
    grouped = torch.empty(2, SEQUENCE, HEADS, 3, 64, dtype=half)
    rotary.split_and_rotate(grouped, torch.empty(SEQUENCE, 32), torch.empty(SEQUENCE, 32))
    spectral(x, weight)
    update(x, weight, bias)


def spectral(x: torch.Tensor, weight: torch.Tensor) -> None:
    """Entropy and mixing, of a width of two factors."""
    from chiar_megatron.operators.kernels import spectral

    spectral.spectral_mixing(x, weight).backward(x.detach())
    spectral.spectral_entropy(x.detach())


def update(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> None:
    """A routed layer's post-norm."""
    from chiar_megatron.operators.kernels.residual_norm import NormParameters
    from chiar_megatron.operators.kernels.routed_update import UpdateParameters, routed_update
    from chiar_megatron.operators.rows import TokenRows

    rows = TokenRows(
        torch.zeros(ROWS, dtype=torch.int64),
        torch.zeros(ROWS, dtype=torch.bool),
        tokens_of(dtype=torch.int64),
        tokens_of(dtype=torch.bool),
        tokens_of(dtype=torch.int32),
        torch.zeros(1, dtype=torch.int32),
    )
    norm = NormParameters(weight, bias, 1e-5)
    attended = torch.empty(ROWS, 1024, dtype=half, requires_grad=True)
    parameters = UpdateParameters(weight, bias, norm, norm)
    routed_update(x, attended, rows, parameters)[0].backward(x.detach())


if __name__ == "__main__":
    print("triton", triton.__version__)
    main()
