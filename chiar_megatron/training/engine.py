"""The engine: model, optimizer and one training step on megatron-core."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.optimizer import optimizer as megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func

from chiar_megatron.config.mcore import ddp_config
from chiar_megatron.config.schema import RunConfig
from chiar_megatron.data.dataset import TokenBatch
from chiar_megatron.model.build import SHARDING_METADATA, build_model
from chiar_megatron.model.initialize import initialize_parameters
from chiar_megatron.runtime.distributed import World, seed_random_streams
from chiar_megatron.training.decisions import DecisionRecorder, DecisionReplay
from chiar_megatron.training.optimizer import LearningRate, build_optimizer, give_each_parameter_its_step
from chiar_megatron.training.step import (
    ForwardStep,
    Requests,
    StepSums,
    meta_router_of,
    reduce_step,
    validation_sums,
)


@dataclass(frozen=True)
class StepResult:
    """One optimizer step; `taken` is False if a non-finite loss or gradient made all ranks skip it."""

    sums: StepSums
    grad_norm: float
    learning_rate: float
    taken: bool


class MegatronEngine:
    """One pipeline stage of the model on this process, and how to train it."""

    def __init__(
        self,
        config: RunConfig,
        world: World,
        recorder: DecisionRecorder | None = None,
        replay: DecisionReplay | None = None,
    ) -> None:
        """config: resolved. Weights start as a function of the seed alone, whatever the layout."""
        self.config = config
        self.world = world
        self.module = build_model(config, world)
        initialize_parameters(self.module, config.training.seed)
        self.model = DistributedDataParallel(
            config=self.module.config, ddp_config=ddp_config(config), module=self.module
        )
        self.optimizer = build_optimizer(config, self.model)
        self.learning_rate = LearningRate(config.optimizer, self.optimizer)
        self.module.config.finalize_model_grads_func = finalize_model_grads
        self.module.config.no_sync_func = self.model.no_sync
        self.forward_step = ForwardStep(world.device, recorder, replay)
        self.forward_backward = get_forward_backward_func()

    def train_step(
        self, batches: Sequence[TokenBatch], step: int, requests: Callable[[], Requests] = Requests
    ) -> StepResult:
        """Forward, backward and update from this replica's micro-batches of `step` (from 0).

        requests: asked when the work is done, so that a signal during the step counts; any rank's reach
        all in the step's one reduction.
        """
        seed_random_streams(self.config.training.seed, step, self.world)
        learning_rate = self.learning_rate.set(step)
        self.model.train()
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        reports = self._run(batches, forward_only=False)
        sums = reduce_step(self.module, reports, self.world, requests())
        self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())
        # Gradients were summed over replicas and the norm over the rest: all ranks judge alike.
        taken = math.isfinite(sums.loss) and math.isfinite(grad_norm)
        if taken:
            self._update(sums, grad_norm)
        return StepResult(sums, grad_norm, learning_rate, taken)

    def _update(self, sums: StepSums, grad_norm: float) -> None:
        clip = self.config.optimizer.clip_grad
        if clip > 0.0:
            for inner in self.optimizer.chained_optimizers:
                if inner.get_parameters():
                    megatron_optimizer.clip_grad_by_total_norm_fp32(
                        inner.get_parameters(), max_norm=clip, total_norm=grad_norm
                    )
        self.optimizer.step_with_ready_grads()
        meta_router = meta_router_of(self.module)
        if meta_router is not None and sums.embedding_mean_H is not None:
            meta_router.update_running(sums.embedding_mean_H.to(self.world.device))

    @torch.no_grad()
    def validation_loss(self, batches: Sequence[TokenBatch]) -> float:
        """Mean cross entropy, nats a token, over all replicas' batches; leaves training state alone."""
        with evaluation_mode(self.model):
            reports = self._run(batches, forward_only=True)
        loss, tokens = validation_sums(reports, self.world)
        return loss / max(tokens, 1)

    def _run(self, batches: Sequence[TokenBatch], forward_only: bool) -> list[torch.Tensor]:
        reports: list[torch.Tensor] = self.forward_backward(
            forward_step_func=self.forward_step,
            data_iterator=iter(batches),
            model=[self.model],
            num_microbatches=len(batches),
            seq_length=self.config.model.seq_length,
            micro_batch_size=batches[0].tokens_BS.shape[0],
            forward_only=forward_only,
        )
        return reports

    def sharded_state(self, is_loading: bool) -> dict[str, Any]:
        """Weights and optimizer state as megatron-core's distributed checkpoint wants them."""
        model_state = self.module.sharded_state_dict(metadata=dict(SHARDING_METADATA))
        optimizer_state = self.optimizer.sharded_state_dict(
            model_state, is_loading=is_loading, metadata=dict(SHARDING_METADATA)
        )
        return {"model": model_state, "optimizer": optimizer_state}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take what `sharded_state` described, as loaded."""
        self.module.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        give_each_parameter_its_step(self.optimizer)

    def load_weights(self, state: dict[str, Any]) -> None:
        """Take weights only; float32 master weights follow them."""
        self.module.load_state_dict(state)
        self.optimizer.reload_model_params()


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Dropout off and nothing counted."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
