"""What each process of the context-parallel tests runs: light tokens where the layout likes them least."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import chiar_megatron.operators.attention as attention
from chiar_megatron.config.schema import ParallelConfig, RunConfig
from chiar_megatron.model.build import build_model
from chiar_megatron.model.initialize import initialize_parameters
from chiar_megatron.operators.context import ForwardContext
from tests.parallel.workers_parity import start_layout

Work = tuple[int, int, int, int]  # rows, query heads, keys, rows in use


@dataclass
class Pass:
    """One forward and backward pass: the whole batch's sum of losses and gradients, this rank's work."""

    loss: Tensor
    gradients: dict[str, Tensor]
    work: list[Work]
    overflow: float


@dataclass
class Comparison:
    """A layout beside one process, both of the same tokens."""

    largest_error: float
    work: list[Work]
    work_of_one: list[Work]
    overflows: tuple[float, float]


def skewed(configs: dict[str, RunConfig], parallel: ParallelConfig) -> dict[tuple[str, str], Comparison]:
    """By config and by where the light tokens of layer 1 lie. Both processes hold all of one TP rank."""
    answers = {}
    for name, config in configs.items():
        for place, tokens_BS in _tokens(config).items():
            one = _run(replace(config, parallel=ParallelConfig()), tokens_BS)
            found = _run(replace(config, parallel=parallel), tokens_BS)
            errors = [_error(found.loss, one.loss)]
            errors += [_error(found.gradients[n], g) for n, g in one.gradients.items()]
            overflows = (found.overflow, one.overflow)
            answers[name, place] = Comparison(max(errors), found.work, one.work, overflows)
    return answers


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp_min(1e-2))


def _tokens(config: RunConfig) -> dict[str, Tensor]:
    """Ids `[b, s]` whose embeddings layer 1 calls light or dark, in several places."""
    model = build_model(config, start_layout(ParallelConfig(), config))
    initialize_parameters(model, seed=1)
    router = model.chiar_layers[0].router
    assert router is not None
    with torch.no_grad():
        scores_V = router.score(model.embedding.word_embeddings.weight[: config.model.vocab_size])
    order_V = scores_V.argsort()
    assert scores_V[order_V[40]] < 0 < scores_V[order_V[-40]]
    b, s = config.training.micro_batch_size, config.model.seq_length
    generator = torch.Generator().manual_seed(3)
    draw_BS = torch.randint(40, (b, s), generator=generator)
    dark_BS, light_BS = order_V[draw_BS], order_V[-1 - draw_BS]
    half_S = torch.arange(s) < s // 2
    return {
        "all on the first rank": torch.where(half_S, light_BS, dark_BS),
        "all on the last rank": torch.where(half_S, dark_BS, light_BS),
        "none": dark_BS,
        "every token": light_BS,
    }


def _run(config: RunConfig, tokens_BS: Tensor) -> Pass:
    world = start_layout(config.parallel, config)
    model = build_model(config, world).train()
    initialize_parameters(model, seed=1)
    work: list[Work] = []
    attend = attention.rotated_attention

    def noted(q: Tensor, kv: Tensor, angles: Any, ranges: tuple[Tensor, Tensor], *rest: Any) -> Tensor:
        used = int((ranges[1] >= ranges[0]).sum())
        work.append((q.shape[0], q.shape[1], kv.shape[0], used))
        return attend(q, kv, angles, ranges, *rest)

    attention.rotated_attention = noted
    try:
        labels_BS = tokens_BS.roll(-1, dims=1)
        part = world.context_part
        losses = model(part(tokens_BS), ForwardContext(tokens_BS=tokens_BS), labels=part(labels_BS))
        losses.sum().backward()
    finally:
        attention.rotated_attention = attend
    statistics = model.chiar_layers[0].statistics
    assert statistics is not None
    sums = [losses.detach().sum(), statistics.sums_F[5].float()]
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    if world.context_parallel_size > 1:
        for tensor in (*sums, *gradients.values()):
            dist.all_reduce(tensor)
    return Pass(sums[0], gradients, work, float(sums[1]))
