"""The ways of `chiar bench attention`, with their inputs, and the check of each against float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from chiar_megatron.bench.baselines import plain_attention
from chiar_megatron.bench.checks import Checks
from chiar_megatron.config.schema import RouterConfig
from chiar_megatron.operators.routed_attention import routed_attention
from chiar_megatron.routing.balance import capacity_rows

Compute = Callable[[Tensor, Tensor, Tensor], Tensor]
_LIMIT = {torch.float32: 2e-5, torch.bfloat16: 1.5e-2}
_MATH_MAX_BYTES = 8 << 30  # of float32 scores, which that backend keeps several times


@dataclass(frozen=True)
class Rows:
    """Query rows of the light tokens, batch-major, padded to the capacity (DESIGN decision 5)."""

    first_R: Tensor
    """int32 [R], first key: where the row's sequence begins."""
    last_R: Tensor
    """int32 [R], last key: the row's own token; below first in padding."""
    useful: int
    """Rows before the padding."""

    @staticmethod
    def of(light_BS: Tensor, rho: float) -> Rows:
        """Rows of `light_BS` (bool), as many as the capacity for ρ holds."""
        tokens, length = light_BS.numel(), light_BS.shape[1]
        capacity = capacity_rows(RouterConfig(target=rho), tokens)
        assert capacity is not None
        token_U = light_BS.flatten().nonzero().squeeze(1)[:capacity]
        first_R = torch.zeros(capacity, dtype=torch.int32, device=light_BS.device)
        last_R = first_R - 1
        first_R[: len(token_U)] = (token_U // length * length).int()
        last_R[: len(token_U)] = token_U.int()
        return Rows(first_R, last_R, len(token_U))

    def visible(self, keys: int) -> Tensor:
        """bool [R, keys]; padding sees nothing."""
        key_K = torch.arange(keys, device=self.first_R.device)
        return (key_K >= self.first_R[:, None]) & (key_K <= self.last_R[:, None])


@dataclass(frozen=True)
class Case:
    """One way with its inputs: full attention takes q, k, v as `[b, n, s, d]`, routed as `[rows, n, d]`."""

    name: str
    rho: float
    compute: Compute
    inputs: Sequence[tuple[Tensor, Tensor, Tensor]]
    grads: Sequence[Tensor]
    rows: Rows | None = None
    """None: full attention."""


@dataclass(frozen=True)
class Shape:
    """Sizes of one batch, and where its numbers come from."""

    batch: int
    length: int
    heads: int
    groups: int
    head_size: int
    dtype: torch.dtype
    generator: torch.Generator
    with_flex: bool = True
    """Whether FlexAttention is one of the ways."""

    @property
    def tokens(self) -> int:
        """Of the whole batch."""
        return self.batch * self.length

    @property
    def device(self) -> torch.device:
        """Where everything is computed."""
        return self.generator.device

    @property
    def bytes(self) -> int:
        """Of q, k, v and a gradient."""
        width = (2 * self.heads + 2 * self.groups) * self.head_size
        return self.tokens * width * self.dtype.itemsize

    def normal(self, *shape: int) -> Tensor:
        """Random numbers that need a gradient."""
        numbers = torch.randn(*shape, device=self.device, generator=self.generator)
        return numbers.to(self.dtype).requires_grad_()

    def light(self, rho: float) -> Tensor:
        """Light tokens bool [b, s]: ρ of the batch to the token, anywhere in it."""
        light = torch.zeros(self.tokens, dtype=torch.bool, device=self.device)
        order = torch.randperm(self.tokens, device=self.device, generator=self.generator)
        light[order[: round(rho * self.tokens)]] = True
        return light.view(self.batch, self.length)


def full_cases(shape: Shape, sets: int, note: Callable[[str], None]) -> list[Case]:
    """Full causal attention by every backend of torch that works here; `note` hears of the others."""
    size = (shape.batch, shape.heads, shape.length, shape.head_size)
    narrow = (shape.batch, shape.groups, shape.length, shape.head_size)
    inputs = [(shape.normal(*size), shape.normal(*narrow), shape.normal(*narrow)) for _ in range(sets)]
    grads = [shape.normal(*size).detach() for _ in range(sets)]
    backends: dict[str, SDPBackend | None] = {"torch's choice": None}
    if shape.device.type == "cuda":
        backends |= {
            "cuDNN": SDPBackend.CUDNN_ATTENTION,
            "flash": SDPBackend.FLASH_ATTENTION,
            "efficient": SDPBackend.EFFICIENT_ATTENTION,
        }
    if 4 * shape.batch * shape.heads * shape.length**2 <= _MATH_MAX_BYTES:
        backends["math"] = SDPBackend.MATH
    cases = []
    for name, backend in backends.items():
        compute = _full(backend, shape.heads != shape.groups)
        try:
            compute(*inputs[0])
        except RuntimeError as error:
            note(f"full {name}: not here: {str(error).splitlines()[0][:120]}")
            continue
        cases.append(Case(f"full {name}", 1.0, compute, inputs, grads))
    return cases


def _full(backend: SDPBackend | None, gqa: bool) -> Compute:
    def compute(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if backend is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)

    return compute


def routed_cases(shape: Shape, rho: float, sets: int, note: Callable[[str], None]) -> list[Case]:
    """Attention of light queries alone over all keys: the product's, and on CUDA FlexAttention."""
    rows = Rows.of(shape.light(rho), rho)
    query = (len(rows.last_R), shape.heads, shape.head_size)
    keys = (shape.tokens, shape.groups, shape.head_size)
    inputs = [(shape.normal(*query), shape.normal(*keys), shape.normal(*keys)) for _ in range(sets)]
    grads = [shape.normal(*query).detach() for _ in range(sets)]

    def routed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return routed_attention(q, k, v, rows.first_R, rows.last_R, sequences=shape.batch)

    cases = [Case(f"routed ρ={rho:g}", rho, routed, inputs, grads, rows)]
    if shape.with_flex and shape.device.type == "cuda":
        try:
            flex = _flex(rows, shape)
            flex(*inputs[0])
            cases.append(Case(f"FlexAttention ρ={rho:g}", rho, flex, inputs, grads, rows))
        except Exception as error:  # an alternative: where it fails, the product is still measured
            note(f"FlexAttention: not here: {type(error).__name__}: {str(error).splitlines()[0][:160]}")
    return cases


def _flex(rows: Rows, shape: Shape) -> Compute:
    """FlexAttention over the flat rows and keys; its block mask is made beforehand and not timed."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled: Any = torch.compile(flex_attention, dynamic=False)
    make_mask: Any = create_block_mask
    first_R, last_R = rows.first_R, rows.last_R

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key >= first_R[query]) & (key <= last_R[query])

    mask = make_mask(visible, None, None, len(last_R), shape.tokens, device=str(shape.device), _compile=True)
    gqa = shape.heads != shape.groups

    def compute(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batched = [tensor.transpose(0, 1)[None] for tensor in (q, k, v)]
        return compiled(*batched, block_mask=mask, enable_gqa=gqa)[0].transpose(0, 1)  # type: ignore[no-any-return]

    return compute


def check_case(case: Case, what: str, checks: Checks) -> None:
    """Output and gradients against the softmax written out in float64; raises WrongResult."""
    inputs, grad = case.inputs[0], case.grads[0]
    out = case.compute(*inputs)
    results = [out.detach(), *torch.autograd.grad(out, inputs, grad)]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    wanted = reference(exact, case.rows)
    references = [wanted.detach(), *torch.autograd.grad(wanted, exact, grad.double())]
    limit = _LIMIT[out.dtype]
    checks.all_close(f"{case.name}, {what}: output and gradients against float64", results, references, limit)


def reference(inputs: Sequence[Tensor], rows: Rows | None) -> Tensor:
    """Attention written out, in the inputs' precision and layout; padding rows give 0."""
    q, k, v = inputs
    if rows is None:
        return plain_attention(q, k, v)
    visible_RK = rows.visible(len(k))
    used_R = visible_RK.any(dim=1)
    flat = [tensor.transpose(0, 1)[None] for tensor in inputs]
    out_RND = plain_attention(flat[0], flat[1], flat[2], visible_RK | ~used_R[:, None])[0].transpose(0, 1)
    return torch.where(used_R[:, None, None], out_RND, 0.0)
