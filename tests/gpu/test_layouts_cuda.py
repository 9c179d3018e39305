"""Layouts over several GPUs of one host, through NCCL, against one GPU: the command line by torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tests.parallel.harness import REPOSITORY
from tests.parallel.tiny_run import Sections, losses, records, write_data, write_recipe
from tests.parallel.tiny_run import recipe as tiny_recipe

STEPS = 6
DEVICE = "cuda"  # "cpu" tries the test itself, over gloo
LIMIT_SECONDS = 240
OPTIONS: Sections = {
    "model": {
        "hidden_size": 256,
        "num_attention_heads": 4,
        "seq_length": 128,
        "schedule": "D R*4 A*3",
        "router": {"kind": "learned", "target": 0.5},
        "dropout": 0.0,
    },
    "training": {"steps": STEPS, "global_batch_size": 8, "micro_batch_size": 2},
    "runtime": {"device": DEVICE, "collective_timeout_seconds": 60.0, "compile": False},
}
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "TP=2": (2, ["tensor_model_parallel_size=2"]),
    "TP=2 SP": (2, ["tensor_model_parallel_size=2", "sequence_parallel=true"]),
    "PP=2": (2, ["pipeline_model_parallel_size=2"]),
    "PP=2 VPP=2": (2, ["pipeline_model_parallel_size=2", "virtual_pipeline_model_parallel_size=2"]),
    "CP=2": (2, ["context_parallel_size=2"]),
    "DP=2": (2, ["data_parallel_size=2"]),
    "DP=2 overlapped": (
        2, ["distributed_optimizer=true", "overlap_grad_reduce=true", "overlap_param_gather=true"],
    ),
    "TP=2 SP CP=2": (
        4, ["tensor_model_parallel_size=2", "sequence_parallel=true", "context_parallel_size=2"],
    ),
    "TP=2 PP=2": (4, ["tensor_model_parallel_size=2", "pipeline_model_parallel_size=2"]),
    "PP=2 DP=2": (4, ["pipeline_model_parallel_size=2", "data_parallel_size=2"]),
    "TP=2 SP DP=2": (4, ["tensor_model_parallel_size=2", "sequence_parallel=true", "data_parallel_size=2"]),
}  # fmt: skip


def pretrain(recipe: Path, run_dir: Path, processes: int, overrides: Sequence[str]) -> Path:
    """Train; returns the run folder."""
    module = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *module, "-m", "chiar_megatron.cli", "pretrain", str(recipe), *overrides]
    done = subprocess.run(
        [*command, f"run_dir={run_dir}"],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return run_dir


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    return write_recipe(folder / "r.yaml", tiny_recipe(write_data(folder), folder / "run", OPTIONS))


@pytest.fixture(scope="module")
def alone(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pretrain(recipe, tmp_path_factory.mktemp("alone") / "run", 1, [])


@pytest.mark.timeout(2 * LIMIT_SECONDS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_trains_as_one_gpu_does(
    name: str, recipe: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    processes, fields = LAYOUTS[name]
    if DEVICE == "cuda" and torch.cuda.device_count() < processes:
        pytest.skip(f"needs {processes} CUDA devices, has {torch.cuda.device_count()}")
    alone = request.getfixturevalue("alone")
    run_dir = pretrain(recipe, tmp_path / "run", processes, [f"parallel.{field}" for field in fields])
    found, expected = losses(run_dir), losses(alone)
    assert found.keys() == expected.keys() == set(range(1, STEPS + 1))
    for step in expected:
        assert found[step][0] == pytest.approx(expected[step][0], abs=5e-3), (step, found, expected)
        assert found[step][1] == pytest.approx(expected[step][1], rel=2e-2), (step, found, expected)
    rates = [record["tokens_per_second"] for record in records(run_dir)]
    assert max(rates[1:]) < 10 * min(rates[1:]), rates  # no step's time is another's
