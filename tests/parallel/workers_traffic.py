"""What each process of the traffic tests runs: single layers, with every collective seen and counted."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from chiar_megatron.config.schema import RunConfig
from chiar_megatron.model.build import build_model
from chiar_megatron.model.initialize import initialize_parameters
from chiar_megatron.operators.context import ForwardContext
from tests.parallel.workers_parity import start_layout


class SentBytes(TorchDispatchMode):
    """Counts what a rank sends in rings, from the tensors that torch's own collectives are given."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0.0
        self.calls: list[tuple[str, int]] = []  # operation, bytes of the whole tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Every operation passes; those of process groups are counted."""
        name = func._schema.name
        if name.startswith("c10d::"):
            self._count(name.removeprefix("c10d::"), args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Any) -> None:
        if name == "allreduce_":
            whole, group, times = sum(_bytes(x) for x in args[0]), args[1], 2
        elif name == "_allgather_base_":
            whole, group, times = _bytes(args[0]), args[2], 1
        elif name in ("_reduce_scatter_base_", "alltoall_base_"):
            whole, group, times = _bytes(args[1]), args[2], 1
        else:
            raise AssertionError(f"a collective that nobody counts: {name}")
        size = dist.ProcessGroup.unbox(group).size()
        self.total += times * (size - 1) / size * whole
        self.calls.append((name, whole))


def _bytes(x: torch.Tensor) -> int:
    return x.numel() * x.element_size()


def sent_by_layers(configs: dict[str, RunConfig]) -> dict[str, list[dict[str, Any]]]:
    """By name of a config: for each layer what this rank sends forward and backward, and the calls."""
    answers = {}
    for name, config in configs.items():
        world = start_layout(config.parallel, config)
        model = build_model(config, world).train()
        initialize_parameters(model, seed=1)
        generator = torch.Generator().manual_seed(2)
        b, s, h = config.training.micro_batch_size, config.model.seq_length, config.model.hidden_size
        tokens_BS = torch.randint(1, 50, (b, s), generator=generator)
        whole_SBH = torch.randn(s, b, h, generator=generator)
        answers[name] = []
        for layer in model.chiar_layers:
            x_SBH = layer.part.own(whole_SBH).clone().requires_grad_()
            with SentBytes() as forward:
                out_SBH, _ = layer(x_SBH, ForwardContext(tokens_BS=tokens_BS))
            with SentBytes() as backward:
                out_SBH.square().sum().backward()
            answers[name].append(
                {"forward": forward.total, "backward": backward.total, "calls": forward.calls}
            )
    return answers
