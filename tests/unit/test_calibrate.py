"""`chiar calibrate` against entropies and quantiles computed apart, in numpy and scipy."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.fft
import torch

from chiar_megatron import load_model
from chiar_megatron.checkpoint.files import CheckpointInfo, resolve_checkpoint
from chiar_megatron.cli import main
from chiar_megatron.data.preprocess import preprocess
from chiar_megatron.data.tokenizer import load_tokenizer
from chiar_megatron.operators.context import ForwardContext
from chiar_megatron.training.calibrate import (
    Calibration,
    CalibrationSettings,
    calibrate,
    quantile_threshold,
)
from tests.unit.tiny_models import sample_text, save_model, tiny_config, tiny_model, tiny_tokenizer

EOD, WINDOW = 1, 24
REPOSITORY = Path(__file__).resolve().parents[2]
DOCUMENTS = [sample_text(words, seed=words) + "\n" for words in (200, 90)]
MODELS = {
    "twin": dict(schedule="A*2"),
    "entropy": dict(router=dict(kind="entropy", dc_power_weight=2.0)),
    "gated": dict(router=dict(kind="entropy_gated"), mask_documents=True, pooling="causal"),
    "learned": dict(router=dict(kind="learned", keys_values="routed"), schedule="R*3 A", pooling="batch"),
    "random": dict(router=dict(kind="random"), norm="pre"),
    "soft": dict(router=dict(kind="soft")),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tokenizer, a text of two documents, its tokens, and a run folder for each model."""
    folder = tmp_path_factory.mktemp("calibrate")
    tokenizer = tiny_tokenizer(folder)
    (folder / "text.txt").write_text("<|endoftext|>\n".join(DOCUMENTS))
    preprocess([folder / "text.txt"], tokenizer, folder / "data")
    for name, settings in MODELS.items():
        config = tiny_config(data=dict(tokenizer=str(tokenizer), eod_token=EOD), vocab_size=320, **settings)
        save_model(tiny_model(config), folder / name)
    return folder


def run(folder: Path, name: str, **settings) -> Calibration:
    settings.setdefault("text", (str(folder / "text.txt"),))
    return calibrate(CalibrationSettings(str(folder / name), device="cpu", **settings))


def row(folder: Path) -> np.ndarray:
    """All tokens in order, with their eods."""
    tokenizer = load_tokenizer(folder / "tok.model")
    ids = [EOD]
    for document in DOCUMENTS:
        ids += [*tokenizer.encode(document), EOD]
    return np.array(ids)


def windows(folder: Path, batch: int) -> list[torch.Tensor]:
    ids = torch.from_numpy(row(folder))
    whole = len(ids) // WINDOW
    rows = ids[: whole * WINDOW].view(whole, WINDOW)
    return [*rows.split(batch), *([ids[None, whole * WINDOW :]] if len(ids) % WINDOW else [])]


def plain_entropies(folder: Path, name: str, dc_power_weight: float) -> np.ndarray:
    """Float64 entropies of the text's embeddings, by their definition."""
    weight = load_model(folder / name, device="cpu").module.embedding.word_embeddings.weight
    vectors = weight.detach().double().numpy()[row(folder)]
    power = scipy.fft.dct(vectors, norm="ortho") ** 2
    power[:, 0] *= dc_power_weight
    p = power / power.sum(axis=1, keepdims=True)
    return -(p * np.log(p)).sum(axis=1) / math.log(p.shape[1])


@torch.no_grad()
def routed_shares(checkpoint: Path, folder: Path, batch: int) -> dict[int, float]:
    """Share of the text's tokens that each layer of a checkpoint sends to attention."""
    model = load_model(checkpoint, device="cpu", precision="fp32")
    light: dict[int, int] = {}
    for ids in windows(folder, batch):
        ends = (ids == EOD).long()
        documents = ends.cumsum(1) - ends if model.config.model.mask_documents else None
        context = ForwardContext(tokens_BS=ids, document_ids_BS=documents, recorded_light_SB={})
        model(ids, context=context)
        for layer, light_SB in (context.recorded_light_SB or {}).items():
            light[layer] = light.get(layer, 0) + int(light_SB.sum())
    return {layer: number / len(row(folder)) for layer, number in light.items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(("name", "option", "weight"), [("twin", None, 1.0), ("twin", 2.0, 2.0)])
def test_the_published_threshold_is_numpys(folder, name, option, weight):
    found = run(folder, name, dc_power_weight=option)
    entropies = plain_entropies(folder, name, weight)
    expected = np.percentile(entropies, [33, 67])
    assert found.tokens == len(entropies) and found.layers == () and found.dc_power_weight == weight
    assert found.percentiles == pytest.approx(tuple(expected), abs=2e-6)
    assert found.threshold == pytest.approx(expected.mean(), abs=2e-6)
    assert found.share_of_embeddings == pytest.approx((entropies > expected.mean()).mean(), abs=0.01)


@pytest.mark.parametrize("name", ["entropy", "gated"])
def test_the_published_threshold_is_written_to_every_layer(folder, tmp_path, name):
    before = contents(folder / name)
    found = run(folder, name, output=str(tmp_path / "made"))
    weight = MODELS[name]["router"].get("dc_power_weight", 1.0)
    expected = np.percentile(plain_entropies(folder, name, weight), [33, 67]).mean()
    assert found.layers == (2, 3) and found.thresholds == pytest.approx((expected, expected), abs=2e-6)
    assert found.fractions == tuple(routed_shares(tmp_path / "made", folder, 8).values())
    model = load_model(tmp_path / "made", device="cpu")
    assert model.config.model.router.threshold == pytest.approx(expected, abs=2e-6)
    assert model.config.run_dir == str(tmp_path / "made")
    assert contents(folder / name) == before


@pytest.mark.parametrize("target", [0.5, 0.2])
@pytest.mark.parametrize("name", ["entropy", "gated", "learned", "random"])
def test_the_target_is_reached_in_every_layer(folder, tmp_path, name, target):
    before = contents(folder / name)
    found = run(folder, name, target=target, output=str(tmp_path / "made"))
    batch = 1 if name == "learned" else 8
    assert found.percentiles == () and found.threshold is None
    # A token scores alike wherever it stands until it has had attention, so a share is as coarse as the
    # most frequent token; hashes differ.
    coarse = 0.001 if name == "random" else np.bincount(row(folder)).max() / found.tokens / 2
    assert found.fractions == pytest.approx([target] * len(found.layers), abs=coarse)
    assert routed_shares(tmp_path / "made", folder, batch) == dict(
        zip(found.layers, found.fractions, strict=True)
    )
    old, new = (load_model(path, device="cpu").state_dict() for path in (folder / name, tmp_path / "made"))
    assert old.keys() == new.keys()
    changed = {
        key for key in old if isinstance(old[key], torch.Tensor) and not torch.equal(old[key], new[key])
    }
    assert changed == {f"module.decoder.layers.{layer - 1}.router.threshold" for layer in found.layers}
    assert contents(folder / name) == before


@torch.no_grad()
def test_layers_are_calibrated_on_the_decisions_before_them(folder):
    """Quantiles of the scores in whole forward passes with the thresholds before a layer as found."""
    model = load_model(folder / "learned", device="cpu")
    found = run(folder, "learned", target=0.3)
    routed = [layer for layer in model.module.chiar_layers if layer.router is not None]
    for layer, threshold in zip(routed[1:], found.thresholds[1:], strict=True):
        place = layer.layer_number - 2
        routed[place].router.threshold.fill_(found.thresholds[place])
        scores = []
        for ids in windows(folder, 1):
            context = ForwardContext(tokens_BS=ids, recorded_score_SB={})
            model(ids, context=context)
            assert context.recorded_score_SB is not None
            scores.append(context.recorded_score_SB[layer.layer_number].flatten())
        low, high = np.quantile(torch.cat(scores).numpy(), [0.697, 0.703])
        assert low < threshold < high


def test_equal_scores_go_one_way_together():
    scores = np.array([0.5] * 4 + [0.5 + 1e-8] * 3 + [0.7] * 2 + [0.9])
    assert quantile_threshold(scores, 0.3) == pytest.approx(0.6)
    assert quantile_threshold(scores, 0.5) == pytest.approx(0.6)  # 0.3, not 1.0
    assert quantile_threshold(scores, 0.05) == pytest.approx(0.8)
    assert quantile_threshold(np.full(9, 0.25), 0.5) == 0.25
    spread = np.random.default_rng(0).normal(size=10000)
    assert (spread > quantile_threshold(spread, 0.123)).mean() == pytest.approx(0.123, abs=2e-4)


def test_bf16_checkpoints_stay_bf16(folder, tmp_path):
    config = load_model(folder / "learned", device="cpu").config
    config = replace(config, training=replace(config.training, precision="bf16"))
    save_model(tiny_model(config), tmp_path / "run")
    found = run(tmp_path, "run", text=(str(folder / "text.txt"),), target=0.5, output=str(tmp_path / "made"))
    made, source = (load_model(tmp_path / name, device="cpu") for name in ("made", "run"))
    assert made.config.training.precision == "bf16"
    for (name, new), old in zip(made.named_parameters(), source.parameters(), strict=True):
        assert new.dtype == old.dtype and torch.equal(new, old), name
    threshold = made.module.chiar_layers[0].router.threshold
    assert threshold.dtype == torch.float32 and float(threshold) == found.thresholds[0]


def test_a_copy_can_be_a_source_and_says_what_it_is(folder, tmp_path):
    run(folder, "random", target=0.25, output=str(tmp_path / "made"))
    step = resolve_checkpoint(tmp_path / "made")
    info = CheckpointInfo.read(step)
    assert info.step == 7 and not info.has_optimizer
    report = json.loads((tmp_path / "made" / "calibration.json").read_text())
    assert report["target"] == 0.25 and report["checkpoint"] == str(resolve_checkpoint(folder / "random"))
    again = run(tmp_path, "made", text=(str(folder / "text.txt"),), target=0.25)
    assert again.thresholds == again.thresholds_before
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_tokens_bound_what_is_read_and_spread_over_the_text(folder):
    found = run(folder, "twin", tokens=WINDOW * 5 + 3, batch_size=2)
    assert (found.tokens, found.windows) == (WINDOW * 5, 5)
    assert next(found.lines()).endswith(f"{WINDOW * 5:,} tokens read in 5 windows")
    assert run(folder, "twin", tokens=1).tokens == WINDOW
    ids, entropies = row(folder), plain_entropies(folder, "twin", 1.0)
    starts = np.linspace(0, len(ids) // WINDOW - 1, 5).round().astype(int) * WINDOW
    read = np.concatenate([entropies[start : start + WINDOW] for start in starts])
    assert found.percentiles == pytest.approx(tuple(np.percentile(read, [33, 67])), abs=2e-6)


def test_preprocessed_data_gives_what_its_text_gives(folder):
    assert run(folder, "learned", text=(), data=str(folder / "data"), target=0.4) == run(
        folder, "learned", target=0.4
    )


# The verb.


def command(folder: Path, name: str, *options: str) -> list[str]:
    return ["calibrate", "--checkpoint", str(folder / name), "--device", "cpu", *options]


def test_the_verb_prints_a_table_and_one_json_line(folder, tmp_path, capsys):
    text = ["--text", str(folder / "text.txt")]
    made = str(tmp_path / "made")
    assert main(command(folder, "entropy", *text, "--target", "0.5", "--output", made)) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    figures = json.loads(last)
    expected = run(folder, "entropy", target=0.5)
    assert figures["mode"] == "target" and figures["tokens"] == len(row(folder))
    assert figures["thresholds"] == dict(zip(("2", "3"), expected.thresholds, strict=True))
    assert figures["fractions"] == dict(zip(("2", "3"), expected.fractions, strict=True))
    assert figures["percentiles"] is None and figures["threshold"] is None and figures["output"] == made
    assert sum(line.split()[0] in ("2", "3") for line in lines) == 2 and lines[-1] == f"written to {made}"
    assert main(command(folder, "twin", *text, "--json")) == 0
    (only,) = capsys.readouterr().out.splitlines()
    figures = json.loads(only)
    assert figures["mode"] == "percentiles" and figures["thresholds"] == {}
    assert figures["threshold"] == (figures["percentiles"]["33"] + figures["percentiles"]["67"]) / 2


def test_the_tool_is_the_verb():
    tool = [sys.executable, str(REPOSITORY / "tools" / "calibrate_threshold.py"), "--help"]
    shown = subprocess.run(tool, capture_output=True, text=True, timeout=120)
    assert shown.returncode == 0 and "calibrate [-h] --checkpoint DIR" in shown.stdout


@pytest.mark.parametrize(
    ("name", "options", "messages"),
    [
        ("twin", ["--target", "0.5"], ["--target", "no routed layers", "A*2"]),
        ("twin", ["--output", "made"], ["--output", "no routed layers"]),
        ("soft", ["--target", "0.5"], ["soft router", "no threshold"]),
        ("soft", [], ["soft router", "no threshold"]),
        ("learned", [], ["learned scores", "--target"]),
        ("random", [], ["random scores", "--target"]),
        ("learned", ["--target", "1"], ["--target: 1.0", "between 0 and 1"]),
        ("learned", ["--target", "nan"], ["--target: nan"]),
        ("twin", ["--tokens", "0"], ["--tokens: 0"]),
        ("twin", ["--batch-size", "0"], ["--batch-size: 0"]),
        ("twin", ["--dc-power-weight", "-1"], ["--dc-power-weight: -1"]),
        ("twin", ["--dc-power-weight", "nan"], ["--dc-power-weight: nan must be above 0 and finite"]),
        ("entropy", ["--dc-power-weight", "inf"], ["--dc-power-weight: inf must be above 0 and finite"]),
        ("entropy", ["--dc-power-weight", "1"], ["--dc-power-weight: 1.0", "2.0"]),
        ("missing", [], ["missing: no such checkpoint"]),
    ],
)
def test_options_that_cannot_be(folder, capsys, name, options, messages):
    check_refused(command(folder, name, "--text", str(folder / "text.txt"), *options), capsys, *messages)


@pytest.mark.parametrize(("content", "message"), [("", "no text"), (None, "does not exist")])
def test_texts_that_cannot_be_read(folder, tmp_path, capsys, content, message):
    if content is not None:
        (tmp_path / "bad.txt").write_text(content)
    check_refused(command(folder, "twin", "--text", str(tmp_path / "bad.txt")), capsys, message)


def test_outputs_that_cannot_be_written(folder, tmp_path, capsys):
    options = ["--text", str(folder / "text.txt"), "--target", "0.5", "--output"]
    before = contents(folder / "learned")
    check_refused(command(folder, "learned", *options, str(folder / "learned")), capsys, "exists already")
    (tmp_path / "file").write_text("")
    check_refused(
        command(folder, "learned", *options, str(tmp_path / "file" / "made")), capsys, "made cannot"
    )
    assert contents(folder / "learned") == before and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_damaged_checkpoint_is_refused(folder, tmp_path, capsys):
    shutil.copytree(folder / "learned", tmp_path / "torn")
    damaged = next((tmp_path / "torn").rglob("*.distcp"))
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    options = ["--text", str(folder / "text.txt"), "--target", "0.5"]
    check_refused(command(tmp_path, "torn", *options), capsys, "is damaged", damaged.name)


def test_weights_that_are_not_finite(folder, tmp_path, capsys):
    model = load_model(folder / "learned", device="cpu")
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    save_model(model, tmp_path / "run")
    options = ["--text", str(folder / "text.txt"), "--target", "0.5"]
    check_refused(command(tmp_path, "run", *options), capsys, "scores of layer 1 are not all finite")


def check_refused(arguments: list[str], capsys, *messages: str) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("chiar: ") and captured.err.count("\n") == 1 and not captured.out
    for message in messages:
        assert message in captured.err
