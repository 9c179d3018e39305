"""Compiled layers with other ranks in their midst, beside eager ones."""

from __future__ import annotations

from typing import Any

import pytest

from tests.gpu.workers_layouts import Trained
from tests.parallel.harness import run_ranks

STEPS = 2
RECIPE: dict[str, Any] = {
    "model": {
        "hidden_size": 48,
        "num_attention_heads": 4,
        "seq_length": 24,
        "vocab_size": 61,
        "schedule": "D R*2 A",  # of the first routed layer gradients would be wrong if the second lost a sum
        "router": {"kind": "learned", "target": 0.5},
        "dropout": 0.0,
    },
    "optimizer": {"lr": 3e-3},
    "training": {"steps": STEPS, "global_batch_size": 2, "micro_batch_size": 2, "eval_steps": 0},
}
RUNTIME = {"device": "cpu"}
TP = {"tensor_model_parallel_size": 2}
LAYOUTS = {"TP": TP, "TP SP": {**TP, "sequence_parallel": True}, "CP": {"context_parallel_size": 2}}


@pytest.fixture(scope="module")
def trained() -> dict[str, Trained]:
    recipes = {
        f"{name} {compiled}": {**RECIPE, "parallel": layout, "runtime": {**RUNTIME, "compile": compiled}}
        for name, layout in LAYOUTS.items()
        for compiled in (False, True)
    }
    arguments = {"recipes": recipes, "steps": STEPS, "evaluate_every": STEPS}
    ranks = run_ranks("tests.parallel.workers_compiled:train", 2, arguments, timeout=240.0)
    assert ranks[0] == ranks[1]
    found: dict[str, Trained] = ranks[0]
    return found


@pytest.mark.timeout(260)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_layers_train_as_eager_ones(trained: dict[str, Trained], layout: str) -> None:
    eager, compiled = trained[f"{layout} False"], trained[f"{layout} True"]
    assert len(compiled.losses) == len(compiled.gradient_norms) == STEPS
    assert compiled.losses == pytest.approx(eager.losses, abs=2e-6)
    assert compiled.gradient_norms == pytest.approx(eager.gradient_norms, rel=1e-5)
    assert compiled.validations == pytest.approx(eager.validations, abs=2e-6)
