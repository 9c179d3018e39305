"""The training loop: `pretrain` is what `chiar pretrain` runs on every rank."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from chiar_megatron.checkpoint.agree import on_main
from chiar_megatron.checkpoint.claim import join_claim
from chiar_megatron.checkpoint.files import CheckpointInfo
from chiar_megatron.checkpoint.store import CheckpointStore, Commit, make_info
from chiar_megatron.config.load import resolve_config, to_dict
from chiar_megatron.config.schema import RunConfig
from chiar_megatron.config.validate import check_config
from chiar_megatron.data.dataset import Streams, TokenBatch, TokenStream, build_streams, read_streams
from chiar_megatron.data.loader import BatchLayout, evaluation_batches, read_ahead
from chiar_megatron.data.tokenizer import load_tokenizer
from chiar_megatron.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_RESUMABLE,
    CheckpointError,
    ChiarError,
    DataError,
    NonFiniteError,
)
from chiar_megatron.runtime.device import set_deterministic
from chiar_megatron.runtime.distributed import World
from chiar_megatron.runtime.watchdog import EXIT_HUNG, Progress, Watchdog
from chiar_megatron.training.decisions import DecisionRecorder, DecisionReplay
from chiar_megatron.training.engine import MegatronEngine, PendingStep, StepResult
from chiar_megatron.training.hooks import Schedule
from chiar_megatron.training.report import Reporter
from chiar_megatron.training.restore import restore
from chiar_megatron.training.run_folder import RunFolder
from chiar_megatron.training.signals import StopSignals

_log = logging.getLogger(__name__)


def pretrain(
    config: RunConfig,
    world: World,
    signals: StopSignals | None = None,
    open_streams: Callable[[RunConfig], Streams] | None = None,
    attempt: int | None = None,
) -> int:
    """Train, or continue, the run of a recipe; returns the exit code (0 done, 75 stopped, resumable).

    signals: noted since the process began; None notes them from now on. open_streams: called on every rank
    with the resolved config; None reads what `data` names. attempt: that a job's script has begun for these
    ranks; None begins one, to which older copies of the run give way. Raises ChiarError for whatever the user
    can mend, FencedError if a newer attempt has begun.
    """
    signals = signals or StopSignals()
    config = resolve(config)
    check_config(config, world.size)
    folder = RunFolder(on_main(lambda: join_claim(Path(config.run_dir), attempt)))
    on_main(lambda: folder.write_start(world.size))
    with _watchdog(config, world, folder) as progress:
        return _attempt(config, world, folder, signals, open_streams, progress)


def _watchdog(config: RunConfig, world: World, folder: RunFolder) -> Watchdog:
    runtime = config.runtime
    seconds = runtime.hang_seconds
    if seconds is None:  # before torch's own time-out, which names nobody
        seconds = 0.9 * runtime.collective_timeout_seconds

    def report(verdict: str, step: int) -> None:
        folder.write_exit(f"hang: {verdict}", step, EXIT_HUNG)

    stacks = folder.path / "hangs" / f"{folder.claim.number:06d}"
    return Watchdog(world.env, seconds, runtime.start_timeout_seconds, stacks, report)


def _attempt(
    config: RunConfig,
    world: World,
    folder: RunFolder,
    signals: StopSignals,
    open_streams: Callable[[RunConfig], Streams] | None,
    progress: Progress,
) -> int:
    if config.training.deterministic:
        set_deterministic()
    trainer = None
    try:
        if open_streams is None:
            streams = shared_streams(config)
        else:
            streams = open_streams(config)
        if streams.train is None:
            raise DataError(
                "data.train is empty: give the prefix of preprocessed files (see `chiar preprocess`)"
            )
        progress.beat()
        trainer = Trainer(config, world, folder, streams, signals, progress)
        on_main(lambda: folder.write_config(config))
        return trainer.run()
    except BaseException as error:
        progress.wait_if_hung()
        kind = "not finite" if isinstance(error, NonFiniteError) else "error"
        reason = f"{kind}: " + (str(error).splitlines() or [type(error).__name__])[0]
        code = error.exit_code if isinstance(error, ChiarError) else EXIT_FAILED
        if trainer is not None:
            trainer.end(reason, code)
        elif world.is_main:
            folder.write_exit(reason, 0, code)
        raise


def shared_streams(config: RunConfig) -> Streams:
    """The run's streams on every rank, by an index cache that rank 0 writes first. Raises as `build_streams`
    does, on all ranks alike."""

    def build() -> None:
        build_streams(config)

    on_main(build)
    return read_streams(config)


def resolve(config: RunConfig) -> RunConfig:
    """Fill the recipe's nulls, from the tokenizer where there is one."""
    if config.data.tokenizer is None:
        return resolve_config(config, vocab_size=None, eod_token=None)
    tokenizer = load_tokenizer(config.data.tokenizer)
    return resolve_config(config, vocab_size=tokenizer.vocab_size, eod_token=tokenizer.eod)


class Trainer:
    """One attempt at a run: from where it stands to its end, a stop, or a failure."""

    def __init__(
        self,
        config: RunConfig,
        world: World,
        folder: RunFolder,
        streams: Streams,
        signals: StopSignals,
        progress: Progress,
    ) -> None:
        self.config = config
        self.world = world
        self.folder = folder
        self.streams = streams
        self.progress = progress
        runtime = config.runtime
        self.recorder = DecisionRecorder(Path(runtime.record_decisions)) if runtime.record_decisions else None
        replay = DecisionReplay(Path(runtime.replay_decisions)) if runtime.replay_decisions else None
        self.engine = MegatronEngine(config, world, self.recorder, replay)
        self.engine.on_batch = progress.beat
        self.store = CheckpointStore(folder.checkpoints, config.checkpoint, folder.claim)
        self.schedule = Schedule(config, folder.claim, world.is_main, signals)
        restored = restore(config, self.engine, self.store)
        self.step, self.tokens_seen = restored.step, restored.tokens_seen
        self.first_step = self.step
        self.saved_step = self.step if self.step > 0 else None
        self.bad_in_a_row = 0
        self.save_asked = False
        self.under_way: deque[PendingStep] = deque()
        self.reporter = Reporter(config, world, folder.claim, self.step, self.tokens_seen, signals.started)
        for problem in restored.problems:
            self._warn("checkpoint_problem", problem)

    def run(self) -> int:
        """Train to the end of the recipe, or to a stop."""
        training = self.config.training
        last = min(training.steps, training.exit_after_steps or training.steps)
        if self.step >= last:
            self.reporter.say(f"nothing to do: {self.step} of {training.steps} steps are done")
        batches = read_ahead(self._train, self._layout(), self.step, last, self.config.data.num_workers)
        stop_reason = None
        for step, step_batches in enumerate(batches, start=self.step):
            self.progress.mark("training", step + 1)
            detailed = self.reporter.is_due(step + 1) or self.schedule.validation_due(step + 1)
            self.under_way.append(
                self.engine.launch_step(step_batches, step, self.schedule.requests, detailed)
            )
            # The device works on while the host judges the step before, unless what follows this step needs
            # the weights as they are after it.
            waits = self.save_asked or self.bad_in_a_row > 0 or self.schedule.waits_for(step + 1)
            while len(self.under_way) > (0 if waits else self.engine.steps_ahead):
                stop_reason = self._settle_step(self.under_way.popleft()) or stop_reason
            if stop_reason is not None:
                break
            self.progress.mark("reading data", step + 2)
        while self.under_way:
            self._settle_step(self.under_way.popleft())
        return self._finish(stop_reason)

    def _settle_step(self, pending: PendingStep) -> str | None:
        """Wait for a step and do what follows it; why the run stops, if it does."""
        result = pending.result()
        self.step += 1
        self.tokens_seen += result.sums.tokens
        self.reporter.count(result)
        self._judge(result)
        self._report_and_validate(result)
        self._settle(self.store.poll)
        if result.sums.requests.stop:
            return self.schedule.stop_reason()
        # A save that another rank's clock asks for waits until nothing is under way.
        self.save_asked |= result.sums.requests.save
        wanted = self.save_asked or self.schedule.save_due(self.step)
        if wanted and self.bad_in_a_row == 0 and not self.under_way:
            self._save(required=False)
            self.save_asked = False
        return None

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
        if self.bad_in_a_row < self.config.training.max_bad_steps or self.under_way:
            return  # what is under way may still be a good step, and is part of the weights by now
        # Weights are as before those steps, but maybe near their end: older checkpoints stay.
        self._save(required=True, delete_old=False)
        raise NonFiniteError(
            f"loss or gradient was not finite in {self.bad_in_a_row} steps in a row "
            f"(training.max_bad_steps), up to step {self.step}; those steps changed no weights, and a "
            "checkpoint was kept. Go back with checkpoint.load_step=N, and lower optimizer.lr or leave text "
            "out with data.skip_samples"
        )

    def _report_and_validate(self, result: StepResult) -> None:
        validation: dict[str, float] = {}
        if self.schedule.validation_due(self.step):
            started = time.monotonic()
            self.progress.mark("validation", self.step)
            validation = self._validate(self.streams.validation)
            self.reporter.pause(time.monotonic() - started, "evaluation")
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

    def _save(self, required: bool, delete_old: bool = True) -> None:
        """Write a checkpoint. A failed one is reported and, unless required, training goes on without it."""
        started = time.monotonic()
        self.progress.mark("saving", self.step)
        self._settle(self.store.finish)
        if self.saved_step != self.step:
            info = self._info()
            state = self.engine.sharded_state(is_loading=False)
            self.saved_step = self.step
            in_background = self.config.checkpoint.async_save and not required
            save = self.store.start if in_background else self.store.save
            self._settle(lambda: save(state, info, delete_old), required)
        self.schedule.saved()
        self.progress.mark("saved", self.step)
        self.reporter.pause(time.monotonic() - started, "save")
        self.reporter.times(self.step)

    def _info(self) -> CheckpointInfo:
        parallel = self.config.parallel
        layout = {
            "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
            "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
            "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline_model_parallel_size,
            "context_parallel_size": parallel.context_parallel_size,
            "data_parallel_size": self.world.data_parallel_size,
        }
        return make_info(self.step, self.tokens_seen, True, layout, to_dict(self.config))

    def _settle(self, save: Callable[[], Commit | None], required: bool = False) -> None:
        """Do a part of a save, and report what came of it."""
        try:
            commit = save()
        except CheckpointError as error:
            self.saved_step = None
            if required:
                self.reporter.event("save_failed", step=self.step, error=str(error))
                raise
            self._warn("save_failed", f"{error}; training goes on, the next save may succeed")
            return
        if commit is not None:
            self.reporter.event("save", step=commit.step, seconds=round(commit.seconds, 3))

    def _warn(self, event: str, text: str) -> None:
        self.reporter.event(event, step=self.step, error=text)
        if self.world.is_main:
            _log.warning("%s", text)

    def _finish(self, stop_reason: str | None) -> int:
        on_main(self.folder.claim.check)
        done = self.step >= self.config.training.steps
        if done and self.bad_in_a_row == self.step - self.first_step > 0:
            # Without a checkpoint of them the same command tries these steps again.
            raise NonFiniteError(
                f"loss or gradient was not finite in all {self.bad_in_a_row} step(s) of this attempt, up to "
                f"the last, {self.step}; they changed no weights, and no checkpoint was written. Lower "
                "optimizer.lr or model.init_std, or leave text out with data.skip_samples"
            )
        self._save(required=True)
        if self.recorder is not None:
            self.recorder.write(self.world.rank)
        if done and self.streams.test and self.config.training.eval_steps > 0:
            started = time.monotonic()
            self.progress.mark("test", self.step)
            self.reporter.test(self._validate(self.streams.test))
            self.reporter.pause(time.monotonic() - started, "evaluation")
        code = EXIT_DONE if done else EXIT_RESUMABLE
        reason = "done" if done else (stop_reason or "exit_after_steps")
        self.end(reason, code)
        self.schedule.obeyed()
        return code

    def end(self, reason: str, code: int) -> None:
        """Leave the reason in the run folder."""
        self.reporter.times(self.step)
        self.reporter.event("exit", step=self.step, reason=reason, exit_code=code)
        self.reporter.close()
        if self.world.is_main:
            self.folder.write_exit(reason, self.step, code)
            self.folder.write_goodput()
