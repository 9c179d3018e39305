"""Which checkpoints are kept: the newest few, and of the older ones one for every so many minutes."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from chiar_megatron.checkpoint.files import CheckpointInfo, complete_steps, step_folder
from chiar_megatron.config.schema import CheckpointConfig
from chiar_megatron.errors import CheckpointError


def steps_to_delete(folder: Path, config: CheckpointConfig) -> list[int]:
    """Steps whose checkpoints in a folder are no longer wanted, oldest first."""
    if config.keep_last <= 0:
        return []
    times = {}
    for step in complete_steps(folder):
        with suppress(CheckpointError):  # a damaged one is left to the user
            times[step] = CheckpointInfo.read(step_folder(folder, step)).created_unix_seconds
    return choose_deleted(times, config)


def choose_deleted(times: dict[int, float], config: CheckpointConfig) -> list[int]:
    """The choice alone. times: when the checkpoint of each step was written, in seconds, oldest first."""
    older = list(times)[: -config.keep_last]
    if config.keep_every_minutes <= 0:
        return older
    deleted, last_kept = [], None
    for step in older:
        if last_kept is None or times[step] - last_kept >= config.keep_every_minutes * 60:
            last_kept = times[step]
        else:
            deleted.append(step)
    return deleted
