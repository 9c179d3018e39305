"""`load_model`: a checkpoint as a plain module in one process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from chiar_megatron.checkpoint.files import CheckpointInfo, find_damage, read_manifest, resolve_checkpoint
from chiar_megatron.checkpoint.store import load_state
from chiar_megatron.config.load import config_from_dict
from chiar_megatron.config.schema import ParallelConfig, RunConfig
from chiar_megatron.errors import CheckpointError
from chiar_megatron.model.build import SHARDING_METADATA, build_model
from chiar_megatron.model.gpt import ChiarModel
from chiar_megatron.operators.context import ForwardContext, GenerationState
from chiar_megatron.runtime.distributed import World, single_process_world


class InferenceModel(torch.nn.Module):
    """A whole model in one process: `[b, s]` int64 ids to `[b, s, vocab]` float32 logits.

    With `meta_router.pooling: batch` the logits depend on the whole batch (and see the future), as the
    paper's model does.
    """

    def __init__(self, module: ChiarModel, config: RunConfig) -> None:
        super().__init__()
        self.module = module
        self.config = config

    @property
    def vocab_size(self) -> int:
        """Entries of the vocabulary, without padding."""
        assert self.config.model.vocab_size is not None
        return self.config.model.vocab_size

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def forward(
        self,
        input_ids: Tensor,
        document_ids: Tensor | None = None,
        generation: GenerationState | None = None,
        context: ForwardContext | None = None,
    ) -> Tensor:
        """Logits of every position.

        document_ids: int64 `[b, s]`, tokens see only their own document. generation: keys and values of
        the tokens before these; the caller advances its `length`. context: given, used as it is.
        """
        if context is None:
            context = ForwardContext(tokens_BS=input_ids, document_ids_BS=document_ids, generation=generation)
        logits_BSV = self.module(input_ids, context)
        return logits_BSV[..., : self.vocab_size].float()  # type: ignore[no-any-return]


def load_model(path: str | Path, device: str = "auto", precision: str | None = None) -> InferenceModel:
    """Load a native checkpoint (its folder, or a run folder: the newest) for one process, in evaluation mode.

    precision: `fp32` or `bf16`; None keeps the run's. Raises CheckpointError if there is no whole
    checkpoint, or one of another kind.
    """
    folder = resolve_checkpoint(Path(path))
    manifest = read_manifest(folder)
    damage = find_damage(folder, sorted(manifest), manifest)
    if damage is not None:
        raise CheckpointError(f"{folder} is damaged: {damage}")
    world = single_process_world(device)
    config = checkpoint_config(folder, ParallelConfig(), precision)
    module = load_weights(folder, config, world)
    return InferenceModel(module, config).eval()


def checkpoint_config(folder: Path, parallel: ParallelConfig, precision: str | None) -> RunConfig:
    """The config a checkpoint was trained with, for use in another layout and precision."""
    config = config_from_dict(CheckpointInfo.read(folder).config, str(folder))
    training = config.training
    if precision is not None:
        training = replace(training, precision=precision)  # type: ignore[arg-type]
    return replace(config, parallel=parallel, training=training)


def load_weights(folder: Path, config: RunConfig, world: World) -> ChiarModel:
    """This process's stage of a checkpoint's model, in the layout of `config.parallel`."""
    module = build_model(config, world)
    state = load_state(folder, {"model": module.sharded_state_dict(metadata=dict(SHARDING_METADATA))})
    module.load_state_dict(state["model"])
    return module
