"""The authors' model in plain PyTorch, on the tensors of their file as they are: what a conversion is
checked against.

Written from DESIGN section 1 alone, with their conventions (a DCT that is not orthonormal, an epsilon in
the entropy, `[q; k; v]` stacked), so that it shares no line with the model or the key map it checks.
Batch first: `[b, s, h]`; one process; every operator on every token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from chiar_megatron.conversion.reference import (
    ENTROPY_EPSILON,
    ROTARY_BASE,
    ReferenceCheckpoint,
)


@dataclass
class ReferenceAnswer:
    """What their model answers, in the precision asked for."""

    logits_BSV: Tensor
    meta_gate: float | None
    """None for the baseline."""
    entropy_BS: dict[int, Tensor] = field(default_factory=dict)
    """By number of the routed layer, from 1."""
    light_BS: dict[int, Tensor] = field(default_factory=dict)
    """True: attention (soft: where attention weighs most)."""
    margin_BS: dict[int, Tensor] = field(default_factory=dict)
    """How far the score lies from where the decision changes."""
    weight_BS: dict[int, Tensor] = field(default_factory=dict)
    """Attention's weight, of soft and hard routers."""


@torch.no_grad()
def reference_forward(
    checkpoint: ReferenceCheckpoint,
    ids_BS: Tensor,
    dtype: torch.dtype = torch.float32,
    forced_light_BS: Mapping[int, Tensor] | None = None,
) -> ReferenceAnswer:
    """Their model in evaluation mode on int64 ids `[b, s]`.

    forced_light_BS: decisions of threshold and hard routers by layer number, instead of their own.
    """
    return _Forward(checkpoint, dtype, forced_light_BS or {}).run(ids_BS)


class _AsNeeded(dict[str, Any]):
    """Tensors in the precision asked for, read when used and then forgotten."""

    def __init__(self, stored: Mapping[str, Callable[[], Tensor]], dtype: torch.dtype) -> None:
        super().__init__(stored)
        self.dtype = dtype

    def __getitem__(self, name: str) -> Tensor:
        read: Callable[[], Tensor] = super().__getitem__(name)
        return read().to(self.dtype)


class _Forward:
    def __init__(
        self, checkpoint: ReferenceCheckpoint, dtype: torch.dtype, forced_light_BS: Mapping[int, Tensor]
    ) -> None:
        self.checkpoint = checkpoint
        self.dtype = dtype
        self.forced_light_BS = forced_light_BS
        self.tensors = _AsNeeded(checkpoint.tensors, dtype)
        h = checkpoint.sizes.hidden
        k_H, n_H = torch.arange(h, dtype=torch.float64)[:, None], torch.arange(h, dtype=torch.float64)
        cosines_KN = torch.cos(math.pi * (n_H + 0.5) * k_H / h) * math.sqrt(2 / h)
        self.forward_KN = (2 * cosines_KN).to(dtype)
        cosines_KN[0] /= 2
        self.inverse_KN = cosines_KN.to(dtype)

    def run(self, ids_BS: Tensor) -> ReferenceAnswer:
        x = self.tensors["token_emb.weight"][ids_BS]
        answer = ReferenceAnswer(logits_BSV=torch.empty(0), meta_gate=None)
        gate = None
        if self.checkpoint.kind == "chiar":
            gate = torch.sigmoid(self._linear("meta_router.gate_proj", x.mean(dim=(0, 1))))
            answer.meta_gate = float(gate)
        for index in range(len(self.checkpoint.schedule)):
            y = self._layer(index, x, answer)
            x = gate * y + (1 - gate) * x if index == 0 and gate is not None else y
        head = self.tensors["lm_head.weight" if "lm_head.weight" in self.tensors else "token_emb.weight"]
        answer.logits_BSV = self._norm("norm", x) @ head.T
        return answer

    def _layer(self, index: int, x: Tensor, answer: ReferenceAnswer) -> Tensor:
        if self.checkpoint.kind == "baseline":
            attention, ffn, ffn_norm = f"attns.{index}", f"ffns.{index}", f"ffn_norms.{index}"
        else:
            layer = f"layers.{index}"
            attention, ffn, ffn_norm = f"{layer}.attn", f"{layer}.ffn", f"{layer}.ffn_norm"
        letter = self.checkpoint.schedule[index]
        updates = []
        if letter != "A":
            updates.append(self._mixing(f"layers.{index}.dct_mix", x))
        if letter != "D":
            updates.append(self._attention(attention, x))
        if letter == "R":
            u = self._route(index, x, updates[0], updates[1], answer)
        else:
            u = updates[0]
        return self._norm(ffn_norm, u + self._linear(f"{ffn}.3", F.gelu(self._linear(f"{ffn}.0", u))))

    def _route(
        self, index: int, x: Tensor, spectral: Tensor, attention: Tensor, answer: ReferenceAnswer
    ) -> Tensor:
        entropy_BS = self._entropy(x)
        if self.checkpoint.routing_mode == "threshold":
            score_BS, border = entropy_BS, self.checkpoint.tau
        else:
            features = torch.cat([x, entropy_BS[..., None]], dim=-1)
            weights = self._linear(f"layers.{index}.router.gate_proj", features).softmax(dim=-1)
            score_BS, border = weights[..., 1], 0.5
        light_BS = self.forced_light_BS.get(index + 1, score_BS > border)
        answer.entropy_BS[index + 1] = entropy_BS
        answer.light_BS[index + 1] = light_BS
        answer.margin_BS[index + 1] = (score_BS - border).abs()
        if self.checkpoint.routing_mode != "threshold":
            answer.weight_BS[index + 1] = score_BS
        weight_BS = score_BS if self.checkpoint.routing_mode == "soft" else light_BS.to(self.dtype)
        return weight_BS[..., None] * attention + (1 - weight_BS[..., None]) * spectral

    def _entropy(self, x: Tensor) -> Tensor:
        power = (x @ self.forward_KN.T).square()
        p = power / (power.sum(dim=-1, keepdim=True) + ENTROPY_EPSILON)
        return -(p * (p + ENTROPY_EPSILON).log()).sum(dim=-1) / math.log(x.shape[-1])

    def _mixing(self, name: str, x: Tensor) -> Tensor:
        spectrum = x @ self.forward_KN.T
        return self._norm(f"{name}.norm", x + (spectrum * self.tensors[f"{name}.w"]) @ self.inverse_KN)

    def _attention(self, name: str, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        sizes = self.checkpoint.sizes
        query, key, value = (
            part.view(b, s, sizes.heads, sizes.head_size).transpose(1, 2)
            for part in self._linear(f"{name}.qkv", x).chunk(3, dim=-1)
        )
        scores = _rotate(query) @ _rotate(key).transpose(-1, -2) / math.sqrt(sizes.head_size)
        future = torch.ones(s, s, dtype=torch.bool).triu(1)
        mixed = scores.masked_fill(future, -math.inf).softmax(dim=-1) @ value
        return self._norm(
            f"{name}.norm", x + self._linear(f"{name}.out_proj", mixed.transpose(1, 2).flatten(2))
        )

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.tensors[f"{name}.weight"].T + self.tensors[f"{name}.bias"]

    def _norm(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]
        return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-5)


def _rotate(x: Tensor) -> Tensor:
    """Rotate-half positions over the whole head, `[b, n, s, d]`."""
    half = x.shape[-1] // 2
    frequency = ROTARY_BASE ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.arange(x.shape[-2], dtype=torch.float64)[:, None] * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
