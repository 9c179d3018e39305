"""Layouts over several GPUs of one host, through NCCL, against one GPU, replayed as CUDA graphs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.gpu.workers_layouts import Trained
from tests.parallel.harness import run_ranks

DEVICE = "cuda"  # "cpu" tries the test itself, over gloo
LIMIT_SECONDS = 300.0
STEPS, EVALUATE_EVERY = 6, 3  # a graph is captured in step 4, right after a validation
RECIPE: dict[str, Any] = {
    "model": {
        "hidden_size": 256,
        "num_attention_heads": 4,
        "seq_length": 128,
        "vocab_size": 97,  # odd: every layout pads it differently
        "schedule": "D R*4 A*3",
        "router": {"kind": "learned", "target": 0.5},
        "dropout": 0.0,
    },
    "optimizer": {"lr": 3e-3, "warmup_steps": 2},
    "training": {"steps": STEPS, "global_batch_size": 8, "micro_batch_size": 2, "eval_steps": 0},
    "runtime": {"device": DEVICE, "collective_timeout_seconds": 60.0, "compile": False},
}

TP, PP = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
CP, SP = {"context_parallel_size": 2}, {"sequence_parallel": True}
VPP = {"virtual_pipeline_model_parallel_size": 2}
OVERLAPPED = {"distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
# Each with as many replicas as there are processes for.
LAYOUTS: dict[str, dict[str, Any]] = {
    "DP": {},
    "DP overlapped": OVERLAPPED,
    "TP": TP,
    "TP SP": {**TP, **SP},
    "CP": CP,
    "PP": PP,
    "PP VPP": {**PP, **VPP},
    "TP SP CP": {**TP, **SP, **CP},
    "TP PP": {**TP, **PP},
    "TP SP overlapped": {**TP, **SP, **OVERLAPPED},
    "PP overlapped": {**PP, **OVERLAPPED},
}
HALVES = ("TP SP", "CP")  # also in half precision, which the kernels are for
COMPILED = ("TP", "TP SP", "CP")  # also with compiled layers, around the transfers
DROPS = {"replayed": None, "eager": False}


def processes() -> int:
    """Of the launch with all layouts."""
    devices = 4 if DEVICE == "cpu" else torch.cuda.device_count()
    return 4 if devices >= 4 else min(devices, 2)


def fits(layout: dict[str, Any]) -> bool:
    """Whether there are GPUs enough."""
    sizes = [
        size for name, size in layout.items() if name.endswith("parallel_size") and "virtual" not in name
    ]
    return processes() > 1 and processes() % math.prod(sizes) == 0


def need(layout: dict[str, Any]) -> None:
    """Skip the test if it does not fit."""
    if not fits(layout):
        pytest.skip(f"needs more CUDA devices than {processes()}")


def recipe(layout: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """Sections of a recipe; fields as `section.field`, with a dot written as two underscores."""
    sections = {name: dict(section) for name, section in RECIPE.items()} | {"parallel": dict(layout)}
    for name, value in fields.items():
        section, _, key = name.partition("__")
        sections[section][key] = value
    return sections


@pytest.fixture(scope="module")
def alone() -> dict[str, Trained]:
    recipes = {"full": recipe({}), "half": recipe({}, training__precision="bf16")}
    return launch(1, recipes)


@pytest.fixture(scope="module")
def together() -> dict[str, Trained]:
    recipes = {name: recipe(layout) for name, layout in LAYOUTS.items() if fits(layout)}
    recipes |= {f"{name} half": recipe(LAYOUTS[name], training__precision="bf16") for name in HALVES}
    recipes |= {f"{name} compiled": recipe(LAYOUTS[name], runtime__compile=True) for name in COMPILED}
    recipes |= {
        f"drop {name}": recipe(TP, model__dropout=0.2, runtime__cuda_graph=graph)
        for name, graph in DROPS.items()
    }
    return launch(processes(), recipes)


def launch(size: int, recipes: dict[str, dict[str, Any]]) -> dict[str, Trained]:
    """All recipes in one launch; every rank has to tell the same."""
    arguments = {"recipes": recipes, "steps": STEPS, "evaluate_every": EVALUATE_EVERY}
    ranks = run_ranks("tests.gpu.workers_layouts:train", size, arguments, timeout=LIMIT_SECONDS)
    assert all(told == ranks[0] for told in ranks)
    trained: dict[str, Trained] = ranks[0]
    return trained


def differences(found: Trained, expected: Trained, half: bool = False) -> list[str]:
    """Where two runs differ by more than order of summation and precision allow: losses and validations by an
    absolute bound, gradient norms by a relative one."""
    loss, norm = (5e-2, 0.1) if half else (2e-3, 1e-2)
    bounds: dict[str, tuple[int, dict[str, Any]]] = {
        "losses": (STEPS, {"abs": loss}),
        "validations": (STEPS // EVALUATE_EVERY, {"abs": loss}),
        "gradient_norms": (STEPS, {"rel": norm}),
    }
    pairs = {name: (getattr(found, name), getattr(expected, name)) for name in bounds}
    return [
        f"{name}: {pairs[name]}"
        for name, (count, bound) in bounds.items()
        if len(pairs[name][0]) != count or pairs[name][0] != pytest.approx(pairs[name][1], **bound)
    ]


@pytest.mark.timeout(2 * LIMIT_SECONDS)
@pytest.mark.parametrize(
    ("name", "half"), [(name, False) for name in LAYOUTS] + [(name, True) for name in HALVES]
)
def test_a_layout_trains_as_one_gpu_does(name: str, half: bool, request: pytest.FixtureRequest) -> None:
    need(LAYOUTS[name])
    alone, together = (request.getfixturevalue(fixture) for fixture in ("alone", "together"))
    found, expected = together[f"{name} half" if half else name], alone["half" if half else "full"]
    assert not differences(found, expected, half)


@pytest.mark.timeout(2 * LIMIT_SECONDS)
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_layers_train_as_one_gpu_does(name: str, request: pytest.FixtureRequest) -> None:
    need(LAYOUTS[name])
    alone, together = (request.getfixturevalue(fixture) for fixture in ("alone", "together"))
    assert not differences(together[f"{name} compiled"], alone["full"])


@pytest.mark.timeout(2 * LIMIT_SECONDS)
def test_replayed_steps_drop_what_eager_ones_do(request: pytest.FixtureRequest) -> None:
    """Tensor-parallel ranks drop from two streams, and a CUDA graph must hold both."""
    need(TP)
    together = request.getfixturevalue("together")
    assert not differences(together["drop replayed"], together["drop eager"])
