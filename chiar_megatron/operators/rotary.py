"""Rotary positions (RoFormer): rotate-half over the whole head, halves as in Llama."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from chiar_megatron.config.schema import RotaryScalingConfig
from chiar_megatron.operators.casts import cast
from chiar_megatron.runtime.device import current_device
from chiar_megatron.runtime.paths import kernels_available


class RotaryEmbedding(torch.nn.Module):
    """Rotate-half rotary positions over the whole head (RoFormer; halves as in Llama)."""

    def __init__(self, head_size: int, base: float, max_length: int, scaling: RotaryScalingConfig) -> None:
        """max_length: positions expected; later ones make the tables grow."""
        super().__init__()
        self.head_size = head_size
        self.base = base
        self.scaling = scaling
        self._cos_SD, self._sin_SD = _rotary_tables(max_length, head_size, base, scaling, current_device())

    def forward(self, positions_X: Tensor, end: int) -> tuple[Tensor, Tensor]:
        """cos and sin `[x, 1, d/2]` float32 of positions that all lie before `end`."""
        cos_SD, sin_SD = self._tables(end, positions_X.device)
        return cos_SD[positions_X][:, None], sin_SD[positions_X][:, None]

    def stretch(self, first: int, end: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin `[end - first, 1, d/2]` float32 of the positions from `first` to before `end`, which
        are no copies."""
        cos_SD, sin_SD = self._tables(end, device)
        return cos_SD[first:end, None], sin_SD[first:end, None]

    def _tables(self, end: int, device: torch.device) -> tuple[Tensor, Tensor]:
        if self._cos_SD.shape[0] < end or self._cos_SD.device != device:
            length = max(end, 2 * self._cos_SD.shape[0])  # generation asks token by token
            tables = _rotary_tables(length, self.head_size, self.base, self.scaling, device)
            self._cos_SD, self._sin_SD = tables
        return self._cos_SD, self._sin_SD


@lru_cache(maxsize=4)
def _rotary_tables(
    length: int, head_size: int, base: float, scaling: RotaryScalingConfig, device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos and sin `[length, d/2]` float32, shared by all layers."""
    position_S = torch.arange(length, dtype=torch.float32, device=device)
    angle_SD = torch.outer(position_S, rotary_frequencies(head_size, base, scaling, device))
    return angle_SD.cos(), angle_SD.sin()


def rotary_frequencies(
    head_size: int, base: float, scaling: RotaryScalingConfig, device: torch.device
) -> Tensor:
    """Radians a position turns each pair of a head by, float32 `[d/2]`.

    Source of llama3's scaling: Llama 3.1 (Grattafiori et al., 2024) as transformers computes it.
    """
    exponent_D = torch.arange(0, head_size, 2, dtype=torch.float32, device=device) / head_size
    frequency_D = base**-exponent_D
    if scaling.rope_type == "none":
        return frequency_D
    if scaling.rope_type == "linear":
        return frequency_D / scaling.factor
    turns_D = scaling.original_max_position_embeddings * frequency_D / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept_D = ((turns_D - low) / (high - low)).clamp(0.0, 1.0)
    return kept_D * frequency_D + (1.0 - kept_D) * frequency_D / scaling.factor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the halves of `[..., heads, d]` as complex numbers; same shape and dtype. Backwards by -sin.

    Written as a swap of halves rather than a concatenation, which a compiler would not fuse further.
    """
    halves = x.float().unflatten(-1, (2, -1))
    signed_sin = torch.stack((-sin, sin), dim=-2)
    turned: Tensor = halves * cos[..., None, :] + halves.flip(-2) * signed_sin
    return cast(turned.flatten(-2), x.dtype)


def split_and_rotate(
    grouped: Tensor, cos: Tensor, sin: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries `[..., g, r, d]`, rotated keys and plain values `[..., g, d]` from Megatron's layout
    `[..., x, g, r + 2, d]`; cos, sin: `[x, 1, d/2]`. r may be 0.

    bias: `[g·(r + 2)·d]`, which `grouped` has been given without a gradient (`bias_for_split`): its gradient
    is taken here.
    """
    return _SplitAndRotate.apply(grouped, cos, sin, bias)  # type: ignore[no-any-return,no-untyped-call]


def bias_for_split(x: Tensor, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The bias as the linear layer in front of `split_and_rotate` (or of `rotated_attention`) is to have it,
    and as that is: where a kernel writes the layer's gradient, it adds up the bias's on its way."""
    if bias is None or not _by_kernel(x):
        return bias, None
    return bias.detach(), bias


def join_rotated_back(
    grad_query: Tensor, grad_key: Tensor, grad_value: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:
    """The gradient `[..., x, g, r + 2, d]` from those of what `split_and_rotate` returns."""
    parts = (
        rotate(grad_query, cos[..., None, :], -sin[..., None, :]),
        rotate(grad_key, cos, -sin)[..., None, :],
        grad_value[..., None, :],
    )
    return torch.cat(parts, dim=-2)


class _SplitAndRotate(torch.autograd.Function):
    """The gradient of all three is written once, as one tensor: autograd's own would fill and add three."""

    @staticmethod
    def forward(
        ctx: Any, grouped: Tensor, cos: Tensor, sin: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin, bias)
        value = grouped[..., -1, :]
        if _by_kernel(grouped):
            from chiar_megatron.operators.kernels import rotary

            query, key = rotary.split_and_rotate(_five(grouped), cos.squeeze(-2), sin.squeeze(-2))
            return query.view(grouped[..., :-2, :].shape), key.view(value.shape), value.view_as(value)
        query, key = grouped[..., :-2, :], grouped[..., -2, :]
        rotated = rotate(query, cos[..., None, :], sin[..., None, :]), rotate(key, cos, sin)
        return *rotated, value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad_query: Tensor, grad_key: Tensor, grad_value: Tensor) -> tuple[Any, ...]:
        cos, sin, bias = ctx.saved_tensors
        if not _by_kernel(grad_query):
            assert bias is None, "see bias_for_split"
            return join_rotated_back(grad_query, grad_key, grad_value, cos, sin), None, None, None
        from chiar_megatron.operators.kernels import rotary

        grads = (
            _five(grad_query),
            _five(grad_key[..., None, :])[..., 0, :],
            _five(grad_value[..., None, :])[..., 0, :],
        )
        joined, of_bias = rotary.join_rotated_back(grads, cos.squeeze(-2), sin.squeeze(-2), bias)
        return joined.view(*grad_query.shape[:-2], *joined.shape[-2:]), None, None, of_bias


def _by_kernel(x: Tensor) -> bool:
    return kernels_available(x.device) and x.dtype in (torch.bfloat16, torch.float16)


def _five(x: Tensor) -> Tensor:
    """`[s, g, r, d]` as one sequence `[1, s, g, r, d]`."""
    return x if x.dim() == 5 else x[None]
