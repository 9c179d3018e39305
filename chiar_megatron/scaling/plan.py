"""`chiar scaling plan`: budgets, sizes and schedules into a folder of recipes with their cost.

Batch and learning rate follow DeepSeek LLM (arXiv:2401.02954, section 3.1), fitted there to AdamW runs of
1e17 to 2e19 FLOPs: `batch = 0.2920·C^0.3271` tokens, `lr = 0.3118·C^-0.1250`. Below that range they are an
extrapolation, which a sweep of learning rates (`--kind lr`) checks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from chiar_megatron.config.problems import raise_problems
from chiar_megatron.config.schema import RunConfig
from chiar_megatron.config.validate import check_config, data_prefixes
from chiar_megatron.data.preprocess import load_summary
from chiar_megatron.errors import ConfigError
from chiar_megatron.model.accounting import parameter_count
from chiar_megatron.scaling.flops import token_flops
from chiar_megatron.scaling.ladder import Size, Variant, apply
from chiar_megatron.scaling.manifest import PlannedRun, Sweep, cheap_first
from chiar_megatron.training.loop import resolve

KINDS = ("isoflop", "ratio", "lr")
_WARMUP_SHARE, _FINAL_LR = 0.05, 0.1
_MIN_STEPS = 20


@dataclass(frozen=True)
class PlanRequest:
    """What to plan."""

    base: RunConfig
    """The recipe that sizes, schedules, lengths and rates are put into."""
    folder: Path
    sizes: tuple[Size, ...]
    variants: tuple[Variant, ...]
    kind: str = "isoflop"
    """isoflop: every size at every budget. ratio: every size at every D/N. lr: every size at every budget
    at every factor on the learning rate."""
    budgets: tuple[float, ...] = ()
    """FLOPs of one run."""
    ratios: tuple[float, ...] = (20.0,)
    """Tokens a parameter (with embeddings)."""
    lr_factors: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0)
    lr: float | None = None
    """Learning rate; None: by the rule."""
    batch_tokens: int | None = None
    """Tokens a step; None: by the rule."""
    flops_per_second: float = 0.4 * 989e12
    """Of one device, for the estimate of hours."""
    held_out: bool = False
    """Mark the runs: `submit` and `collect` leave them out unless asked."""
    mup_base: int | None = None
    """Base width of µP, which also unties the head; None: standard parametrisation."""
    min_ratio: float = 0.0
    """Grid points of fewer tokens a parameter are left out."""
    routed_fraction: float | None = None
    """Share of tokens that routed layers without a target send to attention, as a run measured it."""


@dataclass(frozen=True)
class Plan:
    """A sweep with the recipes of its runs."""

    sweep: Sweep
    configs: dict[str, RunConfig]
    notes: tuple[str, ...]
    """What was left out, and what to mind."""


def plan_sweep(request: PlanRequest) -> Plan:
    """Every run's recipe and cost. Raises ConfigError for what does not fit together."""
    _check(request)
    configs: dict[str, RunConfig] = {}
    runs: list[PlannedRun] = []
    notes: list[str] = []
    for size, variant in product(request.sizes, request.variants):
        model = apply(request.base.model, size, variant)
        if request.mup_base is not None:
            model = replace(model, mup_base_hidden_size=request.mup_base, tie_embeddings=False)
        rung = _Rung(replace(request.base, model=model), size, variant, request.routed_fraction)
        for point in _points(request, rung):
            run, config = _run(request, rung, point)
            ratio = run.tokens / run.parameters
            if run.steps < _MIN_STEPS or ratio < request.min_ratio:
                notes.append(f"left out {run.name}: {run.steps} steps, {ratio:.2g} tokens a parameter")
                continue
            check_config(config)
            if run.name in configs:
                raise ConfigError(
                    f"two runs would be called {run.name}: give values that differ by over 1%, once"
                )
            runs.append(run)
            configs[run.name] = config
    if not runs:
        raise ConfigError(f"no run is left: {'; '.join(notes[:3])}; raise --budgets or lower --batch-tokens")
    notes += _repeated_text(request.base, runs)
    sweep = Sweep(request.folder, request.kind, _rules(request), cheap_first(runs))
    return Plan(sweep, configs, tuple(notes))


def _repeated_text(base: RunConfig, runs: Sequence[PlannedRun]) -> list[str]:
    """A note where runs read their text more than once: the law is about fresh tokens."""
    summaries = [load_summary(prefix) for prefix in data_prefixes(base.data.train)]
    if not summaries or None in summaries:
        return []
    try:
        parts = [float(part) for part in base.data.split.split(",")]
        tokens = parts[0] / sum(parts) * sum(summary.tokens for summary in summaries if summary is not None)
    except (ValueError, ZeroDivisionError):
        return []  # the run itself will say what is wrong with data.split
    again = [run.tokens / tokens for run in runs if run.tokens > tokens]
    if not again:
        return []
    return [f"{len(again)} runs read their text of {tokens:,.0f} tokens up to {max(again):.3g} times"]


class _Rung:
    """A size with a schedule."""

    def __init__(self, config: RunConfig, size: Size, variant: Variant, fraction: float | None) -> None:
        self.config, self.size, self.variant = config, size, variant
        self.resolved = resolve(config)
        self.count = parameter_count(self.resolved.model)
        # A target is what the controller holds; only without one a measured share tells more.
        self.fraction = fraction if config.model.router.target is None else None
        self.flops = token_flops(self.resolved, self.fraction).executed


@dataclass(frozen=True)
class _Point:
    """One run's place in the grid."""

    label: str
    flops: float
    """Of the whole run."""
    budget: float
    lr_factor: float = 1.0


def _points(request: PlanRequest, rung: _Rung) -> Iterator[_Point]:
    if request.kind == "ratio":
        for ratio in request.ratios:
            yield _Point(f"r{ratio:g}", rung.flops * rung.count.total * ratio, 0.0)
        return
    for budget in request.budgets:
        label = f"c{budget:.3g}".replace("+", "")
        if request.kind == "isoflop":
            yield _Point(label, budget, budget)
            continue
        for factor in request.lr_factors:
            yield _Point(f"{label}_lr{factor:g}", budget, budget, factor)


def batch_rule(flops: float) -> float:
    """Tokens a step for a run of `flops` FLOPs."""
    return float(0.2920 * flops**0.3271)


def lr_rule(flops: float) -> float:
    """Peak learning rate for a run of `flops` FLOPs."""
    return float(0.3118 * flops**-0.1250)


def _run(request: PlanRequest, rung: _Rung, point: _Point) -> tuple[PlannedRun, RunConfig]:
    batch, micro = _batch(request, point.flops)
    base = request.base.training
    batch_config = replace(
        rung.config.training,
        global_batch_size=batch,
        micro_batch_size=micro,
        # As many sequences as the base recipe's, whatever the batch: losses of equal text are compared.
        eval_steps=-(-base.eval_steps * base.global_batch_size // batch),
    )
    # Rows of attention are rounded a micro-batch, so that a token's FLOPs depend on it.
    flops = token_flops(replace(rung.resolved, training=batch_config), rung.fraction)
    tokens_per_step = batch * rung.config.model.seq_length
    steps = max(1, round(point.flops / flops.executed / tokens_per_step))
    lr = (request.lr or lr_rule(point.flops)) * point.lr_factor
    name = f"{rung.variant}_{rung.size}_{point.label}".replace(":", "")
    total = steps * tokens_per_step * flops.executed
    run = PlannedRun(
        name=name,
        recipe=f"recipes/{name}.yaml",
        run_dir=str(request.folder / "runs" / name),
        variant=str(rung.variant),
        size=str(rung.size),
        schedule=rung.config.model.schedule,
        parameters=rung.count.total,
        parameters_non_embedding=rung.count.non_embedding,
        budget=point.budget,
        tokens=steps * tokens_per_step,
        steps=steps,
        global_batch_size=batch,
        lr=lr,
        training_flops=total,
        attention_share=flops.attention_share,
        device_hours=total / request.flops_per_second / 3600,
        held_out=request.held_out,
    )
    optimizer = replace(
        rung.config.optimizer,
        lr=lr,
        min_lr=lr * _FINAL_LR,
        warmup_steps=max(1, round(_WARMUP_SHARE * steps)),
        decay_steps=None,
    )
    config = replace(
        rung.config,
        run_dir=run.run_dir,
        optimizer=optimizer,
        training=replace(batch_config, steps=steps),
        logging=replace(rung.config.logging, log_interval_steps=max(1, steps // 100)),
    )
    return run, config


def _batch(request: PlanRequest, flops: float) -> tuple[int, int]:
    """Sequences a step, in whole multiples of the replicas, and of a micro-batch, at most the base's."""
    base = request.base
    replicas = base.parallel.data_parallel_size or 1
    wanted = (request.batch_tokens or batch_rule(flops)) / base.model.seq_length
    each = max(1, round(wanted / replicas))
    most = min(each, base.training.micro_batch_size)
    # Rather a few sequences fewer than micro-batches of one.
    micro = max(range(1, most + 1), key=lambda size: (each // size * size >= 0.9 * each, size))
    return each // micro * micro * replicas, micro


def _rules(request: PlanRequest) -> tuple[str, ...]:
    batch = (
        f"{request.batch_tokens:,} tokens a step" if request.batch_tokens else "0.2920·C^0.3271 tokens a step"
    )
    rate = f"{request.lr:g}" if request.lr else "0.3118·C^-0.1250"
    source = "" if request.batch_tokens and request.lr else " (DeepSeek LLM, arXiv:2401.02954)"
    mup = (
        "" if request.mup_base is None else f"; µP scales it by {request.mup_base} / hidden size for matrices"
    )
    return (
        f"{', '.join(map(str, request.sizes))}: batch {batch}, in whole sequences; peak learning rate "
        f"{rate}{mup}{source}",
        f"warmup {_WARMUP_SHARE:.0%} of the steps, then the base recipe's decay to {_FINAL_LR:g} of the peak",
        "C: executed training FLOPs of the ledger; N: parameters with embeddings, and without beside it",
    )


def _check(request: PlanRequest) -> None:
    problems = []
    if request.kind not in KINDS:
        problems.append(f"--kind: {request.kind} must be one of {', '.join(KINDS)}")
    if request.kind != "ratio" and not request.budgets:
        problems.append(
            f"--budgets: empty, but --kind {request.kind} needs FLOPs of a run, such as 1e18,3e18"
        )
    positive: dict[str, Sequence[float | None]] = {
        "--budgets": request.budgets,
        "--ratios": request.ratios,
        "--lr-factors": request.lr_factors,
        "--lr": (request.lr,),
        "--batch-tokens": (request.batch_tokens,),
        "--flops-per-second": (request.flops_per_second,),
    }
    for option, values in positive.items():
        for value in values:
            if value is not None and not (math.isfinite(value) and value > 0):
                problems.append(f"{option}: {value} must be finite and above 0")
    if not request.min_ratio >= 0:
        problems.append(f"--min-ratio: {request.min_ratio} must be 0 or more")
    for option, listed in (("--ladder", request.sizes), ("--schedules", request.variants)):
        if not listed:
            problems.append(f"{option}: is empty; name at least one")
        if len(set(map(str, listed))) < len(listed):
            problems.append(f"{option}: names one twice; leave it out")
    raise_problems(problems)


def plan_lines(plan: Plan, price_per_hour: float | None) -> Iterator[str]:
    """The plan for people: rules, a table, totals."""
    yield from plan.sweep.rules
    yield (
        f"{'run':34s} {'N':>12s} {'N without emb.':>14s} {'tokens':>14s} {'D/N':>6s} {'steps':>7s} "
        f"{'batch':>6s} {'lr':>8s} {'FLOPs':>9s} {'rho':>5s} {'hours':>9s}"
    )
    for run in plan.sweep.runs:
        yield (
            f"{run.name:34s} {run.parameters:12,d} {run.parameters_non_embedding:14,d} {run.tokens:14,d} "
            f"{run.tokens / run.parameters:6.3g} {run.steps:7,d} {run.global_batch_size:6d} {run.lr:8.2e} "
            f"{run.training_flops:9.2e} {run.attention_share:5.2f} {run.device_hours:9.3g}"
        )
    hours = sum(run.device_hours for run in plan.sweep.runs)
    price = "" if price_per_hour is None else f", {hours * price_per_hour:,.2f} at {price_per_hour:g} an hour"
    flops = sum(run.training_flops for run in plan.sweep.runs)
    yield f"{len(plan.sweep.runs)} runs, {flops:.3g} FLOPs, {hours:.3g} device hours{price}"
    yield from plan.notes
