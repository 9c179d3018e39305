"""The engine: model, optimizer and one training step on megatron-core."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func

from chiar_megatron.config.schedule import parse_schedule
from chiar_megatron.config.schema import RunConfig
from chiar_megatron.data.dataset import TokenBatch
from chiar_megatron.model.build import SHARDING_METADATA, build_model
from chiar_megatron.model.gpt import ChiarModel
from chiar_megatron.model.initialize import initialize_parameters
from chiar_megatron.routing.balance import move_thresholds
from chiar_megatron.runtime.distributed import World, seed_random_streams
from chiar_megatron.runtime.paths import compiles, replays_steps
from chiar_megatron.training.cuda_graph import GraphedPass, Pass, prepare
from chiar_megatron.training.data_parallel import ReducedGradients, gather_again, wrap
from chiar_megatron.training.decisions import DecisionRecorder, DecisionReplay
from chiar_megatron.training.detail import Detail, Stopwatch
from chiar_megatron.training.main_gradients import CopiedGradients
from chiar_megatron.training.optimizer import (
    LearningRate,
    apply_update,
    build_optimizer,
    give_each_parameter_its_step,
    gradient_norm,
)
from chiar_megatron.training.step import (
    DeviceSums,
    ForwardStep,
    Requests,
    StepSums,
    meta_router_of,
    reduce_step,
    routed_layers,
    validation_sums,
)
from chiar_megatron.training.step_clock import StepClock


@dataclass(frozen=True)
class StepResult:
    """One optimizer step; `taken` is False if a non-finite loss or gradient made all ranks skip it."""

    sums: StepSums
    grad_norm: float
    learning_rate: float
    taken: bool
    ended: float
    """When its work was done, in seconds of the monotonic clock."""


class PendingStep:
    """A step under way: its figures are copied to the host as soon as the device has them."""

    def __init__(
        self,
        sums: DeviceSums,
        grad_norm: torch.Tensor,
        taken: torch.Tensor,
        learning_rate: float,
        clock: StepClock,
    ) -> None:
        self._sums, self._learning_rate, self._clock = sums, learning_rate, clock
        figures = torch.cat((sums.packed, torch.stack((grad_norm.double(), taken.double()))))
        if figures.device.type == "cuda":
            self._figures = torch.empty(figures.shape, dtype=figures.dtype, pin_memory=True)
            self._figures.copy_(figures, non_blocking=True)
        else:
            self._figures = figures
        self._end = clock.end()

    def result(self) -> StepResult:
        """Wait for the figures, in the order of steps."""
        ended = self._clock.wait(self._end)
        sums = self._sums.read(self._figures[:-2])
        grad_norm, taken = self._figures[-2:].tolist()
        return StepResult(sums, grad_norm, self._learning_rate, taken > 0.0, ended)


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
        alone = recorder is None and replay is None
        graphed = alone and replays_steps(config, world.device)
        if world.device.type == "cuda":
            prepare(graphed)
        virtual = config.parallel.virtual_pipeline_model_parallel_size
        vp_stages: Sequence[int | None] = range(virtual) if virtual > 1 else (None,)
        self.chunks = [build_model(config, world, vp_stage) for vp_stage in vp_stages]
        self.compiles = compiles(world.device, config.runtime.compile)
        for chunk in self.chunks:
            initialize_parameters(chunk, config.training.seed)
            if self.compiles:
                chunk.compile_parts()
        self.wrapped = wrap(config, self.chunks)
        self.optimizer = build_optimizer(config, self.wrapped)
        self.learning_rate = LearningRate(config.optimizer, self.optimizer)
        self.forward_step = ForwardStep(world, recorder, replay)
        self.forward_backward = get_forward_backward_func()
        self._train_pass, self._reduce_gradients = self._passes(graphed)
        self.stopwatch = Stopwatch(world.device)
        self.clock = StepClock(world.device)
        self.on_batch: Callable[[], None] = lambda: None
        """Called before each forward pass, but for those replayed as a CUDA graph."""
        self._last_sums: DeviceSums | None = None
        # Steps that may be under way while the host judges the one before.
        self.steps_ahead = 1 if world.device.type == "cuda" else 0

    def _passes(self, graphed: bool) -> tuple[Pass, Callable[[], None]]:
        """How a step goes forward and backward, and what then sums gradients over ranks."""
        run: Pass = partial(self._run, forward_only=False)
        # But for the division by the number of tokens, which would wait for the host and pass over all
        # gradients once more: the update divides.
        reduce = partial(finalize_model_grads, self.wrapped, None)
        if not graphed:
            return run, reduce
        forget = partial(gather_again, self.wrapped)
        if self.config.parallel.overlap_grad_reduce:
            return GraphedPass(ReducedGradients(run, reduce), forget), lambda: None
        return GraphedPass(CopiedGradients(run, self.chunks), forget), reduce

    @property
    def module(self) -> ChiarModel:
        """This process's stage, of a pipeline that is not interleaved."""
        (module,) = self.chunks
        return module

    def train_step(
        self, batches: Sequence[TokenBatch], step: int, requests: Callable[[], Requests] = Requests
    ) -> StepResult:
        """Forward, backward and update from this replica's micro-batches of `step` (from 0).

        requests: asked when the work is done, so that a signal during the step counts; any rank's reach
        all in the step's one reduction.
        """
        return self.launch_step(batches, step, requests).result()

    def launch_step(
        self,
        batches: Sequence[TokenBatch],
        step: int,
        requests: Callable[[], Requests] = Requests,
        detailed: bool = True,
    ) -> PendingStep:
        """`train_step` whose figures are not waited for: on CUDA all of it, whether the step is taken
        included, is decided on the device, and the host may go on. detailed: with what log intervals tell
        besides the sums (every rank must say the same)."""
        self.clock.begin()
        seed_random_streams(self.config.training.seed, step, self.world)
        learning_rate = self.learning_rate.set(step)
        for wrapped in self.wrapped:
            wrapped.train()
            wrapped.zero_grad_buffer()
        self.optimizer.zero_grad()
        reports = self.stopwatch.time(lambda: self._train_pass(batches))
        self._reduce_gradients()
        detail = self._detail(batches) if detailed else None
        sums = reduce_step(self.chunks, reports, self.world, requests(), detail)
        self._last_sums = sums
        self.optimizer.prepare_grads()
        # Gradients are sums over tokens; nothing divides them but the update itself.
        grad_norm = gradient_norm(self.optimizer) / sums.tokens
        # Gradients were summed over replicas and the norm over the rest: all ranks judge alike.
        taken = torch.isfinite(sums.loss) & torch.isfinite(grad_norm)
        self._update(sums, grad_norm, taken)
        return PendingStep(sums, grad_norm, taken, learning_rate, self.clock)

    def _detail(self, batches: Sequence[TokenBatch]) -> Detail:
        traced = batches[0].tokens_BS.shape[0] if self.config.logging.routing_traces else 0
        place = None
        if self._last_sums is not None:
            tokens_L, _, score_L, square_L = self._last_sums.routing_LF[:, :4].unbind(1)
            mean_L = score_L / tokens_L.clamp_min(1.0)
            variance_L = square_L / tokens_L.clamp_min(1.0) - mean_L.square()
            place = (mean_L, variance_L.clamp_min(0.0).sqrt())
        seconds = self.stopwatch.seconds()
        layers = len(parse_schedule(self.config.model.schedule))
        return Detail(layers, len(batches), place, seconds, traced)

    @torch.no_grad()
    def _update(self, sums: DeviceSums, grad_norm: torch.Tensor, taken: torch.Tensor) -> None:
        clip, factor = self.config.optimizer.clip_grad, 1.0 / sums.tokens
        if clip > 0.0:
            factor = factor * (clip / (grad_norm + 1.0e-6)).clamp_max(1.0)
        apply_update(self.optimizer, factor.float(), taken)
        meta_router = meta_router_of(self.chunks)
        if meta_router is not None and meta_router.config.pooling == "running":
            meta_router.update_running(sums.embedding_mean_H, taken)
        routers = [layer.router for layer in routed_layers(self.chunks) if layer.router is not None]
        controllers = [router.controller for router in routers if router.controller is not None]
        if controllers:
            thresholds = [router.threshold for router in routers]
            # Not indexed with a list, which would be copied to the device while the host waits.
            sums_RF = torch.stack([sums.routing_LF[router.layer_number - 1] for router in routers])
            move_thresholds(self.config.model.router, thresholds, controllers, sums_RF, taken)

    @torch.no_grad()
    def validation_loss(self, batches: Sequence[TokenBatch]) -> float:
        """Mean cross entropy, nats a token, over all replicas' batches; leaves training state alone."""
        with evaluation_mode(self.wrapped):
            reports = self._run(batches, forward_only=True)
        loss, tokens = validation_sums(reports, self.world)
        return loss / max(tokens, 1)

    def _run(self, batches: Sequence[TokenBatch], forward_only: bool) -> list[torch.Tensor]:
        reports: list[torch.Tensor] = self.forward_backward(
            forward_step_func=self.forward_step,
            data_iterator=[map(self._seen, batches) for _ in self.chunks],
            model=self.wrapped,
            num_microbatches=len(batches),
            seq_length=self.config.model.seq_length,
            micro_batch_size=batches[0].tokens_BS.shape[0],
            forward_only=forward_only,
        )
        return reports

    def _seen(self, batch: TokenBatch) -> TokenBatch:
        self.on_batch()
        return batch

    def sharded_state(self, is_loading: bool) -> dict[str, Any]:
        """Weights and optimizer state as megatron-core's distributed checkpoint wants them."""
        weights = self.sharded_weights()
        optimizer_state = self.optimizer.sharded_state_dict(
            weights, is_loading=is_loading, metadata=dict(SHARDING_METADATA)
        )
        return {**weights, "optimizer": optimizer_state}

    def sharded_weights(self) -> dict[str, Any]:
        """The weights alone, each chunk's under a name of its own."""
        if self.config.parallel.overlap_param_gather:
            for wrapped in self.wrapped:
                wrapped.start_param_sync(force_sync=True)
        return {
            name: chunk.sharded_state_dict(metadata=dict(SHARDING_METADATA))
            for name, chunk in self._named_chunks()
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Take what `sharded_state` described, as loaded."""
        for name, chunk in self._named_chunks():
            chunk.load_state_dict(state[name])
        self.optimizer.load_state_dict(state["optimizer"])
        give_each_parameter_its_step(self.optimizer)

    def load_weights(self, state: dict[str, Any]) -> None:
        """Take what `sharded_weights` described, as loaded; float32 master weights follow."""
        for name, chunk in self._named_chunks():
            chunk.load_state_dict(state[name])
        self.optimizer.reload_model_params()

    def _named_chunks(self) -> list[tuple[str, ChiarModel]]:
        if len(self.chunks) == 1:
            return [("model", self.module)]
        return [(f"model{number}", chunk) for number, chunk in enumerate(self.chunks)]


@contextmanager
def evaluation_mode(modules: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Dropout off and nothing counted."""
    was_training = [module.training for module in modules]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for module, training in zip(modules, was_training, strict=True):
            module.train(training)
