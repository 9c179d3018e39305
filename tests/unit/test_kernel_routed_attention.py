"""Routed attention against the formula in float64, its kernels run by Triton's interpreter.

The interpreter is chosen when triton is imported, so the variable has to stand before (tests/conftest.py
sets it for the whole suite; here it is for this file alone). With a GPU's triton already imported, skip.
"""

from __future__ import annotations

import os
from itertools import pairwise

os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs triton")

import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder

from chiar_megatron.operators.kernels import routed_attention_tiles as tiles
from chiar_megatron.operators.kernels.routed_attention import routed_attention
from chiar_megatron.operators.kernels.routed_attention_blocks import cut_rows

if not isinstance(tiles.load_tile, InterpretedFunction):
    pytest.skip("triton was imported without TRITON_INTERPRET=1", allow_module_level=True)


OVER_ROWS = ("forward", "query_grad")


@pytest.fixture(autouse=True, params=[False, True], ids=["pointers", "tma"])
def small_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """Blocks smaller than the cases, and unequal, so that loops have edges and a middle."""
    tma = request.param
    monkeypatch.setattr(tiles, "OVERRIDES", {
        "forward": tiles.Tuning(32, 16, 4, 1, tma=tma), "query_grad": tiles.Tuning(32, 32, 4, 1, tma=tma),
        "key_grad": tiles.Tuning(16, 32, 4, 1, tma=tma),
    })  # fmt: skip


@pytest.fixture(autouse=True)
def bfloat16_products(monkeypatch: pytest.MonkeyPatch):
    """The interpreter holds bfloat16 as uint16, and its product of matrices multiplies those integers."""
    plain = InterpreterBuilder.create_dot

    def create_dot(self, a, b, *rest):
        a, b = (self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return plain(self, a, b, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


def formula(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor, last: Tensor, keep: Tensor | None = None
) -> Tensor:
    """The definition, in float64; keep: factor of each probability [n, R, K]."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    s = torch.einsum("rnd,knd->nrk", q, k) / q.shape[-1] ** 0.5
    key = torch.arange(k.shape[0])
    seen = (key >= first[:, None]) & (key <= last[:, None])
    p = torch.where(seen, s.exp(), 0)
    p = p / p.sum(-1, keepdim=True).masked_fill((last < first)[:, None], 1)
    return torch.einsum("nrk,knd->rnd", p if keep is None else p * keep, v)


def routed(starts: list[int], K: int, light: Tensor, R: int) -> tuple[Tensor, Tensor]:
    """first, last [R] of the light positions in segments that begin at `starts`; the rest is padding."""
    begin = torch.empty(K, dtype=torch.int32)
    for a, b in pairwise([*starts, K]):
        begin[a:b] = a
    padding = R - light.numel()
    first = torch.cat((begin[light], torch.full((padding,), 3, dtype=torch.int32)))
    last = torch.cat((light.int(), torch.full((padding,), 2, dtype=torch.int32)))
    return first, last


def check(
    tensors: list[Tensor], first: Tensor, last: Tensor, tolerance: float = 1e-5, sequences: int = 1
) -> None:
    """Output and gradients of the kernels and of the formula, for a random gradient of the output."""
    tensors = [x.detach().requires_grad_() for x in tensors]
    out = routed_attention(*tensors, first, last, sequences=sequences)
    assert out.is_contiguous() and out.dtype == tensors[0].dtype and out.shape == tensors[0].shape
    grad = random(*out.shape, seed=9, dtype=out.dtype)
    wanted = formula(*tensors, first, last)
    want_grads = torch.autograd.grad(wanted, tensors, grad.double(), allow_unused=True)
    grads = torch.autograd.grad(out, tensors, grad)
    assert all(g.is_contiguous() for g in grads)
    for name, found, want in zip(("out", "q", "k", "v"), (out, *grads), (wanted, *want_grads), strict=True):
        close = torch.isclose(found.double(), want.double(), rtol=tolerance, atol=tolerance)
        assert close.all(), f"{name}: off by {(found - want).abs().max().item()}"


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + len(shape))).to(dtype)


def some(K: int, count: int, seed: int = 0) -> Tensor:
    """Sorted positions of `count` light tokens of K."""
    return torch.randperm(K, generator=torch.Generator().manual_seed(seed))[:count].sort().values


@pytest.mark.parametrize(
    ("R", "valid"), [(0, 0), (1, 1), (1, 0), (63, 63), (64, 50), (65, 65), (65, 0), (65, 33)]
)
def test_any_number_of_rows_and_of_valid_ones(R, valid):
    first, last = routed([0, 50], 100, some(100, valid), R)
    tensors = [random(rows, 2, 16, seed=i) for i, rows in enumerate((R, 100, 100))]
    check(tensors, first, last)


@pytest.mark.parametrize(
    ("starts", "K"),
    [([0], 96), ([0, 48], 96), ([0, 7, 8, 40, 73], 97), ([0, 32, 64], 96)],
    ids=["one", "two", "documents", "aligned"],
)
def test_all_light_in_sequences_and_documents(starts, K):
    first, last = routed(starts, K, torch.arange(K), K)
    check([random(K, 1, 16), random(K, 1, 16, seed=1), random(K, 1, 16, seed=2)], first, last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("sequences", [1, 2, 3, 5, 7, 150])
def test_blocks_that_end_with_sequences(sequences, dtype):
    """Three of 50 tokens: whatever number is said, results are right."""
    first, last = routed([0, 50, 100], 150, some(150, 110), 130)
    tensors = [random(rows, 2, 16, seed=i, dtype=dtype) for i, rows in enumerate((130, 150, 150))]
    check(tensors, first, last, 1e-5 if dtype == torch.float32 else 3e-3, sequences)


@pytest.mark.parametrize("heads", [1, 2000])
@pytest.mark.parametrize(
    ("sequences", "length", "light", "R"),
    [
        (4, 256, 600, 640),
        (4, 256, 0, 70),
        (1, 1000, 500, 500),
        (6, 40, 90, 91),
        (3, 7, 21, 21),
        (2, 64, 1, 1),
    ],
)
def test_blocks_of_rows(sequences, length, light, R, heads):
    """Each row once; of a sequence whole blocks from its end; of some sequences the last ones first."""
    keys = sequences * length
    starts = list(range(0, keys, length))
    first, last = routed(starts, keys, some(keys, light), R)
    start, stop = cut_rows(torch.empty(R, heads, 1), keys, (first, last), sequences, 32).unbind(0)
    sizes = (stop - start).tolist()
    taken = sorted(row for a, b in zip(start.tolist(), stop.tolist(), strict=True) for row in range(a, b))
    assert taken == list(range(R)) and min(sizes) >= 0 and max(sizes) <= 32
    of_row = torch.where(last >= first, last // length, sequences)
    blocks = [(of_row[a].item(), a, b) for a, b in zip(start.tolist(), stop.tolist(), strict=True) if b > a]
    assert all(of_row[a:b].unique().numel() == 1 for _, a, b in blocks)
    cut = [block for block in blocks if block[0] < sequences]
    assert blocks[: len(cut)] == cut, "padding comes last"
    for sequence in range(sequences):
        own = [block for block in cut if block[0] == sequence]
        assert own == sorted(own, reverse=True) and all(b - a == 32 for _, a, b in own[:-1])
    if heads == 2000:  # enough programs in one sequence
        assert cut == sorted(cut, reverse=True)
    elif light >= 20 * sequences:
        lasts = {max(block for block in cut if block[0] == sequence) for sequence in range(sequences)}
        together = 1 << (sequences.bit_length() - 1)
        assert len({block[0] for block in cut[-together:]}) == together and max(cut) in cut[:together]
        assert cut[0] in lasts


@pytest.mark.parametrize(("d", "n", "g"), [(16, 4, 2), (40, 2, 1), (64, 2, 2), (128, 2, 1), (3, 3, 1)])
def test_head_sizes_and_groups_of_heads(d, n, g):
    first, last = routed([0, 30], 60, some(60, 37), 40)
    check([random(40, n, d), random(60, g, d, seed=1), random(60, g, d, seed=2)], first, last)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("starts", "count"), [([0, 50], 60), ([0, 7, 8, 40, 73], 100), ([0, 64], 41)], ids=["two", "all", "few"]
)
def test_sixteen_bits(starts, count, dtype):
    # Tiles come by descriptors in these types only.
    first, last = routed(starts, 100, some(100, count), count + 4)
    shapes = ((count + 4, 2, 64), (100, 1, 64), (100, 1, 64))
    tensors = [random(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]
    check(tensors, first, last, tolerance=2e-2 if dtype == torch.bfloat16 else 3e-3)


def test_views_of_a_fused_projection():
    first, last = routed([0, 24], 48, torch.arange(48), 48)
    fused = random(48, 2, 5, 24)  # [token, group, two query heads + key + value + spare, head]
    q, k, v = fused[:, :, :2].transpose(1, 2)[:, 1], fused[:, :, 2], fused[:, :, 3]
    assert not q.is_contiguous() and not k.is_contiguous()
    check([q, k, v], first, last)
    apart = random(24, 48, 2).permute(1, 2, 0)  # the head's dimension is not contiguous
    out = routed_attention(apart, apart, apart, first, last)
    torch.testing.assert_close(out.double(), formula(apart, apart, apart, first, last), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_light_rows_against_light_rows(dtype):
    # Two sequences with 20 and 33 light tokens, then 11 padding rows, which are keys that nobody sees.
    row = torch.arange(64, dtype=torch.int32)
    first, last = torch.where(row < 20, 0, 20).int(), row.clone()
    first[53:], last[53:] = 0, -1
    tensors = [random(64, 2, 16, seed=i, dtype=dtype) for i in range(3)]
    check(tensors, first, last, tolerance=1e-5 if dtype == torch.float32 else 3e-3)
    k, v = (x.clone().requires_grad_() for x in tensors[1:])
    q = tensors[0].clone()
    q[53:] = torch.nan  # what padding rows hold must not matter
    q.requires_grad_()
    out = routed_attention(q, k, v, first, last)
    grad = torch.ones_like(out)
    grad[53:] = torch.nan
    out.backward(grad)
    assert (out[53:] == 0).all() and out.isfinite().all()
    assert all(x.grad.isfinite().all() and (x.grad[53:] == 0).all() for x in (q, k, v))


@triton.jit
def ranges_kernel(first_ptr, last_ptr, out_ptr, R, ROWS: tl.constexpr):
    _, _, low, mid, mid_stop, stop = tiles.key_range(first_ptr, last_ptr, 0, R, ROWS)
    tl.store(out_ptr, low)
    tl.store(out_ptr + 1, mid)
    tl.store(out_ptr + 2, mid_stop)
    tl.store(out_ptr + 3, stop)


def test_padding_rows_do_not_widen_a_blocks_range():
    # Rows 3 and 4 are padding with wild values, row 5 is beyond R.
    first = torch.tensor([4, 4, 9, 2**31 - 1, 0, 0], dtype=torch.int32)
    last = torch.tensor([5, 8, 11, 10**6, -1, 99], dtype=torch.int32)
    out = torch.zeros(4, dtype=torch.int32)
    ranges_kernel[(1,)](first, last, out, 5, ROWS=8)
    assert out.tolist() == [4, 9, 6, 12]


def test_every_place_of_an_edge_within_its_block():
    # All tokens are light; one document begins at every place of a block of keys, and of rows.
    tensors = [random(40, 1, 16, seed=i) for i in range(3)]
    for start in range(1, 34):
        check(tensors, *routed([0, start], 40, torch.arange(40), 40))
        # Rows that see a prefix, the shortest of every length.
        last = torch.arange(40, dtype=torch.int32).clamp(min=start)
        check(tensors, torch.zeros_like(last), last)


@pytest.mark.parametrize("growth", [0.5, 30.0, 100.0])
def test_later_keys_of_larger_scores(growth):
    # At 100 a power of 2 overflows, if it is not relative to the largest score so far.
    tensors = [random(40, 2, 16, seed=i) for i in range(3)]
    tensors[1] *= torch.linspace(0.0, growth, 40)[:, None, None]
    check(tensors, *routed([0, 3], 40, torch.arange(40), 40), tolerance=3e-5)


def test_dropout_keeps_the_same_probabilities_in_both_directions():
    first, last = routed([0, 40], 80, some(80, 50), 64)
    q, k, v = random(64, 2, 16), random(80, 1, 16, seed=1), random(80, 1, 16, seed=2)
    tensors = [x.requires_grad_() for x in (q, k, v)]
    seed, p = torch.tensor([2**40 + 7]), 0.25
    keep = tiles.dropout_mask(seed, 64, 2, 80, p)
    assert abs(keep.double().mean() - (1 - p)) < 0.02
    assert (keep[0] != keep[1]).any() and not torch.equal(keep, tiles.dropout_mask(seed + 1, 64, 2, 80, p))
    out = routed_attention(q, k, v, first, last, p, seed)
    wanted = formula(q, k, v, first, last, keep.double() / (1 - p))
    torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-5)
    grad = random(*out.shape, seed=5)
    want_grads = torch.autograd.grad(wanted, tensors, grad.double())
    for found, want in zip(torch.autograd.grad(out, tensors, grad), want_grads, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)
    assert torch.equal(out, routed_attention(q, k, v, first, last, p, seed))
    torch.manual_seed(1)
    drawn = routed_attention(q, k, v, first, last, p)
    torch.manual_seed(1)
    assert torch.equal(drawn, routed_attention(q, k, v, first, last, p)) and not torch.equal(drawn, out)


def test_a_compiled_layer_takes_the_op_as_it_is():
    first, last = routed([0, 20], 40, some(40, 30), 32)

    def layer(x: Tensor) -> Tensor:
        fused = (2 * x).view(40, 3, 2, 16)
        q, k, v = fused.unbind(1)
        return routed_attention(q[:32], k, v, first, last) * 3

    x = random(40, 96).requires_grad_()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    out, plain = compiled(x), layer(x)
    torch.testing.assert_close(out, plain)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), x), torch.autograd.grad(plain.sum(), x))


def test_the_op_keeps_its_contract_with_torch():
    first, last = routed([0], 20, some(20, 14), 16)
    q, k, v = (random(r, 2, 16, seed=r).requires_grad_() for r in (16, 20, 20))
    op = torch.ops.chiar_megatron.routed_attention.default
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    results = torch.library.opcheck(op, (q, k, v, first, last, None, 0.0, 4), test_utils=checks)
    assert set(results.values()) == {"SUCCESS"}


def test_every_kernel_has_default_blocks(monkeypatch):
    monkeypatch.setattr(tiles, "OVERRIDES", {})
    for kernel in ("forward", "query_grad", "key_grad"):
        for d in (16, 40, 64, 96, 128, 256):
            for dtype in (torch.float32, torch.bfloat16):
                tuning = tiles.tuning_of(kernel, torch.empty(1, d, dtype=dtype))
                assert tuning.block_q % 16 == tuning.block_k % 16 == 0
    for d in (64, 128, 256):
        for dtype in (torch.float32, torch.bfloat16):
            rows = [tiles.tuning_of(kernel, torch.empty(1, d, dtype=dtype)) for kernel in OVER_ROWS]
            assert len({tuning.block_q for tuning in rows}) == 1, "one cut of the rows serves both"
