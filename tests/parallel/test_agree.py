"""What rank 0 does for all: every rank gets its result, or fails with it."""

from __future__ import annotations

from tests.parallel.harness import run_ranks


def test_every_rank_learns_what_came_of_it() -> None:
    fault = "OtherRankError (1): rank 0 failed: ValueError('a fault')"
    assert run_ranks("tests.parallel.workers_agree:outcomes", 2) == [
        ["7", "ConfigError (2): a field", "CheckpointError (2): [Errno 28] full", "ValueError: a fault"],
        ["7", "ConfigError (2): a field", "CheckpointError (2): [Errno 28] full", fault],
    ]
