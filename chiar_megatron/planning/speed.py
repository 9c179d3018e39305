"""How long a step takes, by a model simple enough to be checked by hand.

A micro-batch takes the executed FLOPs of a stage ÷ the throughput of a GPU, plus its transfers, on the stage
where that takes longest; a pipeline of P stages in V chunks each does `micro-batches + (P - 1)/V` of those
one after the other; then gradients are summed over replicas. Throughput is that of measured whole steps,
optimizer included. Where steps are not replayed as a CUDA graph, a micro-batch takes at least the time in
which the host launches its kernels, one by one.

Tensor- and context-parallel ranks share a layer's FLOPs equally: attention by heads, the rest by widths or
tokens, as if light tokens were spread evenly (mixing is not shared where dark ones lie together) and sequence
parallelism on (without it tensor-parallel ranks all mix and score the same tokens); projections of rows,
which context-parallel ranks have more of than there are, as `pipeline_costs` counts them. Transfers within
layers are those of the ledger of bytes (`model/traffic.py`) over the bandwidth of their group;
no compute hides them, and no transfer has a latency.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace

from chiar_megatron.config.pipeline import Layout
from chiar_megatron.config.schema import RunConfig
from chiar_megatron.model.pipeline import expected_fraction, pipeline_costs, pipeline_layout
from chiar_megatron.model.traffic import traffic_per_micro_batch
from chiar_megatron.planning.weights import stage_parameters
from chiar_megatron.runtime.paths import would_compile, would_replay

MEASURED_TFLOPS = 440.0
MEASURED_ON = "one H200, bf16, whole steps of the 400M models: 384 to 505"
# Of layers that tensor- or context-parallel ranks share, without their transfers, and of those not compiled:
# 4,096 tokens of hidden size 1024 a rank (benchmarks/README.md, "Several GPUs").
SHARED, UNCOMPILED = 0.75, 0.8
# Kernels of a layer and micro-batch, forward and backward, and what the host takes for one: profiles of 400M
# models count 96 of compiled layers and 233 of others; two H200s of a virtual machine took 34 to 69 us.
LAUNCHES, UNCOMPILED_LAUNCHES = 100, 240
SECONDS_PER_LAUNCH = 60e-6


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
    """What the slowest stage has more of it than the mean."""
    bubble: float
    """Stages waiting for each other."""
    model_parallel: float
    """Transfers of tensor, context and pipeline parallelism, of the slowest stage."""
    data_parallel: float
    """Gradients and weights between replicas, where nothing hides it."""
    launching: float
    """What the host takes longer to launch kernels than the slowest stage to run them."""

    @property
    def total(self) -> float:
        """Of the step."""
        return float(sum(astuple(self)))


def step_time(config: RunConfig, replicas: int, cluster: Cluster) -> StepTime:
    """Of a resolved recipe with so many replicas."""
    parallel, training = config.parallel, config.training
    tensor, context = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    stages, virtual = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    costs, layout = pipeline_costs(config), pipeline_layout(config)
    loads = costs.of_stages(layout, stages)
    rate = cluster.tflops * 1e12 * (1.0 if tensor * context == 1 else SHARED)
    rate *= 1.0 if would_compile(config) else UNCOMPILED
    per_load = training.micro_batch_size / (tensor * context * rate)
    mean = sum(loads) / stages * per_load
    within = _transfers_of_stages(config, layout, cluster)
    slowest, transfers = max(
        zip((load * per_load for load in loads), within, strict=True), key=lambda stage: sum(stage)
    )
    transfers += _sent_on(config, cluster)
    micro_batches = training.global_batch_size / (training.micro_batch_size * replicas)
    waiting = (stages - 1) / virtual
    launching = max(0.0, _launches(config, layout) * SECONDS_PER_LAUNCH - slowest - transfers)
    data = _data_transfers(config, replicas, cluster)
    if parallel.overlap_grad_reduce:
        data = max(0.0, data - slowest * 2 / 3)  # the last micro-batch's backward pass hides it
    return StepTime(
        compute=micro_batches * mean,
        imbalance=micro_batches * (slowest - mean),
        bubble=waiting * slowest,
        model_parallel=(micro_batches + waiting) * transfers,
        data_parallel=data,
        launching=(micro_batches + waiting) * launching,
    )


def _launches(config: RunConfig, layout: Layout) -> float:
    """Of a micro-batch on the stage with most layers; 0 where a graph makes them."""
    if would_replay(config):
        return 0.0
    stages = config.parallel.pipeline_model_parallel_size
    layers = max(sum(layout[stage::stages]) for stage in range(stages))
    again = 4 / 3 if config.training.recompute == "full" else 1.0
    return layers * again * (LAUNCHES if would_compile(config) else UNCOMPILED_LAUNCHES)


def _transfers_of_stages(config: RunConfig, layout: Layout, cluster: Cluster) -> list[float]:
    """Seconds that each stage's layers take to exchange what they need of one micro-batch, forward and
    backward."""
    parallel, stages = config.parallel, config.parallel.pipeline_model_parallel_size
    tensor, context = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    traffic = traffic_per_micro_batch(
        config.model,
        parallel,
        config.training.micro_batch_size,
        routed_fraction=expected_fraction(config.model.router),
        element_bytes=_element_bytes(config),
    )
    stage_of_layer = [chunk % stages for chunk, layers in enumerate(layout) for _ in range(layers)]
    forward_passes = 2 if config.training.recompute == "full" else 1
    seconds = [0.0] * stages
    for transfer in traffic.transfers:
        moved = forward_passes * transfer.forward + transfer.backward
        span = tensor * (context if transfer.crosses_context else 1)  # tensor-parallel ranks are neighbours
        seconds[stage_of_layer[transfer.layer - 1]] += moved / cluster.bytes_per_second(span)
    return seconds


def _sent_on(config: RunConfig, cluster: Cluster) -> float:
    """Seconds for what a stage hands on of one micro-batch, there and back."""
    parallel = config.parallel
    if parallel.pipeline_model_parallel_size == 1:
        return 0.0
    tokens = config.training.micro_batch_size * config.model.seq_length / parallel.context_parallel_size
    if parallel.sequence_parallel:
        tokens /= parallel.tensor_model_parallel_size
    state = tokens * config.model.hidden_size * _element_bytes(config)
    moved = 2 * parallel.virtual_pipeline_model_parallel_size * state
    return moved / cluster.bytes_per_second(cluster.gpus)


def _element_bytes(config: RunConfig) -> int:
    return 2 if config.training.precision == "bf16" else 4


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
