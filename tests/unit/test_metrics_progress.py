"""The progress line."""

from __future__ import annotations

import math
import sys

import pytest

from chiar_megatron.metrics.progress import ProgressLine, short_duration, short_number

LINE = {
    "step": 7,
    "loss": 3.14159,
    "tokens_per_second": 12345.0,
    "grad_norm": 0.5,
    "learning_rate": 3e-4,
    "routed_fraction": [0.4, 0.6],
    "gate": 0.22,
    "eta_seconds": 3725.0,
    "bad_steps": 0,
    "restarts": 0,
}


def test_progress_line_in_a_log_file() -> None:
    assert ProgressLine(100, is_tty=False).render(LINE) == (
        "step   7/100  loss 3.1416  tokens/s 12.3k  grad 0.5  lr 3.00e-04  routed 0.50 (0.40-0.60)  "
        "gate 0.220  eta 1h02m"
    )


def test_progress_line_shows_mfu_validation_and_trouble_when_there_are_any() -> None:
    line = ProgressLine(100, is_tty=False).render(
        {**LINE, "mfu": 0.417, "bad_steps": 2, "restarts": 1, "gate": None, "validation": {"wiki": 3.5}}
    )
    assert "tokens/s 12.3k  MFU 41.7%" in line
    assert line.endswith("eta 1h02m  val wiki 3.5000  restarts 1  bad steps 2")
    assert "gate" not in line


def test_progress_line_of_a_bad_step() -> None:
    line = ProgressLine(100, is_tty=False).render({"step": 1, "loss": math.nan, "eta_seconds": math.inf})
    assert line == "step   1/100  loss nan"


def test_progress_line_on_a_terminal_says_the_same() -> None:
    from rich.text import Text

    marked = ProgressLine(100, is_tty=True).render({**LINE, "validation": {"[wiki]": 3.5}})
    plain = ProgressLine(100, is_tty=False).render({**LINE, "validation": {"[wiki]": 3.5}})
    assert marked != plain
    assert Text.from_markup(marked).plain == plain


def test_progress_line_has_a_timestamp_in_a_log_file(capsys: pytest.CaptureFixture[str]) -> None:
    ProgressLine(100, is_tty=False).show(LINE)
    day, clock, rest = capsys.readouterr().out.split(" ", 2)
    assert (len(day), len(clock)) == (10, 8)
    assert rest.strip() == ProgressLine(100, is_tty=False).render(LINE)


@pytest.mark.parametrize("is_tty", [False, True])
def test_progress_line_outlives_a_full_log_disk(is_tty: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    full = open("/dev/full", "w", buffering=1)
    monkeypatch.setattr(sys, "stdout", full)
    ProgressLine(100, is_tty).show(LINE)
    with pytest.raises(OSError, match="No space left"):
        full.close()


@pytest.mark.parametrize(
    ("value", "text"),
    [(12345, "12.3k"), (999.9, "1.00k"), (950, "950"), (1.5e6, "1.50M"), (123456, "123k"), (0, "0")],
)
def test_short_number(value: float, text: str) -> None:
    assert short_number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (59.6, "1m00s"), (200, "3m20s"), (3725, "1h02m"), (187200, "2d04h")]
)
def test_short_duration(seconds: float, text: str) -> None:
    assert short_duration(seconds) == text
