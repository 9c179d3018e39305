"""The picture, read back as SVG text and as pixels."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy
import pytest
from matplotlib.image import imread

from chiar_megatron.checkpoint.claim import claim_run
from chiar_megatron.config.schema import LoggingConfig
from chiar_megatron.errors import ChiarError
from chiar_megatron.metrics.picture import draw_run
from chiar_megatron.metrics.writers import open_writers
from tests.unit.metrics_runs import RECIPE, balance, figures, write_run


def svg_texts(path: Path) -> str:
    """Everything written in an SVG of matplotlib, which keeps the words as comments."""
    parser = ElementTree.XMLParser(target=ElementTree.TreeBuilder(insert_comments=True))
    root = ElementTree.parse(path, parser).getroot()
    return "\n".join((node.text or "").strip() for node in root.iter() if node.tag is ElementTree.Comment)


def ink(picture: numpy.ndarray, colour: tuple[int, int, int]) -> int:
    """Pixels of nearly that colour."""
    rgb = picture[..., :3] * 255
    return int((numpy.abs(rgb - numpy.array(colour)).max(axis=-1) < 12).sum())


BLUE, ORANGE = (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)


def test_picture_of_a_run(tmp_path: Path) -> None:
    write_run(tmp_path, range(1, 60))
    (tmp_path / "summary.json").write_text('{"unigram_entropy_nats": 8.71}')
    path = draw_run(tmp_path)
    assert path == tmp_path / "picture.png"
    picture = imread(path)
    assert picture.shape[1] >= 1800
    assert ink(picture, BLUE) > 3000
    assert ink(picture, ORANGE) == 0
    words = svg_texts(path.with_suffix(".svg"))
    for expected in (
        "Loss (nats per token)",
        "Routed fraction",
        "MetaRouter gate",
        "Throughput (tokens per second)",
        "validation wiki",
        "unigram entropy 8.71",
        "layer 2",
        "layer 3",
        "step",
    ):
        assert expected in words


def test_picture_with_the_twin(tmp_path: Path) -> None:
    write_run(tmp_path / "run", range(1, 30))
    write_run(tmp_path / "twin", range(1, 50))
    path = draw_run(tmp_path / "run", tmp_path / "out" / "both.png", {"full attention": tmp_path / "twin"})
    assert path == tmp_path / "out" / "both.png"
    assert ink(imread(path), ORANGE) > 1000
    words = svg_texts(path.with_suffix(".svg"))
    assert "full attention, training" in words
    assert "this run, training" in words
    assert "unigram" not in words


def test_picture_of_balance(tmp_path: Path) -> None:
    writers = open_writers(claim_run(tmp_path), LoggingConfig(), 0, RECIPE)
    for step in range(1, 20):
        told = balance(step) if step > 1 else {"rank_max_over_mean": [1.0, 1.0], "rank_seconds": {}}
        writers.log(step, {**figures(step), **told})
    writers.close()
    path = draw_run(tmp_path)
    picture = imread(path)
    assert picture.shape[0] > 1.3 * picture.shape[1] and ink(picture, ORANGE) > 500
    words = svg_texts(path.with_suffix(".svg"))
    for expected in (
        "useful ÷ executed",
        "overflow ÷ light",
        "light tokens before capacity",
        "executed rows",
        "own work, seconds",
        "Threshold of the score",
        "Scores at step 19",
        "standard deviations from the mean",
    ):
        assert expected in words


def test_picture_of_many_layers_has_a_colour_bar(tmp_path: Path) -> None:
    writers = open_writers(claim_run(tmp_path), LoggingConfig(), 0, {"model": {"schedule": "D R*26 A"}})
    for step in range(1, 20):
        writers.log(step, {**figures(step), "routed_fraction": [i / 26 for i in range(26)]})
    writers.close()
    words = svg_texts(draw_run(tmp_path).with_suffix(".svg")).splitlines()
    assert "layer" in words
    assert {"2", "27"} <= set(words)


def test_picture_says_what_a_run_does_not_have_and_skips_bad_steps(tmp_path: Path) -> None:
    writers = open_writers(claim_run(tmp_path), LoggingConfig(), 0, {"model": {"schedule": "A*4"}})
    for step in range(1, 6):
        loss = math.nan if step == 3 else 5.0
        writers.log(step, {"loss": loss, "tokens_per_second": 10.0, "gate": None, "routed_fraction": []})
    writers.close()
    words = svg_texts(draw_run(tmp_path).with_suffix(".svg"))
    assert "no routed layers" in words
    assert "no MetaRouter" in words


def test_picture_is_the_same_file_each_time(tmp_path: Path) -> None:
    write_run(tmp_path, range(1, 10))
    first, second = draw_run(tmp_path, tmp_path / "a.png"), draw_run(tmp_path, tmp_path / "b.png")
    assert first.read_bytes() == second.read_bytes()
    assert first.with_suffix(".svg").read_bytes() == second.with_suffix(".svg").read_bytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "metrics.jsonl does not exist"),
        ("", "0 steps with a loss"),
        ('{"step": 1, "loss": 2.0}\n', "1 steps with a loss"),
        ('{"step": 1, "loss": 2.0}\nnonsense\n{"step": 2, "loss": 2.0}\n', "line 2"),
        ('{"loss": 2.0}\n', "line 1"),
    ],
)
def test_picture_without_enough_to_draw_is_one_line(
    tmp_path: Path, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(ChiarError, match=message) as caught:
        draw_run(tmp_path)
    assert "\n" not in str(caught.value)


def test_picture_refuses_other_formats_and_a_broken_summary(tmp_path: Path) -> None:
    write_run(tmp_path, range(1, 4))
    with pytest.raises(ChiarError, match=r"\.png"):
        draw_run(tmp_path, tmp_path / "run.jpg")
    (tmp_path / "summary.json").write_text("[1]")
    with pytest.raises(ChiarError, match=r"summary\.json"):
        draw_run(tmp_path)
