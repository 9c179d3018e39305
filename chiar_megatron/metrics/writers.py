"""Where the figures of a run go: `metrics.jsonl` and `events.jsonl` always, TensorBoard and wandb by option.

After a resume at step S nothing that was written for steps after S counts any more: those steps run again.
"""

from __future__ import annotations

import logging
import netrc
import os
import threading
import uuid
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

from chiar_megatron.checkpoint.claim import Claim
from chiar_megatron.config.schedule import parse_schedule
from chiar_megatron.config.schema import LoggingConfig
from chiar_megatron.errors import ChiarError, ConfigError
from chiar_megatron.metrics.jsonl import JsonlWriter, LineFile, Metrics, read_lines
from chiar_megatron.routing.statistics import BIN_WIDTH, BINS, FIRST_EDGE

_log = logging.getLogger(__name__)


class RunWriter(Protocol):
    """One place that figures go to."""

    name: str
    """For messages."""

    def log(self, step: int, metrics: Metrics) -> None:
        """Write the figures of one step. Raises OSError if they cannot be written."""

    def close(self) -> None:
        """Write what is pending. Raises OSError if it cannot be written."""


def flatten(metrics: Metrics, routed_layers: Sequence[int]) -> dict[str, float]:
    """Scalars by name, for tools that know nothing else; None is left out.

    Args:
        metrics: figures of one step.
        routed_layers: number in the model (the first layer is 1) of each entry of a per-layer list, which
            becomes `routed_fraction/layer_3`. Names become `validation/wiki`. Histograms: see `histograms`.
    """
    flat: dict[str, float] = {}
    for key, value in metrics.items():
        if isinstance(value, Mapping):
            flat.update({f"{key}/{name}": inner for name, inner in value.items()})
        elif isinstance(value, Sequence):
            numbered = zip(routed_layers, value, strict=True)
            flat.update({f"{key}/layer_{n}": x for n, x in numbered if isinstance(x, (int, float))})
        elif value is not None and key != "step":
            flat[key] = value
    return flat


def histograms(metrics: Metrics, routed_layers: Sequence[int]) -> dict[str, list[int]]:
    """Counts by name (`score_histogram/layer_3`), in the bins of `routing/statistics.py`."""
    found = metrics.get("score_histogram")
    if not isinstance(found, Sequence):
        return {}
    named = zip(routed_layers, found, strict=True)
    return {f"score_histogram/layer_{n}": list(c) for n, c in named if isinstance(c, Sequence)}


class TensorBoardWriter:
    """Event files in `<run folder>/tensorboard`; a resume hides what was logged for later steps.

    They are hard links to those in the attempt's own folder. The last attempt's is taken over as a copy: what
    that one, woken late, still appends is not seen here.
    """

    name = "TensorBoard"

    def __init__(self, claim: Claim, resume_step: int, routed_layers: Sequence[int]) -> None:
        """Raises ConfigError if the package tensorboard is missing, ChiarError if it cannot be written."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                f"logging.tensorboard=true needs the package tensorboard ({error}): "
                "`pip install tensorboard`, or set logging.tensorboard=false"
            ) from error
        self._routed_layers = tuple(routed_layers)
        self._claim = claim
        threading.excepthook = _leave_out_told_errors
        folder, own = claim.run_dir / "tensorboard", claim.folder / "tensorboard"
        try:
            folder.mkdir(exist_ok=True)
            if older := sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns):
                os.close(claim.take_over(older[-1], older[-1].stat().st_size))
            self._writer: Any = SummaryWriter(str(own), purge_step=resume_step + 1 if resume_step else 0)
            self._writer.flush()
            # It appends by the file's name: that in the claim's folder, which a newer attempt takes away.
            for path in own.iterdir():
                os.link(path, folder / path.name)
        except OSError as error:
            claim.check()
            raise ChiarError(
                f"{folder} cannot be written ({error.strerror}): check the run folder"
            ) from error

    def log(self, step: int, metrics: Metrics) -> None:
        if self._claim.is_lost():
            return
        for key, value in flatten(metrics, self._routed_layers).items():
            self._writer.add_scalar(key, value, step)
        for key, counts in histograms(metrics, self._routed_layers).items():
            self._add_histogram(key, counts, step)
        self._writer.flush()  # a killed job keeps its curves

    def _add_histogram(self, key: str, counts: Sequence[int], step: int) -> None:
        edges = _bin_edges()
        middles = [(low + high) / 2 for low, high in zip(edges, edges[1:], strict=False)]
        moments = [sum(n * x**power for n, x in zip(counts, middles, strict=True)) for power in (1, 2)]
        self._writer.add_histogram_raw(
            key,
            min=edges[0],
            max=edges[-1],
            num=sum(counts),
            sum=moments[0],
            sum_squares=moments[1],
            bucket_limits=edges[1:],
            bucket_counts=list(counts),
            global_step=step,
        )

    def close(self) -> None:
        self._writer.close()


def _leave_out_told_errors(failed: threading.ExceptHookArgs) -> None:
    """What TensorBoard's writing thread cannot write is told in one line when the next figure comes."""
    if not (type(failed.thread).__name__ == "_AsyncWriterThread" and isinstance(failed.exc_value, OSError)):
        threading.__excepthook__(failed)


def _bin_edges() -> list[float]:
    """Edges of the score histogram, in standard deviations; the outermost bins shown as wide as others."""
    return [FIRST_EDGE + BIN_WIDTH * index for index in range(-1, BINS)]


class WandbWriter:
    """A Weights & Biases run that goes on after a resume: its id is kept in `<run folder>/wandb_id.txt`.

    Offline, every attempt leaves a folder of its own under `wandb/`, all of the same id. wandb cannot take
    back what a killed attempt has sent, so the steps that run again after a resume keep their first figures.
    """

    name = "wandb"

    def __init__(
        self,
        claim: Claim,
        config: LoggingConfig,
        config_dict: Mapping[str, object],
        routed_layers: Sequence[int],
    ) -> None:
        """Raises ConfigError: package or key missing, or the server did not answer."""
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                f"logging.wandb_project={config.wandb_project} needs the package wandb ({error}): "
                "`pip install wandb`, or set logging.wandb_project=null"
            ) from error
        mode = wandb_mode(config)
        self._routed_layers = tuple(routed_layers)
        self._errors: type[Exception] = wandb.Error
        self._histogram: Any = wandb.Histogram
        run_dir = claim.run_dir
        try:
            self._run = wandb.init(
                project=config.wandb_project,
                name=run_dir.resolve().name,
                id=_wandb_id(claim),
                resume="allow",
                mode=mode,
                dir=str(run_dir),
                config=dict(config_dict),
            )
        except wandb.Error as error:
            raise ConfigError(
                f"wandb did not start the run ({error}): set logging.wandb_mode=offline and upload "
                f"later with `wandb sync {run_dir}/wandb/offline-run-*`, or set logging.wandb_project=null"
            ) from error
        self._first_step = self._run.step

    def log(self, step: int, metrics: Metrics) -> None:
        if step < self._first_step:
            return
        try:
            figures: dict[str, Any] = {**flatten(metrics, self._routed_layers)}
            for key, counts in histograms(metrics, self._routed_layers).items():
                figures[key] = self._histogram(np_histogram=(counts, _bin_edges()))
            self._run.log(figures, step=step)
        except self._errors as error:
            raise OSError(str(error)) from error

    def close(self) -> None:
        try:
            self._run.finish()
        except self._errors as error:
            raise OSError(str(error)) from error


def wandb_mode(config: LoggingConfig) -> Literal["online", "offline"]:
    """Online if a key is configured (WANDB_API_KEY or netrc), else offline; `logging.wandb_mode` overrules.

    Raises:
        ConfigError: online is asked for without a key, for which wandb would wait at a prompt.
    """
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    has_key = bool(os.environ.get("WANDB_API_KEY"))
    if not has_key:
        try:
            has_key = netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
        except (OSError, netrc.NetrcParseError):
            has_key = False
    if config.wandb_mode == "online" and not has_key:
        raise ConfigError(
            f"logging.wandb_mode=online, but no key for {host} is configured: run `wandb login`, set "
            "WANDB_API_KEY, or set logging.wandb_mode=offline"
        )
    return config.wandb_mode or ("online" if has_key else "offline")


def _wandb_id(claim: Claim) -> str:
    """The run's id, made at the first start and then read from `wandb_id.txt`."""
    path = claim.run_dir / "wandb_id.txt"
    if path.exists() and (kept := path.read_text(encoding="utf-8").strip()):
        return kept
    fresh = uuid.uuid4().hex[:12]
    claim.write(path, fresh + "\n")
    return fresh


class MultiWriter:
    """Every writer of a run behind one interface. A full disk costs figures and one warning, not the run."""

    def __init__(self, writers: Sequence[RunWriter], claim: Claim) -> None:
        events_path = claim.run_dir / "events.jsonl"
        whole = [(record, end) for record, end in read_lines(events_path) if record is not None]
        self._writers = tuple(writers)
        self._events = LineFile(claim, events_path, whole[-1][1] if whole else 0)
        self._attempt = claim.number
        self.restarts = sum(record.get("event") in ("start", "resume") for record, _ in whole)
        """How often the run was started before this attempt."""
        self._warned: set[str] = set()

    def log(self, step: int, metrics: Metrics) -> None:
        """Write the figures of one step everywhere. Call it at most once a step, with growing steps."""
        for writer in self._writers:
            try:
                writer.log(step, metrics)
            except OSError as error:
                self._warn(writer.name, error)

    def event(self, kind: str, **fields: object) -> None:
        """Append one line to `events.jsonl`: `start`, `resume`, `save`, `bad_step`, `exit`, ..."""
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        try:
            self._events.append({"time": now, "attempt": self._attempt, "event": kind, **fields})
        except OSError as error:
            self._warn("events.jsonl", error)

    def close(self) -> None:
        """Write what is pending and close all; failures are warnings."""
        for name, close in [(w.name, w.close) for w in self._writers] + [
            ("events.jsonl", self._events.close)
        ]:
            try:
                close()
            except OSError as error:
                self._warn(name, error)

    def _warn(self, name: str, error: OSError) -> None:
        if name not in self._warned:
            self._warned.add(name)
            _log.warning("%s cannot be written (%s); training goes on without those figures", name, error)


def open_writers(
    claim: Claim,
    logging: LoggingConfig,
    resume_step: int,
    config_dict: Mapping[str, Any],
) -> MultiWriter:
    """Open every writer that the recipe asks for, and log the event `start` or `resume`.

    Only one rank of a run may call it.

    Args:
        claim: of the run folder.
        logging: which writers.
        resume_step: steps done by the checkpoint that the run continues from; 0 for a start from scratch.
        config_dict: the resolved recipe as nested dicts; its `model.schedule` tells which layers the entries
            of per-layer lists belong to.

    Raises:
        ChiarError: the folder is not writable, or a newer attempt of the run has begun.
        ConfigError: a package or a key that the recipe needs is missing.
    """
    kinds = parse_schedule(config_dict["model"]["schedule"])
    routed_layers = [number for number, kind in enumerate(kinds, 1) if kind == "R"]
    writers: list[RunWriter] = [JsonlWriter(claim, resume_step)]
    if logging.tensorboard:
        writers.append(TensorBoardWriter(claim, resume_step, routed_layers))
    if logging.wandb_project is not None:
        writers.append(WandbWriter(claim, logging, config_dict, routed_layers))
    multi = MultiWriter(writers, claim)
    kind = "resume" if resume_step else "start"
    multi.event(kind, step=resume_step, routed_layers=routed_layers)
    return multi
