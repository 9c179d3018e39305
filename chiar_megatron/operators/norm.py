"""LayerNorm and RMSNorm as torch has them, with the mark that sequence parallelism needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from chiar_megatron.runtime.device import current_device
from chiar_megatron.runtime.paths import kernels_available

if TYPE_CHECKING:
    from chiar_megatron.operators.kernels.residual_norm import NormParameters


def mark_sequence_parallel(module: torch.nn.Module, sequence_parallel: bool) -> None:
    """Say that gradients of these replicated parameters are partial: megatron-core then sums them over
    the tensor-parallel group, each rank having seen only its part of the sequence."""
    for parameter in module.parameters(recurse=True):
        setattr(parameter, "sequence_parallel", sequence_parallel)


class Norm:
    """Builds `torch.nn.LayerNorm` or `torch.nn.RMSNorm`; a class because megatron-core's specs want one.

    megatron-core's own wrapper refuses sequence parallelism without apex or TransformerEngine.
    """

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float | None = None) -> Any:
        """A norm over the last dim of `[..., hidden_size]`, parameters in `config.params_dtype`."""
        kind = torch.nn.RMSNorm if config.normalization == "RMSNorm" else torch.nn.LayerNorm
        norm = kind(
            hidden_size,
            eps=config.layernorm_epsilon if eps is None else eps,
            device=current_device(),
            dtype=config.params_dtype,
        )
        mark_sequence_parallel(norm, config.sequence_parallel)
        return norm


def add_and_norm(
    norm: Any, x_XYH: Tensor, y_XYH: Tensor, bias_H: Tensor | None = None, users: int = 1
) -> tuple[Tensor, ...]:
    """`norm(x + y + bias)`, norm by `Norm`, once for each of 1 or 2 users; in training by one kernel on CUDA
    in half precision, which then adds the users' gradients too."""
    if not (norm.training and fuses_norms(x_XYH)):
        y_XYH = y_XYH if bias_H is None else y_XYH + bias_H
        return (norm(x_XYH + y_XYH),) * users
    from chiar_megatron.operators.kernels.residual_norm import residual_norm

    tokens = x_XYH.flatten(0, 1), y_XYH.flatten(0, 1)
    outputs = residual_norm(*tokens, bias_H, norm_parameters(norm), users)
    return tuple(out_NH.view(x_XYH.shape) for out_NH in outputs)


def fuses_norms(x: Tensor) -> bool:
    """Whether the kernels of norms take tensors like x `[..., h]`."""
    if not kernels_available(x.device) or x.dtype not in (torch.bfloat16, torch.float16):
        return False
    from chiar_megatron.operators.kernels.residual_norm import widths_fit

    return widths_fit(x.shape[-1])


def norm_parameters(norm: Any) -> NormParameters:
    """What the kernels need of a `Norm`."""
    from chiar_megatron.operators.kernels.residual_norm import NormParameters

    return NormParameters(norm.weight, getattr(norm, "bias", None), norm.eps)


def choose_norm(choice_XY: Tensor, norm_true: Any, norm_false: Any, x_XYH: Tensor) -> Tensor:
    """`norm_true(x)` for tokens where the choice holds, else `norm_false(x)`, normalised only once.

    Both of one kind (`Norm`): they differ in scale and shift alone. Same shape and dtype as x.
    """
    shape, wide_XYH = norm_true.normalized_shape, x_XYH.float()
    if isinstance(norm_true, torch.nn.RMSNorm):
        plain_XYH = F.rms_norm(wide_XYH, shape, eps=norm_true.eps)
    else:
        plain_XYH = F.layer_norm(wide_XYH, shape, eps=norm_true.eps)
    choice = choice_XY[..., None]
    out_XYH = plain_XYH * torch.where(choice, norm_true.weight, norm_false.weight)
    if getattr(norm_true, "bias", None) is not None:
        out_XYH = out_XYH + torch.where(choice, norm_true.bias, norm_false.bias)
    return out_XYH.to(x_XYH.dtype)
