"""A resumed run is the uninterrupted one: bit for bit in its own layout, within rounding in another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from chiar_megatron.checkpoint.files import CheckpointInfo
from tests.parallel.harness import run_ranks
from tests.parallel.tiny_run import Sections, losses, recipe, records, saved_state, step_folder, write_data
from tests.parallel.workers_resume import Ending

STEPS, HALF = 6, 3
RUN_ALL = "tests.parallel.workers_resume:run_all"

# Layout and options by name: one process, then two.
ONE: dict[str, Sections] = {
    "fp32": {"checkpoint": {"save_interval_steps": 1}},
    "bf16": {"training": {"precision": "bf16"}},
    "distributed": {"parallel": {"distributed_optimizer": True}},
    "async": {"checkpoint": {"async_save": True, "save_interval_steps": 1}},
}
TWO: dict[str, Sections] = {
    "tp2": {"parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True}},
    "pp2": {"parallel": {"pipeline_model_parallel_size": 2}},
    "pp2-vpp2": {"parallel": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}},
    "dp2": {},
    "dp2-distributed": {"parallel": {"distributed_optimizer": True}},
    "dp2-overlapped": {
        "parallel": {"distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
    },
    "dp2-distributed-bf16": {"parallel": {"distributed_optimizer": True}, "training": {"precision": "bf16"}},
}


HALF_WAY: Sections = {"training": {"exit_after_steps": HALF}}
NO_DROPOUT: Sections = {"model": {"dropout": 0.0}}
DISTRIBUTED: Sections = {"parallel": {"distributed_optimizer": True}}

# What is trained on one process with its decisions recorded, then continued on two: (before, after).
MOVES: dict[str, tuple[Sections, Sections]] = {
    "to tp2": ({}, TWO["tp2"]),
    "to pp2": ({}, TWO["pp2"]),
    "to dp2": ({}, {}),
    "to dp2 distributed": (DISTRIBUTED, DISTRIBUTED),
    "to tp2 distributed": (
        DISTRIBUTED,
        {"parallel": {"tensor_model_parallel_size": 2, "distributed_optimizer": True}},
    ),
}

# What is cut one way and goes on in another, on two processes: (before, after).
RECUT: dict[str, tuple[Sections, Sections]] = {
    "interleaved to even": (
        TWO["pp2-vpp2"],
        {"parallel": {"pipeline_model_parallel_size": 2, "layout": "even"}},
    ),
    "uneven to dp2 overlapped": (
        {"parallel": {"pipeline_model_parallel_size": 2, "layout": "Et|t*3L", "distributed_optimizer": True}},
        TWO["dp2-overlapped"],
    ),
}

# What the finished dp2 run cannot continue with, and what is said.
REFUSED: dict[str, tuple[str, Sections]] = {
    "shape": ("model.hidden_size is 64, the checkpoint's 32", {"model": {"hidden_size": 64}}),
    "batch": ("training.global_batch_size is 8", {"training": {"global_batch_size": 8}}),
    "seed": ("training.seed is 7", {"training": {"seed": 7}}),
    "precision": ("training.precision is bf16", {"training": {"precision": "bf16"}}),
    "skip": ("data.skip_samples is ['2:9']", {"data": {"skip_samples": ["2:9"]}}),
    "no such step": ("checkpoint.load_step 5", {"checkpoint": {"load_step": 5}}),
}


def pair(data: str, folder: Path, name: str, options: Sections) -> dict[str, Any]:
    """An uninterrupted run, and one that stops half-way and goes on."""
    return {
        f"{name} whole": recipe(data, folder / name / "whole", options),
        f"{name} first": recipe(data, folder / name / "parts", options, HALF_WAY),
        f"{name} second": recipe(data, folder / name / "parts", options),
    }


def moved_first(data: str, folder: Path, name: str, before: Sections) -> dict[str, Any]:
    """On one process: the whole run with its decisions recorded, and its first half."""
    record: Sections = {"runtime": {"record_decisions": f"{folder}/{name}/decisions"}}
    return {
        f"{name} whole": recipe(data, folder / name / "whole", NO_DROPOUT, before, record),
        f"{name} first": recipe(data, folder / name / "parts", NO_DROPOUT, before, HALF_WAY),
    }


def moved_second(data: str, folder: Path, name: str, after: Sections) -> dict[str, Any]:
    """On two processes: the second half with the first run's decisions."""
    replay: Sections = {"runtime": {"replay_decisions": f"{folder}/{name}/decisions"}}
    return {f"{name} second": recipe(data, folder / name / "parts", NO_DROPOUT, after, replay)}


def init_from(data: str, folder: Path) -> dict[str, Any]:
    """A new run of two processes from the weights of one that one process trained."""
    source: Sections = {"training": {"init_from": f"{folder}/fp32/whole", "exit_after_steps": 1}}
    still: Sections = {
        "optimizer": {"lr": 1e-30},  # so that the one step tells nothing but the weights' loss
        "model": {"norm_epsilon": 2e-5},  # otherwise than in training, which is to be said
    }
    return {"init_from": recipe(data, folder / "init_from", NO_DROPOUT, TWO["tp2"], source, still)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Any]]]:
    """All runs in two launches: their folder, and by name how they ended on each rank."""
    folder = tmp_path_factory.mktemp("resume")
    data = write_data(folder)
    alone: dict[str, Any] = {}
    for name, options in ONE.items():
        alone |= pair(data, folder, name, options)
    for name, (before, _) in MOVES.items():
        alone |= moved_first(data, folder, name, before)
    endings = {name: [e] for name, e in run_ranks(RUN_ALL, 1, {"recipes": alone}, timeout=150)[0].items()}
    together: dict[str, Any] = {}
    for name, options in TWO.items():
        together |= pair(data, folder, name, options)
    for name, (_, after) in MOVES.items():
        together |= moved_second(data, folder, name, after)
    for name, (before, after) in RECUT.items():
        together |= pair(data, folder, name, {**NO_DROPOUT, **before})
        together[f"{name} second"] = recipe(data, folder / name / "parts", NO_DROPOUT, after)
    for name, (_, options) in REFUSED.items():
        together[f"refused {name}"] = recipe(data, folder / "dp2" / "whole", options)
    together |= init_from(data, folder)
    answers = run_ranks(RUN_ALL, 2, {"recipes": together}, timeout=280)
    endings |= {name: [answer[name] for answer in answers] for name in together}
    return folder, endings


@pytest.mark.parametrize("name", [*ONE, *TWO])
def test_the_same_layout_gives_the_same_bits(runs: tuple[Path, dict[str, Any]], name: str) -> None:
    folder, endings = runs
    ranks = 1 if name in ONE else 2
    assert endings[f"{name} first"] == [Ending(exit_code=75)] * ranks
    assert endings[f"{name} second"] == [Ending(exit_code=0)] * ranks
    whole, parts = folder / name / "whole", folder / name / "parts"
    assert [r["step"] for r in records(parts, "events") if r["event"] == "resume"] == [HALF]
    assert losses(parts) == losses(whole)
    assert saved_state(parts, STEPS) == saved_state(whole, STEPS)


def test_the_comparison_sees_other_bits(runs: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = runs
    assert saved_state(folder / "tp2" / "whole", STEPS) != saved_state(folder / "dp2" / "whole", STEPS)
    before, last = (saved_state(folder / "fp32" / "whole", step) for step in (STEPS - 1, STEPS))
    assert before.keys() == last.keys() and before != last


@pytest.mark.parametrize("name", [*MOVES, *RECUT])
def test_another_layout_goes_on_within_rounding(runs: tuple[Path, dict[str, Any]], name: str) -> None:
    folder, endings = runs
    assert endings[f"{name} second"] == [Ending(exit_code=0)] * 2
    whole, parts = losses(folder / name / "whole"), losses(folder / name / "parts")
    assert whole.keys() == parts.keys() == set(range(1, STEPS + 1))
    for step, (loss, norm) in whole.items():
        assert parts[step][0] == pytest.approx(loss, abs=1e-5)
        assert parts[step][1] == pytest.approx(norm, rel=1e-4)


def test_an_async_save_has_the_bits_of_a_plain_one(runs: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = runs
    slow, fast = folder / "async" / "whole", folder / "fp32" / "whole"
    assert [r["step"] for r in records(slow, "events") if r["event"] == "save"] == list(range(1, STEPS + 1))
    for step in (4, 5, STEPS):  # while 4 and 5 were written, training changed the weights
        assert saved_state(slow, step) == saved_state(fast, step)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_continue_is_refused_on_all_ranks(runs: tuple[Path, dict[str, Any]], name: str) -> None:
    _, endings = runs
    first, second = endings[f"refused {name}"]
    assert first.error == second.error and first.error is not None
    assert REFUSED[name][0] in first.error
    assert len(first.error.splitlines()) == 1


def test_weights_of_one_layout_start_another(runs: tuple[Path, dict[str, Any]]) -> None:
    folder, endings = runs
    assert endings["init_from"] == [Ending(exit_code=75)] * 2
    trained, begun = losses(folder / "fp32" / "whole"), losses(folder / "init_from")
    assert begun.keys() == {1}  # its own step count
    # The first batch again: far lower than before training.
    assert begun[1][0] < trained[1][0] - 0.3
    said = [r["error"] for r in records(folder / "init_from", "events") if r["event"] == "checkpoint_problem"]
    assert len(said) == 1 and said[0].startswith("model.norm_epsilon is 2e-05, but the weights of ")


def test_a_refused_run_folder_is_as_before(runs: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = runs
    names = {path.name for path in (folder / "dp2" / "whole" / "checkpoints").iterdir()}
    assert names == {"step_00000006", "latest"}
    config = yaml.safe_load((folder / "dp2" / "whole" / "config.yaml").read_text())
    assert config == CheckpointInfo.read(step_folder(folder / "dp2" / "whole", STEPS)).config
    assert losses(folder / "dp2" / "whole").keys() == set(range(1, STEPS + 1))


def test_one_ranks_undefined_weight_makes_all_skip_the_step(tmp_path: Path) -> None:
    content = recipe(write_data(tmp_path), tmp_path / "run")
    answers = run_ranks("tests.parallel.workers_resume:poison_each_rank", 2, {"recipe": content}, 100)
    for answer in (part for parts in answers for part in parts):
        assert answer["taken"] == [True, False, True, True]
        assert answer["unchanged"] == [False, True, False, False]
        assert answer["moments_unchanged"] == [False, True, False, False]
