"""Throughput, remaining time and MFU, as functions of times and counts that the caller hands in."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Optional

# Dense bf16 FLOP/s from the vendors' data sheets. The first row whose words all stand in the device's
# name counts, so a special case comes before the plain name. A device that is not here has no MFU.
_DENSE_BF16_PEAKS: tuple[tuple[str, float], ...] = (
    ("GB200", 2500e12),
    ("B200", 2250e12),
    ("GH200", 989e12),
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("H100 NVL", 835e12),
    ("H100 PCIE", 756e12),
    ("H100", 989e12),
    ("H800 PCIE", 756e12),
    ("H800", 989e12),
    ("H20", 148e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("A40", 149.7e12),
    ("A30", 165e12),
    ("L40S", 362e12),
    ("L4", 121e12),
    ("MI300X", 1307e12),
    ("MI325X", 1307e12),
)


@dataclass(frozen=True)
class DevicePeak:
    """What a device could do at most: the denominator of MFU."""

    device_name: str
    """As `torch.cuda.get_device_name` tells it."""

    flops: float
    """Dense bf16 FLOP/s of one device, from the vendor's data sheet."""

    def __str__(self) -> str:
        return f"{self.flops / 1e12:g} TFLOP/s, the vendor's dense bf16 peak of one {self.device_name}"


def device_peak(device_name: Optional[str]) -> Optional[DevicePeak]:
    """The dense bf16 peak of a device, or None if it is not known (then no MFU is shown).

    Args:
        device_name: what `torch.cuda.get_device_name` returns; None for a CPU.
    """
    if device_name is None:
        return None
    words = device_name.upper().replace("-", " ").split()
    for wanted, flops in _DENSE_BF16_PEAKS:
        if all(word in words for word in wanted.split()):  # whole words: an A40 is not an "RTX A4000"
            return DevicePeak(device_name, flops)
    return None


def mfu(flops_per_token: float, tokens_per_second: float, num_devices: int, peak_flops: float) -> float:
    """Model FLOPs utilisation: useful FLOP/s over the devices' peak, a share in [0, 1].

    Args:
        flops_per_token: useful forward and backward FLOPs of one token, from `model/accounting.py`.
        tokens_per_second: over all devices.
        num_devices: devices that share the work.
        peak_flops: FLOP/s of one device (`DevicePeak.flops`).
    """
    return flops_per_token * tokens_per_second / (num_devices * peak_flops)


@dataclass(frozen=True)
class ThroughputReading:
    """What `Throughput.update` measured."""

    tokens_per_second: float
    """From the end of the step of the last update to the end of this one's, pauses excluded."""

    smoothed_tokens_per_second: float
    """The same over about the last `smoothing_seconds`."""

    step_seconds: float
    """Seconds of one step, between the same ends."""

    eta_seconds: float
    """Until the last step at the recent pace, pauses included."""


class Throughput:
    """Turns steps, tokens and timestamps into rates. It never reads a clock, so it can be tested.

    Validation and saving are pauses: they do not lower tokens/s, but they do lengthen the ETA. A pause lies
    behind the last step added, so it belongs to the window of the next one.
    """

    def __init__(
        self, total_steps: int, now: float, *, step: int = 0, smoothing_seconds: float = 60.0
    ) -> None:
        """Start at `now` (seconds, any monotonic clock) with `step` of `total_steps` steps done."""
        self._total_steps = total_steps
        self._smoothing_seconds = smoothing_seconds
        self._step, self._now = step, now
        self._ended = now
        self._tokens = 0
        self._paused = self._paused_since = 0.0  # before and behind the end of the last step
        # Sums that fade out exponentially; their ratios need no correction for the short start.
        self._faded_tokens = self._faded_steps = self._faded_busy = self._faded_wall = 0.0

    def pause(self, seconds: float) -> None:
        """Count `seconds` since the last step's end as spent on something other than training."""
        self._paused_since += seconds

    def add_step(self, tokens: int, ended: float) -> None:
        """Count a step: its tokens, over all devices, and when it ended, on the clock of the constructor."""
        self._tokens += tokens
        self._ended = ended
        self._paused, self._paused_since = self._paused + self._paused_since, 0.0

    def update(self, step: int) -> ThroughputReading:
        """Close the window since the last update, at the end of the last step added.

        Args:
            step: steps done; more than at the last update.
        """
        steps, wall = step - self._step, self._ended - self._now
        if steps <= 0 or wall <= 0:
            raise ValueError(
                f"step {step}, ended at {self._ended}, does not lie after step {self._step}, {self._now}"
            )
        busy = max(wall - self._paused, 1e-9)
        keep = math.exp(-wall / self._smoothing_seconds)
        self._faded_tokens = keep * self._faded_tokens + self._tokens
        self._faded_steps = keep * self._faded_steps + steps
        self._faded_busy = keep * self._faded_busy + busy
        self._faded_wall = keep * self._faded_wall + wall
        reading = ThroughputReading(
            tokens_per_second=self._tokens / busy,
            smoothed_tokens_per_second=self._faded_tokens / self._faded_busy,
            step_seconds=busy / steps,
            eta_seconds=max(self._total_steps - step, 0) * self._faded_wall / self._faded_steps,
        )
        self._step, self._now, self._tokens, self._paused = step, self._ended, 0, 0.0
        return reading
