"""No token sees the future, nor another document (DESIGN, decision 4): bit for bit, dense dispatch.

Pooling `batch` does see the future; it shows that these tests can fail.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from chiar_megatron.operators.context import ForwardContext
from tests.unit.tiny_models import tiny_config, tiny_model

B, S, CUT = 4, 24, 11
RBF = "spectral_attention_rbf"
ROUTERS: dict[str, dict[str, Any]] = {
    "entropy": {"kind": "entropy"},
    "learned": {"kind": "learned"},
    "learned, routed keys": {"kind": "learned", "keys_values": "routed"},
    "entropy_gated": {"kind": "entropy_gated"},
    "entropy_gated, routed keys": {"kind": "entropy_gated", "keys_values": "routed"},
    "soft": {"kind": "soft"},
    "soft, RBF": {"kind": "soft", "operators": RBF},
    "hard": {"kind": "hard"},
    "hard, RBF": {"kind": "hard", "operators": RBF},
    "random": {"kind": "random"},
}
STYLES: dict[str, dict[str, Any]] = {
    "post": {},
    "pre": {"norm": "pre", "normalization": "RMSNorm", "activation": "swiglu", "num_query_groups": 2},
}


def random_ids() -> tuple[Tensor, Tensor]:
    """Token ids `[b, s]`, and other ones that differ from them everywhere."""
    generator = torch.Generator().manual_seed(7)
    ids_BS = torch.randint(61, (B, S), generator=generator)
    return ids_BS, (ids_BS + torch.randint(1, 61, (B, S), generator=generator)) % 61


@torch.no_grad()
def logits_and_fraction(
    model: Any, ids_BS: Tensor, documents_BS: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Logits `[b, s, v]`, and the share of light tokens in each routed layer."""
    context = ForwardContext(tokens_BS=ids_BS, document_ids_BS=documents_BS, recorded_light_SB={})
    logits_BSV = model(ids_BS, context=context)
    assert context.recorded_light_SB is not None and len(context.recorded_light_SB) == 2
    return logits_BSV, torch.stack([light.float().mean() for light in context.recorded_light_SB.values()])


def assert_mixed(fractions: Tensor) -> None:
    """The test is worth nothing where every token goes the same way."""
    assert ((fractions >= 0.2) & (fractions <= 0.8)).all(), fractions


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("pooling", ["running", "causal"])
@pytest.mark.parametrize("router", ROUTERS)
def test_the_future_is_not_seen(router, pooling, style):
    model = tiny_model(tiny_config(ROUTERS[router], pooling, **STYLES[style]))
    ids_BS, other_BS = random_ids()
    changed_BS = torch.cat((ids_BS[:, :CUT], other_BS[:, CUT:]), dim=1)
    before, fractions = logits_and_fraction(model, ids_BS)
    after, _ = logits_and_fraction(model, changed_BS)
    assert_mixed(fractions)
    assert torch.equal(before[:, :CUT], after[:, :CUT])
    assert (before[:, CUT:] != after[:, CUT:]).any(dim=-1).all()


@pytest.mark.parametrize("router", ROUTERS)
def test_the_past_is_seen(router):
    """Else a model without any attention would pass for a causal one."""
    model = tiny_model(tiny_config(ROUTERS[router]))
    ids_BS, other_BS = random_ids()
    changed_BS = torch.cat((other_BS[:, :1], ids_BS[:, 1:]), dim=1)
    before, after = (logits_and_fraction(model, ids)[0] for ids in (ids_BS, changed_BS))
    assert (before != after).any(dim=-1).all()


@pytest.mark.parametrize("router", ROUTERS)
def test_the_papers_pooling_sees_the_future(router):
    model = tiny_model(tiny_config(ROUTERS[router], "batch"))
    ids_BS, other_BS = random_ids()
    changed_BS = torch.cat((ids_BS[:, :CUT], other_BS[:, CUT:]), dim=1)
    before, fractions = logits_and_fraction(model, ids_BS)
    after, _ = logits_and_fraction(model, changed_BS)
    assert_mixed(fractions)
    assert not torch.equal(before[:, :CUT], after[:, :CUT])


@pytest.mark.parametrize("pooling", ["running", "causal"])
@pytest.mark.parametrize("router", ROUTERS)
def test_other_documents_are_not_seen(router, pooling):
    """Neither the one before nor the one after; changed values are larger than all that remains."""
    model = tiny_model(tiny_config(ROUTERS[router], pooling))
    with torch.no_grad():
        model.module.embedding.word_embeddings.weight[50:] *= 1000.0
    ids_BS, other_BS = random_ids()
    ids_BS %= 50
    other_BS = 50 + other_BS % 11
    # Ends differ between the sequences of a batch; the middle document is 9 to 12 tokens long.
    starts_B1, ends_B1 = torch.tensor([[5], [6], [7], [8]]), torch.tensor([[17], [16], [17], [17]])
    positions_S = torch.arange(S)
    documents_BS = (positions_S >= starts_B1).long() + (positions_S >= ends_B1)
    middle_BS = documents_BS == 1
    before, fractions = logits_and_fraction(model, ids_BS, documents_BS)
    assert_mixed(fractions)
    after, _ = logits_and_fraction(model, torch.where(middle_BS, ids_BS, other_BS), documents_BS)
    assert torch.equal(before[middle_BS], after[middle_BS])
    assert (before[~middle_BS] != after[~middle_BS]).any(dim=-1).all()
    joined, _ = logits_and_fraction(model, ids_BS)
    assert (before[documents_BS > 0] != joined[documents_BS > 0]).any(dim=-1).all()
