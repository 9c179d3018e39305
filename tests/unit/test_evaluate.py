"""`chiar evaluate` against a brute-force evaluation in numpy, one window at a time."""

from __future__ import annotations

import gzip
import json
import math
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from chiar_megatron import load_model
from chiar_megatron.cli import main
from chiar_megatron.config.schema import ParallelConfig
from chiar_megatron.data.preprocess import preprocess
from chiar_megatron.data.tokenizer import load_tokenizer
from chiar_megatron.operators.context import ForwardContext
from chiar_megatron.runtime.distributed import single_process_world
from chiar_megatron.training.evaluate import Evaluation, EvaluationSettings, evaluate
from chiar_megatron.training.evaluation_text import slide
from tests.unit.tiny_models import sample_text, save_model, tiny_config, tiny_model, tiny_tokenizer

EOD = 1
DOCUMENTS = [sample_text(words, seed=words) + "\n" for words in (40, 5, 28)]
MODELS = {
    "running": dict(router=dict(kind="learned", keys_values="routed"), pooling="running"),
    "causal": dict(
        router=dict(kind="soft", operators="spectral_attention_rbf"), pooling="causal", norm="pre"
    ),
    "batch": dict(router=dict(kind="entropy"), pooling="batch"),
    "documents": dict(router=dict(kind="random"), pooling="causal", mask_documents=True),
    "twin": dict(schedule="A*2", num_query_groups=2),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tokenizer, a text of three documents, its tokens, and a run folder for each model."""
    folder = tmp_path_factory.mktemp("evaluate")
    tokenizer = tiny_tokenizer(folder)
    (folder / "text.txt").write_text("<|endoftext|>\n".join(DOCUMENTS))
    preprocess([folder / "text.txt"], tokenizer, folder / "data")
    for name, settings in MODELS.items():
        config = tiny_config(data=dict(tokenizer=str(tokenizer), eod_token=EOD), vocab_size=320, **settings)
        save_model(tiny_model(config), folder / name)
    return folder


def run(folder: Path, name: str, **settings) -> Evaluation:
    if "data" not in settings:
        settings.setdefault("text", (str(folder / "text.txt"),))
    world = single_process_world("cpu")
    return evaluate(EvaluationSettings(str(folder / name), **settings), ParallelConfig(), world)


@torch.no_grad()
def brute_force(folder: Path, name: str, documents: list[str], window: int, stride: int):
    """(L in nats, tokens, share of light tokens by layer) with every token looked up in the first window
    that reaches it."""
    model = load_model(folder / name, device="cpu", precision="fp32")
    tokenizer = load_tokenizer(folder / "tok.model")
    row = [EOD]
    for document in documents:
        row += [*tokenizer.encode(document), EOD]
    predicted = len(row) - 1
    window = min(window, predicted)
    outputs: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    nats, light = [], []
    for place in range(1, len(row)):
        end = window
        while end < place:
            end = min(end + stride, predicted)
        if end not in outputs:
            ids_BS = torch.tensor([row[end - window : end]])
            context = ForwardContext(tokens_BS=ids_BS, recorded_light_SB={})
            if model.config.model.mask_documents:
                numbers = np.concatenate([[0], np.cumsum(ids_BS[0].numpy() == EOD)[:-1]])
                context.document_ids_BS = torch.from_numpy(numbers)[None]
            logits_SV = model(ids_BS, context=context)[0].double().numpy()
            peak_S1 = logits_SV.max(-1, keepdims=True)
            logits_SV -= peak_S1 + np.log(np.exp(logits_SV - peak_S1).sum(-1, keepdims=True))
            light_LS = np.array([light_SB[:, 0].numpy() for light_SB in context.recorded_light_SB.values()])
            outputs[end] = logits_SV, light_LS
        if row[place] == EOD:
            continue
        position = place - 1 - (end - window)
        nats.append(-outputs[end][0][position, row[place]])
        light.append(outputs[end][1][..., position] if outputs[end][1].size else [])
    return sum(nats), len(nats), np.mean(light, axis=0)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("window", "stride"), [(None, None), (24, 24), (16, 5), (31, 3)])
def test_figures_are_those_of_brute_force(folder, name, window, stride):
    found = run(folder, name, window=window, stride=stride)
    assert (found.window, found.stride) == (window or 24, stride or 12)
    nats, tokens, light = brute_force(folder, name, DOCUMENTS, found.window, found.stride)
    text = "".join(DOCUMENTS)
    size = len(text.encode())
    assert found.tokens == tokens and found.words == len(text.split()) == 73 and found.bytes == size
    assert found.loss == pytest.approx(nats / tokens, abs=1e-5)
    assert found.token_perplexity == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert found.word_perplexity == pytest.approx(math.exp(nats / found.words), rel=1e-4)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    np.testing.assert_allclose(found.routed_fraction, light, atol=1e-12)
    assert len(found.routed_layers) == len(found.routed_fraction) == (0 if name == "twin" else 2)
    assert all(0.02 < share < 0.8 for share in found.routed_fraction), "mixed decisions"


@pytest.mark.parametrize("name", MODELS)
def test_the_batch_size_changes_nothing(folder, name):
    """Also where it exceeds the number of windows, or leaves a last batch that is not full."""
    losses = [run(folder, name, batch_size=size) for size in (1, 7, 1000)]
    for found in losses[1:]:
        assert found.loss == pytest.approx(losses[0].loss, abs=1e-6)
        assert found.tokens == losses[0].tokens and found.routed_fraction == losses[0].routed_fraction
    assert [found.batch_size for found in losses] == ([1, 1, 1] if name == "batch" else [1, 7, 1000])
    said = any("one window a batch" in line for line in losses[1].lines())
    assert said == losses[1].sees_future == (name == "batch")


def test_a_text_shorter_than_a_window(folder, tmp_path):
    (tmp_path / "short.txt").write_text("bado fi")
    found = run(folder, "running", text=(str(tmp_path / "short.txt"),))
    nats, tokens, _ = brute_force(folder, "running", ["bado fi"], 24, 12)
    assert tokens < 20 and found.words == 2 and found.bytes == 7
    assert found.loss == pytest.approx(nats / tokens, abs=1e-5)


def test_preprocessed_data_gives_the_figures_of_its_text(folder, tmp_path):
    assert replace(run(folder, "running"), checkpoint="") == replace(
        run(folder, "running", data=str(folder / "data")), checkpoint=""
    )
    for suffix in (".bin", ".idx"):
        shutil.copy(folder / f"data{suffix}", tmp_path / f"other{suffix}")
    bare = run(folder, "running", data=str(tmp_path / "other"))
    assert bare.loss == run(folder, "running").loss
    figures = json.loads(bare.json_line())
    assert [figures[key] for key in ("words", "bytes", "word_perplexity", "bits_per_byte")] == [None] * 4
    assert any("not known" in line for line in bare.lines())
    shutil.copy(folder / "data.json", tmp_path / "other.json")
    summary = json.loads((tmp_path / "other.json").read_text())
    (tmp_path / "other.json").write_text(json.dumps({**summary, "tokens": summary["tokens"] + 1}))
    assert run(folder, "running", data=str(tmp_path / "other")).words is None, "a summary of other data"


def test_several_files_and_kinds(folder, tmp_path):
    """Files are documents in their order, whatever their kind."""
    lines = "".join(json.dumps({"text": document}) + "\n" for document in DOCUMENTS[:2])
    with gzip.open(tmp_path / "first.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(lines)
    (tmp_path / "second.txt").write_text(DOCUMENTS[2])
    paths = tuple(str(tmp_path / name) for name in ("first.jsonl.gz", "second.txt"))
    assert run(folder, "running", text=paths) == run(folder, "running")


def test_a_model_that_knows_nothing(folder, tmp_path):
    """All weights zero: every token has probability 1/vocabulary."""
    model = tiny_model(tiny_config(data=dict(tokenizer=str(folder / "tok.model")), vocab_size=320))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    save_model(model, tmp_path)
    found = run(tmp_path, "", text=(str(folder / "text.txt"),))
    assert found.token_perplexity == pytest.approx(320, rel=1e-6)
    assert found.word_perplexity == pytest.approx(320 ** (found.tokens / found.words), rel=1e-5)
    assert found.bits_per_byte == pytest.approx(math.log2(320) * found.tokens / found.bytes, rel=1e-6)


def test_bf16_checkpoints_are_evaluated_in_float32(folder, tmp_path):
    config = tiny_config(data=dict(tokenizer=str(folder / "tok.model"), eod_token=EOD), vocab_size=320)
    config = replace(config, training=replace(config.training, precision="bf16"))
    save_model(tiny_model(config), tmp_path / "bf16")
    shutil.copy(folder / "tok.model", tmp_path)
    text = (str(folder / "text.txt"),)
    losses = [run(tmp_path, "bf16", text=text, batch_size=size).loss for size in (1, 8)]
    nats, tokens, _ = brute_force(tmp_path, "bf16", DOCUMENTS, 24, 12)
    assert losses == pytest.approx([nats / tokens] * 2, abs=1e-5)


def test_every_token_is_in_one_window_with_the_most_context():
    for predicted in range(1, 40):
        for window in range(1, 12):
            for stride in range(1, window + 1):
                windows = slide(predicted, window, stride)
                scored = [place for w in windows for place in range(w.scored, w.last + 1)]
                assert scored == list(range(1, predicted + 1))
                assert {w.last - w.first for w in windows} == {min(window, predicted)}
                assert all(w.first >= 0 and w.first < w.scored for w in windows)
                assert all(b.last - a.last == stride for a, b in pairwise(windows[:-1]))


def test_perplexities_beyond_a_double_are_null():
    numbers = dict(step=1, tokens=2000, words=2, bytes=8000, window=4, stride=2, batch_size=1)
    found = Evaluation("c", loss=5.0, sees_future=False, routed_layers=(), routed_fraction=(), **numbers)
    figures = json.loads(found.json_line(), parse_constant=pytest.fail)
    assert figures["word_perplexity"] is None and figures["bits_per_byte"] > 0
    assert figures["token_perplexity"] == pytest.approx(math.exp(5)) and "routed_fraction" not in figures


# The verb.


def command(folder: Path, *options: str) -> list[str]:
    return ["evaluate", "--checkpoint", str(folder / "running"), "--device", "cpu", *options]


def test_the_verb_prints_figures_and_one_json_line(folder, capsys):
    text = str(folder / "text.txt")
    assert main(command(folder, "--text", text, "--stride", "6", "--seq-length", "12")) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    figures = json.loads(last)
    expected = run(folder, "running", window=12, stride=6)
    assert figures == {
        "token_perplexity": expected.token_perplexity,
        "word_perplexity": expected.word_perplexity,
        "bits_per_byte": expected.bits_per_byte,
        "loss": expected.loss,
        "tokens": expected.tokens,
        "words": expected.words,
        "bytes": expected.bytes,
        "window": 12,
        "stride": 6,
        "batch_size": 8,
        "checkpoint": str(folder / "running" / "checkpoints" / "step_00000007"),
        "step": 7,
        "routed_fraction": list(expected.routed_fraction),
    }
    assert f"token perplexity  {expected.token_perplexity:,.2f}" in lines
    assert main(command(folder, "--text", text, "--json")) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no text; evaluation needs at least 2 tokens"),
        (" \n \n", "no text"),
        ("b", "only 1 token;"),
        (None, "does not exist"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
    ],
)
def test_texts_that_cannot_be_evaluated(folder, tmp_path, capsys, content, message):
    path = tmp_path / "bad.txt"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    check_refused(command(folder, "--text", str(path)), capsys, message, "bad.txt")


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        (["--stride", "25"], ["--stride: 25", "24"]),
        (["--stride", "0"], ["--stride: 0"]),
        (["--seq-length", "0"], ["--seq-length: 0"]),
        (["--batch-size", "0"], ["--batch-size: 0"]),
        (["--tokenizer", "missing.model"], ["missing.model does not exist"]),
        (["--checkpoint", "missing"], ["missing: no such checkpoint folder"]),
    ],
)
def test_options_that_cannot_be(folder, capsys, options, messages):
    check_refused(command(folder, "--text", str(folder / "text.txt"), *options), capsys, *messages)


def test_other_tokenizers_are_refused(folder, tmp_path, capsys):
    from chiar_megatron.data.tokenizer import train_tokenizer

    small = train_tokenizer([folder / "tokenizer.txt"], 310, tmp_path / "small", num_threads=1)
    large = train_tokenizer([folder / "tokenizer.txt"], 330, tmp_path / "large", num_threads=1)
    preprocess([folder / "text.txt"], small, tmp_path / "data")
    text = ["--text", str(folder / "text.txt")]
    for tokenizer, entries in ((small, "310"), (large, "330")):
        options = [*text, "--tokenizer", str(tokenizer)]
        check_refused(command(folder, *options), capsys, str(tokenizer), f"{entries} entries", "320")
    check_refused(command(folder, "--data", str(tmp_path / "data")), capsys, "another tokenizer")
    moved = tiny_model(tiny_config(data=dict(tokenizer="moved.model", eod_token=EOD), vocab_size=320))
    save_model(moved, tmp_path / "running")
    check_refused(command(tmp_path, *text), capsys, "moved.model, which is not there", "--tokenizer")
    assert main(command(tmp_path, *text, "--tokenizer", str(folder / "tok.model"))) == 0
    assert main(command(tmp_path, "--data", str(folder / "data"))) == 0
    capsys.readouterr()
    check_refused(command(tmp_path, *text, "--tokenizer", str(large)), capsys, "330 entries", "320")


def test_folders_that_are_no_checkpoint(folder, tmp_path, capsys):
    text = ["--text", str(folder / "text.txt")]
    (tmp_path / "running").mkdir()
    check_refused(command(tmp_path, *text), capsys, str(tmp_path / "running"), "holds no checkpoint")
    (tmp_path / "running" / "config.json").write_text("{}")
    check_refused(command(tmp_path, *text), capsys, "holds no checkpoint")
    shutil.copytree(folder / "running", tmp_path / "torn" / "running")
    damaged = next((tmp_path / "torn" / "running").rglob("*.distcp"))
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    check_refused(command(tmp_path / "torn", *text), capsys, "is damaged", damaged.name)


def test_weights_that_are_not_finite(folder, tmp_path, capsys):
    model = tiny_model(
        tiny_config(data=dict(tokenizer=str(folder / "tok.model"), eod_token=EOD), vocab_size=320)
    )
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    save_model(model, tmp_path / "running")
    check_refused(
        command(tmp_path, "--text", str(folder / "text.txt")), capsys, "the loss on this text is nan"
    )


def check_refused(arguments: list[str], capsys, *messages: str) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("chiar: ") and captured.err.count("\n") == 1 and not captured.out
    for message in messages:
        assert message in captured.err
