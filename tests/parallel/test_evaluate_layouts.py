"""`chiar evaluate` gives one figure in every layout and batch size, and starts its processes itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from chiar_megatron.config.schema import ParallelConfig
from chiar_megatron.runtime.distributed import single_process_world
from chiar_megatron.training.evaluate import EvaluationSettings, evaluate
from tests.parallel.harness import REPOSITORY, run_ranks
from tests.unit.tiny_models import sample_text, save_model, tiny_config, tiny_model, tiny_tokenizer

MODELS = {
    "running": dict(router=dict(kind="learned", keys_values="routed"), pooling="running"),
    "untied": dict(
        router=dict(kind="soft", operators="spectral_attention_rbf"),
        pooling="causal",
        tie_embeddings=False,
        activation="swiglu",
    ),
    "batch": dict(router=dict(kind="entropy"), pooling="batch", mask_documents=True),
    "three_layers": dict(schedule="D R A"),
}
EVALUATED = ("running", "untied", "batch")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Models of an odd vocabulary, which TP=2 pads, and a text."""
    folder = tmp_path_factory.mktemp("layouts")
    tokenizer = tiny_tokenizer(folder)
    texts = [sample_text(words, seed=words) for words in (60, 31)]
    (folder / "text.txt").write_text("\n<|endoftext|>\n".join(texts))
    for name, settings in MODELS.items():
        config = tiny_config(data=dict(tokenizer=str(tokenizer), eod_token=1), vocab_size=321, **settings)
        save_model(tiny_model(config), folder / name)
    return folder


def cases(folder: Path, batch_sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    text = (str(folder / "text.txt"),)
    evaluated = [
        dict(checkpoint=str(folder / name), text=text, batch_size=size)
        for name in EVALUATED
        for size in batch_sizes
    ]
    # One window: the other replica, if there is one, has nothing to do.
    return [*evaluated, dict(checkpoint=str(folder / "running"), text=text, window=1000)]


@pytest.mark.parametrize(
    ("processes", "layouts", "batch_sizes"), [(2, [(2, 1), (1, 2), (1, 1)], (3, 64)), (4, [(2, 2)], (4,))]
)
def test_every_layout_gives_the_figures_of_one_process(folder, processes, layouts, batch_sizes):
    world = single_process_world("cpu")
    settings = cases(folder, batch_sizes)
    expected = [asdict(evaluate(EvaluationSettings(**each), ParallelConfig(), world)) for each in settings]
    three = dict(checkpoint=str(folder / "three_layers"), text=settings[0]["text"])
    args = dict(layouts=layouts, settings=[*settings, three])
    answers = run_ranks("tests.parallel.workers_evaluate:evaluations", processes, args, timeout=240)
    for rank, by_layout in enumerate(answers):
        for layout, (*found, three_layers) in zip(layouts, by_layout, strict=True):
            for own, wanted in zip(found, expected, strict=True):
                where = (rank, layout, wanted["checkpoint"])
                assert own.pop("loss") == pytest.approx(wanted["loss"], abs=1e-5), where
                assert own == {key: value for key, value in wanted.items() if key != "loss"}, where
            assert three_layers["step"] == 7, where


def test_the_verb_starts_its_processes_itself(folder):
    command = [
        sys.executable,
        "-m",
        "chiar_megatron.cli",
        "evaluate",
        "--checkpoint",
        str(folder / "running"),
    ]
    command += ["--text", str(folder / "text.txt"), "--device", "cpu", "--tensor-parallel", "2"]
    ended = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ended.returncode == 0, ended.stderr
    figures = json.loads(ended.stdout.splitlines()[-1])
    world = single_process_world("cpu")
    text = (str(folder / "text.txt"),)
    expected = evaluate(EvaluationSettings(str(folder / "running"), text), ParallelConfig(), world)
    assert figures["token_perplexity"] == pytest.approx(expected.token_perplexity, rel=1e-4)
    missing = subprocess.run(
        [*command, "--tokenizer", "missing.model"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert missing.returncode == 2 and missing.stderr.count("missing.model does not exist") == 1
    assert len(missing.stderr.splitlines()) == 1, missing.stderr
