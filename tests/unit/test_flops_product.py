"""The product's own model under PyTorch's FLOP counter: skipping saves what the ledger says."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from chiar_megatron.model.accounting import flops_per_sequence
from chiar_megatron.operators import dct, routed_attention
from chiar_megatron.operators.context import ForwardContext
from chiar_megatron.routing.balance import capacity_rows
from tests.unit.tiny_models import tiny_config, tiny_model

SEQUENCE, VOCABULARY = 96, 64  # a whole tile of the head, which is padded to multiples of 64
ROUTED_LAYERS = (2, 3)
WITHIN = 0.02
TOKENS = torch.randint(VOCABULARY, (1, SEQUENCE), generator=torch.Generator().manual_seed(0))

LIGHT = {  # one sequence: `[s, 1]`; the last token is light, so that rows see all keys of the range
    1.0: torch.ones(SEQUENCE, 1, dtype=torch.bool),
    0.5: (torch.arange(SEQUENCE) % 2 == 1)[:, None],
    0.0: torch.zeros(SEQUENCE, 1, dtype=torch.bool),
}
CASES = {
    "entropy": dict(router={"kind": "entropy"}),
    "learned": dict(router={"kind": "learned"}),
    "entropy_gated": dict(router={"kind": "entropy_gated"}, norm="pre"),
    "random": dict(router={"kind": "random"}, pooling="causal"),
    "routed keys": dict(router={"kind": "learned", "keys_values": "routed"}),
    "documents": dict(router={"kind": "learned"}, mask_documents=True),
    "modern": dict(
        router={"kind": "learned"}, activation="swiglu", normalization="RMSNorm", add_bias=False,
        tie_embeddings=False, num_query_groups=2, norm="pre",
    ),
}  # fmt: skip


def _build(case: dict):
    config = tiny_config(seq_length=SEQUENCE, hidden_size=48, vocab_size=VOCABULARY, **case)
    assert config.model.hidden_size <= dct.CPU_GEMM_MAX_HIDDEN
    return tiny_model(config)


@pytest.fixture
def whole_blocks(monkeypatch):
    """All rows of a layer in one product: rows × keys, without what short blocks spare on a CPU."""
    monkeypatch.setattr(routed_attention, "QUERY_BLOCK", 1 << 20)


@contextmanager
def _counting():
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield counter


def _count(model, forced: torch.Tensor | None = None) -> tuple[int, int]:
    """FLOPs of the forward pass, and of both."""
    documents = None
    if model.config.model.mask_documents:
        documents = torch.zeros_like(TOKENS)  # one document: a mask all the same
    context = ForwardContext(tokens_BS=TOKENS, document_ids_BS=documents)
    if forced is not None:
        context.forced_light_SB = dict.fromkeys(ROUTED_LAYERS, forced)
    with _counting() as forward:
        loss = model(TOKENS, context=context).square().mean()
    with _counting() as backward:
        loss.backward()
    return forward.get_total_flops(), forward.get_total_flops() + backward.get_total_flops()


def _expected(model, fraction: float, capacity: float | None = None) -> tuple[float, float]:
    # The counter knows no causality: every row times every key, in A layers the square.
    ledger = flops_per_sequence(
        model.config.model, SEQUENCE, fraction, causal=False, capacity_fraction=capacity
    )
    return ledger.total("forward").executed, ledger.total("training").executed


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_product_executes_what_the_ledger_says(case, whole_blocks):
    model = _build(case)
    counted = {fraction: _count(model, light) for fraction, light in LIGHT.items()}
    expected = {fraction: _expected(model, fraction) for fraction in LIGHT}
    for fraction in LIGHT:
        assert counted[fraction] == pytest.approx(expected[fraction], rel=WITHIN), fraction
    for phase in range(2):
        for fraction in (0.5, 0.0):
            fall = counted[1.0][phase] - counted[fraction][phase]
            assert fall == pytest.approx(expected[1.0][phase] - expected[fraction][phase], rel=WITHIN)
            assert fall > 0.04 * counted[1.0][phase]


def test_dense_dispatch_and_blends_execute_everything(whole_blocks):
    for router in ({"kind": "learned", "dispatch": "dense"}, {"kind": "soft"}, {"kind": "hard"}):
        model = _build(dict(router=router))
        for light in LIGHT.values():
            assert _count(model, light) == pytest.approx(_expected(model, 0.5), rel=WITHIN)


@pytest.mark.parametrize(("threshold", "share"), [(-1e9, 1.0), (1e9, 0.0)], ids=["overflow", "unused rows"])
def test_capacity_in_training(threshold, share, monkeypatch):
    """All tokens want attention and find rows for some; none does and every row is unused."""
    model = _build(dict(router={"kind": "learned", "target": 0.5}, dropout=0.0)).train()
    rows = capacity_rows(model.config.model.router, SEQUENCE)
    assert rows == 64
    # Blocks as long as the rows: a CPU skips a block without a used row, as the kernel does.
    monkeypatch.setattr(routed_attention, "QUERY_BLOCK", rows)
    for number in ROUTED_LAYERS:
        router = model.module.chiar_layers[number - 1].router
        router.threshold.fill_(threshold)
        # The highest scores find rows. The last token's is among them: all keys stay in range.
        router.register_forward_hook(_last_token_first)
    expected = _expected(model, share, rows / SEQUENCE)
    assert _count(model) == pytest.approx(expected, rel=WITHIN)
    exact = _expected(model, share)
    assert exact[0] != pytest.approx(expected[0], rel=WITHIN)  # the capacity is felt


def _last_token_first(_router, _inputs, decision):
    score_SB = decision.score_SB.clone()
    score_SB[-1] = 1e6
    return replace(decision, score_SB=score_SB)
