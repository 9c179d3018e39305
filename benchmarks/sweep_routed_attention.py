"""Sweep of routed attention's block sizes on one GPU, next to cuDNN: for whoever tunes another GPU.

    python benchmarks/sweep_routed_attention.py

Prints only; the winners belong into `DEFAULTS` of operators/kernels/routed_attention_tiles.py.
"""

import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel

from chiar_megatron.operators.kernels import routed_attention as fwd
from chiar_megatron.operators.kernels import routed_attention_backward as bwd
from chiar_megatron.operators.kernels import routed_attention_tiles as tiles
from chiar_megatron.operators.kernels.routed_attention_blocks import cut_rows
from chiar_megatron.operators.kernels.routed_attention_key_gradient import key_gradient
from chiar_megatron.operators.kernels.routed_attention_query_gradient import query_gradient

START = time.time()
N, D = 16, 64
CASES = [(256, 128, 0.5), (2048, 16, 0.5), (8192, 4, 0.25)]
# block_q, block_k, warps, stages, edge_stages, tma, registers
SWEEP = {
    "forward": [
        (64, 64, 4, 3, 2), (64, 128, 4, 3, 2), (64, 64, 4, 1, 1, True), (64, 64, 4, 2, 1, True, 168),
        (64, 128, 4, 1, 1, True, 168), (32, 128, 4, 2, 1, True), (64, 256, 8, 1, 1, True),
        (64, 64, 4, 3, 1, True), (64, 64, 4, 2, 1, True), (64, 128, 4, 2, 1, True), (128, 64, 8, 3, 1, True),
        (128, 128, 8, 2, 1, True), (64, 64, 4, 3, 1, True, 128), (64, 128, 4, 2, 1, True, 168),
        (128, 64, 4, 3, 1, True),
    ],
    "query_grad": [
        (64, 64, 4, 3, 1), (64, 64, 4, 2, 2), (128, 64, 8, 2, 2), (64, 128, 8, 2, 1, True),
        (64, 64, 4, 1, 1, True), (64, 64, 4, 3, 1, True, 128), (32, 64, 4, 3, 1, True),
        (64, 64, 4, 3, 1, True), (64, 64, 4, 2, 1, True), (64, 64, 4, 2, 1, True, 128),
        (128, 64, 8, 2, 1, True),
        (64, 128, 4, 2, 1, True), (128, 64, 8, 3, 1, True), (64, 32, 4, 3, 1, True),
    ],
    "key_grad": [
        (64, 64, 4, 3, 1), (64, 64, 4, 2, 2), (32, 64, 4, 2, 2), (32, 64, 4, 2, 1, True, 168),
        (32, 64, 4, 1, 1, True, 168), (32, 128, 8, 3, 1, True), (32, 128, 8, 2, 1, True, 128),
        (32, 128, 4, 2, 1, True), (32, 64, 4, 3, 1, True, 128), (16, 64, 4, 3, 1, True, 168),
        (64, 64, 4, 3, 1, True), (64, 64, 4, 2, 1, True), (64, 64, 4, 3, 1, True, 168),
        (64, 64, 4, 2, 1, True, 168),
        (64, 128, 8, 2, 1, True), (64, 128, 8, 3, 1, True), (32, 64, 4, 3, 1, True),
        (32, 64, 4, 3, 1, True, 168),
        (64, 128, 8, 3, 1, True, 168),
    ],
}  # fmt: skip


def say(*words):
    print(*words, flush=True)


def problem(T, b, rho, seed=0):
    """q, k, v as views of fused projections, first, last: bf16, random light tokens, padded capacity."""
    g = torch.Generator("cuda").manual_seed(seed)
    light = (torch.rand(b * T, device="cuda", generator=g) < rho).nonzero().squeeze(1).int()
    R = -(-int(1.05 * rho * b * T) // 64) * 64
    light = light[:R]
    first = torch.cat((light // T * T, light.new_ones(R - len(light))))
    last = torch.cat((light, light.new_zeros(R - len(light))))
    q = torch.randn(R, N, D, device="cuda", dtype=torch.bfloat16, generator=g)
    fused = torch.randn(b * T, N, 2 * D, device="cuda", dtype=torch.bfloat16, generator=g)
    return q, fused[..., :D], fused[..., D:], first, last


def saved_of(q, k, v, first, last):
    out, lse, blocks = fwd._forward_op(q, k, v, first, last, None, 0.0, sequences_of(first, last))
    return tiles.Saved(q, k, v, first, last, out, lse, blocks)


def sequences_of(first, last):
    return len(first[first <= last].unique())


def runner(kernel, saved, grad):
    """A call of one kernel at the tuning in OVERRIDES; gradients rotate and add up, as in a layer."""
    sequences = sequences_of(saved.first, saved.last)
    if kernel == "forward":
        return lambda: fwd._forward_op(*saved[:5], None, 0.0, sequences)
    numbers = (tiles.score_scale(D), 0, 1.0)
    block_q = tiles.tuning_of("query_grad", saved.q).block_q
    blocks = cut_rows(saved.q, len(saved.k), (saved.first, saved.last), sequences, block_q)
    saved = saved._replace(blocks=blocks)
    sums = bwd.space_for_sums(saved.q, saved.k, blocks)
    dq = torch.empty(saved.q.shape, dtype=grad.dtype, device="cuda")
    after = (*torch.rand(2, len(dq), D // 2, device="cuda"), sums[0], sums[2])

    def queries():
        return query_gradient(grad, saved, None, numbers, dq, after)

    if kernel == "query_grad":
        return queries
    found = queries()
    dkv = torch.empty(len(saved.k), N, 2, D, dtype=grad.dtype, device="cuda")
    out, of_keys = (dkv[:, :, 0], dkv[:, :, 1]), (*torch.rand(2, 256, D // 2, device="cuda"), sums[1])
    return lambda: key_gradient(grad, saved, found, None, numbers, out, of_keys)


def compile_one(kernel, numbers):
    """In a process of its own: fills triton's cache on disk for one tuning, returns what went wrong."""
    try:
        saved = saved_of(*problem(512, 2, 0.5))
        grad = torch.randn_like(saved.out)
        tiles.OVERRIDES[kernel] = tiles.Tuning(*numbers)
        runner(kernel, saved, grad)()
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[-1][:150] if str(error) else ''}"
    return None


def correct():
    """Against SDPA in float32 with an explicit mask, at the default tunings."""
    *tensors, first, last = problem(512, 3, 0.5)
    tensors = [x.detach().requires_grad_() for x in tensors]
    valid = last >= first
    q, k, v = (x.float().transpose(0, 1) for x in (tensors[0][valid], *tensors[1:]))
    key = torch.arange(k.shape[1], device="cuda")
    mask = (key >= first[valid][:, None]) & (key <= last[valid][:, None])
    with sdpa_kernel(SDPBackend.MATH):
        wanted = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask)[0].transpose(0, 1)
    grad = torch.randn(tensors[0].shape, device="cuda", dtype=torch.bfloat16)
    want = [wanted, *torch.autograd.grad(wanted, tensors, grad[valid].float())]
    for tma in (False, True):
        if tma:
            for kernel in SWEEP:
                tiles.OVERRIDES[kernel] = tiles.Tuning(64, 64, 4, 3, 1, True)
        try:
            out = fwd.routed_attention(*tensors, first, last)
            found = [out[valid], *torch.autograd.grad(out, tensors, grad)]
        finally:
            tiles.OVERRIDES.clear()
        pairs = [(a.float(), b.float()) for a, b in zip(found, want, strict=True)]
        errors = [((a - b).norm() / b.norm()).item() for a, b in pairs]
        good = max(errors) < 1e-2 and bool((out[~valid] == 0).all()) and bool((found[1][~valid] == 0).all())
        say("correct" if good else "WRONG", f"tma={tma}", [f"{e:.1e}" for e in errors])


def bench(call):
    return triton.testing.do_bench(call, warmup=10, rep=30, return_mode="median")


def both(function, inputs, grad):
    """Milliseconds of forward alone and of forward with backward."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    with torch.no_grad():
        forward = bench(lambda: function(*inputs))
    return forward, bench(lambda: torch.autograd.grad(function(*inputs), inputs, grad))


def baselines(T, b):
    """cuDNN, all positions, causal, [b, n, T, d] with the strides of [b, T, n, d]."""
    inputs = [torch.randn(b, T, N, D, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(3)]
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        function = partial(F.scaled_dot_product_attention, is_causal=True)
        return {"cudnn": both(function, inputs, torch.randn_like(inputs[0]))}


def sweep_case(T, b, rho, usable):
    """Best tuning and time of each kernel, and all times, printed."""
    saved = saved_of(*problem(T, b, rho))
    grad, best = torch.randn_like(saved.out), {}
    for kernel, tunings in usable.items():
        times = {}
        for numbers in tunings:
            tiles.OVERRIDES[kernel] = tiles.Tuning(*numbers)
            try:
                times[numbers] = bench(runner(kernel, saved, grad))
            except Exception as error:
                say(f"  {kernel} {numbers} failed: {type(error).__name__} {str(error)[:120]}")
        tiles.OVERRIDES.pop(kernel, None)
        say(f"  {kernel:10}", "  ".join(f"{','.join(map(str, k))}={t:.3f}" for k, t in times.items()))
        if times:
            best[kernel] = min(times.items(), key=lambda item: item[1])
    return best


def main():
    say(torch.__version__, triton.__version__, torch.cuda.get_device_name())
    jobs = [(kernel, numbers) for kernel, tunings in SWEEP.items() for numbers in tunings]
    usable = {kernel: [] for kernel in SWEEP}
    with ProcessPoolExecutor(min(16, os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        futures = [(job, pool.submit(compile_one, *job)) for job in jobs]
        correct()  # meanwhile
        for (kernel, numbers), future in futures:
            if problem_found := future.result():
                say(f"  {kernel} {numbers} cannot run: {problem_found}")
            else:
                usable[kernel].append(numbers)
    say(f"compiled {len(jobs)} kernels, {time.time() - START:.0f} s")
    table = []
    for T, b, rho in CASES:
        say(f"T={T} b={b} rho={rho}, ms ({time.time() - START:.0f} s)")
        plain = baselines(T, b)
        best = sweep_case(T, b, rho, usable)
        tiles.OVERRIDES.update({kernel: tiles.Tuning(*numbers) for kernel, (numbers, _) in best.items()})
        *inputs, first, last = problem(T, b, rho)
        grad = torch.randn(inputs[0].shape, device="cuda", dtype=torch.bfloat16)
        plain["routed"] = both(partial(fwd.routed_attention, first_R=first, last_R=last), inputs, grad)
        tiles.OVERRIDES.clear()
        table.append(((T, b, rho), plain, best))
    say(f"\n{'T':>5} {'b':>3} {'rho':>5}  {'':22} {'fwd':>8} {'fwd+bwd':>8}  fwd/cudnn  fwd+bwd/cudnn")
    for (T, b, rho), rows, best in table:
        reference = rows["cudnn"]
        for name, (forward, total) in rows.items():
            ratios = f"{forward / reference[0]:9.2f} {total / reference[1]:14.2f}"
            say(f"{T:5} {b:3} {rho:5}  {name:22} {forward:8.3f} {total:8.3f}  {ratios}")
        say("      best:", "  ".join(f"{k} {','.join(map(str, n))} {t:.3f}" for k, (n, t) in best.items()))
    say(f"{time.time() - START:.0f} s in all")


if __name__ == "__main__":
    main()
