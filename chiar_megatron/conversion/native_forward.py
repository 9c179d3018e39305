"""A native model's answer without ever holding it whole: layer after layer is built, filled, run, dropped."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from chiar_megatron.config.mcore import transformer_config
from chiar_megatron.config.schedule import parse_schedule
from chiar_megatron.config.schema import ParallelConfig
from chiar_megatron.conversion.canonical import Canonical
from chiar_megatron.conversion.formats import Answer
from chiar_megatron.model.layer import ChiarLayer
from chiar_megatron.model.tensors import EMBEDDING, HEAD
from chiar_megatron.operators.context import ForwardContext
from chiar_megatron.operators.norm import Norm
from chiar_megatron.runtime.distributed import seed_random_streams, single_process_world


@torch.no_grad()
def native_answer(
    model: Canonical, ids_BS: Tensor, forced_BS: Mapping[int, Tensor] | None = None, noisy: bool = False
) -> Answer:
    """Float32, on the CPU, in evaluation mode; int64 ids `[b, s]`. noisy: see `Format.answer`."""
    world = single_process_world("cpu")
    config = model.config.model
    settings = transformer_config(config, ParallelConfig())
    groups = ProcessGroupCollection.use_mpu_process_groups()
    seed_random_streams(0, 0, world)  # megatron-core's layers enter their stream while they are built
    answer = Answer(torch.empty(0))
    light: dict[int, Tensor] = {}
    score: dict[int, Tensor] = {}
    entropy: dict[int, Tensor] = {}
    context = ForwardContext(
        tokens_BS=ids_BS,
        document_ids_BS=document_ids(model, ids_BS),
        forced_light_SB=None if forced_BS is None else {n: forced.T for n, forced in forced_BS.items()},
        recorded_light_SB=light,
        recorded_score_SB=score,
        recorded_entropy_SB=entropy,
    )
    x_SBH = F.embedding(ids_BS, model.tensors[EMBEDDING].load().float()).transpose(0, 1)
    if noisy:
        x_SBH = with_rounding_noise(x_SBH)
    for index, kind in enumerate(parse_schedule(config.schedule)):
        layer = ChiarLayer(settings, config, kind, index + 1, groups).eval()
        fill(layer, model, f"decoder.layers.{index}.")
        x_SBH, _ = layer(x_SBH, context)
        if layer.meta_router is not None:
            answer.meta_gate = float(layer.meta_router.last_gate)
        if layer.router is not None and config.router.kind not in ("soft", "hard"):
            answer.border[index + 1] = float(layer.router.threshold)
    norm = Norm(settings, config.hidden_size)
    fill(norm, model, "decoder.final_layernorm.")
    head_VH = model.tensors[EMBEDDING if config.tie_embeddings else HEAD].load().float()
    answer.logits_BSV = norm(x_SBH).transpose(0, 1) @ head_VH.T
    for recorded, shown in (
        (light, answer.light_BS), (score, answer.score_BS), (entropy, answer.entropy_BS)
    ):  # fmt: skip
        shown.update({number: value_SB.T for number, value_SB in recorded.items()})
    return answer


def with_rounding_noise(x: Tensor) -> Tensor:
    """x, every element moved by about half a unit in its last place."""
    noise = torch.randint(0, 2, x.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return x * (1.0 + noise * torch.finfo(torch.float32).eps / 2)


def document_ids(model: Canonical, ids_BS: Tensor) -> Tensor | None:
    """Numbers of the tokens' documents, where the model was trained with documents masked from each other."""
    eod = model.config.data.eod_token
    if not model.config.model.mask_documents or eod is None:
        return None
    ends_BS = (ids_BS == eod).long()
    return ends_BS.cumsum(dim=1) - ends_BS


def fill(module: torch.nn.Module, model: Canonical, prefix: str) -> None:
    """Give a module its tensors, in float32."""
    for name, tensor in module.state_dict().items():
        if tensor is not None:  # megatron-core's linear layers have an empty extra state
            tensor.copy_(model.tensors[prefix + name].load())
