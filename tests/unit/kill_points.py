"""Saves a second checkpoint and kills itself at its n-th dealing with the file system.

`python -m tests.unit.kill_points FOLDER` makes `FOLDER/<n>` for n = 1, 2, … until a save gets through, each
by a fork of its own, and prints how many there were.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor

from chiar_megatron.checkpoint.claim import claim_run
from chiar_megatron.checkpoint.store import CheckpointStore, load_state, make_info
from chiar_megatron.config.schema import CheckpointConfig
from chiar_megatron.runtime.distributed import single_process_world

# What Python tells of before it does it; os.fsync is not told of, but what follows it is.
TOLD = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.listdir", "os.scandir", "shutil.rmtree"}
KEEP = 1  # so that the second save also deletes the first


def state(value: float) -> dict[str, Any]:
    """A sharded state of one tensor and one number."""
    data = torch.full((5, 3), value)
    return {"weight": ShardedTensor.from_rank_offsets("weight", data), "count": value}


def read(folder: Path) -> tuple[float, float]:
    """What a checkpoint holds."""
    loaded = load_state(folder, {"weight": state(0.0)["weight"]})
    return float(loaded["weight"].mean()), float(loaded["count"])


def store(folder: Path) -> CheckpointStore:
    """The store under test, as a new attempt of the run opens it."""
    return CheckpointStore(folder / "checkpoints", CheckpointConfig(keep_last=KEEP), claim_run(folder))


def save(folder: Path, step: int) -> None:
    """One checkpoint whose numbers are its step."""
    store(folder).save(state(float(step)), make_info(step, 0, False, {}, {}))


def signal_at(number: int, folder: Path, sent: signal.Signals) -> None:
    """Kill or stop this process at its `number`-th dealing with files in the folder."""
    seen = 0

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in TOLD and str(arguments[0]).startswith(str(folder)):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), sent)

    sys.addaudithook(count)


def main(root: Path) -> None:
    """See above. Groups are started in the forks: their threads do not survive one."""
    number = 0
    status = signal.SIGKILL
    while status == signal.SIGKILL:
        number += 1
        folder = root / str(number)
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                single_process_world("cpu")
                save(folder, 1)
                signal_at(number, folder, signal.SIGKILL)
                save(folder, 2)
                code = 0
            finally:
                os._exit(code)
        status = os.waitpid(pid, 0)[1]
    if status != 0:
        raise SystemExit(f"kill point {number}: status {status}")
    print(number)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
