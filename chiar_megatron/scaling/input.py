"""From the options of `chiar scaling fit` and a table to the runs that are fitted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from chiar_megatron.errors import ConfigError, DataError
from chiar_megatron.scaling.law import Runs
from chiar_megatron.scaling.table import Columns, Row, read_table, runs_of, select

FINISHED = "finished"
_ONE_LAW = ("tokenizer", "vocab_size")  # columns of `collect` in which runs of one law agree
_BETTER_ALIKE = ("validation_data", "loss_kind", "router")


@dataclass(frozen=True)
class FitInput:
    """What a user asks to be fitted."""

    path: Path
    named: Mapping[str, str | None]
    """Columns by field of `Columns`, None where the user named none."""
    no_rho: bool = False
    where: tuple[str, ...] = ()
    drop_highest_loss: int = 0


def read_runs(request: FitInput) -> tuple[Runs, str, list[str]]:
    """The runs, the column of N, and notes on what was taken and left out.

    Raises DataError or ConfigError: bad options or cells, runs whose losses cannot be compared.
    """
    if request.no_rho and request.named["rho"] is not None:
        raise ConfigError(f"--rho {request.named['rho']}: --no-rho contradicts it; give one of them")
    path, notes = request.path, list[str]()
    rows: list[Row] = list(read_table(path))
    rows = select(rows, request.where, path)
    if "status" in rows[0]:
        finished = [row for row in rows if row["status"] == FINISHED]
        if len(finished) < len(rows):
            notes.append(f"{len(rows) - len(finished)} of {len(rows)} runs are not finished: left out")
        if not finished:
            raise DataError(f"{path}: none of its {len(rows)} runs is finished; train, then collect again")
        rows = finished
    _check_alike(rows, path, notes)
    columns = _columns(request, rows, notes)
    _check_roles(columns, path)
    runs = runs_of(rows, columns, path)
    drop = request.drop_highest_loss
    if drop < 0 or drop >= len(runs):
        raise ConfigError(f"--drop-highest-loss: {drop} must be 0 or more and below the {len(runs)} rows")
    if drop:
        runs = runs.take(np.sort(np.argsort(runs.loss, kind="stable")[: len(runs) - drop]))
        notes.append(f"the {drop} highest losses are left out; {len(runs)} runs remain")
    if len(runs) > 1 and runs.loss.min() == runs.loss.max():
        raise DataError(
            f"{path}, column {columns.loss!r}: all {len(runs)} losses are {runs.loss[0]:g}, which no law can "
            "be told from; name another column by --loss"
        )
    return runs, columns.n, notes


def _check_roles(columns: Columns, path: Path) -> None:
    """Refuse a column that is to be two things."""
    roles: dict[str, str] = {}
    for role, column in vars(columns).items():
        if column is None:
            continue
        if column in roles:
            raise DataError(
                f"{path}, column {column!r}: is both --{roles[column]} and --{role}; name another"
            )
        roles[column] = role


def _check_alike(rows: list[Row], path: Path, notes: list[str]) -> None:
    """Refuse losses of different tokenizers, and note what else differs that may change a loss."""
    for column in (*_ONE_LAW, *_BETTER_ALIKE):
        found = sorted({str(row.get(column)) for row in rows} - {"", "None"})
        if len(found) < 2:
            continue
        names = ", ".join(found[:4])
        if column in _ONE_LAW:
            raise DataError(
                f"{path}, column {column!r}: runs of {len(found)} kinds ({names}), whose losses a token "
                f"cannot be compared; pick one, --where {column}={found[0]}"
            )
        notes.append(f"the runs differ in {column} ({names}): their losses may not be comparable")


def _columns(request: FitInput, rows: list[Row], notes: list[str]) -> Columns:
    """Named columns, else the defaults where the table has them."""
    given, present = request.named, rows[0]
    defaults = Columns()
    chosen: dict[str, str | None] = {
        "n": given["n"] or defaults.n,
        "loss": given["loss"] or defaults.loss,
        "d": given["d"] or _present(defaults.d, present),
        "flops": given["flops"] or _present(defaults.flops, present),
        "rho": given["rho"],
        "seconds": given["seconds"] or _measured("device_seconds", rows),
    }
    devices = sorted({str(row.get("device")) for row in rows} - {"", "None"})
    if chosen["seconds"] == "device_seconds" and len(devices) > 1:
        chosen["seconds"] = None
        notes.append(f"trained on different devices ({', '.join(devices[:4])}): seconds are left out")
    if chosen["d"] is None and chosen["flops"] is not None:
        notes.append("no column of tokens: D = C/6N")
    elif chosen["flops"] is None and chosen["d"] is not None:
        notes.append("no column of FLOPs: C = 6ND")
    if request.no_rho:
        chosen["rho"] = None
    elif chosen["rho"] is None and len({row.get("attention_share") for row in rows}) > 1:
        chosen["rho"] = "attention_share"
        notes.append("attention_share differs among the runs: the law has it as ρ (--no-rho leaves it out)")
    return Columns(**chosen)  # type: ignore[arg-type]


def _present(column: str | None, row: Row) -> str | None:
    return column if column in row else None


def _measured(column: str, rows: list[Row]) -> str | None:
    """The column if every row has a value in it."""
    return column if all(row.get(column) not in (None, "") for row in rows) else None
