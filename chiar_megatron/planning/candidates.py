"""Every layout of a cluster that a recipe's rules allow and whose memory fits, by estimated step time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from chiar_megatron.config.schema import RunConfig
from chiar_megatron.config.validate import check_config
from chiar_megatron.errors import ConfigError
from chiar_megatron.model.pipeline import PipelineCut, pipeline_cut
from chiar_megatron.planning.memory import GIB, USABLE, stage_memory
from chiar_megatron.planning.speed import Cluster, StepTime, step_time, with_layout
from chiar_megatron.runtime.paths import would_compile

_CHUNKS = (1, 2, 4)  # of an interleaved pipeline


@dataclass(frozen=True)
class Candidate:
    """One layout with what it costs."""

    config: RunConfig
    replicas: int
    peak: float
    """Bytes on the fullest GPU."""
    time: StepTime
    cut: PipelineCut

    @property
    def tokens_per_second(self) -> float:
        """Over all GPUs."""
        return self.config.training.global_batch_size * self.config.model.seq_length / self.time.total

    @property
    def name(self) -> str:
        """What differs from layout to layout, in a few words."""
        parallel = self.config.parallel
        virtual = parallel.virtual_pipeline_model_parallel_size
        sizes = {
            "TP": parallel.tensor_model_parallel_size,
            "PP": parallel.pipeline_model_parallel_size,
            "VPP": virtual,
            "CP": parallel.context_parallel_size,
            "DP": self.replicas,
        }
        shown = " ".join(f"{key}={size}" for key, size in sizes.items() if size > 1) or "one GPU"
        extras = {
            "sequence parallel": parallel.sequence_parallel,
            "distributed optimizer": parallel.distributed_optimizer,
            "recompute": self.config.training.recompute == "full",
        }
        return ", ".join([shown, *(name for name, on in extras.items() if on)])


def weigh(config: RunConfig, replicas: int, cluster: Cluster) -> Candidate:
    """A checked, resolved recipe in its own layout."""
    memory = stage_memory(config, replicas, would_compile(config))
    peak = max(stage.peak for stage in memory)
    return Candidate(config, replicas, peak, step_time(config, replicas, cluster), pipeline_cut(config))


def candidates(config: RunConfig, cluster: Cluster) -> tuple[list[Candidate], list[Candidate]]:
    """(what fits, fastest first; what does not, smallest first). Batch, micro-batch and precision are the
    recipe's; a layout that does not fit is tried with a distributed optimizer, then with recomputation."""
    fitting, others = [], []
    for layout in _layouts(config, cluster):
        tried = [weigh(option, _replicas(option), cluster) for option in _options(layout)]
        fits = [candidate for candidate in tried if candidate.peak <= USABLE * cluster.memory_gib * GIB]
        if fits:
            fitting.append(fits[0])
        elif tried:
            others.append(min(tried, key=lambda candidate: candidate.peak))
    fitting.sort(key=lambda candidate: candidate.time.total)
    return fitting, sorted(others, key=lambda candidate: candidate.peak)


def _layouts(config: RunConfig, cluster: Cluster) -> Iterator[RunConfig]:
    """All that the recipe's rules allow: `check_config` is the judge."""
    for tensor in _divisors(cluster.gpus):
        if tensor > cluster.gpus_per_node:
            continue
        for context in _divisors(cluster.gpus // tensor):
            for stages in _divisors(cluster.gpus // (tensor * context)):
                for virtual in _CHUNKS if stages > 1 else (1,):
                    layout = with_layout(
                        config,
                        tensor_model_parallel_size=tensor,
                        sequence_parallel=tensor > 1,
                        context_parallel_size=context,
                        pipeline_model_parallel_size=stages,
                        virtual_pipeline_model_parallel_size=virtual,
                        layout="auto",
                        data_parallel_size=cluster.gpus // (tensor * context * stages),
                    )
                    if _is_allowed(layout, cluster.gpus):
                        yield layout


def _is_allowed(config: RunConfig, gpus: int) -> bool:
    try:
        check_config(config, gpus)
    except ConfigError:
        return False
    return True


def _options(config: RunConfig) -> Iterator[RunConfig]:
    yield config
    if _replicas(config) > 1 and not config.parallel.distributed_optimizer:
        config = with_layout(config, distributed_optimizer=True)
        yield config
    if config.training.recompute == "none":
        yield replace(config, training=replace(config.training, recompute="full"))


def _replicas(config: RunConfig) -> int:
    assert config.parallel.data_parallel_size is not None
    return config.parallel.data_parallel_size


def _divisors(number: int) -> list[int]:
    lower = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return sorted({*lower, *(number // size for size in lower)})
