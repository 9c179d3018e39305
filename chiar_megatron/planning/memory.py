"""Memory of one GPU: what stays allocated, and what a step adds at its peak.

The peak is taken as torch's allocator counts it (`max_memory_allocated`): the CUDA context, NCCL's buffers
and fragmentation come on top, for which `USABLE` leaves room.
"""

from __future__ import annotations

from dataclasses import dataclass

from chiar_megatron.config.pipeline import Layout
from chiar_megatron.config.schedule import parse_schedule
from chiar_megatron.config.schema import RunConfig
from chiar_megatron.model.pipeline import pipeline_layout
from chiar_megatron.planning.activations import ActivationModel
from chiar_megatron.planning.weights import stage_parameters
from chiar_megatron.runtime.paths import would_replay

GIB = 2**30
USABLE = 0.92  # share of a GPU's memory that a plan fills
WORKSPACE = 0.13 * GIB  # of cuBLAS and of the step's own figures, as measured on an H100


@dataclass(frozen=True)
class StageMemory:
    """Bytes on every GPU of one pipeline stage."""

    parameters: int
    """Their number, not bytes."""
    weights: float
    gradients: float
    """float32, whatever the weights are."""
    main_weights: float
    """float32 copies of half-precision weights."""
    optimizer: float
    """AdamW's two moments."""
    activations: float
    """Of all micro-batches that are under way at once."""
    loss: float
    """Logits and what the loss makes of them, or what a layer's backward pass needs for a moment, whichever
    is more: they are not needed together."""
    workspace: float

    @property
    def peak(self) -> float:
        """All of it."""
        return self.static + self.activations + self.loss + self.workspace

    @property
    def static(self) -> float:
        """What stays from step to step."""
        return self.weights + self.gradients + self.main_weights + self.optimizer


def stage_memory(config: RunConfig, replicas: int, compiled: bool) -> list[StageMemory]:
    """Of every pipeline stage; config: resolved. replicas: data-parallel size.

    compiled: whether layers are compiled (`runtime.compile`), which on CUDA they are if nobody forbids it.
    """
    layout = pipeline_layout(config)
    return [
        _stage(config, layout, stage, replicas, compiled)
        for stage in range(config.parallel.pipeline_model_parallel_size)
    ]


def _stage(config: RunConfig, layout: Layout, stage: int, replicas: int, compiled: bool) -> StageMemory:
    parallel, model, training = config.parallel, config.model, config.training
    count = stage_parameters(model, parallel, layout, stage)
    half = training.precision == "bf16"
    sharers = replicas * parallel.context_parallel_size if parallel.distributed_optimizer else 1
    activations = ActivationModel(config, compiled)
    first, last = stage == 0, stage == parallel.pipeline_model_parallel_size - 1
    kept, passing = _layers(config, activations, layout, stage)
    tokens = activations.tokens
    loss = passing
    tied = 0.0
    if last:
        kept += activations.head() * tokens
        loss = max(passing, activations.loss() * tokens)
        # The head's gradient of a tied table waits for the embedding's, beside the buffer of gradients.
        if first and model.tie_embeddings:
            assert model.vocab_size is not None
            width = model.vocab_size / parallel.tensor_model_parallel_size
            tied = width * model.hidden_size * activations.element
    if first:
        kept += activations.embedding() * tokens
    one_pass = training.micro_batch_size * replicas == training.global_batch_size
    if would_replay(config) and one_pass and not parallel.overlap_grad_reduce:
        # Every parameter's gradient waits for the end of the backward pass, when activations are gone.
        loss = max(loss, count * activations.element - kept)
    return StageMemory(
        parameters=count,
        weights=count * (2 if half else 4),
        gradients=count * 4,
        main_weights=count * 4 / sharers if half else 0.0,
        optimizer=count * 8 / sharers,
        activations=kept + tied,
        loss=loss,
        workspace=WORKSPACE,
    )


def _layers(
    config: RunConfig, activations: ActivationModel, layout: Layout, stage: int
) -> tuple[float, float]:
    """(bytes kept over all micro-batches under way, bytes that pass while one layer goes backward)."""
    stages = config.parallel.pipeline_model_parallel_size
    kinds, again = parse_schedule(config.model.schedule), config.training.recompute == "full"
    tokens, kept, passing, first = activations.tokens, 0.0, 0.0, 0
    in_flight = micro_batches_in_flight(config, len(layout), stage)
    for chunk, layers in enumerate(layout):
        if chunk % stages == stage:
            for kind in kinds[first : first + layers]:
                layer = activations.layer(kind)
                whole = layer.kept * tokens + layer.constant
                kept += in_flight[chunk // stages] * (layer.input * tokens if again else whole)
                passing = max(passing, layer.passing * tokens + (whole if again else 0.0))
        first += layers
    return kept, passing


def micro_batches_in_flight(config: RunConfig, chunks: int, stage: int) -> list[float]:
    """Micro-batches whose activations a stage holds at once, for each of its chunks.

    1F1B: as many as stages from this one to the last. Interleaved: what megatron-core's schedule runs forward
    before its first backward, and one more, spread over the chunks.
    """
    parallel, training = config.parallel, config.training
    stages = parallel.pipeline_model_parallel_size
    virtual = chunks // stages
    replicas = parallel.data_parallel_size or 1
    micro_batches = training.global_batch_size // (training.micro_batch_size * replicas)
    if virtual == 1:
        return [float(min(micro_batches, stages - stage))]
    ahead = (stages - stage - 1) * 2 + (virtual - 1) * stages + 1
    held = []
    for chunk in range(virtual):
        # Chunks run forward in groups of `stages` micro-batches, the first chunk first.
        whole, rest = divmod(ahead, stages * virtual)
        held.append(float(min(micro_batches, whole * stages + max(0, min(stages, rest - chunk * stages)))))
    return held
