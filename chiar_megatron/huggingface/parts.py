"""Operators of the `transformers` model as modules: attention, spectral filter, RBF mixing, feed-forward.

Shapes: b batch, s new tokens, t cached and new ones, h hidden, n query heads, g key-value
groups, d head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache

from chiar_megatron.huggingface.configuration import ChiarConfig
from chiar_megatron.huggingface.routers import Routing
from chiar_megatron.operators.rbf import causal_rbf_mixing, make_omega, rbf_features
from chiar_megatron.operators.rotary import rotate
from chiar_megatron.operators.spectral_mixing import spectral_mixing


@dataclass
class TokenContext:
    """What every layer is told of the tokens besides their vectors."""

    position_BS: Tensor
    """int64, from 0 at each row's first token that is no padding."""
    cos_BS1D: Tensor
    sin_BS1D: Tensor
    ids_BS: Tensor | None
    present_BT: Tensor | None
    """bool over cached and new tokens, False for padding; None: all there."""
    cache: Cache | None
    routing: Routing | None
    past: int
    """Tokens cached before these."""
    document_BT: Tensor | None = None
    """Number of each token's document, cached and new; None: one document."""


class SpectralFilter(nn.Module):
    """Spectral mixing `y = Cᵀ diag(w) C x`."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        """`[b, s, h]` to the same."""
        return spectral_mixing(x, self.weight)


class ChiarMLP(nn.Module):
    """Linear, GELU or SwiGLU, dropout, Linear, dropout."""

    def __init__(self, config: ChiarConfig) -> None:
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.use_bias
        self.gate_proj = nn.Linear(hidden, inner, bias=bias) if config.hidden_act == "silu" else None
        self.up_proj = nn.Linear(hidden, inner, bias=bias)
        self.down_proj = nn.Linear(inner, hidden, bias=bias)
        self.dropout = config.dropout

    def forward(self, x: Tensor) -> Tensor:
        """`[b, s, h]` to the same."""
        up = self.up_proj(x)
        inner = F.gelu(up) if self.gate_proj is None else F.silu(self.gate_proj(x)) * up
        inner = F.dropout(inner, self.dropout, self.training)
        return F.dropout(self.down_proj(inner), self.dropout, self.training)


class ChiarAttention(nn.Module):
    """Causal attention with rotary positions over all tokens' keys and values, or light ones' alone."""

    def __init__(self, config: ChiarConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.dropout = config.head_dim, config.dropout
        width, kv_width = self.heads * self.head_dim, self.groups * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=config.attention_bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=config.use_bias)

    def forward(self, x: Tensor, context: TokenContext, light_BS: Tensor | None = None) -> Tensor:
        """`[b, s, h]` to the same. light_BS: given, only these tokens' keys are seen, and each one's own."""
        query, key, value = (
            proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        query = rotate(query, context.cos_BS1D, context.sin_BS1D).transpose(1, 2)
        key = rotate(key, context.cos_BS1D, context.sin_BS1D).transpose(1, 2)
        value = value.transpose(1, 2)
        light_BT = light_BS
        if context.cache is not None:
            flags = None if light_BS is None else light_BS[..., None]
            key, value, seen = cached(context.cache, self.layer_idx, key, value, flags)
            light_BT = None if seen is None else seen[..., 0] > 0.5
        mask = visible(context, x.shape[1], light_BT)
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None,
            dropout_p=self.dropout if self.training else 0.0, enable_gqa=self.heads != self.groups,
        )  # fmt: skip
        return self.o_proj(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class ChiarRBF(nn.Module):
    """RBF mixing, the ablation's third operator; it keeps no cache."""

    omega: Tensor

    def __init__(self, config: ChiarConfig, layer_idx: int) -> None:
        super().__init__()
        features = config.rbf["features"]
        omega = make_omega(config.hidden_size, features, config.rbf["gamma"], seed=layer_idx + 1)
        self.register_buffer("omega", omega)
        self.projection = nn.Linear(2 * features, config.hidden_size)
        self.feed_forward = ChiarMLP(config)

    def forward(self, x: Tensor, context: TokenContext) -> Tensor:
        """`[b, s, h]` to the same."""
        phi = rbf_features(x.transpose(0, 1), self.omega.float())
        positions = torch.arange(len(phi), device=x.device)
        documents = context.document_BT
        if context.present_BT is not None:  # padding is a document of its own
            present = context.present_BT
            documents = (torch.zeros_like(present, dtype=torch.int64) if documents is None else documents) * 2
            documents = documents + present
        mixed = causal_rbf_mixing(phi, phi, positions, None if documents is None else documents.T)
        return self.feed_forward(self.projection(mixed.to(x.dtype)).transpose(0, 1))  # type: ignore[no-any-return]


def make_norm(config: ChiarConfig) -> nn.Module:
    """LayerNorm or RMSNorm over the hidden dimension."""
    kind = nn.RMSNorm if config.normalization == "RMSNorm" else nn.LayerNorm
    return kind(config.hidden_size, eps=config.norm_epsilon)


def cached(
    cache: Cache, slot: int, key: Tensor, value: Tensor, extra: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Append to one slot of the cache; returns all keys, values and extras `[b, t, w]` so far.

    What else is remembered of a token rides as further channels of its values, split over the groups, so
    that reordering and cropping the cache keeps it. key, value: `[b, g, s, d]`.
    """
    if extra is None:
        key, value = cache.update(key, value, slot)
        return key, value, None
    groups, width, own = value.shape[1], extra.shape[-1], value.shape[-1]
    spread = F.pad(extra.to(value.dtype), (0, -width % groups)).unflatten(-1, (groups, -1)).transpose(1, 2)
    key, packed = cache.update(key, torch.cat((value, spread), dim=-1), slot)
    extras = packed[..., own:].transpose(1, 2).flatten(2)[..., :width]
    return key, packed[..., :own], extras


def visible(context: TokenContext, queries: int, light_BT: Tensor | None) -> Tensor | None:
    """Bool mask `[b or 1, 1, queries, keys]`, True where a query may look; None where causal order is all."""
    documents, present, past = context.document_BT, context.present_BT, context.past
    if past == 0 and documents is None and present is None and light_BT is None:
        return None
    keys = past + queries
    device = context.position_BS.device
    query_at = torch.arange(past, keys, device=device)[:, None]
    key_at = torch.arange(keys, device=device)[None, :]
    own = (key_at == query_at)[None]
    mask = (key_at <= query_at)[None]
    if light_BT is not None:
        mask = mask & (light_BT[:, None, :] | own)
    if documents is not None:
        mask = mask & (documents[:, past:, None] == documents[:, None, :])
    if present is not None:  # padding sees itself, so that no row is empty
        mask = mask & present[:, None, :] | own
    return mask[:, None]
