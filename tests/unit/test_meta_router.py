"""MetaRouter's three poolings from their formulas, and when the running average moves."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from chiar_megatron.config.schema import MetaRouterConfig
from chiar_megatron.operators.context import ForwardContext, GenerationState
from chiar_megatron.routing.meta_router import MetaRouter
from chiar_megatron.runtime.distributed import single_process_world
from chiar_megatron.training.engine import MegatronEngine
from tests.unit.test_model import random_batch
from tests.unit.tiny_models import tiny_config

S, B, H = 10, 3, 8


def build(pooling: str, decay: float = 0.9) -> MetaRouter:
    """A MetaRouter with random weights."""
    meta_router = MetaRouter(MetaRouterConfig(pooling=pooling, decay=decay), H)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in meta_router.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return meta_router


def embeddings(seed: int = 0) -> Tensor:
    return torch.randn(S, B, H, generator=torch.Generator().manual_seed(seed)).double()


def gate_of(meta_router: MetaRouter, pooled: Tensor) -> Tensor:
    """σ(w·x̄ + b) `[..., 1]`."""
    weight, bias = meta_router.gate_proj.weight.double(), meta_router.gate_proj.bias.double()
    return torch.sigmoid((pooled.double() * weight[0]).sum(-1, keepdim=True) + bias)


def assert_near(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.double(), expected, atol=1e-6, rtol=1e-5)


def test_running_reads_the_average_of_past_steps_corrected_for_its_start():
    decay = 0.9
    meta_router = build("running", decay).eval()
    assert_near(meta_router(embeddings(), ForwardContext()), gate_of(meta_router, torch.zeros(1, 1, H)))
    means = [torch.randn(H, dtype=torch.float64) for _ in range(4)]
    for count in range(1, 5):
        meta_router.update_running(means[count - 1], torch.tensor(True))
        weights = [(1 - decay) * decay ** (count - i) for i in range(1, count + 1)]
        average = sum(w * m for w, m in zip(weights, means, strict=False)) / (1 - decay**count)
        for x in (embeddings(1), embeddings(2)):
            assert_near(meta_router(x, ForwardContext()), gate_of(meta_router, average[None, None]))


def test_running_passes_gradient_to_the_gate_and_not_to_the_embeddings():
    meta_router = build("running").train()
    meta_router.update_running(torch.ones(H), torch.tensor(True))
    x = embeddings().requires_grad_()
    meta_router(x, ForwardContext()).sum().backward()
    assert x.grad is None
    assert_near(
        meta_router.gate_proj.weight.grad[0] / meta_router.gate_proj.bias.grad, torch.ones(H).double()
    )


@pytest.mark.parametrize("pooling", ["running", "batch", "causal"])
def test_pending_sums_are_of_training_and_taken_once(pooling):
    meta_router = build(pooling)
    meta_router.eval()(embeddings(5), ForwardContext())
    meta_router.train()
    gates = [meta_router(embeddings(seed), ForwardContext()).expand(S, B, 1) for seed in (1, 2)]
    before = meta_router.running_mean_H.clone(), meta_router.running_weight.clone()
    pending = meta_router.take_pending()
    both = embeddings(1) + embeddings(2)
    assert_near(pending[:H], both.sum((0, 1)) if pooling == "running" else torch.zeros(H).double())
    torch.testing.assert_close(pending[H], torch.stack(gates).double().sum(), rtol=1e-6, atol=0.0)
    assert pending[H + 1] == 2 * S * B
    assert torch.equal(meta_router.take_pending(), torch.zeros(H + 2, dtype=torch.float64))
    assert torch.equal(before[0], meta_router.running_mean_H) and before[1] == meta_router.running_weight == 0


def test_batch_is_the_mean_over_batch_and_time_and_differentiable():
    meta_router = build("batch")
    x = embeddings().requires_grad_()
    gate = meta_router(x, ForwardContext())
    expected = gate_of(meta_router, x.mean((0, 1), keepdim=True))
    assert gate.shape == (1, 1, 1)
    assert_near(gate, expected)
    inputs = (x, *meta_router.parameters())
    pairs = zip(torch.autograd.grad(gate, inputs), torch.autograd.grad(expected, inputs), strict=True)
    for ours, theirs in pairs:
        assert_near(ours, theirs.double())


def prefix_means(x: Tensor, documents: Tensor | None) -> Tensor:
    """Of each token's document up to and with it; x `[s, b, h]`, documents `[b, s]`."""
    out = torch.zeros_like(x)
    for b in range(x.shape[1]):
        for i in range(x.shape[0]):
            own = [j for j in range(i + 1) if documents is None or documents[b, j] == documents[b, i]]
            out[i, b] = x[own, b].mean(0)
    return out


DOCUMENTS = torch.tensor([[0] * 10, [0, 1, 2, 2, 2, 3, 3, 3, 3, 3], [0, 0, 0, 0, 0, 0, 0, 1, 1, 2]])


@pytest.mark.parametrize("documents", [None, DOCUMENTS])
def test_causal_is_the_mean_of_the_prefix_and_differentiable(documents):
    meta_router = build("causal")
    x = embeddings().requires_grad_()
    gate = meta_router(x, ForwardContext(document_ids_BS=documents))
    with torch.no_grad():
        assert_near(gate, gate_of(meta_router, prefix_means(x, documents)))
    (ours,) = torch.autograd.grad((gate * embeddings(3)[..., :1]).sum(), x)
    y = x.detach().requires_grad_()
    means = torch.stack(
        [
            torch.stack(
                [
                    y[: i + 1, b][documents[b, : i + 1] == documents[b, i]].mean(0)
                    if documents is not None
                    else y[: i + 1, b].mean(0)
                    for b in range(B)
                ]
            )
            for i in range(S)
        ]
    )
    (theirs,) = torch.autograd.grad((gate_of(meta_router, means) * embeddings(3)[..., :1]).sum(), y)
    assert_near(ours, theirs)


@pytest.mark.parametrize("documents", [None, DOCUMENTS])
@torch.no_grad()
def test_causal_continues_over_generation_calls(documents):
    meta_router = build("causal").eval()
    x = embeddings()
    state, parts = GenerationState(capacity=S), []
    for new in (4, 1, 1, 3, 1):
        end = state.length + new
        seen = None if documents is None else documents[:, :end]
        context = ForwardContext(document_ids_BS=seen, generation=state)
        parts.append(meta_router(x[state.length : end], context))
        state.length = end
    assert_near(torch.cat(parts), gate_of(meta_router, prefix_means(x, documents)))


def test_a_step_moves_the_average_once_by_the_mean_of_all_its_micro_batches():
    decay = 0.75
    config = tiny_config({"kind": "entropy"})
    meta = replace(config.model.meta_router, decay=decay)
    config = replace(
        config,
        model=replace(config.model, meta_router=meta),
        training=replace(config.training, global_batch_size=4, micro_batch_size=2),
    )
    engine = MegatronEngine(config, single_process_world("cpu"))
    meta_router = engine.module.chiar_layers[0].meta_router
    expected, weight = torch.zeros(config.model.hidden_size).double(), 0.0
    for step in range(3):
        batches = [random_batch(config, b=2, seed=10 * step + m) for m in range(2)]
        table = engine.module.embedding.word_embeddings.weight.detach().double()
        mean = table[torch.cat([batch.tokens_BS for batch in batches])].mean((0, 1))
        expected, weight = decay * expected + (1 - decay) * mean, decay * weight + (1 - decay)
        engine.train_step(batches, step)
        assert_near(meta_router.running_mean_H, expected)
        assert float(meta_router.running_weight) == pytest.approx(weight)
    engine.validation_loss(batches)
    assert_near(meta_router.running_mean_H, expected)
