"""A CHIAR model in plain PyTorch, one process, dense dispatch: what the ledger is measured against.

Written from DESIGN section 1, without megatron-core. Rotary positions are left out: they take no matrix
product and have no parameters.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chiar_megatron.config.schedule import parse_schedule
from chiar_megatron.config.schema import ModelConfig
from chiar_megatron.operators.dct import dct
from chiar_megatron.operators.rbf import causal_rbf_mixing, make_omega, rbf_features
from chiar_megatron.operators.spectral_mixing import spectral_mixing
from chiar_megatron.routing.entropy import entropy_of_spectrum


class Spectral(nn.Module):
    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(model.hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        return spectral_mixing(x, self.weight, "gemm")


class Attention(nn.Module):
    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.heads, self.groups, self.size = (
            model.num_attention_heads,
            model.num_query_groups,
            model.kv_channels,
        )
        width = (self.heads + 2 * self.groups) * self.size
        self.qkv = nn.Linear(model.hidden_size, width, bias=model.add_bias)
        self.proj = nn.Linear(self.heads * self.size, model.hidden_size, bias=model.add_bias)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (-1, self.size)).permute(1, 2, 0, 3)
        q, k, v = qkv.split([self.heads, self.groups, self.groups], dim=1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.groups)
        return self.proj(y.permute(2, 0, 1, 3).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.swiglu = model.activation == "swiglu"
        inner = model.ffn_hidden_size
        self.fc1 = nn.Linear(model.hidden_size, inner * (2 if self.swiglu else 1), bias=model.add_bias)
        self.fc2 = nn.Linear(inner, model.hidden_size, bias=model.add_bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc1(x)
        if self.swiglu:
            gate, up = y.chunk(2, dim=-1)
            return self.fc2(F.silu(gate) * up)
        return self.fc2(F.gelu(y))


class Rbf(nn.Module):
    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.register_buffer(
            "omega", make_omega(model.hidden_size, model.rbf_features, model.rbf_gamma, seed=1)
        )
        self.proj = nn.Linear(2 * model.rbf_features, model.hidden_size)
        self.ffn = FeedForward(model)

    def forward(self, x: Tensor) -> Tensor:
        phi = rbf_features(x, self.omega)
        return self.ffn(self.proj(causal_rbf_mixing(phi, phi, torch.arange(len(x)))))


class Layer(nn.Module):
    def __init__(self, model: ModelConfig, kind: str) -> None:
        super().__init__()
        self.model, self.kind = model, kind
        router = model.router.kind if kind == "R" else None
        norm = nn.LayerNorm if model.normalization == "LayerNorm" else nn.RMSNorm
        operators: list[nn.Module] = [Spectral(model)] if kind in "DR" else []
        if kind in "AR":
            operators.append(Attention(model))
        self.blends = router in ("soft", "hard")
        if self.blends and model.router.operators == "spectral_attention_rbf":
            operators.append(Rbf(model))
        self.operators = nn.ModuleList(operators)
        self.norms = nn.ModuleList(norm(model.hidden_size) for _ in operators)
        self.ffn, self.ffn_norm = FeedForward(model), norm(model.hidden_size)
        if self.blends:
            self.gate = nn.Linear(model.hidden_size + 1, len(operators))
        elif router in ("learned", "entropy_gated"):
            self.gate = nn.Linear(model.hidden_size, 1)

    def _residual(self, norm: nn.Module, x: Tensor, operator: nn.Module) -> Tensor:
        return norm(x + operator(x)) if self.model.norm == "post" else x + operator(norm(x))

    def forward(self, x: Tensor) -> Tensor:
        outputs = [self._residual(n, x, op) for n, op in zip(self.norms, self.operators, strict=True)]
        if self.kind != "R":
            u = outputs[0]
        elif self.blends:
            entropy = entropy_of_spectrum(dct(x, "gemm"))
            weights = self.gate(torch.cat([x, entropy[..., None]], dim=-1)).softmax(dim=-1)
            u = sum(weights[..., i : i + 1] * y for i, y in enumerate(outputs))
        else:
            u = self._one_operator_a_token(x, *outputs)
        return self._residual(self.ffn_norm, u, self.ffn)

    def _one_operator_a_token(self, x: Tensor, spectral: Tensor, attention: Tensor) -> Tensor:
        kind = self.model.router.kind
        score = torch.rand(x.shape[:-1])
        if kind in ("entropy", "entropy_gated"):
            with torch.no_grad():
                score = entropy_of_spectrum(dct(x, "gemm"))
        if kind in ("learned", "entropy_gated"):
            attention = attention * torch.sigmoid(self.gate(x))
        return torch.where((score > score.median())[..., None], attention, spectral)


class PlainChiar(nn.Module):
    """Token ids [s, b] to logits [s, b, vocab], of a resolved config."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.model = model
        self.embedding = nn.Embedding(model.vocab_size, model.hidden_size)
        self.layers = nn.ModuleList(Layer(model, kind) for kind in parse_schedule(model.schedule))
        norm = nn.LayerNorm if model.normalization == "LayerNorm" else nn.RMSNorm
        self.norm = norm(model.hidden_size)
        if model.meta_router.enabled:
            self.meta_gate = nn.Linear(model.hidden_size, 1)
        if not model.tie_embeddings:
            self.head = nn.Linear(model.hidden_size, model.vocab_size, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for i, layer in enumerate(self.layers):
            y = layer(x)
            if i == 0 and self.model.meta_router.enabled:
                gate = torch.sigmoid(self.meta_gate(self._pooled(x)))
                y = gate * y + (1 - gate) * x
            x = y
        head = self.embedding.weight if self.model.tie_embeddings else self.head.weight
        return F.linear(self.norm(x), head)

    def _pooled(self, x: Tensor) -> Tensor:
        if self.model.meta_router.pooling == "running":
            return torch.zeros(1, 1, x.shape[-1])
        if self.model.meta_router.pooling == "batch":
            return x.mean(dim=(0, 1), keepdim=True)
        return x.cumsum(0) / torch.arange(1, len(x) + 1)[:, None, None]
