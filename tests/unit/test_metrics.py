"""Meters, writers, the progress line and the picture, against files read back by the tools' own readers."""

from __future__ import annotations

import json
import logging as python_logging
import math
import os
import resource
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import pytest
from matplotlib.image import imread

from chiar_megatron.config.schema import LoggingConfig
from chiar_megatron.errors import ChiarError, ConfigError
from chiar_megatron.metrics.jsonl import read_events, read_metrics
from chiar_megatron.metrics.meters import Throughput, device_peak, mfu
from chiar_megatron.metrics.picture import draw_run
from chiar_megatron.metrics.progress import ProgressLine, short_duration, short_number
from chiar_megatron.metrics.writers import flatten, open_writers, wandb_mode

RECIPE = {"model": {"schedule": "D R*2 A"}, "optimizer": {"lr": 0.001}}


def figures(step: int) -> dict[str, Any]:
    """A record as the training loop logs it, for two routed layers."""
    return {
        "loss": 9.0 - 0.01 * step,
        "tokens_per_second": 1000.0 + step,
        "routed_fraction": [0.25, 0.75],
        "gate": 0.5,
        "validation": {"wiki": 8.0} if step % 2 == 0 else None,
    }


def write_run(run_dir: Path, steps: range, resume_step: int = 0, **logging: Any) -> None:
    writers = open_writers(run_dir, LoggingConfig(**logging), resume_step, RECIPE)
    for step in steps:
        writers.log(step, figures(step))
    writers.close()


@contextmanager
def disk_full_after(size: int) -> Iterator[None]:
    """No file of this process can grow beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def run_program(program: str, *first_on_path: Path) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process of its own, with the package importable."""
    path = os.pathsep.join(map(str, [*first_on_path, Path(__file__).parents[2]]))
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


# Meters


def test_throughput_leaves_pauses_out_of_the_rate_but_not_out_of_the_eta() -> None:
    meter = Throughput(total_steps=100, now=10.0)
    for _ in range(10):
        meter.add_tokens(512)
    meter.pause(3.0)
    reading = meter.update(step=10, now=18.0)
    assert reading.tokens_per_second == pytest.approx(5120 / 5.0)
    assert reading.smoothed_tokens_per_second == pytest.approx(5120 / 5.0)
    assert reading.step_seconds == pytest.approx(0.5)
    assert reading.eta_seconds == pytest.approx(90 * 0.8)


def test_throughput_smooths_over_its_time_constant() -> None:
    meter = Throughput(total_steps=1000, now=0.0, smoothing_seconds=10.0)
    meter.add_tokens(100)
    meter.update(step=1, now=10.0)
    meter.add_tokens(400)
    reading = meter.update(step=2, now=20.0)
    old = math.exp(-1.0)  # a window one time constant back counts 1/e
    assert reading.tokens_per_second == pytest.approx(40.0)
    assert reading.smoothed_tokens_per_second == pytest.approx((100 * old + 400) / (10 * old + 10))


def test_eta_of_a_resumed_and_of_a_finished_run() -> None:
    meter = Throughput(total_steps=50, now=0.0, step=40)
    meter.add_tokens(10)
    assert meter.update(step=45, now=10.0).eta_seconds == pytest.approx(10.0)
    assert meter.update(step=50, now=20.0).eta_seconds == 0.0


def test_mfu_counts_every_device() -> None:
    # 400M parameters, 6 FLOPs each: 2.4e9 a token; 164.8k tokens/s is 40% of one H200's 989 TFLOP/s.
    assert mfu(2.4e9, 164_833.3, 1, 989e12) == pytest.approx(0.4, rel=1e-4)
    assert mfu(2.4e9, 164_833.3, 4, 989e12) == pytest.approx(0.1, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA GB200", 2500),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
    ],
)
def test_peak_is_the_devices_own_and_named(name: str, teraflops: float) -> None:
    peak = device_peak(name)
    assert peak is not None
    assert peak.flops == teraflops * 1e12
    assert name in str(peak)
    assert f"{teraflops} TFLOP/s" in str(peak)


@pytest.mark.parametrize("name", [None, "NVIDIA RTX A4000", "Tesla V100-SXM2-32GB"])
def test_unknown_devices_have_no_peak(name: str | None) -> None:
    assert device_peak(name) is None


# metrics.jsonl and events.jsonl


def steps_of(run_dir: Path) -> list[int]:
    return [record["step"] for record in read_metrics(run_dir)]


def test_jsonl_holds_what_was_logged(tmp_path: Path) -> None:
    write_run(tmp_path, range(1, 4))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": step, **figures(step)} for step in (1, 2, 3)]


def test_nonfinite_numbers_stay_valid_json_and_are_named(tmp_path: Path) -> None:
    writers = open_writers(tmp_path, LoggingConfig(), 0, RECIPE)
    writers.log(
        1, {"loss": math.nan, "grad_norm": math.inf, "routed_fraction": [0.5, math.nan], "gate": None}
    )
    writers.event("bad_step", step=1, loss=math.nan)
    writers.close()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    record = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert record["loss"] is None
    assert record["routed_fraction"] == [0.5, None]
    assert record["nonfinite"] == {"loss": "nan", "grad_norm": "inf", "routed_fraction": "[0.5, nan]"}
    event = json.loads((tmp_path / "events.jsonl").read_text().splitlines()[-1], parse_constant=refuse)
    assert event["loss"] is None
    assert event["nonfinite"] == {"loss": "nan"}


def test_resume_cuts_off_later_steps(tmp_path: Path) -> None:
    write_run(tmp_path, range(1, 8))
    write_run(tmp_path, range(5, 10), resume_step=4)
    assert steps_of(tmp_path) == list(range(1, 10))


def test_resume_keeps_everything_up_to_a_step_that_was_not_logged(tmp_path: Path) -> None:
    write_run(tmp_path, range(10, 60, 10))
    write_run(tmp_path, range(40, 60, 10), resume_step=33)
    assert steps_of(tmp_path) == [10, 20, 30, 40, 50]


def test_start_from_scratch_empties_the_file(tmp_path: Path) -> None:
    write_run(tmp_path, range(0, 5))
    write_run(tmp_path, range(0, 2))
    assert steps_of(tmp_path) == [0, 1]


@pytest.mark.parametrize(
    "torn", ['{"step": 4, "lo', '{"step": 4, "loss": 1.0}', '{"step": 4, "loss": 1.0\n', "\0\0\0"]
)
def test_torn_last_line_is_dropped(tmp_path: Path, torn: str) -> None:
    write_run(tmp_path, range(1, 4))
    for name in ("metrics.jsonl", "events.jsonl"):
        with (tmp_path / name).open("a") as file:
            file.write(torn)
    assert steps_of(tmp_path) == [1, 2, 3]
    write_run(tmp_path, range(4, 6), resume_step=4)
    assert steps_of(tmp_path) == [1, 2, 3, 4, 5]
    assert [event["event"] for event in read_events(tmp_path)] == ["start", "resume"]


def test_lines_survive_kill_9(tmp_path: Path) -> None:
    program = f"""
import os, signal
from pathlib import Path
from chiar_megatron.config.schema import LoggingConfig
from chiar_megatron.metrics.writers import open_writers
writers = open_writers(Path({str(tmp_path)!r}), LoggingConfig(), 0, {RECIPE!r})
writers.log(1, {{"loss": 1.0}})
writers.event("save", step=1)
os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = run_program(program)
    assert killed.returncode == -signal.SIGKILL
    assert steps_of(tmp_path) == [1]
    assert [event["event"] for event in read_events(tmp_path)] == ["start", "save"]


def test_events_outlive_resumes_and_count_restarts(tmp_path: Path) -> None:
    write_run(tmp_path, range(1, 3))
    writers = open_writers(tmp_path, LoggingConfig(), 1, RECIPE)
    writers.event("exit", reason="SIGTERM", code=75)
    writers.close()
    assert writers.restarts == 1
    start, resume, leave = read_events(tmp_path)
    assert (start["event"], start["step"], start["routed_layers"]) == ("start", 0, [2, 3])
    assert (resume["event"], resume["step"]) == ("resume", 1)
    assert (leave["event"], leave["reason"], leave["code"]) == ("exit", "SIGTERM", 75)


def test_full_disk_warns_once_and_leaves_whole_lines(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writers = open_writers(tmp_path, LoggingConfig(), 0, RECIPE)
    writers.log(1, figures(1))
    size = (tmp_path / "metrics.jsonl").stat().st_size
    with caplog.at_level(python_logging.WARNING), disk_full_after(size + 20):  # 20 bytes of step 2 still fit
        writers.log(2, figures(2))
        writers.log(3, figures(3))
    assert (tmp_path / "metrics.jsonl").stat().st_size == size
    writers.log(4, figures(4))  # there is space again
    writers.close()
    assert steps_of(tmp_path) == [1, 4]
    assert [record.getMessage().split(" ")[0] for record in caplog.records] == ["metrics.jsonl"]


def test_full_disk_under_tensorboard_does_not_stop_the_run(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    program = f"""
import resource, signal
from pathlib import Path
from chiar_megatron.config.schema import LoggingConfig
from chiar_megatron.metrics.writers import open_writers
writers = open_writers(Path({str(tmp_path)!r}), LoggingConfig(tensorboard=True), 0, {RECIPE!r})
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
for step in range(1, 40):
    writers.log(step, {{"loss": 1.0}})
writers.close()
print("trained on")
"""
    done = run_program(program)
    assert (done.returncode, done.stdout) == (0, "trained on\n")
    assert done.stderr.count("training goes on without") == 2
    assert "TensorBoard cannot be written" in done.stderr
    assert "metrics.jsonl cannot be written" in done.stderr


def test_unwritable_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ChiarError, match="run_dir=.*choose another") as caught:
        open_writers(tmp_path / "file" / "run", LoggingConfig(), 0, RECIPE)
    assert "\n" not in str(caught.value)


def test_flatten_names_layers_as_the_model_numbers_them() -> None:
    flat = flatten({"step": 3, "loss": 1.0, "gate": None, "routed_fraction": [0.2, 0.4]}, [2, 5])
    assert flat == {"loss": 1.0, "routed_fraction/layer_2": 0.2, "routed_fraction/layer_5": 0.4}
    assert flatten({"validation": {"wiki": 2.0}}, []) == {"validation/wiki": 2.0}


# TensorBoard and wandb, read back


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path: Path) -> None:
    accumulator_module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    write_run(tmp_path, range(1, 8), tensorboard=True)
    write_run(tmp_path, range(5, 10), resume_step=4, tensorboard=True)
    accumulator = accumulator_module.EventAccumulator(str(tmp_path / "tensorboard"))
    accumulator.Reload()
    assert set(accumulator.Tags()["scalars"]) == {
        "loss",
        "tokens_per_second",
        "gate",
        "routed_fraction/layer_2",
        "routed_fraction/layer_3",
        "validation/wiki",
    }
    assert [event.step for event in accumulator.Scalars("loss")] == list(range(1, 10))
    assert accumulator.Scalars("loss")[2].value == pytest.approx(8.97)
    assert accumulator.Scalars("routed_fraction/layer_3")[0].value == pytest.approx(0.75)


def test_missing_tensorboard_names_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").mkdir()  # a package of that name without anything in it hides the real one
    (tmp_path / "tensorboard" / "__init__.py").write_text("raise ImportError('No module named tensorboard')")
    program = f"""
from pathlib import Path
from chiar_megatron.config.schema import LoggingConfig
from chiar_megatron.errors import ConfigError
from chiar_megatron.metrics.writers import open_writers
try:
    open_writers(Path({str(tmp_path / "run")!r}), LoggingConfig(tensorboard=True), 0, {RECIPE!r})
except ConfigError as error:
    print(error)
"""
    done = run_program(program, tmp_path)
    assert done.stdout.count("\n") == 1
    assert "logging.tensorboard=true" in done.stdout
    assert "pip install tensorboard" in done.stdout


@pytest.fixture
def no_wandb_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No key anywhere; returns the netrc file in use, which is empty."""
    netrc = tmp_path / "netrc"
    netrc.touch(mode=0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    return netrc


def test_wandb_mode_follows_the_key(no_wandb_key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = LoggingConfig(wandb_project="p")
    assert wandb_mode(config) == "offline"
    with pytest.raises(ConfigError, match="wandb login"):
        wandb_mode(LoggingConfig(wandb_project="p", wandb_mode="online"))
    no_wandb_key.write_text("machine api.wandb.ai\n  login user\n  password not-a-real-key\n")
    assert wandb_mode(config) == "online"
    assert wandb_mode(LoggingConfig(wandb_project="p", wandb_mode="offline")) == "offline"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")  # the key is for another server
    assert wandb_mode(config) == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "not-a-real-key")
    assert wandb_mode(config) == "online"


@pytest.mark.usefixtures("no_wandb_key")
def test_wandb_goes_on_under_the_same_id_after_a_resume(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    run_dir = tmp_path / "run"
    write_run(run_dir, range(1, 4), wandb_project="chiar-test")
    run_id = (run_dir / "wandb_id.txt").read_text().strip()
    write_run(run_dir, range(3, 6), resume_step=2, wandb_project="chiar-test")
    assert (run_dir / "wandb_id.txt").read_text().strip() == run_id
    attempts = sorted((run_dir / "wandb").glob("offline-run-*"))
    assert [path.name.split("-")[-1] for path in attempts] == [run_id, run_id]
    for path in attempts:
        content = (path / f"run-{run_id}.wandb").read_bytes()
        for expected in (b"chiar-test", b"routed_fraction/layer_3", b"validation/wiki", b'"lr"'):
            assert expected in content


# The progress line

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


# The picture


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


def test_picture_of_many_layers_has_a_colour_bar(tmp_path: Path) -> None:
    writers = open_writers(tmp_path, LoggingConfig(), 0, {"model": {"schedule": "D R*26 A"}})
    for step in range(1, 20):
        writers.log(step, {**figures(step), "routed_fraction": [i / 26 for i in range(26)]})
    writers.close()
    words = svg_texts(draw_run(tmp_path).with_suffix(".svg")).splitlines()
    assert "layer" in words
    assert {"2", "27"} <= set(words)


def test_picture_says_what_a_run_does_not_have_and_skips_bad_steps(tmp_path: Path) -> None:
    writers = open_writers(tmp_path, LoggingConfig(), 0, {"model": {"schedule": "A*4"}})
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
