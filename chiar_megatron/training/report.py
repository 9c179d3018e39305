"""What a run tells its user: progress line, metrics, events. Rank 0 writes; other ranks stay silent."""

from __future__ import annotations

import logging
import sys
import time
from dataclasses import asdict
from typing import Any, Literal

import torch

from chiar_megatron.checkpoint.claim import Claim
from chiar_megatron.config.load import to_dict
from chiar_megatron.config.routing import computes_all
from chiar_megatron.config.schedule import parse_schedule
from chiar_megatron.config.schema import ModelConfig, RunConfig, TrainingConfig
from chiar_megatron.errors import FencedError
from chiar_megatron.metrics import goodput
from chiar_megatron.metrics.alarms import RoutingAlarms
from chiar_megatron.metrics.jsonl import read_events, read_metrics
from chiar_megatron.metrics.meters import Throughput, device_peak, mfu
from chiar_megatron.metrics.progress import ProgressLine
from chiar_megatron.metrics.routing import BalanceSummary
from chiar_megatron.metrics.traces import TraceWriter
from chiar_megatron.metrics.writers import MultiWriter, open_writers
from chiar_megatron.model.accounting import model_flops_per_token, parameter_count
from chiar_megatron.model.pipeline import pipeline_cut
from chiar_megatron.routing.balance import capacity_rows
from chiar_megatron.runtime.distributed import World
from chiar_megatron.runtime.paths import (
    compiles,
    describe_paths,
    kernels_available,
    replays_steps,
    why_launched,
)
from chiar_megatron.training.engine import StepResult

_log = logging.getLogger(__name__)


def describe(config: RunConfig, world: World) -> list[str]:
    """What is about to run, and by which paths, in a few lines; config: resolved."""
    model, parallel, training = config.model, config.parallel, config.training
    count = parameter_count(model)
    layout = [f"tensor {world.tensor_parallel_size}{' with sequence' if parallel.sequence_parallel else ''}"]
    layout += [f"context {world.context_parallel_size}"] if world.context_parallel_size > 1 else []
    virtual = parallel.virtual_pipeline_model_parallel_size
    interleaved = f" in {virtual} chunks each" if virtual > 1 else ""
    layout += [f"pipeline {world.pipeline_size}{interleaved}", f"data {world.data_parallel_size}"]
    if parallel.distributed_optimizer:
        layout.append("distributed optimizer")
    overlapped = {"gradients": parallel.overlap_grad_reduce, "weights": parallel.overlap_param_gather}
    if any(overlapped.values()):
        layout.append(" and ".join(name for name, on in overlapped.items() if on) + " communicated meanwhile")
    lines = [
        f"model {model.schedule}: {count.total:,} parameters, {count.non_embedding:,} without embeddings",
        f"{world.size} process(es): {', '.join(layout)}; {training.precision} on {world.device.type}; "
        f"{training.global_batch_size * model.seq_length:,} tokens a step",
    ]
    if world.pipeline_size > 1:
        lines.append(f"pipeline cut ({parallel.layout}) {pipeline_cut(config)}")
    if "R" in model.schedule:
        lines.append(_routing_line(model, training))
    lines += [f"{part}: {path} ({why})" for part, path, why in describe_paths(world.device)]
    if compiles(world.device, config.runtime.compile):
        lines.append("layers are compiled at the first step")
    if replays_steps(config, world.device):
        lines.append("forward and backward are replayed as one CUDA graph from the fourth step on")
    elif kernels_available(world.device):
        lines.append(f"every kernel is launched by the host, no CUDA graph: {why_launched(config)}")
    peak = device_peak(torch.cuda.get_device_name(world.device)) if world.device.type == "cuda" else None
    if peak is not None:
        lines.append(f"MFU counts useful FLOPs against {peak}")
    return lines


def _routing_line(model: ModelConfig, training: TrainingConfig) -> str:
    router = model.router
    parts = [f"router {router.kind}"]
    if computes_all(router):
        return f"{parts[0]}; dense: every operator sees every token"
    parts.append("each token computed by its operator alone")
    if router.target is not None:
        parts.append(f"thresholds held at a share of {router.target:g}")
    rows = capacity_rows(router, training.micro_batch_size * model.seq_length)
    if rows is None:
        parts.append("as many rows as light tokens (on CUDA routed layers wait for the host and run eagerly)")
    else:
        parts.append(f"{rows:,} rows of attention a micro-batch")
    return "; ".join(parts)


class Reporter:
    """Collects the figures of each step and writes them every `logging.log_interval_steps`."""

    def __init__(
        self, config: RunConfig, world: World, claim: Claim, step: int, tokens_seen: int, began: float
    ) -> None:
        """began: when this process did, by the monotonic clock."""
        self.config = config
        self.world = world
        self.bad_steps = 0
        self.throughput = Throughput(config.training.steps, time.monotonic(), step=step)
        self.clock = goodput.WorkClock(began, time.monotonic())
        self.progress = ProgressLine(config.training.steps, sys.stdout.isatty())
        self.writers: MultiWriter | None = None
        self.restarts = 0
        kinds = parse_schedule(config.model.schedule)
        self.alarms = RoutingAlarms([number for number, kind in enumerate(kinds, 1) if kind == "R"])
        self.traces: TraceWriter | None = None
        if world.is_main:
            self.writers = open_writers(claim, config.logging, step, to_dict(config))
            self.restarts = self.writers.restarts
            self.times(step)
            if step > 0:
                self.alarms.replay(read_metrics(claim.run_dir), read_events(claim.run_dir), step)
            if config.logging.routing_traces:
                self.traces = TraceWriter(claim, config.logging.routing_traces, step)
            for line in describe(config, world):
                self.say(line)
            if step > 0:
                self.say(f"continuing after step {step} ({tokens_seen:,} tokens)")

    def pause(self, seconds: float, cause: Literal["save", "evaluation"]) -> None:
        """Time that is not training's."""
        self.throughput.pause(seconds)
        self.clock.pause(seconds, cause)

    def times(self, step: int) -> None:
        """Tell what the time of this attempt went into so far."""
        self.event(goodput.EVENT, step=step, **self.clock.times(time.monotonic()))

    def is_due(self, step: int) -> bool:
        """Whether a record follows this step by its number alone; every rank answers alike."""
        return step % self.config.logging.log_interval_steps == 0 or step == self.config.training.steps

    def count(self, result: StepResult) -> None:
        """A step is done: its tokens and its time, before anything that pauses training."""
        self.throughput.add_step(result.sums.tokens, result.ended)
        self.clock.step_done(result.ended)

    def step(self, step: int, tokens_seen: int, result: StepResult, validation: dict[str, float]) -> None:
        """Report one finished step, which has been counted."""
        if self.clock.is_due(time.monotonic()):
            self.times(step)
        self._watch(step, result)
        if self.writers is None or not (self.is_due(step) or validation):
            return
        reading = self.throughput.update(step)
        routing = result.sums.routing
        metrics: dict[str, Any] = {
            "step": step,
            "loss": result.sums.loss,
            "grad_norm": result.grad_norm,
            "learning_rate": result.learning_rate,
            "tokens_per_second": reading.tokens_per_second,
            "step_seconds": reading.step_seconds,
            "tokens_seen": tokens_seen,
            "routed_fraction": routing.routed_fraction,
            "useful_over_executed": routing.useful_over_executed,
            "overflow_fraction": routing.overflow_fraction,
            "entropy_mean": routing.entropy_mean,
            "score_mean": routing.score_mean,
            "score_std": routing.score_std,
            "gate": result.sums.gate,
            "bad_steps": self.bad_steps,
            "alarms": self.alarms.figures(),
        }
        if result.sums.balance is not None:
            metrics |= self._balance(result.sums.balance)
        if self.config.training.z_loss > 0.0:
            metrics["z_loss"] = result.sums.z_loss
        self._add_mfu(metrics)
        if validation:
            metrics["validation"] = validation
        self.writers.log(step, metrics)
        self.progress.show({**metrics, "eta_seconds": reading.eta_seconds, "restarts": self.restarts})

    def _balance(self, balance: BalanceSummary) -> dict[str, Any]:
        figures: dict[str, Any] = {"rank_seconds": balance.step_time()}
        if balance.rank_max_over_mean:
            figures["rank_max_over_mean"] = balance.rank_max_over_mean
            figures["micro_batch_max_over_mean"] = balance.micro_batch_max_over_mean
            figures["executed_max_over_mean"] = balance.executed_max_over_mean
            figures["all_layers_executed_max_over_mean"] = balance.all_layers_executed_max_over_mean
            if self.config.model.router.kind not in ("soft", "hard"):
                figures["threshold"] = balance.threshold
        if balance.score_histogram:
            figures["score_histogram"] = balance.score_histogram
        return figures

    def _watch(self, step: int, result: StepResult) -> None:
        """Alarms, each once when it begins and when it ends; and traces."""
        routing, balance = result.sums.routing, result.sums.balance
        imbalance = None if balance is None else balance.rank_max_over_mean
        for change in self.alarms.step(step, routing.routed_fraction, routing.overflow_fraction, imbalance):
            self.event("alarm" if change.active else "alarm_over", step=step, **asdict(change))
            if self.world.is_main:
                _log.warning("step %d, %s", step, change)
        if self.traces is None or result.sums.traces is None:
            return
        try:
            self.traces.write(step, result.sums.traces)
        except FencedError:  # all ranks together learn of it soon
            self.traces = None
        except OSError as error:
            _log.warning("routing traces cannot be written (%s); training goes on without them", error)
            self.traces = None

    def _add_mfu(self, metrics: dict[str, Any]) -> None:
        if self.world.device.type != "cuda":
            return
        peak = device_peak(torch.cuda.get_device_name(self.world.device))
        if peak is not None:
            model = self.config.model
            pairs = zip(metrics["routed_fraction"], metrics["overflow_fraction"], strict=True)
            attended = [share * (1.0 - lost) for share, lost in pairs]
            flops = model_flops_per_token(model, model.seq_length, attended or 0.0)
            metrics["mfu"] = mfu(flops, metrics["tokens_per_second"], self.world.size, peak.flops)

    def bad_step(self, step: int, result: StepResult) -> None:
        """A step that every rank skipped."""
        self.bad_steps += 1
        self.event("bad_step", step=step, loss=str(result.sums.loss), grad_norm=str(result.grad_norm))
        self.say(
            f"step {step} skipped on all ranks: loss {result.sums.loss}, gradient norm {result.grad_norm}"
        )

    def test(self, losses: dict[str, float]) -> None:
        """Losses on the test set at the end of a run."""
        self.event("test", **losses)
        self.say("test " + "  ".join(f"{name} {loss:.4f}" for name, loss in losses.items()))

    def event(self, kind: str, **fields: Any) -> None:
        """One line in `events.jsonl`."""
        if self.writers is not None:
            self.writers.event(kind, **fields)

    def say(self, text: str) -> None:
        """One line on the terminal."""
        if self.world.is_main:
            self.progress.say(text)

    def close(self) -> None:
        """Write what is pending."""
        if self.writers is not None:
            self.writers.close()
            self.writers = None
