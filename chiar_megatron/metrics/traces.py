"""Routing traces of a run: what each of some training sequences asked of every routed layer.

One file a traced step, `<run folder>/routing_traces/step_00000100.npz`, of the arrays named in `StepTraces`
(read it with numpy alone). About 2 · 19 bytes a layer and sequence before compression: 26 layers and 4096
sequences make 4 MB. The newest `logging.routing_traces` sequences are kept.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from torch import Tensor

from chiar_megatron.checkpoint.claim import Claim
from chiar_megatron.errors import ChiarError
from chiar_megatron.routing.statistics import BINS

_log = logging.getLogger(__name__)

FOLDER = "routing_traces"


@dataclass(frozen=True)
class StepTraces:
    """Sequences of one step; of every replica's last micro-batch, at most 64 sequences in all or those of
    one micro-batch. S sequences, L routed layers, X bins of `routing/statistics.py`."""

    layers: Any
    """int `[L]`, numbers in the model, from 1."""
    replica: Any
    """int `[S]`, the data-parallel rank that had the sequence."""
    light: Any
    """uint `[S, L]`, light tokens before capacity."""
    histogram: Any
    """uint `[S, L, X]`, scores by bins: `score_deviation` wide units around `score_mean`."""
    threshold: Any
    """float64 `[L]`, that decided; so are `score_mean` and `score_deviation`, those of the step before."""
    score_mean: Any
    score_deviation: Any

    @property
    def seq_length(self) -> int:
        """Tokens in one sequence."""
        return int(self.histogram[0, 0].sum())

    @staticmethod
    def from_parts(parts: Mapping[str, Tensor], layers: list[int]) -> StepTraces | None:
        """parts: what `training/detail.py` packs, on the host. None if it has no traces."""
        if "traced_light" not in parts or not layers:
            return None
        rows = [layer - 1 for layer in layers]
        light_LRB = parts["traced_light"][rows].numpy()
        _, replicas, sequences = light_LRB.shape
        histogram_LSX = parts["traced_histogram"][rows].flatten(1, 2).numpy()
        tokens = histogram_LSX[0, 0].sum()
        kind = np.uint16 if tokens <= np.iinfo(np.uint16).max else np.uint32
        mean, deviation = parts["score_place"][:, rows].numpy()
        return StepTraces(
            layers=np.array(layers),
            replica=np.repeat(np.arange(replicas), sequences),
            light=light_LRB.reshape(len(layers), -1).T.astype(kind),
            histogram=histogram_LSX.swapaxes(0, 1).astype(kind),
            threshold=parts["threshold"][rows].numpy().copy(),
            score_mean=mean.copy(),
            score_deviation=deviation.copy(),
        )


class TraceWriter:
    """Keeps the newest sequences of a run; only one rank of a run may have one."""

    def __init__(self, claim: Claim, keep: int, resume_step: int) -> None:
        """keep: sequences, at least 1. Files of steps after `resume_step` are removed: they run again."""
        self.claim = claim
        self.folder = claim.run_dir / FOLDER
        self.keep = keep
        self._files = {step: 0 for step in _steps(self.folder)}
        for step in list(self._files):
            try:
                self._files[step] = len(read_step(_path(self.folder, step)).replica)
            except ChiarError as error:
                _log.warning("%s: removed", error)
                self._remove(step)
            if step > resume_step:
                self._remove(step)

    def write(self, step: int, traces: StepTraces) -> None:
        """Keep one step's sequences. A full disk loses this step's only. Raises OSError then, and
        FencedError if a newer attempt has begun."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = _path(self.folder, step)
        partial = self.claim.folder / path.name
        try:
            with partial.open("wb") as file:
                np.savez_compressed(file, **{f.name: getattr(traces, f.name) for f in fields(traces)})
            self.claim.publish(path.name, path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise
        self._files[step] = len(traces.replica)
        for old in sorted(self._files):
            if sum(self._files.values()) - self._files[old] < self.keep:
                break
            self._remove(old)

    def _remove(self, step: int) -> None:
        self.claim.discard(_path(self.folder, step))
        self._files.pop(step, None)


def read_traces(run_dir: Path) -> list[StepTraces]:
    """All traced steps of a run, in order.

    Raises:
        ChiarError: there are none, a file is damaged, or they are of different models.
    """
    folder = run_dir / FOLDER
    steps = _steps(folder)
    if not steps:
        raise ChiarError(
            f"{folder} holds no routing traces: train with logging.routing_traces=4096 (sequences to keep) "
            "on a model with routed layers"
        )
    traces = [read_step(_path(folder, step)) for step in steps]
    for step, other in zip(steps, traces, strict=True):
        same = np.array_equal(other.layers, traces[0].layers) and other.seq_length == traces[0].seq_length
        if not same:
            raise ChiarError(
                f"{_path(folder, step)} is of other layers or another sequence length than "
                f"{_path(folder, steps[0])}: remove those of the older model"
            )
    return traces


def read_step(path: Path) -> StepTraces:
    """One file. Raises ChiarError if it is not one of traces."""
    try:
        with np.load(path, allow_pickle=False) as file:
            traces = StepTraces(**{f.name: file[f.name] for f in fields(StepTraces)})
        _check(traces)
        return traces
    except (OSError, ValueError, KeyError, BadZipFile, EOFError, zlib.error) as error:
        raise ChiarError(f"{path} is damaged or no file of routing traces; remove it") from error


def _check(traces: StepTraces) -> None:
    """Raise ValueError if arrays do not belong together."""
    sequences, layers = len(traces.replica), len(traces.layers)
    counts = {
        "layers": (layers,),
        "replica": (sequences,),
        "light": (sequences, layers),
        "histogram": (sequences, layers, BINS),
    }
    figures = dict.fromkeys(("threshold", "score_mean", "score_deviation"), (layers,))
    for name, shape in {**counts, **figures}.items():
        array = getattr(traces, name)
        kind = np.integer if name in counts else np.floating
        if array.shape != shape or not array.size or not np.issubdtype(array.dtype, kind):
            raise ValueError(name)
        if name in figures and not np.isfinite(array).all():
            raise ValueError(name)


def _path(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}.npz"


def _steps(folder: Path) -> list[int]:
    names = [path.stem.removeprefix("step_") for path in folder.glob("step_*.npz")]
    return sorted(int(name) for name in names if name.isdecimal())
