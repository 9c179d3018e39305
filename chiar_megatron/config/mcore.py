"""The only place that builds megatron-core's configs from a recipe."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.transformer.transformer_config import TransformerConfig

from chiar_megatron.config.pipeline import Layout, layout_text
from chiar_megatron.config.schedule import parse_schedule
from chiar_megatron.config.schema import ModelConfig, OptimizerConfig, ParallelConfig, RunConfig

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def transformer_config(
    model: ModelConfig,
    parallel: ParallelConfig,
    precision: str = "fp32",
    layout: Layout | None = None,
    **overrides: Any,
) -> TransformerConfig:
    """megatron-core's view of a resolved model (no nulls) in a layout; layout: layers of each pipeline chunk,
    None where there is one stage.

    Fused kernels that need TransformerEngine or apex are off; weights are initialised by name elsewhere
    (`model/gpt.py`), so that they do not depend on the layout.
    """
    dtype = _DTYPES[precision]
    virtual = parallel.virtual_pipeline_model_parallel_size
    interleaved = virtual > 1
    settings: dict[str, Any] = dict(
        num_layers=len(parse_schedule(model.schedule)),
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.kv_channels,
        ffn_hidden_size=model.ffn_hidden_size,
        hidden_dropout=model.dropout,
        attention_dropout=model.dropout,
        normalization=model.normalization,
        layernorm_epsilon=model.norm_epsilon,
        add_bias_linear=model.add_bias,
        add_qkv_bias=model.add_bias if model.add_qkv_bias is None else model.add_qkv_bias,
        gated_linear_unit=model.activation == "swiglu",
        activation_func=F.silu if model.activation == "swiglu" else F.gelu,
        # megatron-core's own initialisation also marks parameters as sharded, so it runs, drawing nothing.
        init_method=_leave_as_is,
        output_layer_init_method=_leave_as_is,
        embedding_init_method=_leave_as_is,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual if interleaved else None,
        pipeline_model_parallel_layout=None if layout is None else layout_text(layout),
        context_parallel_size=parallel.context_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=precision == "bf16",
        # The loss is a sum over tokens, divided once by the global number of them: equal in any layout.
        calculate_per_token_loss=True,
        gradient_accumulation_fusion=False,
        cross_entropy_loss_fusion=False,
        # Batched, the interleaved schedule's transfers between two stages mix up: losses off by up to 8e-3.
        batch_p2p_comm=not interleaved,
        overlap_p2p_comm=interleaved,
        variable_seq_lengths=False,
    )
    settings.update(overrides)
    return TransformerConfig(**settings)


def _leave_as_is(weight: torch.Tensor) -> torch.Tensor:
    return weight


def ddp_config(config: RunConfig) -> DistributedDataParallelConfig:
    """Gradients are summed in float32 over replicas."""
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=config.parallel.distributed_optimizer,
        overlap_grad_reduce=config.parallel.overlap_grad_reduce,
        overlap_param_gather=config.parallel.overlap_param_gather,
        check_for_nan_in_grad=False,
    )


def optimizer_config(
    optimizer: OptimizerConfig, precision: str, parallel: ParallelConfig
) -> MegatronOptimizerConfig:
    """AdamW with decoupled weight decay."""
    return MegatronOptimizerConfig(
        optimizer="adam",
        lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.beta1,
        adam_beta2=optimizer.beta2,
        adam_eps=optimizer.eps,
        clip_grad=optimizer.clip_grad,
        bf16=precision == "bf16",
        params_dtype=_DTYPES[precision],
        use_distributed_optimizer=parallel.distributed_optimizer,
        overlap_param_gather=parallel.overlap_param_gather,
    )


def padded_vocab_size(vocab_size: int, tensor_model_parallel_size: int) -> int:
    """Vocabulary rows stored: as many on every tensor-parallel rank, in whole tiles of a matrix product (an
    odd 50257 costs a GPU half its speed there); the surplus is masked."""
    unit = 64 * tensor_model_parallel_size
    return math.ceil(vocab_size / unit) * unit
