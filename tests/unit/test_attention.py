"""Attention against loops over heads, queries and keys in float64."""

from __future__ import annotations

import cmath
import math
from typing import Any

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from chiar_megatron.config.mcore import transformer_config
from chiar_megatron.config.schema import ParallelConfig, RotaryScalingConfig
from chiar_megatron.operators.attention import SelfAttention
from chiar_megatron.operators.context import ForwardContext, GenerationState
from chiar_megatron.operators.rotary import RotaryEmbedding, rotate
from chiar_megatron.runtime.distributed import seed_random_streams, single_process_world
from tests.unit.tiny_models import tiny_config

S, B, H = 13, 3, 20
BASE = 500.0
SHAPES = [(4, 4, 6), (4, 2, 6), (4, 1, 2), (6, 3, 4), (1, 1, 20)]  # query heads, groups, head size


def build(heads: int, groups: int, head_size: int, **model: Any) -> SelfAttention:
    """Attention with random weights and biases, in evaluation mode."""
    world = single_process_world("cpu")
    sizes = dict(num_attention_heads=heads, num_query_groups=groups, kv_channels=head_size)
    config = tiny_config(hidden_size=H, rotary_base=BASE, **sizes, **model)
    seed_random_streams(1, 0, world)
    settings = transformer_config(config.model, ParallelConfig())
    attention = SelfAttention(settings, 2, config.model, ProcessGroupCollection.use_mpu_process_groups())
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.5)
    return attention.eval()


def attend(
    attention: SelfAttention, x: Tensor, context: ForwardContext, light: Tensor | None = None
) -> Tensor:
    """Sequence first, as the definition is written."""
    return attention(x.transpose(0, 1), context, None if light is None else light.T).transpose(0, 1)


def loops(
    attention: SelfAttention, x: Tensor, light: Tensor | None = None, documents: Tensor | None = None
) -> Tensor:
    """From the definition; x `[s, b, h]`, light and documents `[s, b]`."""
    heads, groups, d = attention.heads, attention.groups, attention.head_size
    weight, bias = attention.linear_qkv.weight.double(), attention.linear_qkv.bias.double()
    # Rows in Megatron-LM's order: for every group its query heads, then its key, then its value.
    rows = [(group, slot) for group in range(groups) for slot in range(heads // groups + 2)]
    projected = (x.double() @ weight.T + bias).unflatten(-1, (len(rows), d))
    of = {row: projected[:, :, place] for place, row in enumerate(rows)}
    key_slot, value_slot = heads // groups, heads // groups + 1
    out = torch.zeros(*x.shape[:2], heads, d, dtype=torch.float64)
    for b in range(x.shape[1]):
        for head in range(heads):
            group, slot = divmod(head, heads // groups)
            for i in range(x.shape[0]):
                q = turn(of[group, slot][i, b], i)
                keys = [
                    j
                    for j in range(i + 1)
                    if (light is None or light[j, b] or j == i)
                    and (documents is None or documents[j, b] == documents[i, b])
                ]
                scores = [math.exp(q @ turn(of[group, key_slot][j, b], j) / math.sqrt(d)) for j in keys]
                for score, j in zip(scores, keys, strict=True):
                    out[i, b, head] += score / sum(scores) * of[group, value_slot][j, b]
    weight, bias = attention.linear_proj.weight.double(), attention.linear_proj.bias.double()
    return out.flatten(2) @ weight.T + bias


def turn(vector: Tensor, position: int) -> Tensor:
    """Rotate-half: component i and i + d/2 are a complex number, turned by position·base^(-2i/d)."""
    half = len(vector) // 2
    turned = torch.zeros_like(vector)
    for i in range(half):
        number = complex(vector[i], vector[i + half]) * cmath.exp(1j * position * BASE ** (-i / half))
        turned[i], turned[i + half] = number.real, number.imag
    return turned


def random_input() -> tuple[Tensor, Tensor, Tensor]:
    """x `[s, b, h]`, light and documents `[s, b]`."""
    x = torch.randn(S, B, H)
    light = torch.rand(S, B) < 0.4
    light[:, 0] = False  # no light token at all: each sees itself
    return x, light, (torch.rand(S, B) < 0.2).long().cumsum(0)


@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize("with_light", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_agrees_with_the_definition(shape, with_light, with_documents):
    torch.manual_seed(0)
    attention = build(*shape)
    x, light, documents = random_input()
    light, documents = light if with_light else None, documents if with_documents else None
    context = ForwardContext(document_ids_BS=None if documents is None else documents.T)
    out = attend(attention, x, context, light)
    expected = loops(attention, x, light, documents)
    torch.testing.assert_close(out.double(), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize("with_light", [False, True])
@pytest.mark.parametrize("shape", SHAPES[:2])
@torch.no_grad()
def test_the_cache_gives_what_the_whole_sequence_does(shape, with_light, with_documents):
    torch.manual_seed(1)
    attention = build(*shape)
    x, light, documents = random_input()
    light, documents = light if with_light else None, documents if with_documents else None
    context = ForwardContext(document_ids_BS=None if documents is None else documents.T)
    whole = attend(attention, x, context, light)
    state = GenerationState(capacity=S)
    parts = []
    for new in (5, 1, 1, 4, 2):
        end = state.length + new
        seen = None if documents is None else documents[:end].T
        context = ForwardContext(document_ids_BS=seen, generation=state)
        rows = slice(state.length, end)
        parts.append(attend(attention, x[rows], context, None if light is None else light[rows]))
        state.length = end
    torch.testing.assert_close(torch.cat(parts), whole, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_rotary_positions_keep_lengths_and_depend_on_distance_alone():
    rotary = RotaryEmbedding(8, BASE, 10, RotaryScalingConfig())  # grows
    q, k = torch.randn(2, 1, 1, 8).expand(-1, 30, 1, 8)
    positions = torch.arange(30)
    turned_q, turned_k = (rotate(x, *rotary(positions, 30))[:, 0] for x in (q, k))
    torch.testing.assert_close(turned_q.norm(dim=-1), q[:, 0].norm(dim=-1))
    scores = turned_q @ turned_k.T
    for distance in (0, 3, 11):
        along = scores.diagonal(-distance)
        torch.testing.assert_close(along, along[:1].expand_as(along), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(scores.diagonal(0)[0], scores.diagonal(-3)[0], atol=1e-2)
    assert torch.equal(rotate(q[7:9], *rotary(positions[7:9], 9))[:, 0], turned_q[7:9])
    assert rotate(q.bfloat16(), *rotary(positions, 30)).dtype == torch.bfloat16
    of_stretch = rotary.stretch(7, 70, torch.device("cpu"))  # grows again
    assert all(map(torch.equal, of_stretch, rotary(torch.arange(7, 70), 70)))


def test_gradients_are_those_of_the_definition():
    torch.manual_seed(2)
    attention = build(4, 2, 4)
    x, light, documents = random_input()
    x = x[:6].requires_grad_()
    light, documents = light[:6], documents[:6]
    direction = torch.randn(6, B, H)
    names, tensors = zip(*[("x", x), *attention.named_parameters()], strict=True)
    context = ForwardContext(document_ids_BS=documents.T)
    ours = torch.autograd.grad((attend(attention, x, context, light) * direction).sum(), tensors)
    theirs = torch.autograd.grad(_differentiable(attention, x, light, documents, direction), tensors)
    for name, a, b in zip(names, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def _differentiable(
    attention: SelfAttention, x: Tensor, light: Tensor, documents: Tensor, direction: Tensor
) -> Tensor:
    """As `loops`, by whole rows so that autograd can follow."""
    heads, groups, d = attention.heads, attention.groups, attention.head_size
    each, s = heads // groups, x.shape[0]
    y = (x @ attention.linear_qkv.weight.T + attention.linear_qkv.bias).double()
    y = y.unflatten(-1, (groups, each + 2, d))
    angle = torch.outer(torch.arange(s).double(), BASE ** (-torch.arange(d // 2).double() / (d // 2)))
    matrix = torch.polar(torch.ones_like(angle), angle)[:, None]

    def turned(z: Tensor) -> Tensor:
        numbers = torch.complex(z[..., : d // 2], z[..., d // 2 :]) * matrix
        return torch.cat((numbers.real, numbers.imag), -1)

    seen = torch.ones(s, s, dtype=torch.bool).tril()[:, :, None] & (documents[:, None] == documents[None])
    seen = seen & (light[None] | torch.eye(s, dtype=torch.bool)[:, :, None])
    outputs = []
    for head in range(heads):
        group, slot = divmod(head, each)
        q, k, v = turned(y[:, :, group, slot]), turned(y[:, :, group, each]), y[:, :, group, each + 1]
        scores = torch.einsum("ibd,jbd->ijb", q, k) / math.sqrt(d)
        outputs.append(torch.einsum("ijb,jbd->ibd", scores.masked_fill(~seen, -math.inf).softmax(1), v))
    out = torch.cat(outputs, -1) @ attention.linear_proj.weight.T.double()
    return ((out + attention.linear_proj.bias.double()) * direction).sum().float()
