"""What each process of the dropout tests runs."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from chiar_megatron.config.schema import ParallelConfig, RunConfig
from chiar_megatron.model.build import build_model
from chiar_megatron.model.initialize import initialize_parameters
from chiar_megatron.operators.context import ForwardContext
from chiar_megatron.runtime.distributed import initialize, seed_random_streams
from chiar_megatron.runtime.env import read_process_env


def probe(config: RunConfig, layouts: dict[str, ParallelConfig]) -> dict[str, list[dict[str, Tensor]]]:
    """By layout: what three forward passes in training left at the places where elements are dropped;
    the first two of the same step, the third of the next."""
    answers = {}
    for name, parallel in layouts.items():
        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
        config = replace(config, parallel=parallel)
        world = initialize(parallel, config.runtime, read_process_env())
        model = build_model(config, world).train()
        initialize_parameters(model, seed=1)
        _give_values_of_one(model)
        ids_BS = torch.arange(16 * config.model.seq_length).view(16, -1) % (config.model.vocab_size or 1)
        seen: list[dict[str, Tensor]] = []
        _watch(model, seen)
        for step in (0, 0, 1):
            seed_random_streams(config.training.seed, step, world)
            seen.append({})
            with torch.no_grad():
                model(world.context_part(ids_BS), ForwardContext(tokens_BS=ids_BS))
        answers[name] = seen
    return answers


@torch.no_grad()
def _give_values_of_one(model: Any) -> None:
    """Then a head's output is the sum of its probabilities: 0 at the first token if that one is dropped."""
    for layer in model.chiar_layers:
        if hasattr(layer, "self_attention"):
            attention = layer.self_attention
            for parameter, value in ((attention.linear_qkv.weight, 0.0), (attention.linear_qkv.bias, 1.0)):
                parameter.view(attention.groups, -1, attention.head_size, *parameter.shape[1:])[:, -1] = value


def _dropped(note: Any, place: str, drop: Any, inner: Tensor) -> Tensor:
    dropped: Tensor = drop(inner)
    note(place, dropped)
    return dropped


def _noted(note: Any, place: str, attend: Any, *tensors: Any) -> Tensor:
    """Attention's heads as `[s, b, heads · d]`."""
    out_BNSD: Tensor = attend(*tensors)
    note(place, out_BNSD.permute(2, 0, 1, 3).flatten(2))
    return out_BNSD


def _watch(model: Any, seen: list[dict[str, Tensor]]) -> None:
    def note(place: str, tensor: Tensor) -> None:
        seen[-1][place] = tensor.detach().clone()

    model.embedding.register_forward_hook(lambda _, args, out: note("embedding", out))
    for number, layer in enumerate(model.chiar_layers, start=1):
        layer.register_forward_hook(lambda _, args, out, n=number: note(f"layer {n}", out[0]))
        layer.mlp.register_forward_hook(lambda _, args, out, n=number: note(f"output {n}", out))
        layer.mlp._dropout_inner = partial(_dropped, note, f"inner {number}", layer.mlp._dropout_inner)
        if hasattr(layer, "self_attention"):
            attention = layer.self_attention
            attention._attend = partial(_noted, note, f"heads {number}", attention._attend)
