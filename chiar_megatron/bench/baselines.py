"""What the product is measured against: a plain full-attention GPT, and the FFT way of the authors' code."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class PlainGptSizes:
    """Sizes of `PlainGpt`."""

    layers: int
    hidden: int
    heads: int
    seq_length: int
    vocab: int
    """Rows of the token table, already padded."""


class PlainGpt(nn.Module):
    """The GPT that people train with nanoGPT: pre-norm, no biases, learned positions, exact GELU, tied head.

    attention: "sdpa" is torch's causal attention, which takes flash or cuDNN; "plain" writes the softmax
    out, as a reference.
    """

    def __init__(self, sizes: PlainGptSizes, attention: str = "sdpa") -> None:
        super().__init__()
        h = sizes.hidden
        self.tokens = nn.Embedding(sizes.vocab, h)
        self.positions = nn.Embedding(sizes.seq_length, h)
        self.blocks = nn.ModuleList(PlainBlock(h, sizes.heads, attention) for _ in range(sizes.layers))
        self.norm = nn.LayerNorm(h, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                # Outputs onto the residual stream start smaller, so that its size does not grow with depth.
                onto_residual = name.endswith(("leave.weight", "narrow.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * sizes.layers if onto_residual else 1))

    def forward(self, tokens_BS: Tensor, labels_BS: Tensor) -> Tensor:
        """Mean cross entropy in nats; `tokens_BS`, `labels_BS` int64 `[b, s]`."""
        logits_BSV = self.logits(tokens_BS)
        return F.cross_entropy(logits_BSV.flatten(0, 1), labels_BS.flatten())

    def logits(self, tokens_BS: Tensor) -> Tensor:
        """`[b, s, vocab]`."""
        position_S = torch.arange(tokens_BS.shape[1], device=tokens_BS.device)
        x_BSH = self.tokens(tokens_BS) + self.positions(position_S)
        for block in self.blocks:
            x_BSH = block(x_BSH)
        return F.linear(self.norm(x_BSH), self.tokens.weight)


class PlainBlock(nn.Module):
    """`x + attention(norm(x))`, then `x + feed_forward(norm(x))`."""

    def __init__(self, hidden: int, heads: int, attention: str) -> None:
        super().__init__()
        self.heads, self.attention = heads, attention
        self.norm_1 = nn.LayerNorm(hidden, bias=False)
        self.enter = nn.Linear(hidden, 3 * hidden, bias=False)
        self.leave = nn.Linear(hidden, hidden, bias=False)
        self.norm_2 = nn.LayerNorm(hidden, bias=False)
        self.widen = nn.Linear(hidden, 4 * hidden, bias=False)
        self.narrow = nn.Linear(4 * hidden, hidden, bias=False)

    def forward(self, x_BSH: Tensor) -> Tensor:
        """`[b, s, h]` -> `[b, s, h]`."""
        b, s, h = x_BSH.shape
        qkv = self.enter(self.norm_1(x_BSH)).view(b, s, 3, self.heads, h // self.heads)
        query_BNSD, key_BNSD, value_BNSD = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if self.attention == "sdpa":
            mixed_BNSD = F.scaled_dot_product_attention(query_BNSD, key_BNSD, value_BNSD, is_causal=True)
        else:
            mixed_BNSD = plain_attention(query_BNSD, key_BNSD, value_BNSD)
        x_BSH = x_BSH + self.leave(mixed_BNSD.transpose(1, 2).reshape(b, s, h))
        return x_BSH + self.narrow(F.gelu(self.widen(self.norm_2(x_BSH))))  # type: ignore[no-any-return]


def plain_attention(
    query_BNSD: Tensor, key_BGSD: Tensor, value_BGSD: Tensor, visible: Tensor | None = None
) -> Tensor:
    """Softmax attention written out, in the inputs' precision; visible: bool, None is causal."""
    repeat = query_BNSD.shape[1] // key_BGSD.shape[1]
    key_BNSD = key_BGSD.repeat_interleave(repeat, dim=1)
    value_BNSD = value_BGSD.repeat_interleave(repeat, dim=1)
    scores = query_BNSD @ key_BNSD.transpose(-1, -2) / math.sqrt(query_BNSD.shape[-1])
    if visible is None:
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    return torch.softmax(scores.masked_fill(~visible, -torch.inf), dim=-1) @ value_BNSD


def plain_adamw(model: nn.Module, fused: bool, **options: Any) -> torch.optim.AdamW:
    """AdamW with matrices decayed and norms not, as nanoGPT groups them."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    decay = options.pop("weight_decay")
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, fused=fused, **options)


def fft_way_dct(x: Tensor) -> Tensor:
    """The authors' forward transform `2√(2/h) Σ x cos(π(n+½)k/h)`: a complex FFT over twice the length."""
    h = x.shape[-1]
    mirrored = torch.cat((x, x.flip(-1)), dim=-1)
    angle_H = torch.arange(h, device=x.device, dtype=x.dtype) * (math.pi / (2 * h))
    turned = torch.fft.fft(mirrored, dim=-1)[..., :h] * torch.polar(torch.ones_like(angle_H), -angle_H)
    scaled: Tensor = turned.real * math.sqrt(2 / h)
    return scaled


def fft_way_idct(spectrum: Tensor) -> Tensor:
    """Their inverse, `√(2/h) (X_0/2 + Σ_{k≥1} X_k cos(...))`: one more complex FFT over twice the length."""
    h = spectrum.shape[-1]
    angle_H = torch.arange(h, device=spectrum.device, dtype=spectrum.dtype) * (math.pi / (2 * h))
    turned = spectrum * torch.polar(torch.ones_like(angle_H), angle_H)
    turned = torch.cat((turned[..., :1] / 2, turned[..., 1:]), dim=-1)
    padded = F.pad(turned, (0, h))
    x: Tensor = torch.fft.ifft(padded, dim=-1).real[..., :h] * (2 * h * math.sqrt(2 / h))
    return x


def fft_way(x: Tensor, w_H: Tensor) -> tuple[Tensor, Tensor]:
    """(entropy, mixing) as the authors' code computes them (DESIGN section 1), float32: each of the two
    takes its own forward transform; the mixing is 2× ours, the entropy counts the DC power twice."""
    x32 = x.float()
    power = fft_way_dct(x32).square()
    share = power / (power.sum(dim=-1, keepdim=True) + 1e-8)
    entropy = -(share * torch.log(share + 1e-8)).sum(dim=-1) / math.log(x.shape[-1])
    mixed = fft_way_idct(fft_way_dct(x32) * w_H.float())
    return entropy, mixed.to(x.dtype)
