"""How long a step takes, by a model simple enough to be checked by hand.

A micro-batch takes its heaviest stage's executed FLOPs ÷ the throughput of a GPU, plus its transfers; a
pipeline of P stages in V chunks each does `micro-batches + (P - 1)/V` of those one after the other; then
gradients are summed over replicas. Throughput is that of measured whole steps, optimizer included.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from chiar_megatron.config.schedule import parse_schedule
from chiar_megatron.config.schema import RunConfig
from chiar_megatron.model.pieces import Sizes
from chiar_megatron.model.pipeline import pipeline_costs, pipeline_layout
from chiar_megatron.planning.weights import stage_parameters
from chiar_megatron.runtime.paths import would_compile

MEASURED_TFLOPS = 430.0
MEASURED_ON = "one H200, bf16, whole steps of the 400M models: 384 to 478"
# Of layers that are not compiled, as under tensor parallelism: 105.6k tokens/s beside 119.9k of the 400M twin
# on one H200 (DESIGN, section 2).
UNCOMPILED = 0.88


@dataclass(frozen=True)
class Cluster:
    """GPUs and what joins them."""

    gpus: int
    gpus_per_node: int = 8
    memory_gib: float = 80.0
    """Of one GPU."""
    tflops: float = MEASURED_TFLOPS
    """Executed by one GPU over whole steps, 10¹² FLOPs a second."""
    link_gb_s: float = 300.0
    """Bandwidth of a GPU within its node, 10⁹ bytes a second in one direction (NVLink of an H100, in use)."""
    network_gb_s: float = 40.0
    """The same between nodes (400 Gbit/s for each GPU, in use)."""

    def bytes_per_second(self, span: int) -> float:
        """Of a group that spans so many neighbouring ranks."""
        return 1e9 * (self.link_gb_s if span <= self.gpus_per_node else self.network_gb_s)


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step by cause; they add up."""

    compute: float
    """Were all stages equal and never waiting."""
    imbalance: float
    """For the heaviest stage."""
    bubble: float
    """Stages waiting for each other."""
    model_parallel: float
    """Transfers of tensor, context and pipeline parallelism."""
    data_parallel: float
    """Gradients and weights between replicas, where nothing hides it."""

    @property
    def total(self) -> float:
        """Of the step."""
        parts = self.compute, self.imbalance, self.bubble, self.model_parallel, self.data_parallel
        return sum(parts)


def step_time(config: RunConfig, replicas: int, cluster: Cluster) -> StepTime:
    """Of a resolved recipe with so many replicas."""
    parallel, training = config.parallel, config.training
    tensor, context = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    stages, virtual = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    costs, layout = pipeline_costs(config), pipeline_layout(config)
    loads = costs.of_stages(layout, stages)
    rate = cluster.tflops * 1e12 * (1.0 if would_compile(config) else UNCOMPILED)
    per_load = training.micro_batch_size / (tensor * context * rate)
    mean, heaviest = sum(loads) / stages * per_load, max(loads) * per_load
    micro_batches = training.global_batch_size / (training.micro_batch_size * replicas)
    waiting = (stages - 1) / virtual
    transfers = _model_transfers(config, cluster)
    data = _data_transfers(config, replicas, cluster)
    if parallel.overlap_grad_reduce:
        data = max(0.0, data - heaviest * 2 / 3)  # the last micro-batch's backward pass hides it
    return StepTime(
        compute=micro_batches * mean,
        imbalance=micro_batches * (heaviest - mean),
        bubble=waiting * heaviest,
        model_parallel=(micro_batches + waiting) * transfers,
        data_parallel=data,
    )


def _model_transfers(config: RunConfig, cluster: Cluster) -> float:
    """Seconds of one micro-batch, forward and backward, on a stage of average length."""
    parallel, sizes = config.parallel, Sizes.of(config.model)
    tensor, context = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    stages = parallel.pipeline_model_parallel_size
    element = 2 if config.training.precision == "bf16" else 4
    tokens = config.training.micro_batch_size * config.model.seq_length / context
    kinds = parse_schedule(config.model.schedule)
    attending = sum(kind != "D" for kind in kinds) / stages
    state = tokens * sizes.h * element
    seconds = 0.0
    if tensor > 1:
        # An all-reduce behind attention and one behind the feed-forward layer, each way; with sequence
        # parallelism a reduce-scatter and an all-gather move the same.
        reductions = 2 * (attending + len(kinds) / stages)
        moved = reductions * 2 * (tensor - 1) / tensor * state
        seconds += moved / cluster.bytes_per_second(tensor)
    if context > 1:
        widths = 2 * sizes.query_width + sizes.key_value_width
        moved = attending * 2 * (context - 1) / context * tokens * widths / tensor * element
        seconds += moved / cluster.bytes_per_second(tensor * context)
    if stages > 1:
        shared = tensor if parallel.sequence_parallel else 1
        moved = 2 * parallel.virtual_pipeline_model_parallel_size * state / shared
        seconds += moved / cluster.bytes_per_second(cluster.gpus)
    return seconds


def _data_transfers(config: RunConfig, replicas: int, cluster: Cluster) -> float:
    parallel = config.parallel
    ranks = replicas * parallel.context_parallel_size
    if ranks == 1:
        return 0.0
    layout = pipeline_layout(config)
    stages = range(parallel.pipeline_model_parallel_size)
    largest = max(stage_parameters(config.model, parallel, layout, stage) for stage in stages)
    weight = 2 if config.training.precision == "bf16" else 4
    # float32 gradients are all-reduced, or scattered and the new weights gathered.
    moved = largest * ((4 + weight) if parallel.distributed_optimizer else 8) * (ranks - 1) / ranks
    return moved / cluster.bytes_per_second(parallel.tensor_model_parallel_size * ranks)


def with_layout(config: RunConfig, **fields: object) -> RunConfig:
    """The recipe in another layout; fields: of `parallel`."""
    return replace(config, parallel=replace(config.parallel, **fields))  # type: ignore[arg-type]
