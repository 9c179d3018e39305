"""Whole layers by our kernels, under Triton's interpreter in float16 (its products of bfloat16 are
wrong), against plain PyTorch in float32."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from chiar_megatron.model.layer import ChiarLayer  # noqa: E402
from chiar_megatron.operators.context import ForwardContext  # noqa: E402
from tests.unit.tiny_models import tiny_config, tiny_model  # noqa: E402

B, S, H = 3, 24, 64
KINDS = "D R A"
LEARNED = {"kind": "learned", "target": 0.5}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "A": ("A", LEARNED, {}),
    "A, GQA, RMSNorm": ("A", LEARNED, {"num_query_groups": 2, "normalization": "RMSNorm"}),
    "A, pre, heads of 24": ("A", LEARNED, {"norm": "pre", "kv_channels": 24}),
    "D": ("D", LEARNED, {}),
    "R learned": ("R", LEARNED, {}),
    "R random, little room": ("R", {"kind": "random", "target": 0.25, "slack": 0.0}, {"num_query_groups": 2}),
    "R random, routed keys": ("R", {"kind": "random", "target": 0.5, "keys_values": "routed"}, {}),
    "R learned, heads of 24": ("R", LEARNED, {"kv_channels": 24}),
    "R random, no bias, pre": ("R", {"kind": "random", "target": 0.5}, {"add_bias": False, "norm": "pre"}),
}


def layer_of(kind: str, router: dict[str, Any], model: dict[str, Any]) -> ChiarLayer:
    """In float16, training, its dropout off."""
    config = tiny_config(router, schedule=KINDS, hidden_size=H, dropout=0.0, **model)
    layer = tiny_model(config).module.chiar_layers[KINDS.split().index(kind)]
    return layer.to(torch.float16).train()  # type: ignore[no-any-return]


def run(layer: ChiarLayer, x_BSH: Tensor, tokens_BS: Tensor, grad_BSH: Tensor) -> dict[str, Tensor]:
    """Output, gradients, and what was counted."""
    x_BSH = x_BSH.detach().requires_grad_()
    out_BSH = layer.body(x_BSH, ForwardContext(tokens_BS=tokens_BS))
    named = {"input": x_BSH, **{n: p for n, p in layer.named_parameters() if "meta_router" not in n}}
    grads = torch.autograd.grad(out_BSH, list(named.values()), grad_BSH, allow_unused=True)
    found = {name: grad for name, grad in zip(named, grads, strict=True) if grad is not None}
    assert len(found) == len(named) or layer.kind != "A"
    if layer.statistics is not None:
        found["counted"] = torch.cat((layer.statistics.sums_F, layer.statistics.most_light))
    return {"output": out_BSH, **found}


@pytest.mark.parametrize("name", CASES)
def test_values_and_every_gradient(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, plain = (layer_of(*CASES[name]) for _ in range(2))
    plain.float()
    generator = torch.Generator().manual_seed(5)
    x_BSH, grad_BSH = (torch.randn(B, S, H, generator=generator).half() for _ in range(2))
    tokens_BS = torch.randint(61, (B, S), generator=generator)
    expected = run(plain, x_BSH.float(), tokens_BS, grad_BSH.float())
    take_kernels(monkeypatch)
    assert_same(run(layer, x_BSH, tokens_BS, grad_BSH), expected, 1e-2)


def take_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [m for n, m in sys.modules.items() if n.startswith("chiar_megatron.")]:
        if hasattr(module, "kernels_available"):
            monkeypatch.setattr(module, "kernels_available", lambda device: True)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], bound: float) -> None:
    assert found.keys() == expected.keys()
    for part in expected:
        error = (found[part].double() - expected[part].double()).norm() / expected[part].double().norm()
        assert error < (1e-7 if part == "counted" else bound), (part, float(error))


@pytest.mark.parametrize("name", ["A", "R learned"])
def test_compiled_layers_do_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients that are added in place among them, which a compiler must not lose or move."""
    take_kernels(monkeypatch)
    eager, compiled = (layer_of(*CASES[name]) for _ in range(2))
    monkeypatch.setattr(compiled, "body", torch.compile(compiled.body, dynamic=False))
    generator = torch.Generator().manual_seed(6)
    x_BSH, grad_BSH = (torch.randn(B, S, H, generator=generator).half() for _ in range(2))
    tokens_BS = torch.randint(61, (B, S), generator=generator)
    found = [run(layer, x_BSH, tokens_BS, grad_BSH) for layer in (compiled, eager)]
    assert_same(found[0], found[1], 1e-2)
