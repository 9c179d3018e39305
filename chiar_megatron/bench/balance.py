"""`chiar bench balance`: data-parallel ranks with easy and with hard text, with and without balance.

Three runs of the product: a warm-up with the controller; then from its weights (thresholds as the controller
left them: calibrated) one run with controller and capacity, and one with neither, on the same batches.
Figures are means over the second half of each run; its traces then say what more ranks would see.
"""

from __future__ import annotations

import shutil
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from chiar_megatron.bench.balance_text import (
    KINDS,
    VOCAB_SIZE,
    kind_of_replica,
    prefix_of,
    skewed_streams,
    write_text,
)
from chiar_megatron.bench.checks import Checks
from chiar_megatron.bench.record import Report, check_output
from chiar_megatron.checkpoint.agree import on_main
from chiar_megatron.config.load import config_from_dict, resolve_config
from chiar_megatron.config.schema import ParallelConfig, RunConfig, RuntimeConfig
from chiar_megatron.config.validate import check_config
from chiar_megatron.data.loader import BatchLayout, micro_batches
from chiar_megatron.errors import EXIT_DONE, ConfigError
from chiar_megatron.metrics.jsonl import read_metrics
from chiar_megatron.metrics.traces import read_traces
from chiar_megatron.planning.balance import simulate
from chiar_megatron.runtime.distributed import World, initialize, shutdown
from chiar_megatron.runtime.env import read_process_env
from chiar_megatron.runtime.launch import launch_local
from chiar_megatron.training.detail import traced_replicas
from chiar_megatron.training.loop import pretrain

SIDES = ("on", "off")
LOG_INTERVAL = 2
HEADER = (
    "balance", "executed rows max÷mean", "worst layer", "light tokens, worst layer", "useful ÷ executed",
    "overflow ÷ light", "rank seconds mean", "max÷mean", "validation easy", "hard", "mean",
)  # fmt: skip


@dataclass(frozen=True)
class BalanceSettings:
    """Options of `chiar bench balance`."""

    processes: int
    steps: int
    warmup: int
    router: str
    rho: float
    seq_length: int
    micro_batch_size: int
    hidden_size: int
    schedule: str
    ranks: tuple[int, ...]
    """Simulated."""
    folder: str
    seed: int

    @staticmethod
    def of(parsed: Any) -> BalanceSettings:
        """From parsed arguments. Raises ConfigError for a number of processes that cannot be halved."""
        if parsed.processes < 2 or parsed.processes % 2:
            raise ConfigError(f"--processes: {parsed.processes} must be even: half get easy, half hard text")
        names = ("processes", "steps", "warmup", "router", "rho", "seq_length", "micro_batch_size")
        more = ("hidden_size", "schedule", "folder", "seed")
        fields = {name: getattr(parsed, name) for name in (*names, *more)}
        return BalanceSettings(ranks=tuple(parsed.ranks), **fields)


def bench_balance(parsed: Any) -> int:
    """Train, compare and simulate; 0, WrongResult, or the exit code of a rank that failed."""
    settings = BalanceSettings.of(parsed)
    env = read_process_env()
    if env.launcher == "none":
        if parsed.output:
            check_output(Path(parsed.output))
        side_config(settings, "warmup", settings.processes)  # refuses what does not fit, before any work
        command = [sys.executable, "-m", "chiar_megatron.cli", *sys.argv[1:]]
        result = launch_local(command, settings.processes)
        if result.message:
            sys.stderr.write(result.message + "\n")
        return result.exit_code
    world = initialize(ParallelConfig(), RuntimeConfig(device=parsed.device), env)
    try:
        _bench(settings, world, parsed)
    finally:
        shutdown()
    return EXIT_DONE


def _bench(settings: BalanceSettings, world: World, parsed: Any) -> None:
    folder = Path(settings.folder)
    reports: list[Report] = []
    on_main(lambda: reports.append(Report(f"balance_dp{world.size}", settings, world.device, parsed)))
    report = reports[0] if reports else None
    if world.is_main:
        for name in ("data", "warmup", *SIDES):
            shutil.rmtree(folder / name, ignore_errors=True)
        write_text(folder / "data")
    dist.barrier()
    done: list[str] = []
    for side in ("warmup", *SIDES):
        if on_main(lambda: report is not None and report.out_of_time):
            break
        config = side_config(settings, side, world.size)
        if side == "warmup":
            _check_text(config, world, folder, report)
        pretrain(config, world, open_streams=lambda c: skewed_streams(c, world, folder / "data"))
        done.append(side)
    if report is not None:
        for side in ("warmup", *SIDES)[len(done) :]:
            report.note(f"{side}: skipped, --time-limit has passed")
        _compare(settings, world, report, done[1:])


def side_config(settings: BalanceSettings, side: str, world_size: int) -> RunConfig:
    """The recipe of one run, resolved."""
    folder = Path(settings.folder)
    steps = settings.warmup if side == "warmup" else settings.steps
    traced = settings.micro_batch_size * traced_replicas(settings.micro_batch_size, world_size)
    fields: dict[str, Any] = {
        "run_dir": str(folder / side),
        "model.schedule": settings.schedule,
        "model.hidden_size": settings.hidden_size,
        "model.seq_length": settings.seq_length,
        "model.vocab_size": VOCAB_SIZE,
        "model.norm": "pre",
        "model.router.kind": settings.router,
        "data.train": tuple(prefix_of(folder / "data", kind, "train") for kind in KINDS),
        "data.validation": tuple(prefix_of(folder / "data", kind, "validation") for kind in KINDS),
        "optimizer.lr": 2e-3,
        "optimizer.warmup_steps": min(20, steps // 2),
        "training.steps": steps,
        "training.micro_batch_size": settings.micro_batch_size,
        "training.global_batch_size": settings.micro_batch_size * world_size,
        "training.seed": settings.seed,
        "training.eval_steps": 0 if side == "warmup" else 8,
        "logging.log_interval_steps": LOG_INTERVAL,
        # Those of the second half, which the figures are of.
        "logging.routing_traces": traced * max(1, steps // (2 * LOG_INTERVAL)),
    }
    if side == "off":
        fields["model.router.capacity"] = "none"
    else:
        fields["model.router.target"] = settings.rho
    if side != "warmup":
        fields["training.init_from"] = str(folder / "warmup")
    config = resolve_config(config_from_dict(fields, "bench"), vocab_size=None, eod_token=None)
    check_config(config, world_size)
    return config


def _check_text(config: RunConfig, world: World, folder: Path, report: Report | None) -> None:
    """Each rank's first batches are of its kind: tables are mostly digits and blanks, prose is not."""
    stream = skewed_streams(config, world, folder / "data").train
    assert stream is not None
    layout = BatchLayout(
        config.training.global_batch_size,
        config.training.micro_batch_size,
        world.data_parallel_rank,
        world.data_parallel_size,
    )
    tokens = torch.stack(
        [batch.tokens_BS for step in (0, 1) for batch in micro_batches(stream, step, layout)]
    )
    plain = (tokens >= ord("0")) & (tokens <= ord("9")) | (tokens == ord(" "))
    shares = torch.zeros(world.size, dtype=torch.float64, device=world.device)
    shares[world.rank] = plain.double().mean().item()
    dist.all_reduce(shares)
    # On every rank, so that none goes on alone.
    checks = Checks() if report is None else report.checks
    for rank, share in enumerate(shares.tolist()):
        kind = kind_of_replica(rank, world.data_parallel_size)
        wanted = (0.9, 0.15)[kind]
        checks.below(
            f"rank {rank} has {KINDS[kind]} text: share of digits and blanks", abs(share - wanted), 0.15
        )
    if report is not None:
        report.say("; ".join(checks.lines()))


def _compare(settings: BalanceSettings, world: World, report: Report, sides: Sequence[str]) -> None:
    """sides: those that were trained."""
    figures = {side: side_figures(Path(settings.folder) / side) for side in sides}
    errors: dict[str, float] = {}
    if "on" in figures:
        on = figures["on"]
        errors["balance on: executed rows differ between ranks"] = on["executed_max_over_mean"] - 1.0
    if "off" in figures:
        off = figures["off"]
        errors["balance off: rows without a light token"] = 1.0 - off["useful_over_executed"]
        errors["balance off: overflow"] = off["overflow_over_light"]
    for what, error in errors.items():
        report.checks.below(what, error, 1e-9)
    for side in sides:
        config = side_config(settings, "on", world.size)  # asks the same ρ of both runs' traces
        found = simulate(config, read_traces(Path(settings.folder) / side), (world.size, *settings.ranks))
        report.add({"name": f"balance {side}", **figures[side], "simulation": found.as_dict()})
        for line in found.lines():
            report.say(line)
        alike = next(
            e
            for e in found.estimates
            if e.text == "as recorded" and (e.controller, e.capacity) == (side == "on",) * 2
        )
        measured = figures[side]
        report.note(
            f"simulation beside what it was traced from, {world.size} ranks, balance {side}: light tokens "
            f"max÷mean of the worst layer {alike.light_max_over_mean:.3f}, measured "
            f"{measured['light_max_over_mean']:.3f}; executed rows of all layers "
            f"{alike.rows_max_over_mean:.3f}, measured {measured['all_layers_executed_max_over_mean']:.3f}"
        )
    report.table(HEADER, [_row(side, figures[side]) for side in sides])


def side_figures(run_dir: Path) -> dict[str, Any]:
    """Means over the second half of a run; the worst layer where a figure is one layer's."""
    records = read_metrics(run_dir)
    late = [record for record in records if record["step"] > records[-1]["step"] // 2]

    def layers(key: str) -> list[float]:
        return [statistics.fmean(values) for values in zip(*(r[key] for r in late), strict=True)]

    share, overflow = layers("routed_fraction"), layers("overflow_fraction")
    seconds = [r["rank_seconds"] for r in late if r["rank_seconds"]]
    validation = records[-1]["validation"]
    slowest = [int(s["slowest_rank"]) for s in seconds]
    return {
        "steps": [late[0]["step"], late[-1]["step"]],
        "all_layers_executed_max_over_mean": statistics.fmean(
            r["all_layers_executed_max_over_mean"] for r in late
        ),
        "executed_max_over_mean": max(layers("executed_max_over_mean")),
        "executed_max_over_mean_by_layer": layers("executed_max_over_mean"),
        "light_max_over_mean": max(layers("rank_max_over_mean")),
        "light_max_over_mean_by_layer": layers("rank_max_over_mean"),
        "useful_over_executed": statistics.fmean(layers("useful_over_executed")),
        "overflow_over_light": sum(s * o for s, o in zip(share, overflow, strict=True)) / sum(share),
        "routed_fraction_by_layer": share,
        "rank_seconds_mean": statistics.median(s["mean"] for s in seconds),
        "rank_seconds_max": statistics.median(s["max"] for s in seconds),
        "rank_seconds_max_over_mean": statistics.median(s["max_over_mean"] for s in seconds),
        "slowest_rank_counts": {str(rank): slowest.count(rank) for rank in sorted(set(slowest))},
        "step_seconds": statistics.median(r["step_seconds"] for r in late),
        "training_loss": statistics.fmean(r["loss"] for r in late),
        "validation": validation,
        "validation_mean": statistics.fmean(validation.values()),
        "alarms": records[-1]["alarms"],
    }


def _row(side: str, figures: dict[str, Any]) -> Sequence[str]:
    return [
        side,
        f"{figures['all_layers_executed_max_over_mean']:.3f}",
        f"{figures['executed_max_over_mean']:.3f}",
        f"{figures['light_max_over_mean']:.3f}",
        f"{figures['useful_over_executed']:.3f}",
        f"{figures['overflow_over_light']:.2%}",
        f"{figures['rank_seconds_mean']:.3f}",
        f"{figures['rank_seconds_max_over_mean']:.3f}",
        *(f"{loss:.4f}" for loss in figures["validation"].values()),
        f"{figures['validation_mean']:.4f}",
    ]
