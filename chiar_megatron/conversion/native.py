"""The native format: a config for foreign weights, and a checkpoint that holds weights only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path

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
from chiar_megatron.config.validate import check_config
from chiar_megatron.conversion.reference import ROTARY_BASE, ReferenceCheckpoint
from chiar_megatron.data.tokenizer import load_tokenizer
from chiar_megatron.model.build import SHARDING_METADATA, build_model
from chiar_megatron.runtime.distributed import World

SEQ_LENGTH = 256  # the paper's; the authors' files do not tell
ROUTER_KINDS = {"threshold": "entropy", "soft": "soft", "hard": "hard"}


def native_config(checkpoint: ReferenceCheckpoint, run_dir: Path, tokenizer: str | None) -> RunConfig:
    """The resolved recipe of an imported model; data and training are defaults.

    run_dir: where the checkpoint will lie. tokenizer: path, or None where the authors' is not at hand.
    Raises ConfigError or DataError where sizes contradict each other or the tokenizer does not fit.
    """
    sizes = checkpoint.sizes
    routes_by_entropy = checkpoint.routing_mode == "threshold" and "R" in checkpoint.schedule
    model = ModelConfig(
        schedule=schedule_text(checkpoint.schedule),
        hidden_size=sizes.hidden,
        num_attention_heads=sizes.heads,
        kv_channels=sizes.head_size,
        ffn_hidden_size=sizes.ffn,
        seq_length=SEQ_LENGTH,
        vocab_size=sizes.vocab,
        activation="gelu",
        norm="post",
        normalization="LayerNorm",
        norm_epsilon=1e-5,
        add_bias=True,
        tie_embeddings=checkpoint.tied,
        rotary_base=ROTARY_BASE,
        router=RouterConfig(
            kind=ROUTER_KINDS[checkpoint.routing_mode],  # type: ignore[arg-type]
            threshold=checkpoint.threshold if routes_by_entropy else None,
            dc_power_weight=2.0,
        ),
        # The pooling it was trained with, so that logits agree; it sees future tokens.
        meta_router=MetaRouterConfig(enabled=checkpoint.kind == "chiar", pooling="batch"),
    )
    loaded = None if tokenizer is None else load_tokenizer(tokenizer)
    data = DataConfig(tokenizer=None if tokenizer is None else str(Path(tokenizer).resolve()))
    config = resolve_config(
        RunConfig(run_dir=str(run_dir), model=model, data=data),
        vocab_size=None if loaded is None else loaded.vocab_size,
        eod_token=None if loaded is None else loaded.eod,
    )
    check_config(config)
    return config


def schedule_text(letters: Sequence[str]) -> str:
    """The schedule string of a letter a layer: "D R*26 A"."""
    runs = [(letter, len(list(group))) for letter, group in groupby(letters)]
    return " ".join(letter if count == 1 else f"{letter}*{count}" for letter, count in runs)


@torch.no_grad()
def write_native(
    tensors: Mapping[str, Tensor], config: RunConfig, folder: Path, step: int, world: World
) -> None:
    """Write a weights-only checkpoint `step_…` into `folder`.

    tensors: every parameter of the config's model under its name in one process, no more and no less.
    Raises CheckpointError if it cannot be written.
    """
    module = build_model(config, world)
    parameters = dict(module.named_parameters())
    assert parameters.keys() == tensors.keys(), parameters.keys() ^ tensors.keys()
    for name, parameter in parameters.items():
        rows = len(tensors[name])
        parameter[:rows].copy_(tensors[name])
        parameter[rows:].zero_()  # padding of the vocabulary
    layout = {
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "data_parallel_size": 1,
    }
    info = make_info(step, 0, False, layout, to_dict(config))
    store = CheckpointStore(folder, CheckpointConfig())
    store.start({"model": module.sharded_state_dict(metadata=dict(SHARDING_METADATA))}, info)
    store.finish()
