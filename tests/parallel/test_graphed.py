"""What surrounds a replayed step's pass where communication overlaps; CUDA graphs themselves need a GPU."""

from __future__ import annotations

from tests.parallel.harness import run_ranks

RECIPE = {
    "model": {
        "hidden_size": 32, "num_attention_heads": 4, "seq_length": 16, "vocab_size": 97, "schedule": "D R A",
        "router": {"target": 0.5},
    },
    "optimizer": {"lr": 1e-2},
    "training": {"steps": 100, "global_batch_size": 4, "micro_batch_size": 1, "eval_steps": 0},
    "parallel": {"distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True},
    "runtime": {"device": "cpu", "collective_timeout_seconds": 30.0},
}  # fmt: skip


def test_sums_within_the_pass_and_weights_gathered_again() -> None:
    for told in run_ranks("tests.parallel.workers_graphed:train", 2, {"recipe": RECIPE}):
        assert told["graphed"] == told["plain"] and len(set(told["plain"])) == len(told["plain"])
        after_validation, again = told["dispatched"]
        assert after_validation > 0 and again == 0
