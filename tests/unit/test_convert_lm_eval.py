"""lm-evaluation-harness runs an exported model through its `hf` backend, offline, on a local task."""

import json
import os
import subprocess
import sys

import pytest
import torch

from chiar_megatron.conversion.convert import convert
from chiar_megatron.conversion.formats import ConvertOptions
from chiar_megatron.data.tokenizer import load_tokenizer
from tests.unit.tiny_models import sample_text, save_model, tiny_config, tiny_model, tiny_tokenizer

TASK = """task: local_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{a}}}}"
metric_list:
  - metric: acc
"""


def test_the_harness_finds_what_the_native_model_says(tmp_path):
    pytest.importorskip("lm_eval.models.huggingface")  # installed by lm_eval[hf]
    tokenizer = load_tokenizer(tiny_tokenizer(tmp_path))
    data = {"tokenizer": str(tmp_path / "tok.model"), "eod_token": 1}
    native = tiny_model(tiny_config(vocab_size=320, seq_length=64, data=data))
    save_model(native, tmp_path / "native")
    convert("native", "huggingface", tmp_path / "native", tmp_path / "hf", ConvertOptions())
    questions = [
        {"q": sample_text(5, i).strip(), "choices": ["ba", "de", "gi"], "a": i % 3} for i in range(12)
    ]
    (tmp_path / "tasks").mkdir()
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, questions)))
    (tmp_path / "tasks" / "local.yaml").write_text(TASK.format(data=tmp_path / "data.jsonl"))
    offline = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--tasks", "local_choice", "--device", "cpu"]
    command += ["--model_args", f"pretrained={tmp_path / 'hf'},trust_remote_code=True,dtype=float32"]
    command += ["--include_path", str(tmp_path / "tasks"), "--output_path", str(tmp_path / "out")]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, **offline}, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(next((tmp_path / "out").rglob("results*.json")).read_text())
    right = sum(_best(native, tokenizer, question) == question["a"] for question in questions)
    assert results["results"]["local_choice"]["acc,none"] == pytest.approx(right / len(questions))


@torch.no_grad()
def _best(native, tokenizer, question: dict) -> int:
    """The choice of the highest likelihood, by the native model."""
    scores = []
    for choice in question["choices"]:
        context = tokenizer.encode(question["q"])
        ids = tokenizer.encode(f"{question['q']} {choice}")
        log = native(torch.tensor([ids])).log_softmax(dim=-1)[0]
        scores.append(sum(log[i - 1, ids[i]].item() for i in range(len(context), len(ids))))
    return max(range(len(scores)), key=scores.__getitem__)
