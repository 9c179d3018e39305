"""Tables of runs: CSV and Parquet with named columns, in and out, and the messages for bad ones."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from chiar_megatron.checkpoint.files import write_durably
from chiar_megatron.config.fields import nearest_name
from chiar_megatron.config.problems import shown
from chiar_megatron.errors import DataError
from chiar_megatron.scaling.law import Array, Runs

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Columns:
    """Which columns of a table hold what; the defaults are those that `chiar scaling collect` writes."""

    n: str = "parameters"
    """Parameters N."""
    d: str | None = "tokens"
    """Training tokens D; None: C/6N."""
    flops: str | None = "training_flops"
    """Training FLOPs C; None: 6ND."""
    loss: str = "loss"
    """Final loss, nats a token."""
    rho: str | None = None
    """Share of attention in [0, 1]; None for a law without it."""
    seconds: str | None = None
    """Device seconds of training."""


def read_table(path: Path) -> list[dict[str, Any]]:
    """Rows of a `.csv`, `.tsv` or `.parquet` file, each by column name; CSV values are texts.

    Raises DataError if the file is missing, unreadable, empty, or names a column twice.
    """
    if path.is_dir():
        raise DataError(
            f"table {path} is a folder; give a .csv, .tsv or .parquet, such as {path / 'runs.csv'}"
        )
    if not path.is_file():
        folder = path.parent
        names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
        raise DataError(f"table {path} does not exist{nearest_name(path.name, names)}")
    try:
        rows = _read_parquet(path) if path.suffix == ".parquet" else _read_csv(path)
    except (OSError, UnicodeDecodeError, csv.Error, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"table {path} cannot be read ({reason}); give a .csv, .tsv or .parquet") from error
    if not rows:
        raise DataError(f"table {path} has no rows below its header; give one row a run")
    return rows


def write_table(path: Path, rows: Sequence[Row]) -> None:
    """Write rows of equal columns as `.csv` or `.parquet`, by the suffix. Raises DataError if it cannot."""
    if path.suffix not in (".csv", ".parquet"):
        raise DataError(f"table {path} must end in .csv or .parquet; name it {path.with_suffix('.csv')}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            pyarrow, parquet = _pyarrow(path)
            parquet.write_table(pyarrow.Table.from_pylist([dict(row) for row in rows]), path)
            return
        lines = [",".join(map(_cell, rows[0])), *(",".join(map(_cell, row.values())) for row in rows)]
        write_durably(path, "\n".join(lines) + "\n")
    except OSError as error:
        raise DataError(f"table {path} cannot be written ({error.strerror}); choose another path") from error


def select(rows: Sequence[Row], conditions: Sequence[str], path: Path) -> list[Row]:
    """The rows that satisfy every `COLUMN=VALUE`, compared as texts. Raises DataError if none does."""
    kept = list(rows)
    for condition in conditions:
        column, equals, value = condition.partition("=")
        if not equals:
            raise DataError(f"--where {condition!r} has no '='; write COLUMN=VALUE")
        _need(rows, column, "--where", path)
        found = sorted({str(row[column]) for row in kept})
        kept = [row for row in kept if str(row[column]) == value]
        if not kept:
            raise DataError(f"--where {condition}: no row has it; values are {', '.join(found[:8])}")
    return kept


def runs_of(rows: Sequence[Row], columns: Columns, path: Path) -> Runs:
    """The runs of a table's rows. Raises DataError naming the first column or value that is wrong."""
    n = _numbers(rows, columns.n, "--n", path)
    loss = _numbers(rows, columns.loss, "--loss", path)
    flops = None if columns.flops is None else _numbers(rows, columns.flops, "--flops", path)
    if columns.d is not None:
        d = _numbers(rows, columns.d, "--d", path)
    elif flops is not None:
        d = flops / (6.0 * n)
    else:
        raise DataError(f"{path}: neither --d nor --flops names a column; one of tokens and FLOPs is needed")
    rho = None
    if columns.rho is not None:
        rho = _numbers(rows, columns.rho, "--rho", path, positive=False)
        _refuse(rows, columns.rho, (rho < 0) | (rho > 1), "must be a share of attention, from 0 to 1", path)
    seconds = None if columns.seconds is None else _numbers(rows, columns.seconds, "--seconds", path)
    return Runs(n, d, loss, rho, 6.0 * n * d if flops is None else flops, seconds)


def _read_csv(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
        header = [name.strip() for name in next(reader, [])]
        if len(set(header)) < len(header):
            twice = next(name for name in header if header.count(name) > 1)
            raise DataError(f"table {path} has two columns {twice!r}; rename one")
        rows = []
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) != len(header):
                raise DataError(
                    f"table {path}, line {reader.line_num}: {len(cells)} values for {len(header)} columns"
                )
            rows.append(dict(zip(header, (cell.strip() for cell in cells), strict=True)))
    return rows


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    _, parquet = _pyarrow(path)
    rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    return rows


def _pyarrow(path: Path) -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            f"table {path}: Parquet needs the package pyarrow; `pip install 'chiar-megatron[scaling]'`, or "
            "use a .csv"
        ) from error
    return pyarrow, pyarrow.parquet


def _cell(value: object) -> str:
    """One CSV cell; an empty one for None."""
    text = "" if value is None else repr(value) if isinstance(value, float) else str(value)
    return '"' + text.replace('"', '""') + '"' if any(c in text for c in ',"\n\r') else text


def _need(rows: Sequence[Row], column: str, option: str, path: Path) -> None:
    names = list(rows[0])
    if column not in names:
        near = nearest_name(column, names) or f"; columns: {', '.join(names[:12])}"
        raise DataError(f"{path} has no column {column!r} ({option}){near}")


def _numbers(rows: Sequence[Row], column: str, option: str, path: Path, positive: bool = True) -> Array:
    _need(rows, column, option, path)
    values = np.full(len(rows), math.nan)
    for place, row in enumerate(rows):
        try:
            values[place] = float(row[column])
        except (TypeError, ValueError):
            pass  # NaN, refused below with the cell as it stands
    _refuse(rows, column, ~np.isfinite(values), "is not a finite number", path)
    if positive:
        _refuse(rows, column, values <= 0, "must be above 0", path)
    return values


def _refuse(rows: Sequence[Row], column: str, bad: np.typing.NDArray[np.bool_], why: str, path: Path) -> None:
    if not bad.any():
        return
    place, count = int(np.argmax(bad)), int(bad.sum())
    others = f" (and {count - 1} more rows)" if count > 1 else ""
    raise DataError(
        f"{path}, row {place + 1}, column {column!r}: {shown(rows[place][column])} {why}{others}; correct it "
        "or leave the row out"
    )
