"""The whole model against a float64 reference written from the formulas: logits, losses, gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from chiar_megatron.config.schema import RunConfig
from chiar_megatron.data.dataset import TokenBatch
from chiar_megatron.inference.load import InferenceModel
from chiar_megatron.operators.context import ForwardContext
from chiar_megatron.runtime.distributed import seed_random_streams, single_process_world
from chiar_megatron.training.engine import MegatronEngine
from chiar_megatron.training.step import ForwardStep, Requests
from tests.unit.reference_model import Reference, double_weights
from tests.unit.tiny_models import tiny_config, tiny_model

RBF = "spectral_attention_rbf"
PRE: dict[str, Any] = {"norm": "pre", "normalization": "RMSNorm", "activation": "swiglu"}
GRID: dict[str, RunConfig] = {
    "entropy": tiny_config({"kind": "entropy"}),
    "entropy, c=2, pre": tiny_config({"kind": "entropy", "dc_power_weight": 2.0}, "batch", **PRE),
    "learned, pre, GQA, untied": tiny_config(
        {"kind": "learned"}, "causal", num_query_groups=2, tie_embeddings=False, **PRE
    ),
    "learned, routed keys": tiny_config({"kind": "learned", "keys_values": "routed"}, "batch"),
    "entropy_gated, odd h": tiny_config(
        {"kind": "entropy_gated", "keys_values": "routed"}, hidden_size=33, kv_channels=6, num_query_groups=2
    ),
    "entropy_gated, pre": tiny_config({"kind": "entropy_gated"}, "causal", norm="pre", add_bias=False),
    "soft, RBF": tiny_config({"kind": "soft", "operators": RBF, "collapse_weight": 0.5}, "causal"),
    "soft, pre": tiny_config({"kind": "soft", "collapse_weight": 0.5}, "batch", **PRE),
    "hard, RBF, pre": tiny_config({"kind": "hard", "operators": RBF, "collapse_weight": 0.5}, **PRE),
    "hard": tiny_config({"kind": "hard", "collapse_weight": 0.5}, "batch", normalization="RMSNorm"),
    "random": tiny_config({"kind": "random"}),
    "gate over a routed layer": tiny_config({"kind": "learned"}, "causal", schedule="R A"),
    "twin": tiny_config(schedule="A*2", rotary_base=100.0, norm_epsilon=1e-2),
}
Z_LOSS = 0.03


def random_batch(config: RunConfig, b: int = 4, seed: int = 3) -> TokenBatch:
    """Random text with documents, some labels not counted."""
    model = config.model
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(model.vocab_size or 0, (b, model.seq_length + 1), generator=generator)
    ends = (torch.rand(b, model.seq_length, generator=generator) < 0.1).long()
    return TokenBatch(
        tokens_BS=text[:, :-1].contiguous(),
        labels_BS=text[:, 1:].contiguous(),
        loss_mask_BS=(torch.rand(b, model.seq_length, generator=generator) < 0.9).float(),
        document_ids_BS=(ends.cumsum(1) - ends) if model.mask_documents else None,
        sample_ids_B=torch.arange(b),
    )


def reference_objective(reference: Reference, batch: TokenBatch, z_loss: float) -> tuple[Tensor, Tensor]:
    """Summed cross entropy, and what is differentiated: with z-loss and the collapse regulariser, which
    counts as often as there are tokens."""
    logits = reference.logits(batch.tokens_BS, batch.document_ids_BS)
    mask = batch.loss_mask_BS.double()
    log_z = logits.logsumexp(-1)
    cross_entropy = ((log_z - logits.gather(-1, batch.labels_BS[..., None])[..., 0]) * mask).sum()
    spread = sum(reference.mixture_entropy, torch.zeros((), dtype=torch.float64))
    regulariser = reference.model.router.collapse_weight * spread * mask.sum()
    return cross_entropy, cross_entropy + z_loss * (log_z.square() * mask).sum() - regulariser


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", GRID)
def test_logits_and_decisions(name, masked):
    config = replace(GRID[name], model=replace(GRID[name].model, mask_documents=masked))
    model = tiny_model(config)
    batch = random_batch(config)
    reference = Reference(double_weights(model.module), config.model)
    context = ForwardContext(
        tokens_BS=batch.tokens_BS,
        document_ids_BS=batch.document_ids_BS,
        recorded_light_SB={},
        recorded_score_SB={},
    )
    with torch.no_grad():
        expected = reference.logits(batch.tokens_BS, batch.document_ids_BS)
        logits = model(batch.tokens_BS, context=context)
    assert logits.dtype == torch.float32 and logits.shape == expected.shape
    assert (context.recorded_light_SB or {}).keys() == reference.light.keys()
    for layer, light in reference.light.items():
        score = context.recorded_score_SB[layer].T
        torch.testing.assert_close(score.double(), reference.scores[layer], atol=1e-5, rtol=1e-4)
        assert torch.equal(context.recorded_light_SB[layer].T, light)
        assert 0.2 < light.float().mean() < 0.8
    torch.testing.assert_close(logits.double(), expected, atol=2e-4, rtol=1e-4)


def trained_module(config: RunConfig) -> tuple[MegatronEngine, Reference]:
    """An engine whose weights are those of `tiny_model`, in training mode, and its reference."""
    world = single_process_world("cpu")
    engine = MegatronEngine(config, world)
    with torch.no_grad():
        source = tiny_model(config).module
        for target, value in zip(
            engine.module.state_dict().values(), source.state_dict().values(), strict=True
        ):
            if isinstance(target, Tensor):
                target.copy_(value)
    return engine, Reference(double_weights(engine.module, requires_grad=True), config.model)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", GRID)
def test_a_training_step_has_the_gradients_of_the_formulas(name, masked):
    """Two micro-batches of unequal weight; `batch` pooling and the collapse regulariser belong to each."""
    config = GRID[name]
    config = replace(
        config,
        model=replace(config.model, mask_documents=masked),
        training=replace(config.training, z_loss=Z_LOSS, global_batch_size=4, micro_batch_size=2),
        optimizer=replace(config.optimizer, clip_grad=0.0),
    )
    engine, reference = trained_module(config)
    batches = [random_batch(config, b=2, seed=seed) for seed in (4, 5)]
    result = engine.train_step(batches, 0)
    tokens = sum(float(batch.loss_mask_BS.sum()) for batch in batches)
    losses, objectives = zip(*(reference_objective(reference, b, Z_LOSS) for b in batches), strict=True)
    assert result.sums.tokens == tokens
    assert result.sums.loss == pytest.approx(float(sum(losses)) / tokens, rel=1e-5)
    (sum(objectives) / tokens).backward()
    parameters = dict(engine.module.named_parameters())
    expected = {key: w.grad if w.grad is not None else 0 * w for key, w in reference.weights.items()}
    whole_norm = float(torch.stack([expected[key].norm() for key in parameters]).norm())
    assert result.grad_norm == pytest.approx(whole_norm, rel=1e-4)
    for key, parameter in parameters.items():
        scale = max(float(expected[key].norm()), 1e-2 * whole_norm)
        assert float((parameter.main_grad.double() - expected[key]).norm()) <= 1e-4 * scale, key


def test_what_is_asked_for_during_a_step_counts_at_its_end():
    engine, _ = trained_module(GRID["entropy"])
    gradients = []

    def stop() -> Requests:
        gradients.append(sum(float(p.main_grad.abs().sum()) for p in engine.module.parameters()))
        return Requests(stop=True)

    assert engine.train_step([random_batch(GRID["entropy"])], 0, stop).sums.requests == Requests(stop=True)
    assert gradients[0] > 0.0  # asked after the backward pass, when a signal during the step is known


def test_the_reported_gate_is_the_mean_over_the_step():
    config = GRID["soft, pre"]
    config = replace(config, training=replace(config.training, global_batch_size=4, micro_batch_size=2))
    engine, reference = trained_module(config)
    batches = [random_batch(config, b=2, seed=seed) for seed in (4, 5)]
    gates = []
    for batch in batches:
        reference.logits(batch.tokens_BS)
        gates.append(float(reference.gate))
    assert abs(gates[0] - gates[1]) > 1e-3
    result = engine.train_step(batches, 0)
    assert result.sums.gate == pytest.approx(sum(gates) / 2, abs=1e-5)


def test_z_loss_and_cross_entropy_are_reported_apart():
    config = replace(GRID["entropy"], training=replace(GRID["entropy"].training, z_loss=Z_LOSS))
    engine, reference = trained_module(config)
    batch = random_batch(config)
    with torch.no_grad():
        output, loss_of = ForwardStep(torch.device("cpu"), None, None)(iter([batch]), engine.wrapped[0])
        loss, tokens, report = loss_of(output)
        cross_entropy, objective = map(float, reference_objective(reference, batch, Z_LOSS))
    expected = [cross_entropy, objective - cross_entropy, float(batch.loss_mask_BS.sum())]
    assert report.tolist() == pytest.approx(expected, rel=1e-5) and float(tokens) == expected[2]
    assert float(loss) == pytest.approx(objective, rel=1e-5)


def forward(model: InferenceModel, ids: Tensor, step: int = 0) -> Tensor:
    seed_random_streams(1, step, single_process_world("cpu"))
    with torch.no_grad():
        return model(ids)


@pytest.mark.parametrize("name", ["entropy", "soft, RBF", "twin"])
def test_dropout_is_active_in_training_only(name):
    plain = tiny_model(GRID[name])
    dropping = tiny_model(replace(GRID[name], model=replace(GRID[name].model, dropout=0.3)))
    dropping.load_state_dict(plain.state_dict())
    ids = random_batch(GRID[name]).tokens_BS
    assert torch.equal(forward(plain, ids), forward(dropping, ids))
    assert torch.equal(forward(plain.train(), ids), forward(plain.eval(), ids))
    dropping.train()
    first = forward(dropping, ids)
    assert torch.equal(first, forward(dropping, ids)), "not a function of the seed and the step"
    assert not torch.equal(first, forward(dropping, ids, step=1))
    assert not torch.equal(first, forward(plain, ids))


P = 0.25


@pytest.fixture
def dropping() -> InferenceModel:
    """A full-attention model in training, dropping a quarter."""
    return tiny_model(replace(GRID["twin"], model=replace(GRID["twin"].model, dropout=P))).train()


def assert_dropped(actual: Tensor, expected: Tensor) -> None:
    """A share P of zeros, the rest divided by 1 - P."""
    zero = actual == 0
    assert float(zero.float().mean()) == pytest.approx(P, abs=0.03)
    torch.testing.assert_close(actual[~zero], (expected / (1 - P))[~zero])


def test_dropout_on_embeddings(dropping):
    seen: list[Tensor] = []
    layer = dropping.module.chiar_layers[0]
    layer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True
    )
    ids = random_batch(dropping.config, b=16).tokens_BS
    forward(dropping, ids)
    assert_dropped(seen[0], dropping.module.embedding.word_embeddings.weight[ids].transpose(0, 1))


def test_dropout_inside_the_feed_forward_layer_and_after_it(dropping):
    seen: dict[str, Any] = {}
    mlp = dropping.module.chiar_layers[0].mlp
    drop = mlp._dropout_inner

    def watched(inner: Tensor) -> Tensor:
        seen.update(inner=inner, dropped=drop(inner))
        return seen["dropped"]

    mlp._dropout_inner = watched
    mlp.register_forward_hook(lambda _, args, out: seen.update(given=args[0], result=out))
    forward(dropping, random_batch(dropping.config, b=16).tokens_BS)
    fc1, fc2 = mlp.linear_fc1, mlp.linear_fc2
    torch.testing.assert_close(seen["inner"], F.gelu(F.linear(seen["given"], fc1.weight, fc1.bias)))
    assert_dropped(seen["dropped"], seen["inner"])
    assert_dropped(seen["result"], F.linear(seen["dropped"], fc2.weight, fc2.bias))


def test_dropout_on_attention_probabilities(dropping):
    """With values that are one in every component a head's output is the sum of its probabilities."""
    seen: list[Tensor] = []
    attention = dropping.module.chiar_layers[0].self_attention
    attend = attention._attend
    with torch.no_grad():
        for parameter, value in ((attention.linear_qkv.weight, 0.0), (attention.linear_qkv.bias, 1.0)):
            parameter.view(attention.groups, -1, attention.head_size, *parameter.shape[1:])[:, -1] = value
    attention._attend = lambda *tensors: seen.append(attend(*tensors)) or seen[-1]
    forward(dropping, random_batch(dropping.config, b=1024).tokens_BS)
    sums_BNS = seen[0][..., 0]
    assert float(sums_BNS.mean()) == pytest.approx(1.0, abs=0.05)
    first = sums_BNS[:, :, 0]
    assert_dropped(first, torch.ones_like(first))  # one key only: its probability is 1
