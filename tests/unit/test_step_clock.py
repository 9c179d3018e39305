"""When steps end, with a device that runs ahead of the host or behind it, and in a real run's records."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from chiar_megatron.config.load import config_from_dict
from chiar_megatron.metrics.meters import Throughput
from chiar_megatron.runtime.distributed import single_process_world
from chiar_megatron.training.engine import MegatronEngine
from chiar_megatron.training.loop import pretrain
from chiar_megatron.training.step_clock import StepClock
from tests.parallel.tiny_run import recipe, records, write_data


class Device:
    """Works through what the host gives it, in order; both have a time of their own."""

    def __init__(self) -> None:
        self.host = 100.0
        self.free = 0.0

    def event(self) -> Event:
        return Event(self)

    def work(self, launching: float, working: float) -> None:
        """The first of many kernels starts at once, the last is launched after `launching` seconds."""
        start, self.host = self.host, self.host + launching
        self.free = max(self.host, max(self.free, start) + working)


class Event:
    """As `torch.cuda.Event`: it passes when the device comes to it, by a clock that began at another time."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.passes = 0.0

    def record(self) -> None:
        self.passes = max(self.device.free, self.device.host)

    def synchronize(self) -> None:
        self.device.host = max(self.device.host, self.passes)

    def elapsed_time(self, end_event: Any) -> float:
        assert max(self.passes, end_event.passes) <= self.device.host, "an event that has not passed"
        return float(1e3 * (end_event.passes - self.passes))


@pytest.mark.parametrize(("launching", "working"), [(1.0, 0.7), (0.1, 0.7)], ids=["eager", "replayed"])
def test_every_steps_time_is_the_devices(launching: float, working: float) -> None:
    """One step under way while the host settles the one before; the last two are settled together."""
    device = Device()
    clock = StepClock(torch.device("cuda"), device.event, lambda: device.host)
    meter = Throughput(total_steps=6, now=device.host)
    under_way: list[Any] = []
    seconds = []

    def settle() -> None:
        meter.add_step(10, clock.wait(under_way.pop(0)))
        seconds.append(meter.update(len(seconds) + 1).step_seconds)

    for _ in range(6):
        clock.begin()
        device.work(launching, working)
        under_way.append(clock.end())
        if len(under_way) > 1:
            settle()
    settle()
    assert seconds == pytest.approx([max(launching, working)] * 6)


def test_a_step_is_not_over_later_than_it_is_seen_to_be() -> None:
    device = Device()
    clock = StepClock(torch.device("cuda"), device.event, lambda: device.host - 0.5)  # the host's runs behind
    clock.begin()
    device.work(0.1, 1.0)
    assert clock.wait(clock.end()) == pytest.approx(101.0 - 0.5)


def test_a_cpus_steps_end_when_they_are_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one step under way, as on CUDA: neither the last step nor one before a validation is short."""
    sections = {
        "training": {"steps": 5, "eval_interval_steps": 3, "eval_steps": 1},
        "logging": {"log_interval_steps": 1},
        "data": {"validation": [write_data(tmp_path)], "train": [write_data(tmp_path)], "eod_token": 0},
    }
    config = config_from_dict(recipe("unused", tmp_path / "run", sections))
    launch, validate = MegatronEngine.launch_step, MegatronEngine.validation_loss

    def slow_launch(*arguments: Any) -> Any:
        arguments[0].steps_ahead = 1
        time.sleep(0.3)
        return launch(*arguments)

    def slow_validation(*arguments: Any) -> float:
        time.sleep(2.0)
        return validate(*arguments)

    monkeypatch.setattr(MegatronEngine, "launch_step", slow_launch)
    monkeypatch.setattr(MegatronEngine, "validation_loss", slow_validation)
    assert pretrain(config, single_process_world("cpu")) == 0
    seconds = [record["step_seconds"] for record in records(tmp_path / "run")]
    assert len(seconds) == 5 and min(seconds) >= 0.3 and max(seconds[1:]) < 1.5, seconds
    (last,) = [e for e in records(tmp_path / "run", "events") if e["event"] == "times"][-1:]
    assert last["evaluation"] >= 2.0 and 1.5 <= last["start"] + last["train"]
