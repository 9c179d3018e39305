"""The recipe's pipeline: the text of a layout, and what a layout asks of model and batch.

A layout is the number of layers in each chunk, in the order of layers: with 4 stages and 2 chunks on each,
stage 0 holds chunks 0 and 4. The embedding stands in the first chunk, the loss in the last.
"""

from __future__ import annotations

import re

from chiar_megatron.config.problems import shown
from chiar_megatron.config.schema import ModelConfig, ParallelConfig, TrainingConfig
from chiar_megatron.errors import ConfigError

Layout = tuple[int, ...]
CHOSEN_LAYOUTS = ("auto", "even")
_MAX_CHARACTERS = 100_000  # a slipped digit such as t*999999999 must not fill the memory


def chunks_of(parallel: ParallelConfig) -> int:
    """Chunks of layers in the whole pipeline."""
    return parallel.pipeline_model_parallel_size * parallel.virtual_pipeline_model_parallel_size


def even_layout(layers: int, chunks: int) -> Layout:
    """As many layers in every chunk; `chunks` must divide `layers`."""
    assert layers % chunks == 0, (layers, chunks)
    return (layers // chunks,) * chunks


def parse_layout(text: str) -> Layout:
    """Layers of each chunk of megatron-core's text, such as "Et*8|t*8|t*8|t*4L"; spaces and commas are free.

    Raises ConfigError for anything but one E at its start, one L at its end and t's between.
    """
    plain = _repeated(re.sub(r"[\s,]", "", text))
    if not re.fullmatch(r"E[t|]*L", plain):
        raise ConfigError(
            f"parallel.layout: {shown(text)} must be auto, even, or chunks of layers parted by |, from E "
            '(embedding) over t (a layer; t*3 for three) to L (loss), such as "Et*8|t*8|t*8|t*4L"'
        )
    return tuple(len(chunk) for chunk in plain[1:-1].split("|"))


def layout_text(layout: Layout) -> str:
    """The text that `parse_layout` reads back."""
    chunks = ["" if count == 0 else "t" if count == 1 else f"t*{count}" for count in layout]
    return f"E{'|'.join(chunks)}L"


def check_pipeline(model: ModelConfig, parallel: ParallelConfig, layers: int, problems: list[str]) -> None:
    """Add what the pipeline asks of the model; layers: of its schedule."""
    stages, virtual = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    if stages < 1 or virtual < 1:
        return  # reported as limits of single fields
    if virtual > 1 and stages == 1:
        problems.append(
            f"parallel.virtual_pipeline_model_parallel_size: {virtual} needs "
            "parallel.pipeline_model_parallel_size above 1, which is 1; set it to 1"
        )
        return
    _check_overlap(parallel, problems)
    chunks, sizes = stages * virtual, f"{stages} stages × {virtual} chunks"
    described = f"model.schedule: {shown(model.schedule)}, number of layers: {layers}"
    if parallel.layout == "even":
        if layers % chunks:
            problems.append(
                f"{described} is not divisible by {sizes} (parallel.pipeline_model_parallel_size × "
                "virtual_pipeline_model_parallel_size); use parallel.layout: auto, or other sizes"
            )
    elif parallel.layout == "auto":
        if layers < chunks - 1:
            problems.append(
                f"{described} is too few for {sizes}: each needs a layer, but for the last, which may hold "
                "the loss alone; lower parallel.pipeline_model_parallel_size"
            )
    else:
        _check_explicit(parallel.layout, layers, chunks, sizes, problems)


def _check_explicit(text: str, layers: int, chunks: int, sizes: str, problems: list[str]) -> None:
    try:
        layout = parse_layout(text)
    except ConfigError as error:
        problems.append(str(error))
        return
    named = f"parallel.layout: {shown(text)}"
    if len(layout) != chunks:
        problems.append(f"{named} has {len(layout)} chunks, but there are {sizes}; give {chunks}")
    elif sum(layout) != layers:
        problems.append(f"{named} has {sum(layout)} layers, but model.schedule has {layers}; make them equal")
    elif 0 in layout[1:-1]:
        problems.append(f"{named}: a chunk is empty; only E and L may stand without a layer")


def _check_overlap(parallel: ParallelConfig, problems: list[str]) -> None:
    if parallel.overlap_param_gather and not (
        parallel.distributed_optimizer and parallel.overlap_grad_reduce
    ):
        problems.append(
            "parallel.overlap_param_gather: true needs parallel.distributed_optimizer and "
            "parallel.overlap_grad_reduce; set both to true, or this to false"
        )


def check_interleaved_batch(
    parallel: ParallelConfig, training: TrainingConfig, replicas: int, problems: list[str]
) -> None:
    """Add what the interleaved schedule asks of the batch."""
    stages = parallel.pipeline_model_parallel_size
    micro_batches, rest = divmod(training.global_batch_size, training.micro_batch_size * replicas)
    if parallel.virtual_pipeline_model_parallel_size == 1 or rest or micro_batches % stages == 0:
        return  # what does not divide is reported elsewhere
    problems.append(
        f"training.global_batch_size: {training.global_batch_size} gives each of {replicas} replicas "
        f"{micro_batches} micro-batches of {training.micro_batch_size}, but with "
        f"parallel.virtual_pipeline_model_parallel_size above 1 they must come in multiples of the {stages} "
        "stages; change it or training.micro_batch_size"
    )


def _repeated(text: str) -> str:
    """`(...)*n` and `x*n` written out, as megatron-core does."""
    for pattern in (r"\(([^()]+)\)\*(\d{1,9})(?!\d)", r"([^*])\*(\d{1,9})(?!\d)"):
        longest = len(text) + sum(len(m[1]) * int(m[2]) for m in re.finditer(pattern, text))
        if longest > _MAX_CHARACTERS:
            raise ConfigError(f"parallel.layout: {shown(text)} names far too many layers; lower the counts")
        text = re.sub(pattern, lambda match: match[1] * int(match[2]), text)
    return text
