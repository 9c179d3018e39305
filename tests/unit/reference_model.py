"""A CHIAR-Former from DESIGN section 1 alone: float64, loops over heads, explicit matrices, none of the
product's operators. It reads the product's weights by name.

Tensors are `[b, s, h]`; `weights` maps names to float64 tensors, which may require gradients.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from chiar_megatron.config.schema import ModelConfig

LAYERS = {"D R*2 A": "DRRA", "A*2": "AA", "R A": "RA"}


@dataclass
class Reference:
    """The model, and what its last call decided."""

    weights: dict[str, Tensor]
    model: ModelConfig
    light: dict[int, Tensor] = field(default_factory=dict)  # by layer number from 1, [b, s]
    scores: dict[int, Tensor] = field(default_factory=dict)
    mixture_entropy: list[Tensor] = field(default_factory=list)  # U of each soft or hard layer
    gate: Tensor | None = None

    def logits(self, ids: Tensor, documents: Tensor | None = None) -> Tensor:
        """`[b, s, vocabulary]`."""
        self.visible = visible(documents, *ids.shape)
        self.documents = documents
        self.ids = ids
        self.mixture_entropy = []
        x = self.weights["embedding.word_embeddings.weight"][ids]
        for number, kind in enumerate(LAYERS[self.model.schedule], start=1):
            self.prefix, self.number = f"decoder.layers.{number - 1}.", number
            y = self._layer(kind, x)
            if number == 1 and self.model.meta_router.enabled:
                self.gate = torch.sigmoid(self._linear("meta_router.gate_proj", self._pooled(x)))
                y = self.gate * y + (1 - self.gate) * x
            x = y
        self.prefix = "decoder."
        head = "embedding.word_embeddings" if self.model.tie_embeddings else "output_layer"
        return self._norm("final_layernorm", x) @ self.weights[head + ".weight"][: self.model.vocab_size].T

    def _get(self, name: str) -> Tensor | None:
        return self.weights.get(self.prefix + name)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self._get(name + ".weight"), self._get(name + ".bias")
        assert weight is not None
        y = x @ weight.T
        return y if bias is None else y + bias

    def _norm(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self._get(name + ".weight"), self._get(name + ".bias")
        eps = self.model.norm_epsilon
        if self.model.normalization == "RMSNorm":
            return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight
        centred = x - x.mean(-1, keepdim=True)
        return centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + eps) * weight + bias

    def _layer(self, kind: str, x: Tensor) -> Tensor:
        update = {
            "D": lambda: self._spectral(x),
            "A": lambda: self._attention(x, self.visible),
            "R": lambda: self._routed(x),
        }[kind]()
        return self._around("pre_mlp_layernorm", update, lambda y: self._feed_forward("mlp", y))

    def _around(self, norm: str, x: Tensor, operator) -> Tensor:
        if self.model.norm == "post":
            return self._norm(norm, x + operator(x))
        return x + operator(self._norm(norm, x))

    def _spectral(self, x: Tensor) -> Tensor:
        c = dct_matrix(x.shape[-1])
        w = self._get("spectral.weight")
        return self._around("spectral_norm", x, lambda y: (y @ c.T * w) @ c)

    def _attention(self, x: Tensor, mask: Tensor, gate: Tensor | None = None) -> Tensor:
        def operator(y: Tensor) -> Tensor:
            out = self._heads(y, mask)
            return out if gate is None else out * gate[..., None]

        return self._around("input_layernorm", x, operator)

    def _heads(self, y: Tensor, mask: Tensor) -> Tensor:
        heads, groups, d = self.model.num_attention_heads, self.model.num_query_groups, self.model.kv_channels
        assert groups is not None and d is not None
        each = heads // groups
        qkv = self._linear("self_attention.linear_qkv", y)
        outputs = []
        for head in range(heads):
            group, place = divmod(head, each)
            first = group * (each + 2) * d  # of the group: its query heads, its key, its value
            q = rotate(qkv[..., first + place * d : first + (place + 1) * d], self.model.rotary_base)
            k = rotate(qkv[..., first + each * d : first + (each + 1) * d], self.model.rotary_base)
            v = qkv[..., first + (each + 1) * d : first + (each + 2) * d]
            scores = (q @ k.transpose(1, 2) / math.sqrt(d)).masked_fill(~mask, -math.inf)
            outputs.append(scores.softmax(-1) @ v)
        return self._linear("self_attention.linear_proj", torch.cat(outputs, -1))

    def _feed_forward(self, name: str, y: Tensor) -> Tensor:
        inner = self._linear(name + ".linear_fc1", y)
        if self.model.activation == "swiglu":
            gate, up = inner.chunk(2, -1)
            inner = gate * torch.sigmoid(gate) * up
        else:
            inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
        return self._linear(name + ".linear_fc2", inner)

    def _rbf(self, y: Tensor) -> Tensor:
        omega = self._get("rbf.omega")
        assert omega is not None
        angle = y @ omega / math.sqrt(omega.shape[1])
        phi = torch.cat((angle.cos(), angle.sin()), -1)
        mixed = (phi @ phi.transpose(1, 2)).masked_fill(~self.visible, -math.inf).softmax(-1) @ phi
        return self._feed_forward("rbf.feed_forward", self._linear("rbf.projection", mixed))

    def _routed(self, x: Tensor) -> Tensor:
        router = self.model.router
        if router.kind in ("soft", "hard"):
            return self._blend(x)
        gate = None
        threshold = self._get("router.threshold")
        if router.kind == "learned":
            score = self._linear_score("router.score.linear", x)
            gate = 2 * torch.sigmoid(score)
        elif router.kind == "random":
            score = random_scores(self.ids, self.number)
        else:
            score = entropy(x, router.dc_power_weight)
            if router.kind == "entropy_gated":
                gate = 2 * torch.sigmoid(self._linear_score("router.gate_score.linear", x))
        light = score > threshold
        self.light[self.number], self.scores[self.number] = light, score
        mask = self.visible
        if router.keys_values == "routed":
            mask = mask & (light[:, None, :] | torch.eye(light.shape[1], dtype=torch.bool))
        return torch.where(light[..., None], self._attention(x, mask, gate), self._spectral(x))

    def _linear_score(self, name: str, x: Tensor) -> Tensor:
        return self._linear(name, x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))[..., 0]

    def _blend(self, x: Tensor) -> Tensor:
        router = self.model.router
        h = entropy(x, router.dc_power_weight)[..., None]
        weights = self._linear("router.gate_proj", torch.cat((x, h), -1)).softmax(-1)
        self.light[self.number], self.scores[self.number] = weights.argmax(-1) == 1, weights[..., 1]
        if router.kind == "hard":
            one_hot = torch.eye(weights.shape[-1], dtype=weights.dtype)[weights.argmax(-1)]
            weights = one_hot + weights - weights.detach()
        q = weights.mean((0, 1))
        self.mixture_entropy.append(-sum(p * p.log() if p > 0 else 0 * p for p in q))
        outputs = [self._spectral(x), self._attention(x, self.visible)]
        if router.operators == "spectral_attention_rbf":
            outputs.append(self._around("rbf_norm", x, self._rbf))
        return sum(weights[..., i : i + 1] * y for i, y in enumerate(outputs))

    def _pooled(self, x: Tensor) -> Tensor:
        pooling = self.model.meta_router.pooling
        if pooling == "running":
            mean, weight = self._get("meta_router.running_mean_H"), self._get("meta_router.running_weight")
            assert mean is not None and weight is not None
            return (mean / weight.clamp_min(1e-12)).expand(1, 1, -1)
        if pooling == "batch":
            return x.mean((0, 1), keepdim=True)
        return self.visible.double() @ x / self.visible.sum(-1, keepdim=True)


def visible(documents: Tensor | None, b: int, s: int) -> Tensor:
    """Bool `[b, s, s]`: query row, key column."""
    mask = torch.ones(s, s, dtype=torch.bool).tril().expand(b, s, s)
    return mask if documents is None else mask & (documents[:, :, None] == documents[:, None, :])


def dct_matrix(h: int) -> Tensor:
    """Orthonormal DCT-II, `X = C x`."""
    k, n = torch.arange(h, dtype=torch.float64)[:, None], torch.arange(h, dtype=torch.float64)[None]
    c = math.sqrt(2 / h) * torch.cos(math.pi * (n + 0.5) * k / h)
    c[0] = math.sqrt(1 / h)
    return c


def entropy(x: Tensor, dc_power_weight: float) -> Tensor:
    """Spectral entropy `[b, s]`."""
    power = (x @ dct_matrix(x.shape[-1]).T).square()
    power = torch.cat((dc_power_weight * power[..., :1], power[..., 1:]), -1)
    p = power / power.sum(-1, keepdim=True)
    return -(p * p.log()).sum(-1) / math.log(x.shape[-1])


def rotate(x: Tensor, base: float) -> Tensor:
    """Rotary positions on `[b, s, d]`: the pair (i, i + d/2) as a complex number, turned by its angle."""
    s, d = x.shape[-2:]
    pairs = torch.complex(x[..., : d // 2], x[..., d // 2 :])
    angle = torch.outer(torch.arange(s).double(), base ** (-2 * torch.arange(d // 2).double() / d))
    turned = pairs * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((turned.real, turned.imag), -1)


def random_scores(ids: Tensor, layer: int) -> Tensor:
    """SplitMix64's finaliser in Python's own integers, `[b, s]` float64 in [0, 1)."""
    mask = (1 << 64) - 1

    def score(token: int, position: int) -> float:
        z = (position * 1_000_003 + token * 7_919 + layer * 104_729) * 0x9E3779B97F4A7C15 & mask
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
        return ((z ^ (z >> 31)) >> 40) / 2**24

    rows = [[score(token, position) for position, token in enumerate(row)] for row in ids.tolist()]
    return torch.tensor(rows, dtype=torch.float64)


def double_weights(module: torch.nn.Module, requires_grad: bool = False) -> dict[str, Tensor]:
    """The product's parameters and buffers in float64, parameters with gradients if asked."""
    weights = {name: b.detach().double() for name, b in module.named_buffers()}
    for name, p in module.named_parameters():
        weights[name] = p.detach().double().requires_grad_(requires_grad)
    return weights
