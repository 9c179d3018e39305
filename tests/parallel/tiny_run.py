"""The smallest run that has everything: R layers, a running MetaRouter, dropout, warmup."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

VOCAB_SIZE = 97  # odd: every layout pads it differently
END = 0


def write_data(folder: Path) -> str:
    """Random documents whose next token depends on the last, so that there is something to learn."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    random = np.random.default_rng(5)
    builder = IndexedDatasetBuilder(f"{folder}/text.bin", dtype=np.int32)
    for _ in range(60):
        steps = random.integers(1, 4, size=random.integers(20, 90))
        tokens = 1 + np.cumsum(steps) % (VOCAB_SIZE - 1)
        document = np.append(tokens, END).astype(np.int32)
        builder.add_document(document, [len(document)])
    builder.finalize(f"{folder}/text.idx")
    return f"{folder}/text"


Sections = dict[str, dict[str, Any]]


def recipe(prefix: str, run_dir: Path, *parts: Sections) -> dict[str, Any]:
    """A recipe as nested dicts; `parts` add to it or overrule it."""
    base: Sections = {
        "model": {
            "hidden_size": 32,
            "num_attention_heads": 4,
            "seq_length": 16,
            "vocab_size": VOCAB_SIZE,
            "schedule": "D R*2 A",
            "router": {"kind": "learned"},
            "dropout": 0.1,
        },
        "data": {"train": [prefix], "eod_token": END},
        "optimizer": {"lr": 1e-2, "warmup_steps": 2},
        "training": {"steps": 6, "global_batch_size": 4, "micro_batch_size": 2, "eval_steps": 0},
        "runtime": {"device": "cpu", "threads_per_process": 1, "collective_timeout_seconds": 60.0},
    }
    for part in parts:
        for name, fields in part.items():
            base[name] = {**base.get(name, {}), **fields}
    return {"run_dir": str(run_dir), **base}


def write_recipe(path: Path, content: dict[str, Any]) -> Path:
    """The recipe as a file for the command line."""
    path.write_text(yaml.safe_dump(content))
    return path


def step_folder(run_dir: Path, step: int) -> Path:
    """Where a checkpoint lies."""
    return run_dir / "checkpoints" / f"step_{step:08d}"


def saved_state(run_dir: Path, step: int) -> dict[str, bytes]:
    """The very bytes of a checkpoint's weights, moments, averages and counters, by file."""
    folder = step_folder(run_dir, step)
    return {p.name: p.read_bytes() for p in [*folder.glob("*.distcp"), folder / "common.pt"]}


def records(run_dir: Path, name: str = "metrics") -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` or `events.jsonl`."""
    return [json.loads(line) for line in (run_dir / f"{name}.jsonl").read_text().splitlines()]


def losses(run_dir: Path) -> dict[int, tuple[float, float]]:
    """Loss and gradient norm by step; fails if a step stands twice."""
    found = records(run_dir)
    by_step = {record["step"]: (record["loss"], record["grad_norm"]) for record in found}
    assert len(by_step) == len(found), [record["step"] for record in found]
    return by_step
