"""Small runs whose figures the tests of the metrics package write and read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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


def write_run(run_dir: Path, steps: range, resume_step: int = 0, **logging: Any) -> None:
    writers = open_writers(run_dir, LoggingConfig(**logging), resume_step, RECIPE)
    for step in steps:
        writers.log(step, figures(step))
    writers.close()
