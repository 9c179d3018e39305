"""Which checkpoints are kept: the newest few, and of the older ones one for every so many minutes."""

from __future__ import annotations

from pathlib import Path

from chiar_megatron.checkpoint.files import MANIFEST, step_folder
from chiar_megatron.config.schema import CheckpointConfig


def steps_to_delete(folder: Path, steps: list[int], config: CheckpointConfig) -> list[int]:
    """Steps whose checkpoints are no longer wanted. steps: all complete ones, oldest first."""
    if config.keep_last <= 0:
        return []
    times = {step: (step_folder(folder, step) / MANIFEST).stat().st_mtime for step in steps}
    return choose_deleted(steps, times, config)


def choose_deleted(steps: list[int], times: dict[int, float], config: CheckpointConfig) -> list[int]:
    """The choice alone; times: when each was written, in seconds."""
    older = steps[: -config.keep_last]
    if config.keep_every_minutes <= 0:
        return older
    deleted, last_kept = [], None
    for step in older:
        if last_kept is None or times[step] - last_kept >= config.keep_every_minutes * 60:
            last_kept = times[step]
        else:
            deleted.append(step)
    return deleted
