"""Stand-ins for TransformerEngine's modules, which is not installed: megatron-core's own layers that keep
what TransformerEngine's keep, under the same names.

After megatron-core's `extensions/transformer_engine.py` and `gpt_layer_specs.py`: the norm before a linear
layer is part of it (`layer_norm_weight`, `layer_norm_bias`); every linear layer, the attention and the last
norm have an `_extra_state`: without fp8 an empty byte tensor (TransformerEngine 2) or a BytesIO (before).
"""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

VERSION = 2
"""Of TransformerEngine, as far as the extra states go."""


class ExtraState:
    """What every module of TransformerEngine's keeps and expects."""

    def get_extra_state(self) -> Any:
        """Nothing, in the version's words."""
        if VERSION >= 2:
            return torch.empty(0, dtype=torch.uint8)
        stream = io.BytesIO()
        torch.save({"scale_fwd": torch.ones(3), "extra_fp8_variables": {"fp8": False}}, stream)
        return stream

    def set_extra_state(self, state: Any) -> None:
        """As theirs, with fp8 off: None, an empty tensor, or a BytesIO."""
        assert state is None or isinstance(state, io.BytesIO) or state.numel() == 0


def _strict(module: torch.nn.Module) -> None:
    """Without the default for a missing extra state that megatron-core's own layers have."""
    module._load_state_dict_pre_hooks.clear()


class Linear(ExtraState, RowParallelLinear):
    """TERowParallelLinear."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _strict(self)


class LayerNormLinear(ExtraState, ColumnParallelLinear):
    """TELayerNormColumnParallelLinear."""

    def __init__(self, input_size: int, output_size: int, *, config: Any, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.settings = config
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(input_size))
        self.layer_norm_bias = None
        if config.normalization == "LayerNorm":
            self.layer_norm_bias = torch.nn.Parameter(torch.zeros(input_size))
        _strict(self)

    def forward(self, x: Any) -> Any:  # type: ignore[override]
        """Norm, then the product."""
        shape, eps = x.shape[-1:], self.settings.layernorm_epsilon
        if self.layer_norm_bias is None:
            return super().forward(F.rms_norm(x, shape, self.layer_norm_weight, eps))
        return super().forward(F.layer_norm(x, shape, self.layer_norm_weight, self.layer_norm_bias, eps))

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> Any:
        """As theirs."""
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(
            state, prefix, {"weight": 0, "bias": 0}, sharded_offsets, tp_group=self.tp_group,
            dp_cp_group=(metadata or {}).get("dp_cp_group"),
        )  # fmt: skip


class Attention(ExtraState, DotProductAttention):
    """TEDotProductAttention, as in older megatron-core: its state is in distributed checkpoints too."""

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> Any:
        """By its state dict, as any module without an own method."""
        groups = dict(tp_group=self.pg_collection.tp, dp_cp_group=(metadata or {}).get("dp_cp_group"))
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {}, sharded_offsets, **groups)


class _Norm(ExtraState, torch.nn.LayerNorm):
    pass


class _RMSNorm(ExtraState, torch.nn.RMSNorm):
    pass


class Norm:
    """TENorm."""

    def __new__(cls, config: Any, hidden_size: int, eps: float = 1e-5) -> Any:
        """One or the other."""
        kind = _Norm if config.normalization == "LayerNorm" else _RMSNorm
        return kind(hidden_size, eps=eps)


def transformer_engine_spec(normalization: str, layers: int) -> ModuleSpec:
    """`get_gpt_layer_with_transformer_engine_spec` for a stage of so many layers."""
    layer = get_gpt_layer_local_spec(normalization=normalization)
    parts = layer.submodules
    attention, mlp = parts.self_attention, parts.mlp
    attention = replace(
        attention,
        submodules=replace(
            attention.submodules, linear_qkv=LayerNormLinear, core_attention=Attention, linear_proj=Linear
        ),
    )
    mlp = replace(mlp, submodules=replace(mlp.submodules, linear_fc1=LayerNormLinear, linear_fc2=Linear))
    layer = replace(
        layer,
        submodules=replace(
            parts,
            input_layernorm=IdentityOp,
            pre_mlp_layernorm=IdentityOp,
            self_attention=attention,
            mlp=mlp,
            sharded_state_dict_keys_map={},
        ),
    )
    block = TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=Norm)
    return ModuleSpec(module=TransformerBlock, submodules=block)
