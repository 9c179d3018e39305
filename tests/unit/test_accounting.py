"""The ledger against PyTorch's own counters, hand counts and the published sizes."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from chiar_megatron.config.schema import MetaRouterConfig, ModelConfig, RouterConfig
from chiar_megatron.errors import ConfigError
from chiar_megatron.model.accounting import (
    flops_per_sequence,
    full_attention_twin,
    model_flops_per_token,
    parameter_count,
    savings,
)
from chiar_megatron.model.pieces import Flops
from tests.unit.plain_chiar import PlainChiar

SEQUENCE = 48
BASE = ModelConfig(
    schedule="D R R A",
    hidden_size=40,
    num_attention_heads=4,
    num_query_groups=4,
    kv_channels=10,
    ffn_hidden_size=160,
    vocab_size=101,
    rbf_features=12,
)
M400 = replace(
    BASE,
    schedule="D R*26 A",
    hidden_size=1024,
    num_attention_heads=16,
    num_query_groups=16,
    kv_channels=64,
    ffn_hidden_size=4096,
    vocab_size=50257,
)


def _routed(kind: str, operators: str = "spectral_attention", **fields: object) -> ModelConfig:
    return replace(BASE, router=RouterConfig(kind=kind, operators=operators), **fields)


def _dense(model: ModelConfig) -> ModelConfig:
    return replace(model, router=replace(model.router, dispatch="dense"))


MODELS = {
    "D": replace(BASE, schedule="D"),
    "A": replace(BASE, schedule="A"),
    "R": replace(BASE, schedule="R"),
    "D R R A": BASE,
    "no gate": replace(BASE, meta_router=MetaRouterConfig(enabled=False)),
    "batch gate": replace(BASE, meta_router=MetaRouterConfig(pooling="batch")),
    "causal gate": replace(BASE, meta_router=MetaRouterConfig(pooling="causal")),
    "learned": _routed("learned"),
    "entropy_gated": _routed("entropy_gated", norm="pre"),
    "random": _routed("random"),
    "soft": _routed("soft"),
    "hard": _routed("hard", norm="pre"),
    "soft of three": _routed("soft", "spectral_attention_rbf"),
    "soft of three, swiglu": _routed("soft", "spectral_attention_rbf", activation="swiglu", add_bias=False),
    "modern": replace(
        BASE, activation="swiglu", normalization="RMSNorm", add_bias=False, tie_embeddings=False,
        num_query_groups=2, kv_channels=16, ffn_hidden_size=128, norm="pre",
    ),
}  # fmt: skip


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_parameters_are_exact(model):
    built = PlainChiar(model)
    count = parameter_count(model)
    assert count.total == sum(p.numel() for p in built.parameters())
    assert count.embedding == built.embedding.weight.numel()
    assert count.head == (0 if model.tie_embeddings else built.head.weight.numel())
    gate = sum(p.numel() for n, p in built.named_parameters() if n.startswith("meta_gate"))
    layers = [sum(p.numel() for p in layer.parameters()) for layer in built.layers]
    assert count.per_layer == (layers[0] + gate, *layers[1:])
    norm = sum(p.numel() for p in built.norm.parameters())
    assert count.non_embedding == sum(layers) + gate + norm


def test_published_sizes():
    assert round(parameter_count(M400).total / 1e6) == 400
    assert round(parameter_count(full_attention_twin(M400)).total / 1e6) == 404


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_flops_agree_with_the_flop_counter(model):
    built = PlainChiar(model)
    ids = torch.randint(model.vocab_size, (SEQUENCE, 1), generator=torch.Generator().manual_seed(0))
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            loss = built(ids).square().mean()
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    ledger = flops_per_sequence(_dense(model), SEQUENCE, 0.5, causal=False, dct_form="gemm")
    counted = forward.get_total_flops()
    assert ledger.total("forward").executed == counted
    counted += backward.get_total_flops()
    assert ledger.total("training").executed == counted


def _brute_force_pairs(sequence: int, every: int, routed_keys: bool) -> int:
    """Query-key pairs where every `every`-th token, from the first of each group's middle, is light."""
    light = [i for i in range(sequence) if i % every == every // 2]
    keys = light if routed_keys else range(sequence)
    return sum(1 for i in light for j in keys if j <= i)


@pytest.mark.parametrize("keys_values", ["all", "routed"])
def test_useful_work_of_a_routed_layer(keys_values):
    s, every, h = 300, 3, BASE.hidden_size
    model = replace(BASE, schedule="R", router=RouterConfig(keys_values=keys_values))
    ledger = flops_per_sequence(model, s, 1 / every)
    light = s / every

    def useful(name: str) -> float:
        return ledger.total("forward", names=[name]).useful

    keys = light if keys_values == "routed" else s
    assert useful("qkv") == pytest.approx(2 * h * h * light + 2 * h * 2 * h * keys)
    assert useful("output_projection") == pytest.approx(2 * h * h * light)
    pairs = _brute_force_pairs(s, every, keys_values == "routed")
    assert useful("scores") == useful("values") == pytest.approx(2 * h * pairs, rel=0.01)
    assert useful("mixing") == pytest.approx(2 * 2 * h * h * (s - light))
    assert useful("entropy") == pytest.approx(2 * h * h * s)


def test_dense_dispatch_executes_both_operators_for_every_token():
    some, none = (flops_per_sequence(_dense(BASE), SEQUENCE, f).total() for f in (0.5, 0.0))
    assert some.executed == none.executed
    assert none.useful < some.useful < some.executed
    assert some.padded == 0
    assert some.useful == flops_per_sequence(BASE, SEQUENCE, 0.5).total().useful
    assert some == flops_per_sequence(_dense(BASE), SEQUENCE, 0.5, capacity_fraction=0.6).total()


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_blends_are_counted_as_dense_whatever_the_dispatch(kind):
    model = _routed(kind)
    assert flops_per_sequence(model, SEQUENCE, 0.25) == flops_per_sequence(_dense(model), SEQUENCE, 0.25)
    with_capacity = flops_per_sequence(model, SEQUENCE, 0.25, capacity_fraction=0.5)
    assert with_capacity == flops_per_sequence(model, SEQUENCE, 0.25)


@pytest.mark.parametrize("keys_values", ["all", "routed"])
@pytest.mark.parametrize("kind", ["entropy", "learned", "entropy_gated", "random"])
@pytest.mark.parametrize("fraction", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("causal", [True, False])
def test_skipping_executes_what_is_useful(kind, keys_values, fraction, causal):
    router = RouterConfig(kind=kind, keys_values=keys_values)
    ledger = flops_per_sequence(replace(BASE, router=router), SEQUENCE, fraction, causal=causal)
    for phase in ("forward", "training"):
        total = ledger.total(phase)
        assert total.executed == pytest.approx(total.useful)
        assert total.padded == 0
    entropies = ledger.total("forward", names=["entropy"])
    computes = kind in ("entropy", "entropy_gated")
    assert entropies.executed == (2 * SEQUENCE * 2 * BASE.hidden_size**2 if computes else 0)


def test_all_light_and_all_dark_are_the_layers_of_one_operator():
    for fraction, schedule in ((1.0, "D A A A"), (0.0, "D D D A")):
        skipping = flops_per_sequence(_routed("random"), SEQUENCE, fraction)
        pure = flops_per_sequence(replace(BASE, schedule=schedule), SEQUENCE, [])
        extra = 0 if fraction else 2 * 2 * SEQUENCE * BASE.hidden_size * 2 * BASE.hidden_size  # keys, values
        assert skipping.total("forward").executed == pytest.approx(pure.total("forward").executed + extra)


def test_soft_routers_need_everything():
    total = flops_per_sequence(_routed("soft"), SEQUENCE, 0.1).total()
    assert total.useful == total.executed


def test_a_third_operator_takes_its_share_from_spectral_mixing():
    model, h = _routed("hard", "spectral_attention_rbf", schedule="R"), BASE.hidden_size
    ledger = flops_per_sequence(model, SEQUENCE, 0.5, rbf_fraction=0.25)
    mixing = ledger.total("forward", names=["mixing"])
    assert mixing.useful / mixing.executed == 0.25
    rbf = ledger.total("forward", names=["rbf_feed_forward"])
    assert rbf.useful / rbf.executed == 0.25
    assert rbf.executed == SEQUENCE * 2 * (24 * h + 2 * h * 160)
    unused = flops_per_sequence(model, SEQUENCE, 0.5)
    assert unused.total(names=["rbf_features", "rbf_mixing", "rbf_feed_forward"]).useful == 0


@pytest.mark.parametrize("keys_values", ["all", "routed"])
def test_unused_rows_are_padding_in_matrix_products_alone(keys_values):
    model = replace(BASE, router=RouterConfig(keys_values=keys_values))
    h, exact = BASE.hidden_size, flops_per_sequence(model, SEQUENCE, 0.5)
    ledger = flops_per_sequence(model, SEQUENCE, 0.5, capacity_fraction=0.75)

    def forward(name: str) -> Flops:
        return ledger.total("forward", layer=2, names=[name])

    unused = SEQUENCE / 4
    width = 3 * h if keys_values == "routed" else h  # queries, and keys and values of rows alone
    assert forward("qkv").padded == pytest.approx(2 * h * width * unused)
    assert forward("output_projection").padded == pytest.approx(2 * h * h * unused)
    for name in ("scores", "values", "mixing"):
        assert forward(name) == exact.total("forward", layer=2, names=[name])
        assert forward(name).padded == 0
    total = ledger.total()
    assert total.executed == pytest.approx(total.useful + total.padded)
    assert total.useful == pytest.approx(exact.total().useful)
    padded = forward("qkv").padded + forward("output_projection").padded
    assert total.padded == pytest.approx(3 * 2 * padded)  # forward and backward, two layers
    assert ledger.total(layer=4) == exact.total(layer=4)


def test_tokens_without_a_row_are_mixed():
    overflowing = flops_per_sequence(BASE, SEQUENCE, 0.9, capacity_fraction=0.6)
    assert overflowing.total() == flops_per_sequence(BASE, SEQUENCE, 0.6).total()
    mixing = overflowing.total("forward", layer=2, names=["mixing"])
    assert mixing.executed == pytest.approx(0.4 * SEQUENCE * 2 * 2 * BASE.hidden_size**2)
    per_token = (model_flops_per_token(BASE, SEQUENCE, 0.9, c) for c in (0.6, 1.0))
    assert list(per_token) == [model_flops_per_token(BASE, SEQUENCE, f) for f in (0.6, 0.9)]


def test_causal_half_and_masks():
    twin = full_attention_twin(BASE)
    half, full = (
        flops_per_sequence(twin, SEQUENCE, 1.0, causal=c).total(names=["scores"]).executed
        for c in (True, False)
    )
    assert half / full == pytest.approx(_brute_force_pairs(SEQUENCE, 1, False) / SEQUENCE**2)
    masked = flops_per_sequence(replace(twin, mask_documents=True), SEQUENCE, 1.0).total(names=["scores"])
    assert (masked.executed, masked.useful) == (full, half)
    routed_keys = replace(BASE, schedule="R", router=RouterConfig(keys_values="routed", dispatch="dense"))
    assert flops_per_sequence(routed_keys, SEQUENCE, 1.0).total(names=["scores"]).executed == full / 4


@pytest.mark.parametrize("keys_values", ["all", "routed"])
def test_skipping_gives_rows_a_range_of_keys_where_dense_dispatch_needs_a_mask(keys_values):
    model = replace(BASE, schedule="R A", mask_documents=True, router=RouterConfig(keys_values=keys_values))
    full = 2 * BASE.hidden_size * SEQUENCE**2

    def scores(config: ModelConfig, layer: int) -> Flops:
        return flops_per_sequence(config, SEQUENCE, 0.5).total("forward", layer=layer, names=["scores"])

    keys = SEQUENCE if keys_values == "all" else SEQUENCE // 2
    triangle = 2 * BASE.hidden_size * (SEQUENCE // 2) * (keys + 1) / 2
    assert scores(model, 1) == Flops(triangle, 0.0, triangle)
    assert scores(_dense(model), 1) == Flops(full, 0.0, triangle)
    assert scores(model, 2).executed == full


def test_sums_by_layer_and_fraction_by_layer():
    ledger = flops_per_sequence(BASE, SEQUENCE, [0.0, 1.0])
    per_layer = ledger.per_layer("forward")
    assert len(per_layer) == 4
    head = 2 * SEQUENCE * BASE.hidden_size * BASE.vocab_size
    assert sum(f.executed for f in per_layer) + head == ledger.total("forward").executed
    assert per_layer[1].useful < per_layer[2].useful == per_layer[2].executed
    assert ledger.total(layer=2, names=["scores"]).useful == 0
    assert ledger.total(layer=3, names=["mixing"]).useful == 0


def test_twin_agrees_with_the_usual_rule():
    """6 per parameter and token, plus 6·h per layer, token and earlier position (Chowdhery et al. 2022)."""
    twin, s = full_attention_twin(M400), 2048
    rule = 6 * parameter_count(twin).total + 12 * 28 * 1024 * s / 2
    assert model_flops_per_token(twin, s, 1.0) == pytest.approx(rule, rel=0.002)


def test_mfu_counts_useful_work_with_cheap_transforms():
    useful = flops_per_sequence(BASE, SEQUENCE, 0.3).total().useful / SEQUENCE
    assert model_flops_per_token(BASE, SEQUENCE, 0.3) < useful
    ffts = flops_per_sequence(BASE, SEQUENCE, 0.3, dct_form="fft").total(names=["entropy"])
    gemms = flops_per_sequence(BASE, SEQUENCE, 0.3).total(names=["entropy"])
    assert ffts.executed / gemms.executed == pytest.approx(2.5 * 5.3219 / 80, rel=1e-3)


def test_savings_are_reported_side_by_side():
    report = savings(_dense(M400), 256, 0.5, measured_seconds=(3.0, 2.0))
    # In units of h² a token: q 2, k and v 4, scores and values 2·257/1024, output 2. 27 of 28 layers hold
    # attention; in 26 of them half of the queries, scores and outputs is useful, and every key and value.
    pairs = 2 * 257 / 1024
    useful = 26 * (1 + 4 + pairs / 2 + 1) + (2 + 4 + pairs + 2)
    assert report.attention_executed == pytest.approx(1 / 28)
    assert report.attention_useful == pytest.approx(1 - useful / (28 * (2 + 4 + pairs + 2)))
    assert report.model_executed < 0  # dense dispatch runs attention and mixing
    assert report.model_executed < report.model_useful < report.attention_useful
    assert report.measured_time == pytest.approx(-0.5)
    text = str(report)
    for part in ("attention-only 3.6%", "whole model", "measured time -50.0%"):
        assert part in text
    skipping = savings(M400, 256, 0.5, capacity_fraction=0.53)
    assert skipping.attention_useful == report.attention_useful > skipping.attention_executed > 0
    assert savings(M400, 256, 0.5).attention_executed == pytest.approx(report.attention_useful)
    assert "time not measured" in str(savings(M400, 256, 0.5))
    twin = savings(full_attention_twin(M400), 256, [])
    assert (twin.attention_useful, twin.model_executed) == (0, 0)


def test_errors_name_the_field_and_the_remedy():
    with pytest.raises(ConfigError, match="routed_fraction: 3 values for 2 routed layers; give one"):
        flops_per_sequence(BASE, SEQUENCE, [0.1, 0.2, 0.3])
    with pytest.raises(ConfigError, match="routed_fraction: 50 must be a share .* from 0 to 1"):
        flops_per_sequence(BASE, SEQUENCE, 50)
    with pytest.raises(ConfigError, match=r"routed_fraction \+ rbf_fraction: 1.2"):
        flops_per_sequence(BASE, SEQUENCE, 0.5, rbf_fraction=0.7)
    with pytest.raises(ConfigError, match="capacity_fraction: -1"):
        flops_per_sequence(BASE, SEQUENCE, 0.5, capacity_fraction=-1)
    with pytest.raises(ConfigError, match="model.vocab_size is null"):
        parameter_count(replace(BASE, vocab_size=None))
