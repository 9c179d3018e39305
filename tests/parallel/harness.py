"""Run a function in several processes and bring back what each of them answers.

One launch costs seconds (imports, groups), so let one worker function check many things:

    results = run_ranks("tests.parallel.workers:losses", world_size=2, args={"tensor": 2})

The worker is called as `losses(**args)` in every process. It reads its rank by
`chiar_megatron.runtime.env.read_process_env()`; joining the others is its own affair.
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
from pathlib import Path
from typing import Any, Optional

REPOSITORY = Path(__file__).resolve().parents[2]


def run_ranks(
    function_path: str, world_size: int, args: Optional[dict[str, Any]] = None, timeout: float = 120.0
) -> list[Any]:
    """Call the function `"package.module:name"` with `**args` in world_size processes.

    Args:
        args: what `torch.save` can write, tensors included.
        timeout: hard limit in seconds; then every rank is ended and its stack shown.

    Returns:
        What each rank returned (anything `torch.save` can write), by rank.

    Raises:
        AssertionError: a rank failed or the time was up; names the rank, with its traceback.
    """
    import torch

    from chiar_megatron.runtime.launch import launch_local

    inherited = os.environ.get("PYTHONPATH")
    with tempfile.TemporaryDirectory(prefix="chiar-ranks-") as folder:
        torch.save(args or {}, Path(folder) / "args.pt")
        result = launch_local(
            [sys.executable, "-m", "tests.parallel.harness", function_path, folder],
            world_size,
            timeout_seconds=timeout,
            env={"PYTHONPATH": os.pathsep.join(filter(None, (str(REPOSITORY), inherited)))},
            grace_seconds=3.0,
        )
        if result.exit_code != 0:
            own = result.stderr_tails[0] if result.failed_rank == 0 else ""
            raise AssertionError(f"{function_path} with {world_size} ranks: {result.message}\n{own}")
        return [torch.load(_answer(folder, rank), weights_only=False) for rank in range(world_size)]


def _answer(folder: str, rank: int) -> Path:
    return Path(folder) / f"answer_{rank}.pt"


def main(function_path: str, folder: str) -> None:
    """What each process runs."""
    import torch

    from chiar_megatron.runtime.env import read_process_env
    from tests.parallel.nccl_rules import require_contiguous_tensors

    require_contiguous_tensors()
    module_name, _, function_name = function_path.partition(":")
    function = getattr(importlib.import_module(module_name), function_name)
    args = torch.load(Path(folder) / "args.pt", weights_only=False)
    torch.save(function(**args), _answer(folder, read_process_env().rank))


if __name__ == "__main__":
    main(*sys.argv[1:])
