"""Small runs whose figures the tests of the metrics package write and read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from chiar_megatron.checkpoint.claim import claim_run
from chiar_megatron.config.schema import LoggingConfig
from chiar_megatron.metrics.writers import open_writers

RECIPE = {"model": {"schedule": "D R*2 A"}, "optimizer": {"lr": 0.001}}


def figures(step: int) -> dict[str, Any]:
    """A record as the training loop logs it, for two routed layers."""
    return {
        "loss": 9.0 - 0.01 * step,
        "tokens_per_second": 1000.0 + step,
        "routed_fraction": [0.25, 0.75],
        "gate": 0.5,
        "validation": {"wiki": 8.0} if step % 2 == 0 else None,
    }


def balance(step: int) -> dict[str, Any]:
    """What a logged step says of balance, for the same layers."""
    return {
        "useful_over_executed": [0.9, 0.8],
        "overflow_fraction": [0.0, 0.01],
        "rank_max_over_mean": [1.1, 1.0 + 1.0 / step],
        "executed_max_over_mean": [1.0, 1.0],
        "rank_seconds": {"mean": 1.0, "max": 1.2, "max_over_mean": 1.2, "slowest_rank": 3},
        "threshold": [0.1, -0.1],
        "score_mean": [0.0, 0.0],
        "score_std": [1.0, 1.0],
        "score_histogram": [[0] * 8 + [30, 10] + [0] * 8, [1] * 18],
        "alarms": {"overflow/layer_3": 0.02},
    }


def write_run(run_dir: Path, steps: range, resume_step: int = 0, **logging: Any) -> None:
    writers = open_writers(claim_run(run_dir), LoggingConfig(**logging), resume_step, RECIPE)
    for step in steps:
        more = balance(step) if "wandb_project" in logging else {}
        writers.log(step, {**figures(step), **more})
    writers.close()
