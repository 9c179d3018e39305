"""What each rank of a launcher's test runs: find the others, add up over gloo, and write down who it was."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def main(folder: Path) -> None:
    """Write `rank_<n>.json`."""
    import torch
    import torch.distributed as dist

    from chiar_megatron.config.schema import ParallelConfig, RuntimeConfig
    from chiar_megatron.runtime.distributed import initialize, shutdown
    from chiar_megatron.runtime.env import read_process_env

    env = read_process_env()
    runtime = RuntimeConfig(device="cpu", start_timeout_seconds=40.0, collective_timeout_seconds=30.0)
    world = initialize(ParallelConfig(tensor_model_parallel_size=env.world_size), runtime, env)
    total = torch.tensor([2.0**env.rank])
    dist.all_reduce(total)
    record = {"launcher": env.launcher, "size": world.size, "total": total.item(), "pid": os.getpid()}
    record |= {"local": [env.local_rank, env.local_world_size], "node": env.node_rank, "job": env.job}
    record |= {"host": env.host, "master_addr": env.master_addr, "port": env.master_port}
    (folder / f"rank_{world.rank}.json").write_text(json.dumps(record))
    shutdown()


def check_answers(folder: Path, launcher: str, size: int) -> list[dict[str, Any]]:
    """Every rank was there once and saw all the others; returns what they wrote, by rank."""
    found = [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(size)]
    assert {entry["launcher"] for entry in found} == {launcher}, found
    assert {(entry["size"], entry["total"]) for entry in found} == {(size, 2.0**size - 1)}, found
    assert len({entry["pid"] for entry in found}) == size and len({entry["job"] for entry in found}) == 1
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
