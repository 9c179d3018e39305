"""Files of JSON lines, which stay whole through kills and full disks, and the readers of a run's two.

`metrics.jsonl` holds one record a logged step, `events.jsonl` one a start, resume, save, bad step or exit.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional, Union

from chiar_megatron.checkpoint.claim import Claim
from chiar_megatron.errors import ChiarError

MetricValue = Union[float, None, Sequence[float], Sequence[Sequence[int]], Mapping[str, float]]
"""A number, one number or one histogram for each routed layer, or numbers by name; None is "does not
apply"."""

Metrics = Mapping[str, MetricValue]
"""The figures of one step."""


def _is_finite(value: object) -> bool:
    """Whether no number in the value is NaN or infinite."""
    if isinstance(value, Mapping):
        return all(map(_is_finite, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def _finite_or_null(value: object) -> object:
    """The value with None for every NaN and infinity."""
    if isinstance(value, Mapping):
        return {name: _finite_or_null(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite_or_null(inner) for inner in value]
    return value if _is_finite(value) else None


class LineFile:
    """A file of JSON lines that holds whole lines only, whatever happens to the process or the disk."""

    def __init__(self, claim: Claim, path: Path, keep: int) -> None:
        """Take over `path`, cut off at `keep` bytes, for appending.

        Raises ChiarError if it cannot be written, FencedError if a newer attempt has begun.
        """
        self._path = path
        try:
            self._file = claim.take_over(path, keep)
        except OSError as error:
            raise ChiarError(f"{path} cannot be written ({error.strerror}): check the run folder") from error
        self._size = keep

    def append(self, record: Mapping[str, object]) -> None:
        """Write one line, which survives a kill of the process once this returns.

        JSON has no NaN: such a value is written as null and named in `"nonfinite": {"loss": "nan"}`.

        Raises:
            OSError: the line could not be written; the file is then as before.
        """
        nonfinite = {key: str(value) for key, value in record.items() if not _is_finite(value)}
        if nonfinite:
            record = {
                **{key: _finite_or_null(value) for key, value in record.items()},
                "nonfinite": nonfinite,
            }
        line = (json.dumps(record, allow_nan=False) + "\n").encode()
        try:
            if os.write(self._file, line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
        except OSError:
            os.ftruncate(self._file, self._size)  # takes back the part that fitted
            raise
        self._size += len(line)

    def close(self) -> None:
        os.close(self._file)


def _parse_line(line: bytes) -> Optional[dict[str, Any]]:
    """The record of one line, or None where the line is torn or is not a JSON object."""
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def read_lines(path: Path) -> Iterator[tuple[Optional[dict[str, Any]], int]]:
    """Each line's record and the offset of its end, in bytes. A missing file has no lines."""
    if not path.exists():
        return
    end = 0
    with path.open("rb") as file:
        for line in file:
            end += len(line)
            yield _parse_line(line), end


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The records of `<run_dir>/metrics.jsonl`, in order; a last line still being written is left out.

    Raises:
        ChiarError: the file is missing, unreadable, or holds something else than records with a `step`.
    """
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        raise ChiarError(f"{path} does not exist: give the folder of a run that has logged at least one step")
    try:
        parsed = [record for record, _ in read_lines(path)]
    except OSError as error:
        raise ChiarError(f"{path} cannot be read ({error.strerror})") from error
    if parsed and parsed[-1] is None:
        parsed.pop()
    records = []
    for number, record in enumerate(parsed, 1):
        if record is None or not isinstance(record.get("step"), int):
            raise ChiarError(f"{path}, line {number}: not a JSON object with a `step`; remove that line")
        records.append(record)
    return records


def read_events(run_dir: Path) -> list[dict[str, Any]]:
    """The records of `<run_dir>/events.jsonl` (start, resume, save, ...), in order; [] without the file."""
    return [record for record, _ in read_lines(run_dir / "events.jsonl") if record is not None]


class JsonlWriter:
    """`metrics.jsonl`: one strictly valid JSON object a step, `{"step": 1, "loss": 6.9, ...}`."""

    name = "metrics.jsonl"

    def __init__(self, claim: Claim, resume_step: int) -> None:
        """Continue the run's file after `resume_step` (0: begin anew), so that it never holds a step twice.

        Lines of later steps, written by a killed attempt after its last checkpoint, and a torn last line
        are cut off.

        Raises:
            ChiarError: the file cannot be written, or a newer attempt has begun.
        """
        path = claim.run_dir / "metrics.jsonl"
        keep = 0
        for record, end in read_lines(path):
            step = record.get("step") if record else None
            if isinstance(step, int) and step <= resume_step and resume_step > 0:
                keep = end
        self._file = LineFile(claim, path, keep)

    def log(self, step: int, metrics: Metrics) -> None:
        self._file.append({"step": step, **metrics})

    def close(self) -> None:
        self._file.close()
