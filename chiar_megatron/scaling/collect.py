"""`chiar scaling collect`: run folders into one tidy table, whatever state the runs are in."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from chiar_megatron.config.load import load_config
from chiar_megatron.config.schedule import parse_schedule
from chiar_megatron.config.schema import RunConfig
from chiar_megatron.config.validate import data_prefixes
from chiar_megatron.data.preprocess import load_summary
from chiar_megatron.errors import ChiarError, DataError
from chiar_megatron.metrics.jsonl import read_metrics
from chiar_megatron.metrics.run_state import run_state
from chiar_megatron.model.accounting import parameter_count
from chiar_megatron.scaling.flops import token_flops
from chiar_megatron.scaling.manifest import PlannedRun

STATUSES = ("finished", "running", "stopped", "failed", "missing")
_LAST_SHARE = 0.05  # of the steps, whose mean loss stands for a run without validation


@dataclass(frozen=True)
class CollectedRun:
    """One row: a run as it was, its measured shares and costs. Empty where nothing is known."""

    run: str
    status: str
    """finished; running (no exit yet, wrote lately); stopped (resumable, or killed); failed; missing."""
    reason: str
    """Why it ended, or what could not be read."""
    variant: str = ""
    size: str = ""
    schedule: str = ""
    router: str = ""
    held_out: bool = False
    hidden_size: int | None = None
    layers: int | None = None
    parameters: int | None = None
    """N with embeddings."""
    parameters_non_embedding: int | None = None
    tokens: int | None = None
    """D seen."""
    steps: int | None = None
    budget: float | None = None
    """FLOPs asked for."""
    training_flops: float | None = None
    """C executed, with the measured routed fraction."""
    useful_flops: float | None = None
    attention_share: float | None = None
    """ρ, measured; for runs without records, planned."""
    loss: float | None = None
    """Nats a token: of the last validation, else of the last steps."""
    loss_kind: str = ""
    """validation or training."""
    train_loss: float | None = None
    """Mean of the last twentieth of the steps."""
    device_seconds: float | None = None
    """Seconds of training steps times processes; validation and saving are not in it."""
    lr: float | None = None
    global_batch_size: int | None = None
    seed: int | None = None
    device: str = ""
    vocab_size: int | None = None
    tokenizer: str = ""
    """Fingerprint of the tokenizer that made the text, its first 12 digits; empty where none is recorded."""
    validation_data: str = ""
    """Prefixes of the text that `loss` is of."""
    path: str = ""


def collect(runs: Sequence[PlannedRun]) -> list[CollectedRun]:
    """A row for each of a sweep's runs, in their order."""
    rows = []
    for run in runs:
        row = collect_run(Path(run.run_dir))
        rows.append(
            _with(
                row,
                run=run.name,
                variant=run.variant,
                size=run.size,
                held_out=run.held_out,
                budget=run.budget,
            )
        )
    return rows


def collect_run(folder: Path) -> CollectedRun:
    """The row of one run folder, whatever is in it; never raises for what a run left behind."""
    row = CollectedRun(run=folder.name, status="missing", reason="no run folder", path=str(folder))
    if not folder.is_dir():
        return row
    status, reason = run_state(folder)
    row = _with(row, status=status, reason=reason)
    try:
        config = load_config(folder / "config.yaml")
    except ChiarError as error:
        broken = status in ("running", "stopped", "finished")
        return _with(row, status="failed" if broken else status, reason=reason or str(error).splitlines()[0])
    row = _with(row, **_planned_figures(config))
    try:
        records = read_metrics(folder)
    except ChiarError as error:
        return _with(row, reason=reason or str(error).splitlines()[0])
    if not records:
        return row
    try:
        return _with(row, **_measured_figures(config, records, folder))
    except (KeyError, TypeError, ValueError, ChiarError) as error:
        return _with(row, status="failed", reason=f"metrics.jsonl is not of this recipe's run ({error})")


def as_rows(runs: Sequence[CollectedRun]) -> list[dict[str, Any]]:
    """Rows for `write_table`."""
    return [{field.name: getattr(run, field.name) for field in fields(CollectedRun)} for run in runs]


def collect_lines(runs: Sequence[CollectedRun]) -> Iterator[str]:
    """How many runs there are of each status, and each that is not finished."""
    counts = Counter(run.status for run in runs)
    yield ", ".join(f"{counts[status]} {status}" for status in STATUSES if counts[status])
    for run in runs:
        if run.status != "finished":
            yield f"  {run.run}: {run.status}{f' ({run.reason})' if run.reason else ''}"
    kinds = {run.loss_kind for run in runs if run.status == "finished"}
    if len(kinds) > 1:
        yield "  mind: some losses are of validation, others of training (column loss_kind)"


def _with(row: CollectedRun, **changes: Any) -> CollectedRun:
    from dataclasses import replace

    return replace(row, **changes)


def _planned_figures(config: RunConfig) -> dict[str, Any]:
    model = config.model
    count = parameter_count(model)
    return {
        "schedule": model.schedule,
        "router": model.router.kind if "R" in model.schedule else "",
        "hidden_size": model.hidden_size,
        "layers": len(parse_schedule(model.schedule)),
        "parameters": count.total,
        "parameters_non_embedding": count.non_embedding,
        "attention_share": token_flops(config).attention_share,
        "lr": config.optimizer.lr,
        "global_batch_size": config.training.global_batch_size,
        "seed": config.training.seed,
        "vocab_size": model.vocab_size,
        "tokenizer": _tokenizer(config),
        "validation_data": " ".join(config.data.validation) or f"{config.data.split} of the training text",
    }


def _tokenizer(config: RunConfig) -> str:
    """By the summary beside the text: cheaper to read than the tokenizer, and checked against it."""
    for prefix in data_prefixes(config.data.train):
        summary = load_summary(prefix)
        if summary is not None and summary.tokenizer_sha256:
            return summary.tokenizer_sha256[:12]
    return ""


def _measured_figures(config: RunConfig, records: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    last = records[-1]
    tokens, steps = int(last["tokens_seen"]), int(last["step"])
    fractions = _mean_fractions(records)
    flops = token_flops(config, fractions)
    seconds = sum(r["step_seconds"] * count for r, count in _with_steps(records) if r.get("step_seconds"))
    environment = _environment(folder)
    recent = [
        r["loss"] for r in records if r["step"] > (1 - _LAST_SHARE) * steps and r.get("loss") is not None
    ]
    train_loss = sum(recent) / len(recent) if recent else None
    validation = last.get("validation") or {}
    losses = [value for value in validation.values() if value is not None]
    loss = sum(losses) / len(losses) if losses else train_loss
    return {
        "tokens": tokens,
        "steps": steps,
        "training_flops": flops.executed * tokens,
        "useful_flops": flops.useful * tokens,
        "attention_share": flops.attention_share,
        "loss": loss,
        "loss_kind": "validation" if losses else "training" if loss is not None else "",
        "train_loss": train_loss,
        "device_seconds": seconds * int(environment.get("world_size", 1)) if seconds else None,
        "device": str(environment.get("device", "")),
    }


def _with_steps(records: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], int]]:
    """Each record and the number of steps since the one before."""
    before = 0
    for record in records:
        yield record, max(0, int(record["step"]) - before)
        before = int(record["step"])


def routed_fractions(folder: Path) -> list[float]:
    """Share of tokens that each routed layer's attention computed, over the whole of a run.

    Raises DataError where the run has no routed layers or has not logged their shares.
    """
    fractions = _mean_fractions(read_metrics(folder))
    if not fractions:
        raise DataError(f"run {folder} has logged no routed fraction; give a trained run with R layers")
    return fractions


def _mean_fractions(records: list[dict[str, Any]]) -> list[float]:
    """Share of tokens that each routed layer's attention computed, over the whole run."""
    sums: list[float] = []
    steps = 0
    for record, count in _with_steps(records):
        shares = record.get("routed_fraction") or []
        lost = record.get("overflow_fraction") or [0.0] * len(shares)
        if any(value is None for value in (*shares, *lost)):
            continue
        attended = [share * (1.0 - overflow) for share, overflow in zip(shares, lost, strict=True)]
        sums = (
            [a + count * b for a, b in zip(sums, attended, strict=True)]
            if sums
            else [count * b for b in attended]
        )
        steps += count
    return [min(1.0, total / steps) for total in sums] if steps else sums


def _environment(folder: Path) -> dict[str, Any]:
    try:
        record = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}
