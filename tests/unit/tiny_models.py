"""Tiny models with weights that matter: every part is felt, and routers decide either way."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chiar_megatron.checkpoint.store import CheckpointStore, make_info
from chiar_megatron.config.load import resolve_config, to_dict
from chiar_megatron.config.schema import (
    CheckpointConfig,
    DataConfig,
    MetaRouterConfig,
    ModelConfig,
    RouterConfig,
    RunConfig,
)
from chiar_megatron.data.tokenizer import train_tokenizer
from chiar_megatron.inference.load import InferenceModel
from chiar_megatron.model.build import SHARDING_METADATA, build_model
from chiar_megatron.model.initialize import initialize_parameters
from chiar_megatron.operators.context import ForwardContext
from chiar_megatron.runtime.distributed import single_process_world

BLENDS = ("soft", "hard")


def tiny_config(
    router: dict[str, Any] | None = None,
    pooling: str = "running",
    data: dict[str, Any] | None = None,
    run_dir: Path | str = "unused",
    **model: Any,
) -> RunConfig:
    """A resolved config; `model` overrules sizes."""
    sizes: dict[str, Any] = dict(
        schedule="D R*2 A",
        hidden_size=32,
        num_attention_heads=4,
        seq_length=24,
        vocab_size=61,
        rbf_features=8,
    )
    model_config = ModelConfig(
        **{**sizes, **model},
        router=RouterConfig(**(router or {"kind": "learned"})),
        meta_router=MetaRouterConfig(pooling=pooling),  # type: ignore[arg-type]
    )
    config = RunConfig(run_dir=str(run_dir), model=model_config, data=DataConfig(**(data or {})))
    return resolve_config(config, vocab_size=None, eod_token=None)


def tiny_model(config: RunConfig, seed: int = 3) -> InferenceModel:
    """Random weights, a filled running mean, and thresholds or biases such that about half of random
    tokens go to attention in every routed layer."""
    module = build_model(config, single_process_world("cpu"))
    initialize_parameters(module, seed)
    generator = torch.Generator().manual_seed(seed)

    def normal(like: Tensor, std: float) -> Tensor:
        return torch.randn(like.shape, generator=generator) * std

    with torch.no_grad():
        for name, parameter in module.named_parameters():
            std = 0.3 if parameter.dim() > 1 else 0.1
            parameter.add_(normal(parameter, std))
            if "meta_router.gate_proj.bias" in name:
                parameter.fill_(-0.2)
        meta_router = module.chiar_layers[0].meta_router
        if meta_router is not None:
            meta_router.running_mean_H.copy_(normal(meta_router.running_mean_H, 1.0))
            meta_router.running_weight.fill_(0.9)
    model = InferenceModel(module, config).eval()
    ids_BS = torch.randint(config.model.vocab_size or 0, (16, 24), generator=generator)
    _balance_routers(model, ids_BS)
    return model


@torch.no_grad()
def _balance_routers(model: InferenceModel, ids_BS: Tensor) -> None:
    """Layer by layer, since each layer's scores depend on the decisions before it."""
    for layer in model.module.chiar_layers:
        if layer.router is None:
            continue
        if model.config.model.router.kind in BLENDS:
            seen: list[Tensor] = []
            hook = layer.router.gate_proj.register_forward_hook(
                lambda _, __, logits, seen=seen: seen.append(logits)
            )
            model(ids_BS)
            hook.remove()
            layer.router.gate_proj.bias.sub_(seen[0].flatten(0, 1).median(dim=0).values)
        else:
            context = ForwardContext(tokens_BS=ids_BS, recorded_score_SB={})
            model(ids_BS, context=context)
            assert context.recorded_score_SB is not None
            scores = context.recorded_score_SB[layer.layer_number].flatten().sort().values
            # The middle of the widest gap near the median: rounding flips no decision.
            middle = len(scores) // 2
            near = scores[middle - 20 : middle + 20]
            place = int(near.diff().argmax())
            layer.router.threshold.copy_((near[place] + near[place + 1]) / 2)


def save_model(model: InferenceModel, folder: Path, step: int = 7) -> Path:
    """A run folder with this model as its checkpoint."""
    config = replace(model.config, run_dir=str(folder))
    state = {"model": model.module.sharded_state_dict(metadata=dict(SHARDING_METADATA))}
    layout = {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "data_parallel_size": 1}
    store = CheckpointStore(folder / "checkpoints", CheckpointConfig())
    store.save(state, make_info(step, 0, False, layout, to_dict(config)))
    return folder


def sample_text(words: int, seed: int = 0) -> str:
    """Words of random syllables, single and double spaces, lines, and a letter of two bytes."""
    generator = random.Random(seed)
    syllables = [a + b for a in "bdfgklmnprstv" for b in ("a", "e", "i", "o", "u", "é")]
    text = ""
    for _ in range(words):
        text += "".join(generator.choices(syllables, k=generator.randint(1, 3)))
        text += generator.choice([" ", " ", " ", "  ", "\n"])
    return text


def tiny_tokenizer(folder: Path) -> Path:
    """A SentencePiece model of 320 entries; its end-of-document token is 1."""
    (folder / "tokenizer.txt").write_text(sample_text(2000))
    return train_tokenizer([folder / "tokenizer.txt"], 320, folder / "tok", num_threads=1)
