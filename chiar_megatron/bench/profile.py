"""Where a step's time goes on the device, and where the host waits for it."""

from __future__ import annotations

import traceback
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType

from chiar_megatron.bench.step_sides import Trainee
from chiar_megatron.bench.timing import synchronize

_WAITS_HEAD = (
    "where the host may wait, calls a step (one wait for the device is the profiler's; the product waits by "
    "cudaEventSynchronize for the figures of the step before, when the next is on its way):"
)
STEPS = 2
ROWS, GAP_ROWS = 60, 20
# What makes the host wait, or tells that it does. A copy waits only if it is to pageable memory.
WAITS = (
    "cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy",
    "cudaMemcpyAsync", "aten::item", "aten::_local_scalar_dense", "aten::nonzero",
    "Memcpy DtoH (Device -> Pageable)", "Memcpy DtoH (Device -> Pinned)",
    "Memcpy HtoD (Pageable -> Device)",
)  # fmt: skip


def profile_steps(trainee: Trainee, name: str, file: str, device: torch.device) -> dict[str, Any]:
    """Profile two steps; a section with the table is appended to `file`. Returns what the record keeps."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    trainee.step()
    synchronize(device)
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(STEPS):
            trainee.step()
        synchronize(device)
    averages = profiler.key_averages()
    waits = {
        event.key: event.count / STEPS
        for event in averages
        if event.key in WAITS or event.key.startswith("Memcpy DtoH")
    }
    lines = kernel_lines(averages, device)
    gaps = gap_lines(profiler.events() or ()) if device.type == "cuda" else []
    where = _waits_by_place(trainee, device)
    text = [f"## {name}", *lines, "", *gaps, "", _WAITS_HEAD]
    text += [f"  {count:8.1f}  {key}" for key, count in sorted(waits.items())]
    text += [f"calls that torch calls synchronising, in one step: {sum(where.values())}"]
    text += [f"  {count:8d}  {place}" for place, count in where.most_common(20)]
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a", encoding="utf-8") as stream:
        stream.write("\n".join(text) + "\n\n")
    return {
        "file": file,
        "host_synchronisations_a_step": waits,
        "synchronising_calls_of_one_step": dict(where),
        "kernels": lines[:8],
        "gaps": gaps[:1],
    }


def kernel_lines(averages: Any, device: torch.device) -> list[str]:
    """The longest kernels (on a CPU: operations): milliseconds a step, share, calls a step, name."""
    wanted = DeviceType.CUDA if device.type == "cuda" else DeviceType.CPU
    attribute = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    # User annotations (compiled regions) span kernels and would count them twice.
    events = [
        (float(getattr(event, attribute)), event)
        for event in averages
        if event.device_type == wanted and not getattr(event, "is_user_annotation", False)
    ]
    events.sort(key=lambda pair: pair[0], reverse=True)
    total = sum(time for time, _ in events) or 1.0
    lines = [f"{total / 1e3 / STEPS:.2f} ms a step in {len(events)} kinds of kernels"]
    for time, event in events[:ROWS]:
        milliseconds, calls = time / 1e3 / STEPS, event.count / STEPS
        lines.append(f"{milliseconds:9.3f} ms {time / total:6.1%} {calls:7.1f}x  {event.key[:110]}")
    return lines


def gap_lines(events: Iterable[Any]) -> list[str]:
    """How long the device does nothing between two kernels, whatever their streams; and before which."""
    kernels = sorted(
        (event.time_range.start, event.time_range.end, event.key)
        for event in events
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    )
    gaps, counts, until = Counter[str](), Counter[str](), float("inf")
    for start, end, key in kernels:
        if start > until:
            gaps[key] += start - until
            counts[key] += 1
        until = end if until == float("inf") else max(until, end)
    total = sum(gaps.values())
    lines = [f"{total / 1e3 / STEPS:.2f} ms a step between {len(kernels) / STEPS:.0f} kernels, most before:"]
    for key, time in gaps.most_common(GAP_ROWS):
        lines.append(f"{time / 1e3 / STEPS:9.3f} ms {counts[key] / STEPS:7.1f}x  {key[:110]}")
    return lines


def _waits_by_place(trainee: Trainee, device: torch.device) -> Counter[str]:
    """Calls in one step that torch itself knows to make the host wait, by the line of ours that made them."""
    places: Counter[str] = Counter()
    if device.type != "cuda":
        return places

    def count(message: Any, *unused: Any, **also_unused: Any) -> None:
        if "synchroniz" in str(message):
            places[_own_line()] += 1

    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = count
        torch.cuda.set_sync_debug_mode("warn")
        try:
            trainee.step()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    return places


def _own_line() -> str:
    """The innermost lines of this package or of megatron-core on the stack."""
    frames = [
        f"{Path(frame.filename).name}:{frame.lineno} {frame.name}"
        for frame in traceback.extract_stack()
        if ("chiar_megatron" in frame.filename or "megatron" in frame.filename)
        and "bench/profile" not in frame.filename
    ]
    return " < ".join(reversed(frames[-3:])) or "torch"
