"""What each process of the evaluation tests runs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from megatron.core import parallel_state

from chiar_megatron.config.schema import ParallelConfig, RuntimeConfig
from chiar_megatron.errors import ChiarError
from chiar_megatron.runtime.distributed import initialize
from chiar_megatron.runtime.env import read_process_env
from chiar_megatron.training.evaluate import EvaluationSettings, evaluate


def evaluations(
    layouts: list[tuple[int, int, int]], settings: list[dict[str, Any]]
) -> list[list[dict[str, Any] | str]]:
    """Every evaluation in every layout (tensor, pipeline, context; the rest is data), or the error."""
    answers = []
    for tensor, pipeline, context in layouts:
        parallel = ParallelConfig(
            tensor_model_parallel_size=tensor,
            pipeline_model_parallel_size=pipeline,
            context_parallel_size=context,
        )
        world = initialize(parallel, RuntimeConfig(device="cpu"), read_process_env())
        answers.append([_one(EvaluationSettings(**setting), parallel, world) for setting in settings])
        parallel_state.destroy_model_parallel()
    return answers


def _one(settings: EvaluationSettings, parallel: ParallelConfig, world: Any) -> dict[str, Any] | str:
    try:
        return asdict(evaluate(settings, parallel, world))
    except ChiarError as error:
        return str(error)
