"""What `chiar plan` says, in sections: lines for people and fields for programs. Another section is another
function in `SECTIONS`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

from chiar_megatron.config.pipeline import layout_text
from chiar_megatron.config.schema import RunConfig
from chiar_megatron.errors import ChiarError
from chiar_megatron.metrics.traces import read_traces
from chiar_megatron.model.accounting import (
    flops_per_sequence,
    full_attention_twin,
    parameter_count,
    savings,
)
from chiar_megatron.model.pieces import Flops
from chiar_megatron.model.pipeline import expected_fraction, pipeline_cut, pipeline_layout, projected_rows
from chiar_megatron.planning.activations import ActivationModel
from chiar_megatron.planning.balance import RANKS, simulate
from chiar_megatron.planning.candidates import Candidate, candidates, weigh
from chiar_megatron.planning.memory import GIB, USABLE, StageMemory, stage_memory
from chiar_megatron.planning.speed import (
    MEASURED_ON,
    MEASURED_TFLOPS,
    SECONDS_PER_LAUNCH,
    SHARED,
    UNCOMPILED,
    Cluster,
    with_layout,
)
from chiar_megatron.runtime.paths import why_launched, would_compile

_SHOWN = 12  # layouts in the list for people


@dataclass(frozen=True)
class Plan:
    """A recipe, resolved and checked, on a cluster."""

    config: RunConfig
    replicas: int
    cluster: Cluster
    listed: bool
    """Whether other layouts of the cluster are asked for."""

    traces: Path | None = None
    """Run folder with routing traces, from which to simulate the balance."""

    ranks: tuple[int, ...] = RANKS
    """Numbers of ranks to simulate."""

    @cached_property
    def candidates(self) -> tuple[list[Candidate], list[Candidate]]:
        """Layouts of the cluster that fit and those that do not."""
        return candidates(self.config, self.cluster)

    def check_fits(self) -> None:
        """Raise ChiarError if layouts were asked for and none fits."""
        if not self.listed or self.candidates[0]:
            return
        gib, gpus = self.cluster.memory_gib, self.cluster.gpus
        smallest = min(self.candidates[1], key=lambda candidate: candidate.peak, default=None)
        if smallest is None:
            raise ChiarError(
                f"--gpus: the recipe allows no layout of {gpus} GPUs; change its batch sizes or --gpus"
            )
        lower = " or lower training.micro_batch_size" if self.config.training.micro_batch_size > 1 else ""
        raise ChiarError(
            f"--gpu-memory-gib: no layout of {gpus} GPUs fits in {USABLE:.0%} of {gib:g} GiB; the smallest "
            f"needs {smallest.peak / GIB:.1f} GiB ({smallest.name}): use more or larger GPUs{lower}"
        )

    def lines(self) -> Iterator[str]:
        """For people."""
        for section in SECTIONS:
            yield from section(self)[0]

    def summary(self) -> list[str]:
        """What is told before a run is submitted: FLOPs, and this layout's memory and speed."""
        return [*_flops(self)[0], *_own_layout(self)[0]]

    def json_line(self) -> str:
        """For programs."""
        fields: dict[str, Any] = {}
        for section in SECTIONS:
            fields |= section(self)[1]
        return json.dumps(fields)


Section = tuple[list[str], dict[str, Any]]


def _parameters(plan: Plan) -> Section:
    model = plan.config.model
    count = parameter_count(model)
    twin = parameter_count(full_attention_twin(model))
    lines = [
        f"model {model.schedule}: {count.total:,} parameters, {count.non_embedding:,} without embeddings "
        f"(full-attention twin: {twin.total:,})"
    ]
    fields = {
        "total": count.total,
        "non_embedding": count.non_embedding,
        "embedding": count.embedding,
        "head": count.head,
        "twin_total": twin.total,
    }
    return lines, {"parameters": fields}


def _flops(plan: Plan) -> Section:
    config, model = plan.config, plan.config.model
    fraction, capacity = expected_fraction(model.router), projected_rows(config)
    ledger = flops_per_sequence(model, model.seq_length, fraction, capacity_fraction=capacity)
    token = Flops(*(part / model.seq_length for part in asdict(ledger.total()).values()))
    tokens = config.training.global_batch_size * model.seq_length
    step = Flops(*(part * tokens for part in asdict(token).values()))
    lines = [
        f"training FLOPs a token: {token.executed / 1e9:.3f} G executed ({token.padded / 1e9:.3f} G on "
        f"unused rows), {token.useful / 1e9:.3f} G useful",
        f"FLOPs a step of {tokens:,} tokens: {step.executed / 1e12:,.1f} T executed, "
        f"{step.useful / 1e12:,.1f} T useful",
    ]
    if "R" in model.schedule:
        known = model.router.target is not None or model.router.kind == "random"
        assumed = "" if known else " (assumed: the recipe has no model.router.target)"
        saved = savings(model, model.seq_length, fraction, capacity_fraction=capacity)
        lines += [f"share of light tokens {fraction:g}{assumed}", str(saved)]
    fields: dict[str, Any] = {"tokens_per_step": tokens, "routed_fraction": fraction}
    fields |= {"flops_per_token": asdict(token), "flops_per_step": asdict(step)}
    return lines, fields


def _memory(plan: Plan) -> Section:
    config, compiled = plan.config, would_compile(plan.config)
    lines = ["memory a GPU, GiB:"]
    head = ("weights", "gradients", "main", "optimizer", "activations", "logits", "peak")
    lines.append("  stage" + "".join(f"{name:>13}" for name in head))
    by_mode: dict[str, Any] = {}
    for recompute in ("none", "full"):
        training = replace(config.training, recompute=recompute)
        stages = stage_memory(replace(config, training=training), plan.replicas, compiled)
        by_mode[recompute] = [{**asdict(stage), "peak": stage.peak} for stage in stages]
        lines.append(f"  recompute: {recompute}{' (the recipe)' * (recompute == config.training.recompute)}")
        lines += [f"  {number:>5}" + _row(stage) for number, stage in enumerate(stages)]
    lines.append("activations a token and layer, KiB (with torch.compile / without):")
    kinds = [kind for kind in "DRA" if kind in config.model.schedule]
    kept = {kind: [ActivationModel(config, on).layer(kind).kept for on in (True, False)] for kind in kinds}
    pairs = [f"{kind} {kept[kind][0] / 1024:.1f} / {kept[kind][1] / 1024:.1f}" for kind in kinds]
    lines.append("  " + "   ".join(pairs))
    fields = {"memory": by_mode, "compiled": compiled, "activation_bytes_per_token": kept}
    return lines, fields


def _row(stage: StageMemory) -> str:
    parts = (stage.weights, stage.gradients, stage.main_weights, stage.optimizer, stage.activations)
    return "".join(f"{part / GIB:>13.2f}" for part in (*parts, stage.loss, stage.peak))


def _stages(plan: Plan) -> Section:
    if plan.config.parallel.pipeline_model_parallel_size == 1:
        return [], {"pipeline": None}
    cut = pipeline_cut(plan.config)
    lines = [f"pipeline ({plan.config.parallel.layout}) {cut}"]
    layers = sum(cut.layout)
    if layers % len(cut.layout) == 0 and plan.config.parallel.layout != "even":
        lines.append(f"  with equal layer counts {pipeline_cut(with_layout(plan.config, layout='even'))}")
    fields = {"layout": layout_text(cut.layout), "shares": cut.shares, "heaviest_to_mean": cut.heaviest}
    return lines, {"pipeline": fields}


def _own_layout(plan: Plan) -> Section:
    own = weigh(plan.config, plan.replicas, plan.cluster)
    time = own.time
    causes = {name.replace("_", " "): 1e3 * seconds for name, seconds in asdict(time).items()}
    parts = ", ".join(f"{name} {milliseconds:.1f}" for name, milliseconds in causes.items())
    fits = own.peak <= USABLE * plan.cluster.memory_gib * GIB
    lines = [
        f"this layout ({own.name}): {own.peak / GIB:.1f} GiB at its peak, "
        f"{'fits' if fits else 'does NOT fit'} in {USABLE:.0%} of {plan.cluster.memory_gib:g} GiB",
        f"  estimated step {1e3 * time.total:.0f} ms ({parts} ms), {own.tokens_per_second:,.0f} tokens/s",
        *_assumptions(plan.cluster),
    ]
    launched = why_launched(plan.config)
    if launched is not None:
        lines.append(
            f"  no CUDA graph ({launched}): the host launches every kernel, "
            f"{1e6 * SECONDS_PER_LAUNCH:.0f} us each where that was measured; a faster host takes less"
        )
    if time.data_parallel > 0.1 * time.total and not plan.config.parallel.overlap_grad_reduce:
        lines.append("  parallel.overlap_grad_reduce=true would hide some of what is data parallel")
    return lines, {"own": _candidate_fields(own), "fits": fits, "cluster": asdict(plan.cluster)}


def _assumptions(cluster: Cluster) -> list[str]:
    measured = f"measured: {MEASURED_ON}" if cluster.tflops == MEASURED_TFLOPS else "as given"
    return [
        f"  assumed: {cluster.tflops:g} TFLOP/s executed by a GPU ({measured});",
        f"  {SHARED:g} of it where tensor- or context-parallel ranks share layers, {UNCOMPILED:g} where "
        "layers are not compiled;",
        f"  {cluster.link_gb_s:g} GB/s within a node of {cluster.gpus_per_node} GPUs, "
        f"{cluster.network_gb_s:g} GB/s between nodes; nothing else takes time",
    ]


def _layouts(plan: Plan) -> Section:
    if not plan.listed:
        return [], {}
    fitting, others = plan.candidates
    lines = [f"layouts of {plan.cluster.gpus} GPUs that fit, by estimated step time:"]
    lines.append(f"  {'ms':>8}{'tokens/s':>12}{'GiB':>7}{'heaviest':>10}  layout")
    for candidate in fitting[:_SHOWN]:
        lines.append(
            f"  {1e3 * candidate.time.total:>8.1f} {candidate.tokens_per_second:>11,.0f}"
            f" {candidate.peak / GIB:>6.1f} {candidate.cut.heaviest:>8.2f}×  {candidate.name}"
        )
    if len(fitting) > _SHOWN:
        lines.append(f"  and {len(fitting) - _SHOWN} slower ones (--json has all)")
    if not fitting:
        lines.append("  none")
    if others:
        small = others[0]
        lines.append(
            f"  {len(others)} more do not fit; the smallest needs {small.peak / GIB:.1f} GiB ({small.name})"
        )
    fields = [_candidate_fields(candidate) for candidate in fitting]
    return lines, {"layouts": fields, "not_fitting": len(others)}


def _candidate_fields(candidate: Candidate) -> dict[str, Any]:
    return {
        "name": candidate.name,
        "parallel": asdict(candidate.config.parallel) | {"data_parallel_size": candidate.replicas},
        "recompute": candidate.config.training.recompute,
        "peak_bytes": candidate.peak,
        "step_seconds": candidate.time.total,
        "seconds_by_cause": asdict(candidate.time),
        "tokens_per_second": candidate.tokens_per_second,
        "heaviest_to_mean": candidate.cut.heaviest,
        "layout": layout_text(candidate.cut.layout),
    }


def _balance(plan: Plan) -> Section:
    if plan.traces is None:
        return [], {}
    layout, parallel = pipeline_layout(plan.config), plan.config.parallel
    ends = list(accumulate(layout))
    chunks = [list(range(end - count + 1, end + 1)) for count, end in zip(layout, ends, strict=True)]
    stages = parallel.pipeline_model_parallel_size
    held = [[layer for chunk in chunks[stage::stages] for layer in chunk] for stage in range(stages)]
    found = simulate(plan.config, read_traces(plan.traces), plan.ranks, held)
    return found.lines(), {"balance": found.as_dict()}


SECTIONS: tuple[Callable[[Plan], Section], ...] = (
    _parameters,
    _flops,
    _stages,
    _memory,
    _own_layout,
    _layouts,
    _balance,
)
