"""What autograd keeps of one layer's forward pass, the other measure of `chiar plan`'s activations."""

from __future__ import annotations

import torch
from torch import Tensor

from chiar_megatron.model.layer import ChiarLayer
from chiar_megatron.operators.context import ForwardContext


def bytes_kept(layer: ChiarLayer, batch: int, seq_length: int) -> float:
    """For the backward pass of one micro-batch; weights are not counted, nor is a tensor twice.

    batch, seq_length: of whole sequences, of which the layer's process may hold a part. The input lies in
    memory as another layer leaves it, batch first.
    """
    own = {p.data_ptr() for p in layer.parameters()}
    whole_SBH = torch.randn(seq_length, batch, layer.config.hidden_size, dtype=layer.config.params_dtype)
    x_SBH = layer.part.own(whole_SBH).transpose(0, 1).clone(memory_format=torch.contiguous_format)
    x_SBH = x_SBH.transpose(0, 1).requires_grad_()
    context = ForwardContext(
        tokens_BS=torch.zeros(batch, seq_length, dtype=torch.int64), auxiliary_scale=torch.tensor(1.0)
    )
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)  # alive, so its address is its own
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer.body(x_SBH.transpose(0, 1), context)
    return float(sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in own))
