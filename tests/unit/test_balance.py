"""Load balance: capacity, and the controller on simulated scores and in real training."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any, Optional

import numpy as np
import pytest
import torch
from torch import Tensor

from chiar_megatron.checkpoint.store import CheckpointStore, load_state, make_info
from chiar_megatron.config.load import to_dict
from chiar_megatron.config.schema import CheckpointConfig, OptimizerConfig, RouterConfig, RunConfig
from chiar_megatron.data.dataset import TokenBatch
from chiar_megatron.operators.context import ForwardContext
from chiar_megatron.routing.balance import (
    ThresholdController,
    capacity_rows,
    cut_to_capacity,
    move_thresholds,
)
from chiar_megatron.routing.statistics import FIELDS
from chiar_megatron.runtime.distributed import single_process_world
from chiar_megatron.training.engine import MegatronEngine
from tests.unit.tiny_models import tiny_config, tiny_model

TOKENS = 4096
RHOS = [0.125, 0.25, 0.5, 0.75]


@pytest.mark.parametrize("target", [*RHOS, 0.1, 0.3, 0.99])
@pytest.mark.parametrize("slack", [0.0, 0.05, 0.1, 0.5])
def test_capacity_is_the_target_with_slack_in_whole_tiles(target, slack):
    config = RouterConfig(kind="learned", target=target, slack=slack)
    for tokens in (1, 63, 64, 65, 192, 1000, 1280, 4096, 8192, 32768):
        # Exactly, so that 0.1 · 1.1 · 64000 is what it is.
        wanted = Fraction(str(target)) * (1 + Fraction(str(slack))) * tokens
        expected = min(tokens, 64 * math.ceil(wanted / 64))
        assert capacity_rows(config, tokens) == expected
    assert capacity_rows(replace(config, capacity="none"), 4096) is None
    assert capacity_rows(replace(config, target=None), 4096) is None


@pytest.mark.parametrize("n", [1, 50, 300])
@pytest.mark.parametrize("ties", [False, True])
def test_what_is_cut_has_the_lowest_scores_and_comes_last_among_equals(n, ties):
    generator = torch.Generator().manual_seed(n)
    score_N = torch.randn(n, generator=generator)
    if ties:
        score_N = score_N.round()
    for share in (0.0, 0.3, 1.0):
        light_N = torch.rand(n, generator=generator) < share
        for capacity in (0, 1, n // 3, int(light_N.sum()), n, n + 5):
            kept_N = cut_to_capacity(light_N, score_N, capacity)
            ranked = sorted(light_N.nonzero().squeeze(1).tolist(), key=lambda i: (-float(score_N[i]), i))
            assert sorted(ranked[:capacity]) == kept_N.nonzero().squeeze(1).tolist()
            assert kept_N.dtype == torch.bool
            if capacity >= len(ranked):
                assert torch.equal(kept_N, light_N)


Sampler = Callable[[np.random.Generator, int], np.ndarray]


def _normal(mean: float, deviation: float) -> Sampler:
    return lambda generator, n: generator.normal(mean, deviation, n)


SCORES: dict[str, Sampler] = {
    "entropy": _normal(0.895, 0.004),
    "learned": _normal(0.0, 1.0),
    "learned, far off": _normal(-40.0, 3.0),
    "skewed low": lambda generator, n: 0.9 - 0.004 * generator.gamma(1.5, 1.0, n),
    "skewed high": lambda generator, n: generator.lognormal(0.0, 0.75, n),
    "exponential": lambda generator, n: generator.exponential(2.0, n),
    "heavy tails": lambda generator, n: generator.standard_t(3.0, n),
    "two groups": lambda generator, n: generator.normal(np.where(generator.random(n) < 0.4, -2.0, 2.0), 1.0),
    "uniform": lambda generator, n: generator.random(n),
}


class Layers:
    """Routed layers whose scores are drawn, one for each sampler, under one controller."""

    def __init__(self, config: RouterConfig, samplers: list[Sampler], start: float = 1000.0) -> None:
        self.config, self.samplers = config, samplers
        self.thresholds = [torch.tensor(start) for _ in samplers]
        self.controllers = [ThresholdController() for _ in samplers]
        self.generator = np.random.default_rng(5)
        self.capacity = capacity_rows(config, TOKENS) or TOKENS

    def step(self, shift: Optional[list[float]] = None) -> tuple[np.ndarray, np.ndarray]:
        """Each layer's share of light tokens, and the share of those that overflow."""
        rows, overflow = [], []
        for layer, sampler in enumerate(self.samplers):
            scores = sampler(self.generator, TOKENS) + (0.0 if shift is None else shift[layer])
            scores = scores.astype(np.float32).astype(np.float64)
            light = int((scores > float(self.thresholds[layer])).sum())
            lost = max(0, light - self.capacity)
            rows.append([TOKENS, light, scores.sum(), (scores**2).sum(), 0.0, lost])
            overflow.append(lost / max(light, 1))
        move_thresholds(
            self.config,
            self.thresholds,
            self.controllers,
            torch.tensor(rows, dtype=torch.float64),
            torch.tensor(True),
        )
        return np.array([row[1] for row in rows]) / TOKENS, np.array(overflow)

    def run(self, steps: int) -> tuple[np.ndarray, np.ndarray]:
        """Means of the last 50 of so many steps."""
        shares, overflow = zip(*(self.step() for _ in range(steps)), strict=True)
        return np.mean(shares[-50:], axis=0), np.mean(overflow[-50:], axis=0)


def assert_held(layers: Layers, found: tuple[np.ndarray, np.ndarray], names: list[str]) -> None:
    for name, share, overflow in zip(names, *found, strict=True):
        assert share == pytest.approx(layers.config.target, abs=0.01), name
        assert overflow < 0.02, name


def controlled(target: float, **fields: Any) -> RouterConfig:
    return RouterConfig(kind="learned", target=target, **fields)


@pytest.mark.parametrize("start", [1000.0, -1000.0])
@pytest.mark.parametrize("target", RHOS)
def test_the_share_is_held_from_a_cold_start_and_after_a_sudden_change(target, start):
    names = list(SCORES)
    layers = Layers(controlled(target), list(SCORES.values()), start)
    assert_held(layers, layers.run(200), names)
    # Every layer gets the scores of another.
    layers.samplers = layers.samplers[1:] + layers.samplers[:1]
    assert_held(layers, layers.run(200), names)


@pytest.mark.parametrize("ratio", [1 / 64, 1 / 4, 4, 64])
@pytest.mark.parametrize("target", RHOS)
def test_the_share_comes_back_when_the_spread_changes(target, ratio):
    layers = Layers(controlled(target), [SCORES["learned"], SCORES["entropy"]])
    layers.run(50)
    layers.samplers = [_normal(0.0, ratio), _normal(0.895, 0.004 * ratio)]
    assert_held(layers, layers.run(200), ["learned", "entropy"])


@pytest.mark.parametrize("drift", [0.1, -0.1])
@pytest.mark.parametrize("target", RHOS)
def test_the_share_is_held_while_scores_drift(target, drift):
    """By a tenth of a standard deviation a step."""
    layers = Layers(controlled(target), [SCORES["entropy"], SCORES["learned"], SCORES["heavy tails"]])
    deviations = np.array([0.004, 1.0, math.sqrt(3.0)])
    shares = [layers.step(list(drift * step * deviations))[0] for step in range(250)]
    assert np.abs(np.mean(shares[-50:], axis=0) - target).max() < 0.01
    assert np.abs(np.array(shares[50:]) - target).max() < 0.1


@pytest.mark.parametrize("target", RHOS)
def test_the_first_step_sets_the_threshold(target):
    """As if scores were Gaussian: here they are, so the next share is right at once."""
    layers = Layers(controlled(target), [SCORES["entropy"], SCORES["learned"], SCORES["learned, far off"]])
    assert layers.step()[0].tolist() == [0.0] * 3
    assert layers.step()[0] == pytest.approx([target] * 3, abs=5 * math.sqrt(0.5 / TOKENS))


def sums(rows: list[dict[str, float]]) -> Tensor:
    return torch.tensor([[row.get(name, 0.0) for name in FIELDS] for row in rows], dtype=torch.float64)


def test_one_move_by_its_formula():
    config = controlled(0.25, controller_gain=0.3)
    thresholds, controllers = [torch.tensor(0.5), torch.tensor(-2.0)], [ThresholdController() for _ in "ab"]
    controllers[0].started.fill_(1.0)
    controllers[0].place.fill_(0.6)
    controllers[0].spread.fill_(0.4)
    seen = {"tokens": 100.0, "light": 40.0, "score_sum": 30.0, "score_square_sum": 34.0, "overflow": 7.0}
    move_thresholds(config, thresholds, controllers, sums([seen, seen]), torch.tensor(True))
    mean, deviation = 0.3, 0.5  # 0.34 - 0.3² = 0.5²
    place, spread = 0.6 + 0.3 * (0.4 - 0.25), 0.9 * 0.4 + 0.1 * deviation
    assert float(thresholds[0]) == pytest.approx(mean + spread * place)
    assert float(thresholds[1]) == pytest.approx(mean + deviation * 0.6744897501960817)
    assert [float(c.place) for c in controllers] == pytest.approx([place, 0.6744897501960817])
    assert [float(c.spread) for c in controllers] == pytest.approx([spread, deviation])
    assert [float(c.started) for c in controllers] == [1.0, 1.0]


@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("broken", ["skipped", "nan", "inf", "no tokens"])
def test_a_step_that_does_not_count_changes_nothing(started, broken):
    layers = Layers(controlled(0.5), [SCORES["learned"]] * 2, start=0.7)
    if started:
        layers.run(3)
    tensors = [*layers.thresholds, *(b for c in layers.controllers for b in c.buffers())]
    before = [tensor.clone() for tensor in tensors]
    good = {"tokens": 100.0, "light": 90.0, "score_sum": 50.0, "score_square_sum": 80.0}
    bad = {
        "skipped": good,
        "nan": {**good, "score_sum": math.nan},
        "inf": {**good, "score_square_sum": math.inf},
        "no tokens": {},
    }[broken]
    taken = torch.tensor(broken != "skipped")
    move_thresholds(layers.config, layers.thresholds, layers.controllers, sums([bad, bad]), taken)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    # A layer whose scores are in order is not held up by another's.
    move_thresholds(layers.config, layers.thresholds, layers.controllers, sums([bad, good]), taken)
    moved = [not torch.equal(a, b) for a, b in zip(tensors[:2], before[:2], strict=True)]
    assert moved == [False, broken != "skipped"]


VOCAB, LENGTH, SEQUENCES = 64, 64, 32


def corpus(first: int, count: int, seed: int) -> Callable[[int], TokenBatch]:
    """Text by a random grammar over some of the ids, mostly the likeliest successor: learnable."""
    grammar = torch.Generator().manual_seed(seed)
    successors = torch.randint(first, first + count, (VOCAB, 4), generator=grammar)
    weights = torch.tensor([0.7, 0.15, 0.1, 0.05])

    def batch(step: int) -> TokenBatch:
        generator = torch.Generator().manual_seed(1_000_000 * seed + step)
        draws = torch.multinomial(weights, SEQUENCES * LENGTH, replacement=True, generator=generator)
        draws = draws.view(SEQUENCES, LENGTH)
        text = torch.randint(first, first + count, (SEQUENCES, LENGTH + 1), generator=generator)
        for place in range(LENGTH):
            text[:, place + 1] = successors[text[:, place], draws[:, place]]
        mask = torch.ones(SEQUENCES, LENGTH)
        tokens, labels = text[:, :-1].contiguous(), text[:, 1:].contiguous()
        return TokenBatch(tokens, labels, mask, None, torch.arange(SEQUENCES))

    return batch


def training_config(router: dict[str, Any], steps: int = 600, lr: float = 3e-3) -> RunConfig:
    """2048 tokens a step: a binomial share then has a deviation of 0.011, its mean of 50 steps 0.0016."""
    config = tiny_config(
        router, schedule="D R*2 A", vocab_size=VOCAB, seq_length=LENGTH, hidden_size=32, norm="pre"
    )
    return replace(
        config,
        optimizer=OptimizerConfig(lr=lr, warmup_steps=20, decay_steps=steps, schedule="constant"),
        training=replace(config.training, steps=steps, global_batch_size=SEQUENCES, micro_batch_size=16),
    )


def train(
    engine: MegatronEngine, text: Callable[[int], TokenBatch], first: int, steps: int
) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """Shares and overflow `[steps, layers]`, and losses."""
    shares, overflow, losses = [], [], []
    for step in range(first, first + steps):
        whole = text(step)
        parts = [
            TokenBatch(*(x[half] for x in (whole.tokens_BS, whole.labels_BS, whole.loss_mask_BS)), None, ids)
            for half, ids in ((slice(0, 16), torch.arange(16)), (slice(16, 32), torch.arange(16, 32)))
        ]
        result = engine.train_step(parts, step)
        assert result.taken
        shares.append(result.sums.routing.routed_fraction)
        overflow.append(result.sums.routing.overflow_fraction)
        losses.append(result.sums.loss)
    return np.array(shares), np.array(overflow), losses


def routers_of(engine: MegatronEngine) -> list[Any]:
    return [layer.router for layer in engine.module.chiar_layers if layer.router is not None]


@pytest.fixture
def world() -> Any:
    return single_process_world("cpu")


@pytest.mark.parametrize("router", [{"kind": "learned"}, {"kind": "entropy"}], ids=["learned", "entropy"])
def test_training_holds_the_share_through_a_change_of_corpus(router, world):
    """And thresholds, controllers included, are saved and come back."""
    config = training_config({**router, "target": 0.5}, lr=1e-3)
    engine = MegatronEngine(config, world)
    shares, overflow, losses = train(engine, corpus(0, 40, 1), 0, 200)
    assert losses[-1] < losses[0] - 1.0, "nothing was learned"
    assert np.abs(shares[150:].mean(0) - 0.5).max() < 0.01
    assert overflow[150:].mean() < 0.02
    before = [float(r.threshold) for r in routers_of(engine)]
    shares, overflow, losses = train(engine, corpus(24, 40, 2), 200, 200)
    assert losses[0] > losses[-1] + 1.0, "the corpus is no other"
    assert np.abs(shares[150:].mean(0) - 0.5).max() < 0.01
    assert overflow[150:].mean() < 0.02
    assert before != [float(r.threshold) for r in routers_of(engine)]
    saved = copy.deepcopy(
        {
            "model": engine.module.state_dict_for_save_checkpoint(),
            "optimizer": engine.optimizer.state_dict(),
        }
    )
    ours = [b.clone() for r in routers_of(engine) for b in r.buffers()]
    assert len(ours) == 2 * 4  # of each layer the threshold and its controller's place, spread and start
    other = MegatronEngine(config, world)
    other.load_state(saved)
    theirs = [b for r in routers_of(other) for b in r.buffers()]
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@torch.no_grad()
def test_the_threshold_never_enters_the_gate():
    """With decisions forced, thresholds elsewhere change nothing."""
    config = tiny_config({"kind": "learned", "target": 0.5})
    model = tiny_model(config)
    ids_BS = torch.randint(61, (2, 16), generator=torch.Generator().manual_seed(1))
    forced = {number: torch.rand(16, 2) < 0.5 for number in (2, 3)}
    logits = []
    for threshold in (0.0, 5.0):
        for layer in model.module.chiar_layers:
            if layer.router is not None:
                layer.router.threshold.fill_(threshold)
        context = ForwardContext(tokens_BS=ids_BS, forced_light_SB=dict(forced))
        logits.append(model(ids_BS, context=context))
    assert torch.equal(*logits)


def test_a_checkpoint_holds_thresholds_and_controllers(world, tmp_path):
    config = training_config({"kind": "entropy", "target": 0.5})
    engine, other = MegatronEngine(config, world), MegatronEngine(config, world)
    train(engine, corpus(0, 40, 1), 0, 3)
    CheckpointStore(tmp_path, CheckpointConfig()).save(
        engine.sharded_state(is_loading=False), make_info(3, 0, False, {}, to_dict(config))
    )
    other.load_state(load_state(tmp_path / "step_00000003", other.sharded_state(is_loading=True)))
    names = {name for name, _ in routers_of(engine)[0].named_buffers()}
    assert names == {"threshold", "controller.place", "controller.spread", "controller.started"}
    for one, two in zip(routers_of(engine), routers_of(other), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.buffers(), two.buffers(), strict=True))
    # And the run goes on as if nothing had happened.
    for a, b in zip(*(train(e, corpus(0, 40, 1), 3, 2) for e in (engine, other)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", ["learned", "entropy", "entropy_gated", "random"])
def test_without_a_target_thresholds_stay_bit_for_bit(kind, world):
    engine = MegatronEngine(training_config({"kind": kind}), world)
    before = [router.threshold.clone() for router in routers_of(engine)]
    train(engine, corpus(0, 40, 1), 0, 3)
    assert all(router.controller is None for router in routers_of(engine))
    for router, threshold in zip(routers_of(engine), before, strict=True):
        assert torch.equal(router.threshold, threshold)
