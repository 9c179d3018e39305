"""From a resolved config to this process's stage of the model."""

from __future__ import annotations

from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection

from chiar_megatron.config.mcore import transformer_config
from chiar_megatron.config.schema import RunConfig
from chiar_megatron.model.gpt import ChiarModel
from chiar_megatron.model.pipeline import pipeline_layout
from chiar_megatron.runtime.distributed import World, seed_random_streams
from chiar_megatron.runtime.paths import replays_steps

# How distributed checkpoints are cut: layers under names of their own, since D, R and A layers differ,
# and optimizer state that any other layout can read.
SHARDING_METADATA: dict[str, Any] = {
    "non_homogeneous_layers": True,
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "chained_optim_avoid_prefix": True,
}


def build_model(config: RunConfig, world: World, vp_stage: int | None = None) -> ChiarModel:
    """This process's stage of the model, or one chunk (vp_stage) of it where the pipeline is interleaved;
    weights not yet set."""
    layout = pipeline_layout(config) if world.pipeline_size > 1 else None
    settings = transformer_config(config.model, config.parallel, config.training.precision, layout)
    settings.deterministic_mode = config.training.deterministic
    # What megatron-core does for old versions of torch; a CUDA graph cannot hold it.
    settings.batch_p2p_sync = not replays_steps(config, world.device)
    if config.training.recompute == "full":
        settings.recompute_granularity, settings.recompute_method = "full", "uniform"
        settings.recompute_num_layers = 1
    groups = ProcessGroupCollection.use_mpu_process_groups()
    # megatron-core's parallel layers enter the model-parallel random stream while they are built.
    seed_random_streams(config.training.seed, 0, world)
    model = ChiarModel(settings, config.model, groups, config.training.z_loss, vp_stage)
    return model.to(world.device)  # type: ignore[no-any-return]
