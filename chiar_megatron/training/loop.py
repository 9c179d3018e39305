"""The training loop: `pretrain` is what `chiar pretrain` runs on every rank."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import torch.distributed as dist

from chiar_megatron.checkpoint.store import CheckpointStore, make_info
from chiar_megatron.config.load import resolve_config, to_dict
from chiar_megatron.config.schema import RunConfig
from chiar_megatron.config.validate import check_config
from chiar_megatron.data.dataset import Streams, TokenBatch, TokenStream, build_streams
from chiar_megatron.data.loader import BatchLayout, evaluation_batches, read_ahead
from chiar_megatron.data.tokenizer import load_tokenizer
from chiar_megatron.errors import EXIT_DONE, EXIT_RESUMABLE, CheckpointError, ChiarError, DataError
from chiar_megatron.runtime.device import set_deterministic
from chiar_megatron.runtime.distributed import World
from chiar_megatron.training.decisions import DecisionRecorder, DecisionReplay
from chiar_megatron.training.engine import MegatronEngine, StepResult
from chiar_megatron.training.hooks import Schedule, StopSignals
from chiar_megatron.training.report import Reporter
from chiar_megatron.training.restore import restore
from chiar_megatron.training.run_folder import RunFolder

_log = logging.getLogger(__name__)


def pretrain(config: RunConfig, world: World) -> int:
    """Train, or continue, the run of a recipe; returns the exit code (0 done, 75 stopped, resumable).

    Raises ChiarError for whatever the user can mend.
    """
    signals = StopSignals()
    config = resolve(config)
    check_config(config, world.size)
    folder = RunFolder(config.run_dir)
    if world.is_main:
        folder.write_start(config, world.size)
    dist.barrier()
    if config.training.deterministic:
        set_deterministic()
    streams = build_streams(config, is_builder=world.is_main, barrier=dist.barrier)
    if streams.train is None:
        raise DataError("data.train is empty: give the prefix of preprocessed files (see `chiar preprocess`)")
    trainer = Trainer(config, world, folder, streams, signals)
    try:
        return trainer.run()
    except BaseException as error:
        trainer.fail(error)
        raise


def resolve(config: RunConfig) -> RunConfig:
    """Fill the recipe's nulls, from the tokenizer where there is one."""
    if config.data.tokenizer is None:
        return resolve_config(config, vocab_size=None, eod_token=None)
    tokenizer = load_tokenizer(config.data.tokenizer)
    return resolve_config(config, vocab_size=tokenizer.vocab_size, eod_token=tokenizer.eod)


class Trainer:
    """One attempt at a run: from where it stands to its end, a stop, or a failure."""

    def __init__(
        self, config: RunConfig, world: World, folder: RunFolder, streams: Streams, signals: StopSignals
    ) -> None:
        self.config = config
        self.world = world
        self.folder = folder
        self.streams = streams
        runtime = config.runtime
        self.recorder = DecisionRecorder(Path(runtime.record_decisions)) if runtime.record_decisions else None
        replay = DecisionReplay(Path(runtime.replay_decisions)) if runtime.replay_decisions else None
        self.engine = MegatronEngine(config, world, self.recorder, replay)
        self.store = CheckpointStore(folder.checkpoints, config.checkpoint)
        self.schedule = Schedule(config, world.is_main, signals)
        self.step, self.tokens_seen = restore(config, self.engine, self.store)
        self.saved_step = self.step if self.step > 0 else None
        self.bad_in_a_row = 0
        self.reporter = Reporter(config, world, folder.path, self.step, self.tokens_seen)

    def run(self) -> int:
        """Train to the end of the recipe, or to a stop."""
        training = self.config.training
        last = min(training.steps, training.exit_after_steps or training.steps)
        if self.step >= last:
            self.reporter.say(f"nothing to do: {self.step} of {training.steps} steps are done")
        batches = read_ahead(self._train, self._layout(), self.step, last, self.config.data.num_workers)
        stop_reason = None
        for step_batches in batches:
            result = self.engine.train_step(step_batches, self.step, self.schedule.requests())
            self.step += 1
            self.tokens_seen += result.sums.tokens
            self._judge(result)
            self._report_and_validate(result)
            self.store.poll()
            if result.sums.requests.stop:
                stop_reason = self.schedule.stop_reason()
                break
            if result.sums.requests.save or self.schedule.save_due(self.step):
                self._save(required=False)
        return self._finish(stop_reason)

    @property
    def _train(self) -> TokenStream:
        assert self.streams.train is not None
        return self.streams.train

    def _layout(self, micro_batch_size: int | None = None) -> BatchLayout:
        training = self.config.training
        return BatchLayout(
            training.global_batch_size,
            micro_batch_size or training.micro_batch_size,
            self.world.data_parallel_rank,
            self.world.data_parallel_size,
        )

    def _judge(self, result: StepResult) -> None:
        """Count steps that were skipped for a non-finite loss or gradient; too many in a row end the run."""
        if result.taken:
            self.bad_in_a_row = 0
            return
        self.bad_in_a_row += 1
        self.reporter.bad_step(self.step, result)
        if self.bad_in_a_row < self.config.training.max_bad_steps:
            return
        self._save(required=True)
        raise ChiarError(
            f"loss or gradient was not finite in {self.bad_in_a_row} steps in a row (training.max_bad_steps), "
            f"up to step {self.step}; those steps changed no weights, and a checkpoint was kept. Go back with "
            "checkpoint.load_step=N, and lower optimizer.lr or leave text out with data.skip_samples"
        )

    def _report_and_validate(self, result: StepResult) -> None:
        validation: dict[str, float] = {}
        if self.schedule.validation_due(self.step):
            started = time.monotonic()
            validation = self._validate(self.streams.validation)
            self.reporter.pause(time.monotonic() - started)
        self.reporter.step(self.step, self.tokens_seen, result, validation)

    def _validate(self, streams: dict[str, TokenStream]) -> dict[str, float]:
        """Mean loss on each component apart. With `batch` pooling every batch is one window, or the loss
        would depend on which windows share a batch."""
        pooling = self.config.model.meta_router
        one_window = pooling.enabled and pooling.pooling == "batch"
        layout = self._layout(1 if one_window else None)
        losses = {}
        for name, stream in streams.items():
            batches: list[TokenBatch] = list(
                evaluation_batches(stream, self.config.training.eval_steps, layout)
            )
            if batches:
                losses[name] = self.engine.validation_loss(batches)
        return losses

    def _save(self, required: bool) -> None:
        """Write a checkpoint. A failed one is reported and, unless required, training goes on without it."""
        if self.saved_step == self.step:
            return
        started = time.monotonic()
        parallel = self.config.parallel
        layout = {
            "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
            "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
            "data_parallel_size": self.world.data_parallel_size,
        }
        info = make_info(self.step, self.tokens_seen, True, layout, to_dict(self.config))
        try:
            self.store.save(self.engine.sharded_state(is_loading=False), info)
            self.saved_step = self.step
            self.reporter.event("save", step=self.step, seconds=round(time.monotonic() - started, 3))
        except CheckpointError as error:
            self.reporter.event("save_failed", step=self.step, error=str(error))
            if required:
                raise
            if self.world.is_main:
                _log.warning("%s; training goes on, the next save may succeed", error)
        self.schedule.saved()
        self.reporter.pause(time.monotonic() - started)

    def _finish(self, stop_reason: str | None) -> int:
        self._save(required=True)
        self.store.finish_pending()
        if self.recorder is not None:
            self.recorder.write(self.world.rank)
        done = self.step >= self.config.training.steps
        if done and self.streams.test and self.config.training.eval_steps > 0:
            self.reporter.test(self._validate(self.streams.test))
        code = EXIT_DONE if done else EXIT_RESUMABLE
        reason = "done" if done else (stop_reason or "exit_after_steps")
        self._end(reason, code)
        return code

    def fail(self, error: BaseException) -> None:
        """Leave the reason of a failure in the run folder."""
        reason = "error: " + (str(error).splitlines() or [type(error).__name__])[0]
        self._end(reason, 2 if isinstance(error, ChiarError) else 1)

    def _end(self, reason: str, code: int) -> None:
        self.reporter.event("exit", step=self.step, reason=reason, exit_code=code)
        self.reporter.close()
        if self.world.is_main:
            self.folder.write_exit(reason, self.step, code)
