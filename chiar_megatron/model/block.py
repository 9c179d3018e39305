"""From the schedule string to the layers of one pipeline stage, as megatron-core specs."""

from __future__ import annotations

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.core.utils import get_pg_rank

from chiar_megatron.config.schedule import parse_schedule
from chiar_megatron.config.schema import ModelConfig
from chiar_megatron.model.layer import ChiarLayer
from chiar_megatron.operators.norm import Norm


def block_spec(
    config: TransformerConfig,
    model: ModelConfig,
    pg_collection: ProcessGroupCollection,
    vp_stage: int | None = None,
) -> TransformerBlockSubmodules:
    """The layers of one chunk (vp_stage; None: the only one) of this process's pipeline stage, and the final
    norm."""
    pipeline_rank = get_pg_rank(pg_collection.pp)
    first = get_transformer_layer_offset(config, vp_stage, pipeline_rank)
    count = get_num_layers_to_build(config, vp_stage, pipeline_rank)
    kinds = parse_schedule(model.schedule)[first : first + count]
    specs = [ModuleSpec(module=ChiarLayer, params={"model": model, "kind": kind}) for kind in kinds]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=Norm)
