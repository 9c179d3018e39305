"""A plain GPT's answer by megatron-core's own transformer layers, one at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from chiar_megatron.config.mcore import transformer_config
from chiar_megatron.config.schedule import parse_schedule
from chiar_megatron.config.schema import ParallelConfig
from chiar_megatron.conversion.canonical import Canonical
from chiar_megatron.conversion.formats import Answer
from chiar_megatron.conversion.native_forward import fill, with_rounding_noise
from chiar_megatron.model.tensors import EMBEDDING, HEAD
from chiar_megatron.operators.norm import Norm
from chiar_megatron.runtime.distributed import seed_random_streams, single_process_world


@torch.no_grad()
def megatron_answer(model: Canonical, ids_BS: Tensor, noisy: bool = False) -> Answer:
    """Float32, on the CPU, in evaluation mode; int64 ids `[b, s]`. noisy: see `Format.answer`."""
    config, length = model.config.model, ids_BS.shape[1]
    seed_random_streams(0, 0, single_process_world("cpu"))
    settings = transformer_config(config, ParallelConfig())
    spec = get_gpt_layer_local_spec(normalization=config.normalization)
    scaling = config.rotary_scaling
    rotary = RotaryEmbedding(
        config.kv_channels,
        rotary_percent=1.0,
        seq_len_interpolation_factor=scaling.factor if scaling.rope_type == "linear" else None,
        rotary_base=config.rotary_base,
        rope_scaling=scaling.rope_type == "llama3",
        rope_scaling_factor=scaling.factor,
        use_cpu_initialization=True,
    )
    future_11SS = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
    x_SBH = F.embedding(ids_BS, model.tensors[EMBEDDING].load().float()).transpose(0, 1).contiguous()
    x_SBH = with_rounding_noise(x_SBH) if noisy else x_SBH
    for index in range(len(parse_schedule(config.schedule))):
        layer = TransformerLayer(settings, spec.submodules, layer_number=index + 1).eval()
        fill(layer, model, f"decoder.layers.{index}.")
        x_SBH, _ = layer(x_SBH, attention_mask=future_11SS, rotary_pos_emb=rotary(length))
    norm = Norm(settings, config.hidden_size)
    fill(norm, model, "decoder.final_layernorm.")
    head_VH = model.tensors[EMBEDDING if config.tie_embeddings else HEAD].load().float()
    return Answer(norm(x_SBH).transpose(0, 1) @ head_VH.T)
