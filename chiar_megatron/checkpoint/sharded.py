"""Writing a sharded state in megatron-core's `torch_dist` format, in stages that fail on all ranks alike.

`dist_checkpointing.save` writes from forked processes, which may hang beside gloo's threads and for which
it waits for ever if one is killed; it asks a manager process that takes seconds to start and dies of a
SIGTERM sent to the whole job; and a rank whose disk is full leaves the collectives that others wait in.
So its planning is kept, and the files are written by a thread of this process, apart from all collectives.
"""

from __future__ import annotations

import errno
import io
import os
import queue
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies import torch as torch_strategy
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.filesystem import FileSystem

_FORMAT, _VERSION = "torch_dist", 1
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

# Any value keeps megatron-core's writer from starting its manager process.
filesystem_async._results_queue = queue.SimpleQueue()


class _Folders(FileSystem):
    """torch's file system, but for making folders: that would bring back what a newer attempt took away."""

    def mkdir(self, path: str | os.PathLike[str]) -> None:
        pass


class _Writer(filesystem_async.FileSystemWriterAsync):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fs = _Folders()


torch_strategy.FileSystemWriterAsync = _Writer


class ShardedWrite:
    """One checkpoint's tensors on their way into a folder."""

    def __init__(self, state: dict[str, Any], folder: Path, copy: bool, validate: bool) -> None:
        """Plan, with all ranks together: which rank writes which tensors. Nothing is written yet.

        state: sharded state; it is consumed. copy: take the tensors as they are now, so that training
        may go on. validate: check that every part of every tensor has exactly one writer.
        """
        state["content_metadata"] = {"non_homogeneous_layers": True}
        sharded, common = save_preprocess(state, validate)
        # Serialised now: it holds the optimizer's own groups. (And writing to a path, torch would say only
        # "unexpected pos" of a full disk.)
        self._common = io.BytesIO()
        if dist.get_rank() == 0:
            torch.save(common, self._common)
        self._folder = folder
        self._planner = _Planner(_FORMAT, _VERSION, thread_count=1)
        self._planner.async_save(sharded, folder)
        self._buckets = [
            (path, key, (objects, [(item, tensor.to("cpu", copy=copy)) for item, tensor in tensors]))
            for path, key, (objects, tensors) in self._planner.writer.write_buckets
        ]

    def write(self) -> tuple[list[str], list[Any]]:
        """Write this rank's tensors, on the disk when this returns; any thread may call it.

        Returns the names of the files, and what `finish` needs of every rank. Raises OSError.
        """
        names, results = [], []
        writer = self._planner.writer
        for path, name, content in self._buckets:
            answers: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
            ticket: queue.Queue[int] = queue.Queue()
            ticket.put(0)
            writer.write_preloaded_data(
                [writer.transforms], 0, (path, name, content), answers, ticket, use_fsync=True
            )
            outcome = answers.get()[1]
            if isinstance(outcome, Exception):
                raise disk_error(outcome) from outcome
            names.append(name)
            results += outcome
        self._buckets = []
        return names, results

    def finish(self, results: list[list[Any]]) -> list[str]:
        """On rank 0, when all ranks have written: the rest of the files; returns their names.

        results: what `write` returned, by rank. Raises OSError.
        """
        (self._folder / COMMON_STATE_FNAME).write_bytes(self._common.getbuffer())
        self._planner.writer.finish(self._planner.global_metadata, results)
        save_config(CheckpointingConfig(_FORMAT, _VERSION), str(self._folder))
        names = [path.name for path in self._folder.iterdir() if path.suffix != ".distcp"]
        for name in names:
            with (self._folder / name).open("rb") as file:
                os.fsync(file.fileno())
        return names


class _Planner(TorchDistSaveShardedStrategy):
    """megatron-core's strategy, stopped before it writes."""

    def _get_save_and_finalize_callbacks(self, writer: Any, planned: Any) -> AsyncRequest:
        self.writer = writer
        self.global_metadata = planned[1]
        return AsyncRequest(None, (), [])


def disk_remedy(error: OSError) -> str:
    """What to do about an error of the disk; empty if that is not known."""
    return "; free space, or lower checkpoint.keep_last" if error.errno in _NO_SPACE else ""


def disk_error(failure: BaseException) -> OSError:
    """The OSError beneath torch's `unexpected pos`, which hides that the disk is full."""
    error: BaseException | None = failure
    while error is not None:
        if isinstance(error, OSError):
            return error
        error = error.__cause__ or error.__context__
    lines = str(failure).strip().splitlines()
    return OSError(lines[0] if lines else type(failure).__name__)
