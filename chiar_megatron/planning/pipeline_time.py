"""How long a pipeline takes for micro-batches of unequal work: the 1F1B schedule, played through."""

from __future__ import annotations

from typing import Any

import numpy as np

FORWARD_SHARE = 1.0 / 3.0  # of a stage's forward and backward work


def step_time(work_NPM: Any) -> Any:
    """Time from the first forward to the last backward, float64 `[N]`, of N pipelines at once.

    work_NPM: forward and backward work of each stage (P) for each micro-batch (M), in any unit of time; a
    third of it is the forward pass. Every stage does its operations one after the other, as many forwards
    first as there are stages behind it, then backward and forward in turn; a forward waits for the stage
    before it, a backward for the one behind it. Sending takes no time. One stage: the sum.
    """
    pipelines, stages, micro_batches = work_NPM.shape
    if stages == 1:
        return work_NPM[:, 0].sum(-1)
    orders = [_order(stages - 1 - stage, micro_batches) for stage in range(stages)]
    places = [0] * stages
    free_PN = np.zeros((stages, pipelines))
    done: dict[tuple[str, int, int], Any] = {}
    left = 2 * stages * micro_batches
    while left:
        before = left
        for stage in range(stages):
            while places[stage] < len(orders[stage]):
                kind, m = orders[stage][places[stage]]
                ready = _ready(done, kind, stage, m, stages)
                if ready is None:
                    break
                share = FORWARD_SHARE if kind == "F" else 1.0 - FORWARD_SHARE
                free_PN[stage] = np.maximum(free_PN[stage], ready) + share * work_NPM[:, stage, m]
                done[kind, stage, m] = free_PN[stage].copy()
                places[stage] += 1
                left -= 1
        assert left < before, "the schedule cannot go on"
    return free_PN.max(0)


def _order(behind: int, micro_batches: int) -> list[tuple[str, int]]:
    """One stage's operations in order; `behind`: stages that follow it."""
    first = min(behind, micro_batches)
    order = [("F", m) for m in range(first)]
    for m in range(first, micro_batches):
        order += [("F", m), ("B", m - first)]
    return order + [("B", m) for m in range(micro_batches - first, micro_batches)]


def _ready(done: dict[tuple[str, int, int], Any], kind: str, stage: int, m: int, stages: int) -> Any:
    """When what the operation waits for is done; None: not known yet."""
    if kind == "F":
        return 0.0 if stage == 0 else done.get(("F", stage - 1, m))
    return done.get(("F", stage, m)) if stage == stages - 1 else done.get(("B", stage + 1, m))
