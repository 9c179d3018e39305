"""Preprocessing over the ranks of `mpirun`, `srun` or torchrun, on any number of hosts: the same bytes.

Every rank reads all of the text and encodes every n-th batch into `PREFIX.part_<rank>.tmp`; rank 0 then
takes the batches in order from the parts, and writes what `preprocess` would have written.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO, Optional

import numpy as np

from chiar_megatron.data.encoding import EncodedBatch
from chiar_megatron.data.preprocess import Request, Summary, preprocess_request, write
from chiar_megatron.errors import DataError
from chiar_megatron.runtime.crew import Crew
from chiar_megatron.runtime.env import ProcessEnv

_HEAD = 4  # int64 before each batch: documents, tokens, bytes, words


def preprocess_over_ranks(request: Request, env: ProcessEnv, silence_seconds: float) -> Optional[Summary]:
    """Preprocess together with the other ranks of this launch; the output must lie where all of them see it.

    Returns the summary on rank 0, None elsewhere. Raises on every rank, with nothing left under the final
    names, if one of them fails (DataError as `preprocess` does, LaunchError naming another rank), or does
    nothing for `silence_seconds`.
    """
    if env.world_size == 1:
        return preprocess_request(request)
    summary = None
    with Crew(env, silence_seconds) as crew, ExitStack() as stack:
        tokenizer = request.check()
        part = _part(request, env.rank)
        stack.callback(part.unlink, missing_ok=True)
        try:
            part.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                for batch in request.encode(tokenizer, part=(env.rank, env.world_size)):
                    _write_batch(file, batch)
                    crew.beat()
        except OSError as error:
            raise DataError(f"{part} cannot be written: {error.strerror}; nothing was kept") from error
        crew.meet("parts")
        if env.rank == 0:
            summary = write(request, tokenizer, _in_order(request, env.world_size, crew))
        crew.meet("written")
    return summary


def _part(request: Request, rank: int) -> Path:
    return Path(f"{request.output_prefix}.part_{rank}.tmp")


def _write_batch(file: BinaryIO, batch: EncodedBatch) -> None:
    head = [len(batch.lengths), len(batch.ids), batch.bytes, batch.words]
    for numbers in (np.array(head, np.int64), np.array(batch.lengths, np.int64), batch.ids):
        file.write(numbers.tobytes())


def _in_order(request: Request, world_size: int, crew: Crew) -> Iterator[EncodedBatch]:
    """All batches, one of each part in turn: the first part that has no more ends them."""
    with ExitStack() as stack:
        try:
            files = [stack.enter_context(_part(request, rank).open("rb")) for rank in range(world_size)]
        except OSError as error:
            raise DataError(
                f"{error.filename} of another rank cannot be read here ({error.strerror}); --output must lie "
                "on a file system that all hosts share"
            ) from error
        while True:
            for file in files:
                head = np.fromfile(file, np.int64, _HEAD)
                if not len(head):
                    return
                documents, tokens, size, words = map(int, head)
                lengths = np.fromfile(file, np.int64, documents).tolist()
                ids = np.fromfile(file, np.int32, tokens)
                if len(ids) != tokens:
                    raise DataError(f"{file.name} of another rank is torn; look at that host's file system")
                yield EncodedBatch(ids, lengths, size, words)
                crew.beat()
