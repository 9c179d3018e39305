"""What one rank knows, told to all: a rank that failed alone would leave the others waiting for ever."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from chiar_megatron.errors import CheckpointError, ChiarError, OtherRankError

Result = TypeVar("Result")


def on_main(action: Callable[[], Result]) -> Result:
    """Do something on rank 0 alone; every rank gets its result, or raises what it raised.

    Raises ChiarError as `action` does, CheckpointError for its OSError, and for anything else OtherRankError
    on the other ranks. Called by all ranks alike.
    """
    outcome: tuple[Result | None, ChiarError | None] = (None, None)
    fault: Exception | None = None
    if dist.get_rank() == 0:
        try:
            outcome = (action(), None)
        except ChiarError as error:
            outcome = (None, error)
        except OSError as error:
            outcome = (None, CheckpointError(str(error)))
        except Exception as error:
            fault, outcome = error, (None, OtherRankError(f"rank 0 failed: {error!r}"))
    holder = [outcome]
    dist.broadcast_object_list(holder, src=0)
    if fault is not None:
        raise fault
    result, failure = holder[0]
    if failure is not None:
        raise failure
    return result  # type: ignore[return-value]


def gather(value: Any) -> list[Any]:
    """Every rank's value, by rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def first_failure(problem: str | None) -> str | None:
    """The first rank's problem, naming the rank if there are several; None if no rank has one."""
    for rank, text in enumerate(gather(problem)):
        if text is not None:
            return f"rank {rank}: {text}" if dist.get_world_size() > 1 else str(text)
    return None
