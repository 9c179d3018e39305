"""Gradients copied to their float32 buffer in a few launches; megatron-core would add them one by one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from chiar_megatron.data.dataset import TokenBatch
from chiar_megatron.training.cuda_graph import Pass


class CopiedGradients:
    """Calls `run`; where a step is one micro-batch, then sets `main_grad` of all parameters at once.

    A few hundred additions read zeros first and wait for one another; on one H100 they took 3 ms of a step
    of the 400M model. Costs a second copy of the gradients until the backward pass is over, when its
    activations are gone. Gradients must not be reduced over replicas before.
    """

    def __init__(self, run: Pass, modules: Sequence[torch.nn.Module]) -> None:
        self.run = run
        self.collected = _Collected()
        for module in modules:
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(self.collected.add)

    def __call__(self, batches: Sequence[TokenBatch]) -> list[Tensor]:
        """What `run` returns."""
        self.collected.wanted = len(batches) == 1
        reports = self.run(batches)
        self.collected.copy()
        return reports


class _Collected:
    """Gradients of one backward pass. Parameters hold it by their hooks, where Python's collector does not
    look: it must not know of the engine, which would never be freed."""

    def __init__(self) -> None:
        self.wanted = False
        self.targets: list[Tensor] = []
        self.gradients: list[Tensor] = []

    def add(self, parameter: Tensor) -> None:
        """Autograd's hook, called once a parameter's gradient is complete."""
        if not self.wanted:
            return
        assert parameter.grad is not None
        self.targets.append(parameter.main_grad)  # type: ignore[attr-defined]
        self.gradients.append(parameter.grad)
        # megatron-core's hook comes next: it adds only what is not there, and lets go of the gradient.
        parameter.grad_added_to_main_grad = True  # type: ignore[attr-defined]

    @torch.no_grad()
    def copy(self) -> None:
        """Write all of them, and forget them."""
        if self.targets:
            torch._foreach_copy_(self.targets, self.gradients)
        self.targets, self.gradients = [], []
