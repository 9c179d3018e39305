"""`chiar bench step`: whole training steps of the twin, the routed model and a plain GPT, in one process."""

from __future__ import annotations

import gc
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from chiar_megatron.bench.checks import WrongResult
from chiar_megatron.bench.profile import profile_steps
from chiar_megatron.bench.record import Report
from chiar_megatron.bench.step_check import check_plain, check_product
from chiar_megatron.bench.step_config import Side, StepSettings, sides_of, twin_config
from chiar_megatron.bench.step_sides import (
    PlainSettings,
    PlainTrainee,
    Product,
    RandomStream,
    Trainee,
    flops_per_token,
)
from chiar_megatron.bench.timing import Spread, matmul_rate, synchronize
from chiar_megatron.data.dataset import TokenStream, build_streams
from chiar_megatron.metrics.meters import DevicePeak, device_peak, mfu
from chiar_megatron.runtime.distributed import World, shutdown, single_process_world

BLOCK = 5  # steps between two waits for the device, so that what overlaps counts
_RANDOM_STEPS = 16  # steps before random text repeats


def bench_step(parsed: Any) -> int:
    """Measure every side; the record is written after each. Returns 0, or 1 if a side failed or is wrong."""
    started_here = not dist.is_initialized()
    world = single_process_world(parsed.device)
    try:
        settings = StepSettings.of(parsed, world.device)
        report = Report(f"step_T{settings.seq_length}", settings, world.device, parsed)
        bench = StepBench(settings, world, report)
        bench.run()
        return 1 if report.failed else 0
    finally:
        if started_here:
            shutdown()


class StepBench:
    """One run of the benchmark."""

    def __init__(self, settings: StepSettings, world: World, report: Report) -> None:
        self.settings, self.world, self.report = settings, world, report
        self.device = world.device
        self.rate: float | None = None
        self.peak: DevicePeak | None = None

    def run(self) -> None:
        """Check and time every side in turn."""
        settings, report = self.settings, self.report
        sides = sides_of(settings, self.world.size)
        stream = self._stream()
        self._say_conditions()
        self._measure_ceiling()
        for side in sides:
            if report.out_of_time:
                report.note(f"{side.name}: skipped, --time-limit has passed")
                report.add({"name": side.name, "skipped": "time limit"})
                continue
            report.add(self._guarded(side, stream))
            # Traces of the failed or finished side hold its memory.
            left = free_memory(self.device)
            if left > 64 << 20:
                report.note(f"{left / 2**20:.0f} MiB are still allocated after {side.name}")
        add_ratios(report.results)
        report.table(*table(report.results))

    def _say_conditions(self) -> None:
        settings, report = self.settings, self.report
        if settings.data is None:
            report.note("text: random token ids by Zipf's law from a fixed generator, the same for all sides")
        else:
            report.note(f"text: {settings.data}")
        report.note(
            f"{settings.tokens_per_step} tokens a step in micro-batches of {settings.micro_batch_size} "
            f"sequences of {settings.seq_length}, {settings.precision}, dropout 0, optimizer included; "
            f"blocks of {BLOCK} steps by the clock, the device waited for at both ends"
        )
        report.note("MFU counts useful causal FLOPs of the product's ledger, DCTs as FFTs")

    def _measure_ceiling(self) -> None:
        dtype = torch.bfloat16 if self.settings.precision == "bf16" else torch.float32
        self.rate = matmul_rate(self.device, dtype)
        free_memory(self.device)
        self.report.note(
            f"floor: the same FLOPs at {self.rate / 1e12:.3g} TFLOP/s, a large {self.settings.precision} "
            "matrix product measured here in this run"
        )
        if self.device.type == "cuda":
            self.peak = device_peak(torch.cuda.get_device_name(self.device))
        if self.peak is not None:
            self.report.note(f"MFU's denominator: {self.peak}")

    def _stream(self) -> TokenStream:
        settings = self.settings
        config = twin_config(settings, self.world.size)
        samples = config.training.global_batch_size
        if settings.data is None:
            assert config.model.vocab_size is not None
            vocab = config.model.vocab_size
            return RandomStream(vocab, settings.seq_length, _RANDOM_STEPS * samples, settings.seed)
        steps = max(settings.warmup, settings.routed_warmup) + settings.steps + 16
        with tempfile.TemporaryDirectory() as folder:
            config = replace(
                config,
                data=replace(config.data, cache_dir=folder),
                training=replace(config.training, steps=steps),
            )
            train = build_streams(config).train
        assert train is not None
        return train

    def _guarded(self, side: Side, stream: TokenStream) -> dict[str, Any]:
        """A side's result; what it raises becomes one, and the other sides are still measured."""
        try:
            return self._measure(side, stream)
        except WrongResult as error:
            self.report.failed = True
            self.report.note(f"WRONG, not timed: {error}")
            return {"name": side.name, "failed": "wrong result", "error": str(error)}
        except torch.OutOfMemoryError as error:
            self.report.note(f"{side.name}: out of memory: {str(error).splitlines()[0]}")
            return {"name": side.name, "failed": "out of memory", "error": str(error)}
        except Exception as error:
            self.report.failed = True
            self.report.say(traceback.format_exc())
            self.report.note(f"{side.name}: failed: {type(error).__name__}: {str(error)[:300]}")
            return {"name": side.name, "failed": type(error).__name__, "error": traceback.format_exc()}

    def _measure(self, side: Side, stream: TokenStream) -> dict[str, Any]:
        settings, report = self.settings, self.report
        if settings.check and side.name != "twin again":
            self._check(side)
        free_memory(self.device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        report.say(f"{side.name}: building")
        precision = torch.get_float32_matmul_precision()
        if side.kind == "nanogpt":
            torch.set_float32_matmul_precision("high")  # as nanoGPT's users do
        try:
            trainee = self._build(side, stream)
            warmup = self._warm_up(trainee, side)
            seconds = self._time_blocks(trainee)
            result = self._result(side, trainee, seconds) | warmup
            if settings.profile is not None:
                result["profile"] = profile_steps(trainee, side.name, settings.profile, self.device)
                report.say(f"{side.name}: profile {result['profile']['host_synchronisations_a_step']}")
        finally:
            torch.set_float32_matmul_precision(precision)
        return result

    def _check(self, side: Side) -> None:
        report, before = self.report, len(self.report.checks.measured)
        compiled = self.settings.check_compiled
        if side.kind == "nanogpt":
            settings = self._plain(side)
            settings = replace(settings, compiled=settings.compiled and compiled)
            check_plain(settings, side.config, self.device, report.checks)
        else:
            check_product(side.name, side.config, self.world, report.checks, compiled)
        report.say(f"{side.name}: {report.checks.summary(before)}")

    def _plain(self, side: Side) -> PlainSettings:
        compiled = {"yes": True, "no": False}.get(self.settings.compile, self.device.type == "cuda")
        return PlainSettings.beside(side.config, compiled, cudnn=side.name == "nanogpt-cudnn")

    def _build(self, side: Side, stream: TokenStream) -> Trainee:
        if side.kind == "nanogpt":
            return PlainTrainee(self._plain(side), side.config, self.device, stream)
        return Product(side.config, self.world, stream)

    def _warm_up(self, trainee: Trainee, side: Side) -> dict[str, Any]:
        started = time.perf_counter()
        first = 0.0
        for number in range(max(1, side.warmup)):
            trainee.step()
            if number == 0:
                synchronize(self.device)
                first = time.perf_counter() - started
                self.report.say(f"{side.name}: first step after {first:.1f} s (compilation included)")
        synchronize(self.device)
        return {"first_step_seconds": first, "warmup_seconds": time.perf_counter() - started}

    def _time_blocks(self, trainee: Trainee) -> list[float]:
        """Seconds a step, of every block."""
        trainee.forget()
        seconds: list[float] = []
        left = self.settings.steps
        while left > 0 and not (seconds and self.report.out_of_time):
            block = min(BLOCK, left)
            synchronize(self.device)
            started = time.perf_counter()
            for _ in range(block):
                trainee.step()
            synchronize(self.device)
            seconds.append((time.perf_counter() - started) / block)
            left -= block
        if left > 0:
            self.report.note(f"{left} of {self.settings.steps} steps left out: --time-limit has passed")
        return seconds

    def _result(self, side: Side, trainee: Trainee, seconds: Sequence[float]) -> dict[str, Any]:
        spread = Spread.of(list(seconds))
        tokens = spread.inverse(self.settings.tokens_per_step)
        result: dict[str, Any] = {
            "name": side.name,
            "tokens_per_second": tokens.record("tokens/s"),
            "step_seconds": spread.record("s"),
            "parameters": trainee.parameters,
            **trainee.seen(),
        }
        if self.device.type == "cuda":
            # From the first step on: what a replayed graph uses was counted while it was recorded.
            result["peak_memory_bytes"] = torch.cuda.max_memory_allocated(self.device)
        model = side.config.model
        if side.kind == "nanogpt":
            model = self._plain(side).counted_as(model)
        share = 1.0
        if "rows" in result:
            share = result["rows"]["useful"] / result["rows"]["tokens"]
        flops = flops_per_token(model, share)
        result["useful_flops_per_token"] = flops
        if self.rate is not None:
            result["floor_tokens_per_second"] = self.rate / flops
            result["share_of_measured_matmul_rate"] = mfu(flops, tokens.median, 1, self.rate)
        if self.peak is not None:
            result["mfu"] = mfu(flops, tokens.median, 1, self.peak.flops)
            result["mfu_denominator"] = str(self.peak)
        self.report.say(f"{side.name}: {tokens.median:,.0f} tokens/s")
        return result


def free_memory(device: torch.device) -> int:
    """Let go of what earlier sides held, compiled code too; bytes still allocated."""
    if "torch._dynamo" in sys.modules:  # importing it takes seconds
        torch._dynamo.reset()
    gc.collect()
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated(device)


def add_ratios(results: list[dict[str, Any]]) -> None:
    """Each side over the twin (the faster of its runs) and over the plain GPT, by median tokens/s."""
    for key, names in (("ratio_to_twin", ("twin", "twin again")), ("ratio_to_nanogpt", ("nanogpt",))):
        medians = [_tokens(result) for result in results if result["name"] in names]
        base = max((median for median in medians if median is not None), default=None)
        for result in results:
            own = _tokens(result)
            if base is not None and own is not None:
                result[key] = own / base


def _tokens(result: dict[str, Any]) -> float | None:
    timed = result.get("tokens_per_second")
    return None if timed is None else float(timed["median"])


def table(results: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """The last words: header and rows."""
    header = [
        "side", "tokens/s", "quartiles", "MFU", "of floor", "peak GiB", "routed", "rows exec/useful/over",
        "×twin", "×nanogpt",
    ]  # fmt: skip
    return header, [_row(result, len(header)) for result in results]


def _row(result: dict[str, Any], width: int) -> list[str]:
    timed, rows = result.get("tokens_per_second"), result.get("rows")
    if timed is None:
        reason = result.get("failed") or result.get("skipped") or "?"
        return [result["name"], str(reason), *[""] * (width - 2)]

    def shown(key: str, form: Callable[[float], str]) -> str:
        value = result.get(key)
        return "" if value is None else form(value)

    return [
        result["name"],
        f"{timed['median']:,.0f}",
        f"{timed['quartile_low']:,.0f}–{timed['quartile_high']:,.0f}",
        shown("mfu", "{:.1%}".format),
        shown("share_of_measured_matmul_rate", "{:.1%}".format),
        shown("peak_memory_bytes", lambda value: f"{value / 2**30:.1f}"),
        shown("routed_fraction", "{:.4f}".format),
        "" if rows is None else f"{rows['executed']:.0f}/{rows['useful']:.0f}/{rows['overflowed']:.0f}",
        shown("ratio_to_twin", "{:.3f}".format),
        shown("ratio_to_nanogpt", "{:.3f}".format),
    ]
