"""Each router's score, decision, gate and gradient, from its formula."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.fft
import torch
import torch.nn.functional as F
from torch import Tensor

from chiar_megatron.config.schema import RouterConfig
from chiar_megatron.operators.context import ForwardContext
from chiar_megatron.operators.linear import normalised_score
from chiar_megatron.routing.decision import ATTENTION, RBF, SPECTRAL, RouteDecision
from chiar_megatron.routing.dispatch import dispatch_dense
from chiar_megatron.routing.router import RandomRouter, Router, blend_entropy, build_router
from tests.unit.reference_model import random_scores

S, B, H = 12, 3, 20
WHOLE = (0, 1)
THREE = "spectral_attention_rbf"


def build(threshold: float | None = None, dtype: torch.dtype = torch.float32, **config) -> Router:
    """A router with random weights."""
    router = build_router(RouterConfig(threshold=threshold, **config), H, 3, dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return router


def hidden(seed: int = 0) -> Tensor:
    return torch.randn(S, B, H, generator=torch.Generator().manual_seed(seed))


def entropies(x: Tensor, c: float = 1.0) -> np.ndarray:
    """By scipy, in float64."""
    power = scipy.fft.dct(x.detach().double().numpy(), norm="ortho") ** 2
    power[..., 0] *= c
    p = power / power.sum(-1, keepdims=True)
    return -(p * np.log(p)).sum(-1) / math.log(x.shape[-1])


def linear_score(x: Tensor, linear: torch.nn.Module) -> np.ndarray:
    """s(x) = w·x/rms(x) + b, in float64."""
    x = x.detach().double().numpy()
    normed = x / np.sqrt((x**2).mean(-1, keepdims=True))
    return normed @ linear.weight.detach().double().numpy()[0] + linear.bias.item()


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize("kind", ["entropy", "entropy_gated"])
@pytest.mark.parametrize("c", [1.0, 2.0])
def test_entropy_routers(kind, c):
    x = hidden()
    expected = entropies(x, c)
    threshold = float(np.median(expected))
    router = build(threshold, kind=kind, dc_power_weight=c)
    decision = router(x.requires_grad_(), ForwardContext(), WHOLE)
    np.testing.assert_allclose(decision.score_SB, expected, atol=1e-6)
    assert torch.equal(decision.entropy_SB, decision.score_SB)
    clear = abs(expected - threshold) > 1e-6
    np.testing.assert_array_equal(decision.light_SB.numpy()[clear], (expected > threshold)[clear])
    assert not decision.score_SB.requires_grad and decision.weights_SBO is None
    if kind == "entropy":
        assert decision.gate_SB is None
    else:
        gate = 2 * sigmoid(linear_score(x, router.gate_score.linear))
        np.testing.assert_allclose(decision.gate_SB.detach(), gate, rtol=1e-5)


def test_learned_router():
    x = hidden()
    router = build(0.1, kind="learned")
    decision = router(x, ForwardContext(), WHOLE)
    expected = linear_score(x, router.score.linear)
    np.testing.assert_allclose(decision.score_SB, expected, atol=1e-5)
    np.testing.assert_array_equal(decision.light_SB, expected > 0.1)
    np.testing.assert_allclose(decision.gate_SB.detach(), 2 * sigmoid(expected), rtol=1e-5)
    scaled = router(1000 * x, ForwardContext(), WHOLE)
    torch.testing.assert_close(scaled.score_SB, decision.score_SB, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["learned", "entropy_gated"])
def test_the_gate_trains_the_score_and_the_threshold_does_not(kind):
    x = hidden()
    router = build(0.0, kind=kind)
    decision = router(x, ForwardContext(), WHOLE)
    factor = torch.randn(S, B)
    (decision.gate_SB * factor).sum().backward()
    linear = router.score.linear if kind == "learned" else router.gate_score.linear
    score = torch.from_numpy(linear_score(x, linear))
    slope = 2 * torch.sigmoid(score) * (1 - torch.sigmoid(score)) * factor
    normed = x / x.square().mean(-1, keepdim=True).sqrt()
    expected = torch.cat(((slope[..., None] * normed).sum((0, 1)), slope.sum()[None]))
    ours = torch.cat((linear.weight.grad[0], linear.bias.grad)).double()
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    assert (
        dict(router.named_buffers()).keys()
        == {"threshold"}
        == router.state_dict().keys() - {name for name, _ in router.named_parameters()}
    )


@pytest.mark.parametrize("kind", ["entropy", "learned", "entropy_gated", "random"])
def test_a_score_equal_to_the_threshold_is_not_above_it(kind):
    context = ForwardContext(tokens_BS=torch.arange(S * B).view(B, S))
    router = build(0.0, kind=kind)
    x = hidden()
    score = router(x, context, WHOLE).score_SB
    router.threshold.copy_(score[4, 1])
    decision = router(x, context, WHOLE)
    assert not decision.light_SB[4, 1]
    assert torch.equal(decision.light_SB, score > score[4, 1]) and decision.light_SB.any()


def blend_weights(router: Router, x: Tensor) -> Tensor:
    """softmax(W[x; H] + b), H last; float64."""
    features = torch.cat((x.double(), torch.from_numpy(entropies(x))[..., None]), -1)
    return (features @ router.gate_proj.weight.double().T + router.gate_proj.bias.double()).softmax(-1)


@pytest.mark.parametrize("operators", ["spectral_attention", THREE])
def test_soft_router(operators):
    x = hidden()
    router = build(kind="soft", operators=operators)
    decision = router(x, ForwardContext(), WHOLE)
    expected = blend_weights(router, x)
    torch.testing.assert_close(decision.weights_SBO.double(), expected, atol=1e-5, rtol=1e-4)
    assert decision.weights_SBO.shape[-1] == (3 if operators == THREE else 2)
    assert torch.equal(decision.light_SB, expected.argmax(-1) == 1)
    torch.testing.assert_close(decision.score_SB.double(), expected[..., 1].detach(), atol=1e-5, rtol=1e-4)
    assert decision.gate_SB is None


@pytest.mark.parametrize("operators", ["spectral_attention", THREE])
def test_hard_router_is_one_hot_with_the_gradient_of_the_softmax(operators):
    x = hidden()
    router = build(kind="hard", operators=operators)
    decision = router(x, ForwardContext(), WHOLE)
    expected = blend_weights(router, x)
    one_hot = torch.eye(expected.shape[-1])[expected.argmax(-1)]
    torch.testing.assert_close(decision.weights_SBO.detach(), one_hot, atol=1e-6, rtol=0.0)
    assert len(expected.argmax(-1).unique()) == expected.shape[-1]
    direction = torch.randn(decision.weights_SBO.shape)
    parameters = [router.gate_proj.weight, router.gate_proj.bias]
    ours = torch.autograd.grad((decision.weights_SBO * direction).sum(), parameters)
    theirs = torch.autograd.grad((expected * direction).sum(), parameters)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_the_entropy_of_a_blend_carries_gradient_to_what_lies_below():
    x = hidden().double()
    router = build(kind="soft").double()
    a = x.clone().requires_grad_()
    direction = torch.randn(S, B, 2).double()
    (router(a, ForwardContext(), WHOLE).weights_SBO * direction).sum().backward()
    step, value = 1e-3, []
    for sign in (1, -1):
        moved = x + sign * step * direction[..., :1]
        value.append(float((blend_weights(router, moved) * direction).sum()))
    slope = float((a.grad * direction[..., :1]).sum())
    assert slope == pytest.approx((value[0] - value[1]) / (2 * step), rel=1e-3)


def test_forced_decisions_replace_the_choice_and_nothing_else():
    x, tokens = hidden(), torch.arange(S * B).view(B, S)
    forced = torch.rand(S, B, generator=torch.Generator().manual_seed(5)) < 0.5
    for kind in ("entropy", "learned", "entropy_gated", "random"):
        router = build(0.0, kind=kind)
        own = router(x, ForwardContext(tokens_BS=tokens), WHOLE)
        context = ForwardContext(
            tokens_BS=tokens, forced_light_SB={3: forced}, recorded_light_SB={}, recorded_score_SB={}
        )
        decision = router(x, context, WHOLE)
        assert torch.equal(decision.light_SB, forced) and torch.equal(decision.score_SB, own.score_SB)
        assert torch.equal(context.recorded_light_SB[3], forced)
        assert torch.equal(context.recorded_score_SB[3], own.score_SB)
        if own.gate_SB is not None:
            assert torch.equal(decision.gate_SB, own.gate_SB)
        other = router(x, ForwardContext(tokens_BS=tokens, forced_light_SB={2: forced}), WHOLE)
        assert torch.equal(other.light_SB, own.light_SB), "another layer's decisions were taken"
        half = router(x[6:], ForwardContext(tokens_BS=tokens, forced_light_SB={3: forced}), (1, 2))
        assert torch.equal(half.light_SB, forced[6:])


@pytest.mark.parametrize("operators", ["spectral_attention", THREE])
def test_a_forced_hard_choice_is_one_hot(operators):
    x = hidden()
    router = build(kind="hard", operators=operators)
    own = router(x, ForwardContext(), WHOLE)
    choice = own.weights_SBO.argmax(-1)
    decision = router(x, ForwardContext(forced_light_SB={3: ~own.light_SB}), WHOLE)
    expected = torch.where(own.light_SB, SPECTRAL, ATTENTION)
    assert torch.equal(decision.weights_SBO.argmax(-1), expected)
    assert torch.equal(decision.light_SB, ~own.light_SB)
    same = router(x, ForwardContext(forced_light_SB={3: own.light_SB}), WHOLE)
    assert torch.equal(same.weights_SBO.argmax(-1), choice)
    assert (choice == RBF).any() == (operators == THREE)


def test_random_router_is_a_hash_of_layer_position_and_token():
    tokens = torch.randint(50_000, (B, S), generator=torch.Generator().manual_seed(2))
    router = build(0.3, kind="random")
    decision = router(hidden(), ForwardContext(tokens_BS=tokens), WHOLE)
    torch.testing.assert_close(decision.score_SB.T.double(), random_scores(tokens, 3), rtol=0, atol=0)
    assert torch.equal(decision.light_SB, decision.score_SB > 0.3)
    assert torch.equal(decision.score_SB, router(hidden(1), ForwardContext(tokens_BS=tokens), WHOLE).score_SB)
    half = router(hidden()[6:], ForwardContext(tokens_BS=tokens), (1, 2))
    assert torch.equal(half.score_SB, decision.score_SB[6:])


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.8])
def test_random_router_sends_the_fraction_independently(fraction):
    """Over layers, positions and tokens: a share within 5 standard deviations, and no correlation."""
    config = RouterConfig(kind="random", threshold=1 - fraction)
    tokens = torch.arange(300)[:, None].expand(300, 100)  # every token at every position
    context = ForwardContext(tokens_BS=tokens)
    x = torch.zeros(100, 300, 1)
    light = torch.stack(
        [RandomRouter(config, H, n, torch.float32)(x, context, WHOLE).light_SB for n in (1, 2)]
    )
    light = light.double()
    n = light[0].numel()
    deviation = math.sqrt(fraction * (1 - fraction) / n)
    assert light.mean((1, 2)).tolist() == pytest.approx([fraction] * 2, abs=5 * deviation)
    centred = (light - fraction) / math.sqrt(fraction * (1 - fraction))
    neighbours = {
        "layers": (centred[0], centred[1]),
        "positions": (centred[0, 1:], centred[0, :-1]),
        "tokens": (centred[0, :, 1:], centred[0, :, :-1]),
    }
    for name, (a, b) in neighbours.items():
        assert abs(float((a * b).mean())) < 5 / math.sqrt(a.numel()), name
    per_position, per_token = light[0].mean(1), light[0].mean(0)
    assert (per_position - fraction).abs().max() < 6 * math.sqrt(fraction * (1 - fraction) / 300)
    assert (per_token - fraction).abs().max() < 6 * math.sqrt(fraction * (1 - fraction) / 100)


def test_collapse_regulariser_is_the_entropy_of_the_mean():
    weights = torch.rand(S, B, 3, generator=torch.Generator().manual_seed(3)).double()
    weights = (weights / weights.sum(-1, keepdim=True)).requires_grad_()
    q = weights.detach().mean((0, 1))
    value = blend_entropy(weights, lambda total: total)
    assert float(value) == pytest.approx(-sum(float(p) * math.log(p) for p in q), rel=1e-12)
    (gradient,) = torch.autograd.grad(value, weights)
    torch.testing.assert_close(gradient, (-(q.log() + 1) / (S * B)).expand_as(gradient))
    collapsed = torch.zeros(S, B, 2)
    collapsed[..., 1] = 1.0
    assert float(blend_entropy(collapsed, lambda total: total)) == 0.0
    # Two halves of a sequence, each on a rank of its own, have the value of the whole.
    halves = weights.detach().split(S // 2)
    totals = sum(half.sum((0, 1)) for half in halves)
    assert float(blend_entropy(halves[0], lambda total: totals)) == pytest.approx(float(value), rel=1e-12)


def test_dispatch_gives_each_token_its_operator_or_the_blend():
    outputs = [torch.full((S, B, 2), float(value)) for value in (1, 10, 100)]
    light = torch.rand(S, B, generator=torch.Generator().manual_seed(5)) < 0.5
    chosen = dispatch_dense(RouteDecision(light, light.float()), outputs[:2])
    assert torch.equal(chosen[..., 0], torch.where(light, 10.0, 1.0))
    weights = torch.rand(S, B, 3)
    blended = dispatch_dense(RouteDecision(light, light.float(), weights_SBO=weights), outputs)
    torch.testing.assert_close(blended[..., 1], weights @ torch.tensor([1.0, 10.0, 100.0]))


@pytest.mark.parametrize("kind", ["entropy", "learned", "entropy_gated", "soft", "hard"])
def test_scores_are_float32_in_a_bfloat16_model(kind):
    router = build(0.5, torch.bfloat16, kind=kind)
    x = hidden().bfloat16()
    decision = router(x, ForwardContext(), WHOLE)
    assert decision.score_SB.dtype == torch.float32
    assert all(parameter.dtype == torch.bfloat16 for parameter in router.parameters())
    exact = build(0.5, kind=kind)
    exact.load_state_dict(router.state_dict())
    torch.testing.assert_close(decision.score_SB, exact(x.float(), ForwardContext(), WHOLE).score_SB)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_normalised_scores_are_a_linear_layers_behind_a_norm(dtype):
    generator = torch.Generator().manual_seed(1)
    x, weight = (torch.randn(shape, generator=generator).to(dtype) for shape in ((5, 3, 33), (33,)))
    inputs = [x.requires_grad_(), weight.requires_grad_(), torch.tensor(0.3, dtype=dtype, requires_grad=True)]
    wide = [y.detach().double().requires_grad_() for y in inputs]
    expected = F.rms_norm(wide[0], (33,), eps=1e-6) @ wide[1] + wide[2]
    found = normalised_score(*inputs)
    grad = torch.randn(5, 3, generator=generator)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    bounds = {"atol": 1e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 1e-2, "rtol": 1e-2}
    for a, b in zip(
        torch.autograd.grad(found, inputs, grad),
        torch.autograd.grad(expected, wide, grad.double()),
        strict=True,
    ):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, **bounds)
