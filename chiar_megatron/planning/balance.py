"""How evenly routing loads N ranks: a simulation from the routing traces of a real run.

**Method.** A traced step (`metrics/traces.py`) holds, for some of its training sequences and for each
routed layer, the light tokens and a histogram of the scores. Neighbouring traced steps are pooled until they
have 256 sequences. A simulated step takes one pool, in turn, and gives every data-parallel replica as many
sequences as its micro-batches need, drawn with replacement: `mixed` from the whole pool, or `as recorded`
replica i only from those of the recorded replica i mod (recorded replicas), which keeps what is peculiar to a
rank's text. Replicas keep the recipe's micro-batches, however many replicas there are. No sequence is heavier
than the heaviest traced one.

Light tokens at another threshold come from the sequence's histogram, linear within a bin and exact at the
recorded threshold. *Without the controller* each layer's threshold stays, in absolute scores, where it was in
the first traced step; *with it* it stands where ρ of a pool's tokens are light, at one place among the scores
of all the pool's steps (a controller that is right: the real one is a step behind and holds ρ within about
0.01). *With capacity* a micro-batch has `C` rows whatever its light tokens; light ones beyond it are mixed.

Work is counted by the FLOP ledger (`model/accounting.py`), training, DCTs as matrix products, and time is
taken to be proportional to it. A layer costs something fixed and something for each light token (its query,
scores and output, less its mixing); with capacity projections are paid for all rows, scores only for used
ones, so time still varies a little where executed rows do not. Attention runs at a lower rate than matrix
products do on a GPU, so there true variation is somewhat larger; communication takes no time.

**Who waits for whom.** Data-parallel replicas wait for each other once a step: a step lasts as long as its
slowest replica. Within a replica the layers follow each other and nothing waits but pipeline stages, which
do at every micro-batch: the 1F1B schedule is played through (`pipeline_time.py`). Ranks that share a
micro-batch (tensor, context parallel) have equal work; what context-parallel ranks project beyond the rows
there are is left out. `over_mean` is the expected time of a step over the
time if every micro-batch had the mean work of that very setting; `over_ideal` over the time if every
micro-batch had the mean number of light tokens and no row were unused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from chiar_megatron.config.schedule import parse_schedule
from chiar_megatron.config.schema import RunConfig
from chiar_megatron.errors import ChiarError
from chiar_megatron.metrics.traces import StepTraces
from chiar_megatron.model.accounting import flops_per_sequence
from chiar_megatron.planning.pipeline_time import step_time
from chiar_megatron.planning.traced_light import Pool, pools
from chiar_megatron.routing.balance import capacity_rows

RANKS = (8, 64, 512, 4096)
SETTINGS = ((False, False), (True, False), (False, True), (True, True))  # (controller, capacity)
_NUMBERS = 20_000_000  # drawn for one row of the table: fewer steps where there are many ranks
_STEPS = (16, 200)  # at least and at most so many simulated steps
_CHUNK = 4_000_000  # numbers in memory at once
_MOST_NUMBERS = (
    120_000_000  # of one step's replicas, micro-batches and layers: a gigabyte, several times over
)


@dataclass(frozen=True)
class Estimate:
    """One setting on so many ranks."""

    ranks: int
    replicas: int
    text: str
    """`mixed` or `as recorded`."""
    controller: bool
    capacity: bool
    over_mean: float
    """Expected step time over that of equal work."""
    over_ideal: float
    """The same over equal work without unused rows and overflow, at the mean share of this setting."""
    rows_max_over_mean: float
    """Executed rows of routed layers in a step, largest over mean of the replicas; mean of the steps."""
    light_max_over_mean: float
    """Light tokens before capacity in a step, largest over mean of the replicas, mean of the steps; of the
    worst layer: what `rank_max_over_mean` of `metrics.jsonl` shows."""
    share: float
    """Light tokens of all, before capacity."""
    overflow: float
    """Of the light tokens those without a row."""
    useful_over_executed: float
    """Of the rows."""


@dataclass(frozen=True)
class Simulation:
    """What was simulated, from what."""

    seq_length: int
    layers: tuple[int, ...]
    traced_steps: int
    traced_sequences: int
    traced_replicas: int
    micro_batch_size: int
    micro_batches: int
    target: float
    capacity_rows: int
    stages: tuple[tuple[int, ...], ...]
    estimates: tuple[Estimate, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def lines(self) -> list[str]:
        """For people: a table of expected step time over mean."""
        tokens = self.micro_batch_size * self.seq_length
        head = (
            f"balance, simulated from {self.traced_sequences} sequences of {self.traced_steps} steps on "
            f"{self.traced_replicas} replica(s): {self.micro_batches} micro-batch(es) of {tokens} tokens a "
            f"replica, {len(self.stages)} stage(s), ρ {self.target:.3g}, {self.capacity_rows} rows with "
            "capacity"
        )
        lines = [head, "step time ÷ mean; in brackets executed rows, largest ÷ mean of the replicas"]
        names = ("neither", "controller", "capacity", "both")
        lines.append(f"{'ranks':>6}{'replicas':>10}  {'text':<12}" + "".join(f"{n:>16}" for n in names))
        for first in range(0, len(self.estimates), len(SETTINGS)):
            row = self.estimates[first : first + len(SETTINGS)]
            cells = "".join(f"{f'{e.over_mean:.3f} ({e.rows_max_over_mean:.3f})':>16}" for e in row)
            lines.append(f"{row[0].ranks:>6}{row[0].replicas:>10}  {row[0].text:<12}{cells}")
        both = self.estimates[-1]
        lines.append(
            f"both, {both.ranks} ranks: {both.useful_over_executed:.1%} of the executed rows useful, "
            f"{both.overflow:.2%} of the light tokens without a row, step time {both.over_ideal:.3f} of one "
            "with equal work and no unused row"
        )
        return lines


def simulate(
    config: RunConfig,
    traces: Sequence[StepTraces],
    ranks: Sequence[int] = RANKS,
    stages: Sequence[Sequence[int]] | None = None,
    seed: int = 0,
) -> Simulation:
    """The balance of a recipe (resolved) on each of some numbers of ranks.

    traces: `metrics.traces.read_traces` of a run of the same schedule and sequence length. stages: layers
    (from 1) of each pipeline stage; None: equal numbers of layers. Numbers of ranks that one replica does not
    fit into are left out.

    Raises:
        ChiarError: the traces are of another model, a number of ranks is too large, or none is left.
    """
    routed = _routed(config)
    _check(config, traces, routed)
    one_replica = config.parallel.processes_per_replica
    sizes = [(number, number // one_replica) for number in ranks if number >= one_replica]
    if not sizes:
        raise ChiarError(
            f"--ranks: one replica takes {one_replica} processes, more than any of {list(ranks)}"
        )
    stages = _equal_stages(config) if stages is None else [list(stage) for stage in stages]
    work = _Work(config, routed, stages, traces)
    most = _MOST_NUMBERS // (work.micro_batches * max(len(routed), work.micro_batch_size))
    if max(replicas for _, replicas in sizes) > most:
        raise ChiarError(
            f"--ranks: {max(ranks)} ranks of {work.micro_batches} micro-batches a step are more than a "
            f"simulation holds; give at most {most * one_replica}"
        )
    pooled = pools(traces, work.target)
    texts = ["mixed"] + (["as recorded"] if len(set(traces[0].replica.tolist())) > 1 else [])
    estimates = []
    for number, replicas in sizes:
        for text in texts:
            generator = np.random.default_rng([seed, number, texts.index(text)])
            estimates += _estimate(work, pooled, (number, replicas, text), generator)
    return Simulation(
        seq_length=work.seq_length,
        layers=tuple(routed),
        traced_steps=len(traces),
        traced_sequences=sum(len(step.replica) for step in traces),
        traced_replicas=len(set(traces[0].replica.tolist())),
        micro_batch_size=work.micro_batch_size,
        micro_batches=work.micro_batches,
        target=work.target,
        capacity_rows=work.capacity,
        stages=tuple(tuple(stage) for stage in stages),
        estimates=tuple(estimates),
    )


class _Work:
    """What micro-batches cost, by the ledger."""

    def __init__(
        self,
        config: RunConfig,
        routed: Sequence[int],
        stages: Sequence[Sequence[int]],
        traces: Sequence[StepTraces],
    ) -> None:
        model, training = config.model, config.training
        self.target = target = _target(config, traces)
        self.seq_length, self.micro_batch_size = model.seq_length, training.micro_batch_size
        replicas = config.parallel.data_parallel_size or len(np.unique(traces[0].replica))
        self.micro_batches = max(1, training.global_batch_size // (self.micro_batch_size * replicas))
        self.tokens = self.micro_batch_size * self.seq_length
        rows = capacity_rows(replace(model.router, target=target, capacity="auto"), self.tokens)
        assert rows is not None
        self.capacity = rows
        self.grid_G = np.linspace(0.0, 1.0, 65)
        self._free_G = np.empty(65)
        self._capped_G = np.empty(65)
        for index, share in enumerate(self.grid_G.tolist()):
            for table, capacity in ((self._free_G, None), (self._capped_G, rows / self.tokens)):
                ledger = flops_per_sequence(model, self.seq_length, share, capacity_fraction=capacity)
                table[index] = ledger.total("training", layer=routed[0]).executed
        ledger = flops_per_sequence(model, self.seq_length, target)
        totals = ledger.per_layer("training")
        place = {layer: index for index, layer in enumerate(routed)}
        self.routed_of_stage = [[place[layer] for layer in stage if layer in place] for stage in stages]
        self.fixed_P = np.array(
            [sum(totals[layer - 1].executed for layer in stage if layer not in place) for stage in stages]
        )
        self.fixed_P[-1] += ledger.total("training", names=("head",)).executed
        self.fixed_P *= self.micro_batch_size

    def of_sequences(self, light_SL: Any) -> Any:
        """FLOPs of each sequence's routed layers where attention has a row for every light token."""
        return np.interp(light_SL / self.seq_length, self.grid_G, self._free_G)

    def of_micro_batches(self, light_XL: Any) -> Any:
        """FLOPs of each micro-batch's routed layers with capacity."""
        return self.micro_batch_size * np.interp(light_XL / self.tokens, self.grid_G, self._capped_G)

    def by_stage(self, work_NML: Any) -> Any:
        """`[N, P, M]` from the routed layers' `[N, M, L]`."""
        stages = [work_NML[..., own].sum(-1) for own in self.routed_of_stage]
        return np.stack(stages, axis=1) + self.fixed_P[:, None]


def _estimate(
    work: _Work,
    pooled: Sequence[Pool],
    size: tuple[int, int, str],
    generator: np.random.Generator,
) -> list[Estimate]:
    """All settings on the same draws."""
    number, replicas, text = size
    numbers = replicas * work.micro_batches * work.micro_batch_size * pooled[0].light_SL[True].shape[1]
    steps = int(np.clip(_NUMBERS // numbers, *_STEPS))
    sums = {setting: _Sums(work) for setting in SETTINGS}
    for step in range(steps):
        pool = pooled[step % len(pooled)]
        drawn_NMB = _draw(pool.replica_S, (replicas, text), work, generator)
        for controller in (False, True):
            pool_SL = pool.light_SL[controller]
            light_NML = _sum_of_drawn(pool_SL, drawn_NMB)
            work_NML = _sum_of_drawn(work.of_sequences(pool_SL), drawn_NMB)
            sums[controller, False].add(light_NML, light_NML, light_NML, work_NML)
            kept_NML = np.minimum(light_NML, work.capacity)
            rows_NML = np.full_like(light_NML, work.capacity)
            work_NML = work.of_micro_batches(light_NML)
            sums[controller, True].add(light_NML, kept_NML, rows_NML, work_NML)
    return [
        Estimate(number, replicas, text, controller, capacity, **sums[controller, capacity].figures())
        for controller, capacity in SETTINGS
    ]


def _draw(recorded_S: Any, replicas: tuple[int, str], work: _Work, generator: np.random.Generator) -> Any:
    """Which traced sequences each micro-batch gets, `[N, M, B]`; replicas: how many, and of which text."""
    count, text = replicas
    shape = (work.micro_batches, work.micro_batch_size)
    if text == "mixed":
        return generator.integers(len(recorded_S), size=(count, *shape))
    recorded = np.unique(recorded_S)
    own = [np.flatnonzero(recorded_S == replica) for replica in recorded]
    drawn = np.empty((count, *shape), dtype=np.int64)
    for first, places in enumerate(own):
        mine = drawn[first :: len(own)]
        mine[:] = generator.choice(places, size=mine.shape)
    return drawn


def _sum_of_drawn(values_SL: Any, drawn_NMB: Any) -> Any:
    """`[N, M, L]`: of each micro-batch's sequences."""
    layers = values_SL.shape[1]
    at_once = max(1, _CHUNK // (drawn_NMB[0].size * layers))
    parts = [
        values_SL[drawn_NMB[first : first + at_once]].sum(2) for first in range(0, len(drawn_NMB), at_once)
    ]
    return np.concatenate(parts)


class _Sums:
    """One setting's simulated steps so far."""

    def __init__(self, work: _Work) -> None:
        self.work = work
        self.steps = 0
        self.slowest = self.light = self.kept = self.rows = self.unequal = 0.0
        self.mean_P: Any = 0.0
        self.light_L: Any = 0.0
        self.unequal_L: Any = 0.0

    def add(self, light_NML: Any, kept_NML: Any, rows_NML: Any, work_NML: Any) -> None:
        """One step; light tokens, those with a row, rows, and FLOPs of routed layers."""
        work_NPM = self.work.by_stage(work_NML)
        rows_N = rows_NML.sum((1, 2))
        self.steps += 1
        self.slowest += float(step_time(work_NPM).max())
        self.unequal += float(rows_N.max() / max(rows_N.mean(), 1e-30))
        self.light += float(light_NML.mean())
        self.kept += float(kept_NML.mean())
        self.rows += float(rows_NML.mean())
        self.mean_P = self.mean_P + work_NPM.mean((0, 2))
        self.light_L = self.light_L + light_NML.mean((0, 1))
        light_NL = light_NML.sum(1)
        self.unequal_L = self.unequal_L + light_NL.max(0) / np.maximum(light_NL.mean(0), 1e-30)

    def figures(self) -> dict[str, float]:
        """Fields of `Estimate`."""
        work, steps = self.work, self.steps
        sequences = self.light_L[None] / (steps * work.micro_batch_size)
        ideal_P = work.by_stage(work.micro_batch_size * work.of_sequences(sequences)[:, None])[0, :, 0]
        slowest = self.slowest / steps
        return {
            "over_mean": slowest / self._equal(self.mean_P / steps),
            "over_ideal": slowest / self._equal(ideal_P),
            "rows_max_over_mean": self.unequal / steps,
            "light_max_over_mean": float(np.max(self.unequal_L)) / steps,
            "share": self.light / steps / work.tokens,
            "overflow": 1.0 - self.kept / max(self.light, 1e-30),
            "useful_over_executed": self.kept / max(self.rows, 1e-30),
        }

    def _equal(self, mean_P: Any) -> float:
        """Time of a step whose micro-batches all have this work."""
        work_NPM = np.repeat(mean_P[None, :, None], self.work.micro_batches, axis=2)
        return float(step_time(work_NPM)[0])


def _target(config: RunConfig, traces: Sequence[StepTraces]) -> float:
    """ρ: the recipe's, or without one the share of light tokens that was traced."""
    if config.model.router.target is not None:
        return config.model.router.target
    shares = [float(step.light.mean()) / step.seq_length for step in traces]
    return float(np.clip(np.mean(shares), 0.001, 0.999))


def _routed(config: RunConfig) -> list[int]:
    return [layer for layer, kind in enumerate(parse_schedule(config.model.schedule), 1) if kind == "R"]


def _equal_stages(config: RunConfig) -> list[list[int]]:
    layers = np.arange(1, len(parse_schedule(config.model.schedule)) + 1)
    parts = np.array_split(layers, config.parallel.pipeline_model_parallel_size)
    return [part.tolist() for part in parts]


def _check(config: RunConfig, traces: Sequence[StepTraces], routed: Sequence[int]) -> None:
    """Raise ChiarError if the traces are not of this model."""
    found, length = traces[0].layers.tolist(), traces[0].seq_length
    if found != list(routed) or length != config.model.seq_length:
        raise ChiarError(
            f"the traces are of routed layers {found} and sequences of {length} tokens, but the recipe's "
            f"model.schedule {config.model.schedule} routes {list(routed)} and its model.seq_length is "
            f"{config.model.seq_length}: give the recipe of the traced run"
        )
    if config.model.router.kind in ("soft", "hard"):
        raise ChiarError(
            f"model.router.kind: {config.model.router.kind} computes every operator for every token: there "
            "is no balance to simulate"
        )
