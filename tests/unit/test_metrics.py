"""Meters and writers, against files read back by the tools' own readers."""

from __future__ import annotations

import json
import logging as python_logging
import math
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from chiar_megatron.checkpoint.claim import claim_run
from chiar_megatron.config.schema import LoggingConfig
from chiar_megatron.errors import ChiarError, ConfigError
from chiar_megatron.metrics.jsonl import read_events, read_metrics
from chiar_megatron.metrics.meters import Throughput, device_peak, mfu
from chiar_megatron.metrics.writers import flatten, open_writers, wandb_mode
from tests.unit.metrics_runs import RECIPE, figures, write_run


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
    meter.add_step(512, ended=10.5)
    meter.pause(3.0)
    for number in range(9):
        meter.add_step(512, ended=14.0 + 0.5 * number)
    meter.pause(100.0)  # behind the last step: the next window's
    reading = meter.update(step=10)
    assert reading.tokens_per_second == pytest.approx(5120 / 5.0)
    assert reading.smoothed_tokens_per_second == pytest.approx(5120 / 5.0)
    assert reading.step_seconds == pytest.approx(0.5)
    assert reading.eta_seconds == pytest.approx(90 * 0.8)


def test_throughput_smooths_over_its_time_constant() -> None:
    meter = Throughput(total_steps=1000, now=0.0, smoothing_seconds=10.0)
    meter.add_step(100, ended=10.0)
    meter.update(step=1)
    meter.add_step(400, ended=20.0)
    reading = meter.update(step=2)
    old = math.exp(-1.0)  # a window one time constant back counts 1/e
    assert reading.tokens_per_second == pytest.approx(40.0)
    assert reading.smoothed_tokens_per_second == pytest.approx((100 * old + 400) / (10 * old + 10))


def test_eta_of_a_resumed_and_of_a_finished_run() -> None:
    meter = Throughput(total_steps=50, now=0.0, step=40)
    meter.add_step(10, ended=10.0)
    assert meter.update(step=45).eta_seconds == pytest.approx(10.0)
    meter.add_step(10, ended=20.0)
    assert meter.update(step=50).eta_seconds == 0.0


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
    writers = open_writers(claim_run(tmp_path), LoggingConfig(), 0, RECIPE)
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
from chiar_megatron.checkpoint.claim import claim_run
from chiar_megatron.metrics.writers import open_writers
writers = open_writers(claim_run(Path({str(tmp_path)!r})), LoggingConfig(), 0, {RECIPE!r})
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
    writers = open_writers(claim_run(tmp_path), LoggingConfig(), 1, RECIPE)
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
    writers = open_writers(claim_run(tmp_path), LoggingConfig(), 0, RECIPE)
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
from chiar_megatron.checkpoint.claim import claim_run
from chiar_megatron.metrics.writers import open_writers
writers = open_writers(claim_run(Path({str(tmp_path)!r})), LoggingConfig(tensorboard=True), 0, {RECIPE!r})
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
    assert "Traceback" not in done.stderr


def test_unwritable_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ChiarError, match="run_dir .*choose another") as caught:
        open_writers(claim_run(tmp_path / "file" / "run"), LoggingConfig(), 0, RECIPE)
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


def test_tensorboard_does_not_see_an_older_copy_write_on(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    write_run(tmp_path, range(1, 8), tensorboard=True)
    (older,) = (tmp_path / "tensorboard").iterdir()
    before = older.read_bytes()
    with older.open("ab") as late:
        write_run(tmp_path, range(5, 10), resume_step=4, tensorboard=True)
        late.write(b"late")
    assert older.read_bytes() == before and len(list((tmp_path / "tensorboard").iterdir())) == 2


def test_missing_tensorboard_names_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").mkdir()  # a package of that name without anything in it hides the real one
    (tmp_path / "tensorboard" / "__init__.py").write_text("raise ImportError('No module named tensorboard')")
    program = f"""
from pathlib import Path
from chiar_megatron.config.schema import LoggingConfig
from chiar_megatron.errors import ConfigError
from chiar_megatron.checkpoint.claim import claim_run
from chiar_megatron.metrics.writers import open_writers
try:
    open_writers(claim_run(Path({str(tmp_path / "run")!r})), LoggingConfig(tensorboard=True), 0, {RECIPE!r})
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
    # Two that begin within a second differ by a suffix: run-DATE_TIME-ID and run-DATE_TIME-ID-1.
    assert len(attempts) == 2 and all(f"-{run_id}" in path.name for path in attempts)
    for path in attempts:
        # wandb's own process may write on for a moment after its end was waited for.
        file, deadline = path / f"run-{run_id}.wandb", time.monotonic() + 30
        while b"chiar-test" not in file.read_bytes() and time.monotonic() < deadline:
            time.sleep(0.1)
        content = file.read_bytes()
        for expected in (
            b"chiar-test",
            b"score_histogram/layer_3",
            b"rank_seconds/max",
            b"routed_fraction/layer_3",
            b"validation/wiki",
            b'"lr"',
        ):
            assert expected in content
