"""Skipping against the dense reference: same logits and gradients, with rows, capacity, recomputation."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Optional

import numpy as np
import pytest
import torch
from torch import Tensor

from chiar_megatron.config.schema import RunConfig
from chiar_megatron.data.dataset import TokenBatch
from chiar_megatron.inference.load import InferenceModel
from chiar_megatron.operators import routed_attention as attention_module
from chiar_megatron.operators.attention import SelfAttention
from chiar_megatron.operators.context import ForwardContext
from chiar_megatron.operators.routed_attention import routed_attention
from chiar_megatron.routing.statistics import FIELDS
from tests.unit.test_model import random_batch, trained_module
from tests.unit.tiny_models import tiny_config, tiny_model

RBF = "spectral_attention_rbf"
POST: dict[str, Any] = {}
PRE: dict[str, Any] = {"norm": "pre", "normalization": "RMSNorm", "activation": "swiglu"}
GQA: dict[str, Any] = {"num_query_groups": 2}
ROUTED = {"keys_values": "routed"}
GRID: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "entropy": ({"kind": "entropy"}, POST),
    "entropy, routed keys, pre": ({"kind": "entropy", **ROUTED}, PRE),
    "learned, GQA": ({"kind": "learned"}, {**POST, **GQA}),
    "learned, pre, untied": ({"kind": "learned"}, {**PRE, "tie_embeddings": False}),
    "learned, routed keys, GQA, RMSNorm": (
        {"kind": "learned", **ROUTED},
        {**GQA, "normalization": "RMSNorm"},
    ),
    "entropy_gated, pre LayerNorm": ({"kind": "entropy_gated"}, {"norm": "pre", "add_bias": False}),
    "entropy_gated, routed keys, odd h": (
        {"kind": "entropy_gated", **ROUTED},
        {"hidden_size": 33, "kv_channels": 6, **GQA},
    ),
    "random": ({"kind": "random"}, PRE),
    "random, routed keys": ({"kind": "random", **ROUTED}, POST),
    "hard": ({"kind": "hard"}, POST),
    "hard, routed keys, pre": ({"kind": "hard", **ROUTED}, {**PRE, **GQA}),
    "hard, RBF": ({"kind": "hard", "operators": RBF}, POST),
    "soft": ({"kind": "soft", **ROUTED}, POST),
    "soft, RBF": ({"kind": "soft", "operators": RBF}, PRE),
}
BLENDS = ("soft", "hard")
LIGHT: dict[str, Optional[bool]] = {"mixed": None, "all light": True, "all dark": False}


def pair(router: dict[str, Any], **model: Any) -> tuple[InferenceModel, InferenceModel]:
    """The model that skips and the dense one, of the same weights and thresholds."""
    skipping = tiny_model(tiny_config(router, **model))
    dense = tiny_model(tiny_config({**router, "dispatch": "dense"}, **model))
    dense.load_state_dict(skipping.state_dict())
    return skipping, dense


def context_of(batch: TokenBatch, forced: Optional[dict[int, Tensor]] = None) -> ForwardContext:
    """Everything recorded."""
    return ForwardContext(
        tokens_BS=batch.tokens_BS,
        document_ids_BS=batch.document_ids_BS,
        forced_light_SB=forced,
        recorded_light_SB={},
        recorded_score_SB={},
    )


def logits_and_gradients(
    model: InferenceModel, batch: TokenBatch, context: ForwardContext
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the gradients of a random direction in them to all parameters and to the embeddings."""
    seen: list[Tensor] = []

    def watch(_: Any, __: Any, kwargs: dict[str, Any]) -> None:
        kwargs["hidden_states"].retain_grad()
        seen.append(kwargs["hidden_states"])

    model.zero_grad()
    hook = model.module.chiar_layers[0].register_forward_pre_hook(watch, with_kwargs=True)
    logits = model(batch.tokens_BS, context=context)
    hook.remove()
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(9))
    ((logits * direction).sum() / math.sqrt(logits.numel())).backward()
    zero = torch.zeros(())
    gradients = {name: zero if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    assert seen[0].grad is not None
    return logits.detach(), {**gradients, "embeddings": seen[0].grad}


def assert_same(skipping: tuple[Tensor, dict[str, Tensor]], dense: tuple[Tensor, dict[str, Tensor]]) -> None:
    """Logits and each gradient within 1e-5 of one, or of their largest component where that is more."""
    assert skipping[1].keys() == dense[1].keys()
    felt = 0
    for name, expected in {"logits": dense[0], **dense[1]}.items():
        largest = float(expected.abs().max())
        ours = skipping[0] if name == "logits" else skipping[1][name]
        difference = float((ours - expected).abs().max())
        assert difference <= 1e-5 * max(1.0, largest), f"{name}: {difference} of {largest}"
        felt += largest > 1e-4
    assert felt > 0.7 * len(dense[1]), "a comparison of zeros"


@pytest.mark.parametrize("light", LIGHT)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", GRID)
def test_the_routed_model_equals_a_dense_masked_model(name, masked, light):
    """In training (no target: no capacity) where a threshold decides; `hard` skips at evaluation only."""
    router, model = GRID[name]
    if router["kind"] == "soft" and light != "mixed":
        pytest.skip("a blend has no choice to force")
    skipping, dense = pair(router, mask_documents=masked, **model)
    training = router["kind"] not in BLENDS
    batch = random_batch(skipping.config)
    forced = None
    if LIGHT[light] is not None:
        every = torch.full((batch.tokens_BS.shape[1], batch.tokens_BS.shape[0]), LIGHT[light])
        forced = {2: every, 3: every}
    contexts = [context_of(batch, forced) for _ in range(2)]
    rows_used = count_rows(skipping)
    answers = [
        logits_and_gradients(m.train(training), batch, c)
        for m, c in zip((skipping, dense), contexts, strict=True)
    ]
    # Replicas' sums that overlap with the backward pass wait for every gradient, whatever was routed where.
    without = [name for name, p in skipping.named_parameters() if training and p.grad is None]
    assert not without
    for layer in (2, 3):
        chosen = [(c.recorded_light_SB or {})[layer] for c in contexts]
        assert torch.equal(*chosen)
        share = float(chosen[0].float().mean())
        if router["kind"] != "soft":
            assert 0.2 < share < 0.8 if light == "mixed" else share == float(light == "all light")
            if router["kind"] != "hard":
                assert rows_used[layer] == [int(chosen[0].sum())], "attention computed other tokens"
    assert_same(*answers)


def count_rows(model: Any) -> dict[int, list[int]]:
    """Rows of each routed layer's attention, call by call, filled as the model runs."""
    seen: dict[int, list[int]] = {}
    for layer in model.module.chiar_layers:
        if layer.kind == "R":
            watch_rows(layer.self_attention, seen.setdefault(layer.layer_number, []))
    return seen


def watch_rows(attention: SelfAttention, seen: list[int]) -> None:
    attend = attention.forward_rows

    def watched(x: Tensor, rows: Any, *rest: Any) -> Tensor:
        seen.append(len(rows.index_R))
        return attend(x, rows, *rest)

    attention.forward_rows = watched  # type: ignore[method-assign]


def test_hard_routing_skips_at_evaluation_without_gradients():
    for keys in ("all", "routed"):
        skipping, dense = pair({"kind": "hard", "keys_values": keys}, **PRE)
        rows_used = count_rows(skipping)
        batch = random_batch(skipping.config)
        context = context_of(batch)
        with torch.no_grad():
            logits = skipping(batch.tokens_BS, context=context)
            expected = dense(batch.tokens_BS, context=context_of(batch))
        assert rows_used == {n: [int(chosen.sum())] for n, chosen in context.recorded_light_SB.items()}
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("keys", ["all", "routed"])
@pytest.mark.parametrize("kind", ["entropy", "learned", "entropy_gated", "random"])
@pytest.mark.parametrize("model", [POST, PRE], ids=["post", "pre"])
def test_rows_to_spare_change_nothing(kind, keys, model):
    """Training with a target and `capacity: auto` where nothing overflows."""
    router = {"kind": kind, "keys_values": keys, "target": 0.5}
    skipping, dense = pair(router, mask_documents=True, **model)
    rows_used = count_rows(skipping)
    batch = random_batch(skipping.config, b=8)
    answers = [logits_and_gradients(m.train(), batch, context_of(batch)) for m in (skipping, dense)]
    for layer in skipping.module.chiar_layers:
        if layer.kind == "R":
            counts = dict(zip(FIELDS, layer.statistics.sums_F.tolist(), strict=True))
            assert rows_used[layer.layer_number] == [128]
            assert counts["tokens"] == 192 and counts["overflow"] == 0 and 40 < counts["light"] < 128
    assert_same(*answers)


def keep_highest(light_SB: Tensor, score_SB: Tensor, capacity: int) -> Tensor:
    """By sorting in numpy: of the light tokens those of the highest scores, of equal ones the earlier."""
    light_N, score_N = light_SB.T.flatten().numpy(), score_SB.T.flatten().numpy()
    order = np.lexsort((np.arange(len(light_N)), -score_N.astype(np.float64), ~light_N))
    kept_N = np.zeros(len(light_N), dtype=bool)
    kept_N[order[:capacity]] = True
    return torch.from_numpy(kept_N & light_N).view(light_SB.T.shape).T


def thrice(config: RunConfig) -> TokenBatch:
    """Nine sequences, each of three standing three times: equal tokens have equal hashes."""
    batch = random_batch(config, b=3)
    fields = ("tokens_BS", "labels_BS", "loss_mask_BS")
    return replace(batch, **{name: getattr(batch, name).repeat(3, 1) for name in fields})


@pytest.mark.parametrize("keys", ["all", "routed"])
@pytest.mark.parametrize("kind", ["entropy", "learned", "entropy_gated", "random"])
def test_overflow_of_the_lowest_scores_takes_the_spectral_path(kind, keys):
    router = {"kind": kind, "keys_values": keys, "target": 0.25, "slack": 0.0}
    skipping, dense = pair(router, **PRE)
    # 216 tokens: 64 rows, so that with equal scores by threes the cut falls between two of them.
    batch = thrice(skipping.config) if kind == "random" else random_batch(skipping.config, b=9)
    context, kept = context_of(batch), {}
    answer = logits_and_gradients(skipping.train(), batch, context)
    assert context.recorded_light_SB is not None and context.recorded_score_SB is not None
    for layer in (2, 3):
        light, score = context.recorded_light_SB[layer], context.recorded_score_SB[layer]
        kept[layer] = keep_highest(light, score, 64)
        counts = dict(
            zip(FIELDS, skipping.module.chiar_layers[layer - 1].statistics.sums_F.tolist(), strict=True)
        )
        assert counts["light"] == int(light.sum()) and counts["overflow"] == int(light.sum()) - 64 > 10
        if kind == "random":
            lost = light & ~kept[layer]
            assert score[lost].max() == score[kept[layer]].min(), "no tie at the cut"
    assert_same(answer, logits_and_gradients(dense.train(), batch, context_of(batch, kept)))


@pytest.mark.parametrize("kind", ["entropy", "learned"])
def test_evaluation_and_forced_decisions_know_no_capacity(kind):
    skipping, dense = pair({"kind": kind, "target": 0.25, "slack": 0.0})
    rows_used = count_rows(skipping)
    batch = random_batch(skipping.config, b=9)
    context = context_of(batch)
    assert_same(
        logits_and_gradients(skipping.eval(), batch, context),
        logits_and_gradients(dense.eval(), batch, context_of(batch)),
    )
    assert context.recorded_light_SB is not None and context.recorded_score_SB is not None
    for layer in (2, 3):
        threshold = skipping.module.chiar_layers[layer - 1].router.threshold
        light = context.recorded_score_SB[layer] > threshold
        assert torch.equal(context.recorded_light_SB[layer], light)
        assert rows_used[layer] == [int(light.sum())] and rows_used[layer][0] > 64
    every = torch.ones(24, 9, dtype=torch.bool)
    skipping(batch.tokens_BS, context=context_of(batch, {2: every, 3: every}))
    skipping.train()(batch.tokens_BS, context=context_of(batch, {2: every, 3: every}))
    assert rows_used[2][1:] == [216, 216]


def by_ranges(q: Tensor, k: Tensor, v: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """Row by row and head by head, in float64."""
    outputs = []
    for row, (low, high) in enumerate(zip(first.tolist(), last.tolist(), strict=True)):
        if high < low:
            outputs.append(torch.zeros_like(q[row]))
            continue
        heads = []
        for head in range(q.shape[1]):
            group = head * k.shape[1] // q.shape[1]
            keys, values = k[low : high + 1, group], v[low : high + 1, group]
            heads.append((keys @ q[row, head] / math.sqrt(q.shape[-1])).softmax(0) @ values)
        outputs.append(torch.stack(heads))
    return torch.stack(outputs) if outputs else q * 0.0


@pytest.mark.parametrize("block", [1, 7, 16, 128])
@pytest.mark.parametrize("used", [0, 1, 41])
@pytest.mark.parametrize("spare", [0, 20])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_attention_over_ranges(monkeypatch, block, used, spare, groups):
    """Sequences and documents of 24 tokens, unused rows at the end, no rows at all."""
    monkeypatch.setattr(attention_module, "QUERY_BLOCK", block)
    generator = torch.Generator().manual_seed(block + used)
    last = torch.randperm(72, generator=generator)[:used].sort().values
    first = torch.cat((last // 24 * 24, torch.zeros(spare, dtype=torch.int64))).int()
    last = torch.cat((last, torch.full((spare,), -1))).int()
    shapes = ((used + spare, 4, 6), (72, groups, 6), (72, groups, 6))
    inputs = [torch.randn(shape, generator=generator) for shape in shapes]
    ours = [x.clone().requires_grad_() for x in inputs]
    exact = [x.double().requires_grad_() for x in inputs]
    out, expected = routed_attention(*ours, first, last), by_ranges(*exact, first, last)
    assert out.dtype == torch.float32 and out.shape == shapes[0]
    torch.testing.assert_close(out.double(), expected, atol=1e-6, rtol=1e-6)
    if used + spare == 0:
        return
    direction = torch.randn(shapes[0], generator=generator)
    if out.requires_grad:
        (out * direction).sum().backward()
    if expected.requires_grad:
        (expected * direction).sum().backward()
    for a, b in zip(ours, exact, strict=True):
        grad, wanted = (x.grad if x.grad is not None else torch.zeros_like(x) for x in (a, b))
        torch.testing.assert_close(grad.double(), wanted, atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("router", [{"kind": "learned", "target": 0.25, "slack": 0.0}, {"kind": "entropy"}])
def test_recomputed_layers_give_the_same_and_count_once(router):
    seen = []
    for recompute in ("none", "full"):
        config = tiny_config({**router, "keys_values": "routed"})
        training = replace(config.training, recompute=recompute, global_batch_size=18, micro_batch_size=9)
        engine, _ = trained_module(replace(config, training=training))
        calls = count_rows(engine)
        counted: list[None] = []
        statistics = engine.module.chiar_layers[1].statistics
        add = statistics.add
        statistics.add = lambda *given, counted=counted, add=add: counted.append(add(*given))
        results = []
        for step in range(3):
            batches = [random_batch(config, b=9, seed=10 * step + m) for m in range(2)]
            result = engine.train_step(batches, step)
            gradients = [p.main_grad.clone() for p in engine.module.parameters()]
            results.append((result.sums.loss, result.grad_norm, result.sums.routing, gradients))
        assert len(calls[2]) == (6 if recompute == "none" else 12), "not what the recipe says"
        # Two micro-batches of three steps: shares alone would not show that each was counted twice.
        assert len(counted) == 6
        seen.append(results)
    for plain, again in zip(*seen, strict=True):
        assert plain[0] == pytest.approx(again[0], rel=1e-6) and plain[1] == pytest.approx(again[1], rel=1e-5)
        assert plain[2].layers == [2, 3] and plain[2].routed_fraction == again[2].routed_fraction
        assert plain[2].overflow_fraction == again[2].overflow_fraction
        assert plain[2].score_std == pytest.approx(again[2].score_std, rel=1e-5)
        for a, b in zip(plain[3], again[3], strict=True):
            torch.testing.assert_close(a, b, atol=1e-5 * max(1.0, float(a.abs().max())), rtol=0.0)
    if "target" in router:
        assert min(seen[0][0][2].overflow_fraction) > 0.1
