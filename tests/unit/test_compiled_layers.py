"""Whole layers in plain PyTorch, float32, compiled beside eager: every gradient. By kernels:
test_kernel_layers.py.

torch 2.11 once compiled a spectral layer to one whose gradients were 0, and said nothing.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from chiar_megatron.model.layer import ChiarLayer
from chiar_megatron.operators.context import ForwardContext
from tests.unit.tiny_models import tiny_config, tiny_model

B, S, H = 2, 24, 48
LEARNED = {"kind": "learned", "target": 0.5}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "A": ("A", LEARNED, {}),
    "A, pre, GQA, SwiGLU, RMSNorm": (
        "A", LEARNED,
        {"norm": "pre", "num_query_groups": 2, "activation": "swiglu", "normalization": "RMSNorm"},
    ),
    "D": ("D", LEARNED, {}),
    "R learned": ("R", LEARNED, {}),
    "R entropy": ("R", {"kind": "entropy", "target": 0.5}, {}),
    "R routed keys": ("R", {"kind": "random", "target": 0.5, "keys_values": "routed"}, {}),
    "R hard": ("R", {"kind": "hard", "target": 0.5}, {}),
    "R soft with RBF": ("R", {"kind": "soft", "operators": "spectral_attention_rbf"}, {}),
}  # fmt: skip


def gradients(layer: ChiarLayer, compute: Any) -> dict[str, Tensor]:
    """Output, and the gradients of the input and of all parameters that have one."""
    generator = torch.Generator().manual_seed(5)
    x_BSH, grad_BSH = (torch.randn(B, S, H, generator=generator) for _ in range(2))
    tokens_BS = torch.randint(61, (B, S), generator=generator)
    named = {"input": x_BSH.requires_grad_(), **dict(layer.named_parameters())}
    out_BSH = compute(x_BSH, ForwardContext(tokens_BS=tokens_BS))
    found = torch.autograd.grad(out_BSH, list(named.values()), grad_BSH, allow_unused=True)
    given = {name: grad for name, grad in zip(named, found, strict=True) if grad is not None}
    return {"output": out_BSH.detach(), **given}


@pytest.mark.parametrize("name", CASES)
def test_a_compiled_layer_has_the_gradients_of_an_eager_one(name: str) -> None:
    kind, router, model = CASES[name]
    config = tiny_config(router, schedule="D R A", hidden_size=H, dropout=0.0, **model)
    layer = tiny_model(config).module.chiar_layers["DRA".index(kind)].train()
    expected = gradients(layer, layer.body)
    torch._dynamo.reset()
    # What gradients a graph has is settled before code is made for it, which takes most of the time.
    found = gradients(layer, torch.compile(layer.body, dynamic=False, backend="aot_eager"))
    assert found.keys() == expected.keys()
    for part, wanted in expected.items():
        error = float((found[part] - wanted).norm() / wanted.norm().clamp_min(1e-12))
        assert error < 1e-5, (part, error)
