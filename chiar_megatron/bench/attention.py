"""`chiar bench attention`: torch's full causal attention beside attention of light queries only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from chiar_megatron.bench.attention_cases import Case, Shape, check_case, full_cases, routed_cases
from chiar_megatron.bench.record import Report
from chiar_megatron.bench.timing import Run, Spread, matmul_rate, rotation, time_in_turn
from chiar_megatron.config.schema import RouterConfig
from chiar_megatron.errors import ConfigError
from chiar_megatron.runtime.device import select_device

HEADER = ("T", "way", "phase", "ms", "quartiles", "rows exec/useful", "×floor", "×full")
# Products of scores' size: QKᵀ and PV; backward those of dV, dP, dQ, dK and QKᵀ once more.
PRODUCTS = {"forward": 2, "forward+backward": 7}
_CHECKED_LENGTH = {"cuda": 1024, "cpu": 128}


@dataclass(frozen=True)
class AttentionSettings:
    """Sizes; filled in for the device."""

    seq_lengths: tuple[int, ...]
    tokens: int
    rhos: tuple[float, ...]
    heads: int
    groups: int
    head_size: int
    rounds: int
    dtype: str
    seed: int
    flex: bool

    def shape(self, length: int, tokens: int, device: torch.device) -> Shape:
        """A batch of `tokens` in sequences of `length`."""
        return Shape(
            batch=tokens // length,
            length=length,
            heads=self.heads,
            groups=self.groups,
            head_size=self.head_size,
            dtype=torch.bfloat16 if self.dtype == "bf16" else torch.float32,
            generator=torch.Generator(device).manual_seed(self.seed),
            with_flex=self.flex,
        )


def bench_attention(parsed: Any) -> int:
    """Check and time every way at every length; 0, or WrongResult."""
    device = select_device(parsed.device, 0)
    settings = _settings(parsed, device)
    report = Report("attention", settings, device, parsed)
    rate = matmul_rate(device, torch.bfloat16 if settings.dtype == "bf16" else torch.float32)
    report.note(
        "floor: products of useful causal scores (2 forward, 5 more backward), padding rows not counted, at "
        f"{rate / 1e12:.3g} TFLOP/s, a large matrix product measured in this run"
    )
    for length in sorted({min(length, _CHECKED_LENGTH[device.type]) for length in settings.seq_lengths}):
        if not report.out_of_time:  # what is skipped here is skipped below too
            _check(settings, length, report)
    table: list[list[str]] = []
    for length in settings.seq_lengths:
        if report.out_of_time:
            report.note(f"T={length}: skipped, --time-limit has passed")
            continue
        table += _time(settings, length, report, rate)
    report.table(HEADER, table)
    return 0


def _settings(parsed: Any, device: torch.device) -> AttentionSettings:
    cuda = device.type == "cuda"
    heads = parsed.heads or (16 if cuda else 4)
    settings = AttentionSettings(
        seq_lengths=parsed.seq_length or ((2048, 8192) if cuda else (128,)),
        tokens=parsed.tokens or (32768 if cuda else 256),
        rhos=tuple(parsed.rho),
        heads=heads,
        groups=parsed.groups or heads,
        head_size=parsed.head_size,
        rounds=parsed.rounds or (20 if cuda else 3),
        dtype="bf16" if cuda else "fp32",
        seed=parsed.seed,
        flex=parsed.flex,
    )
    if settings.heads % settings.groups:
        raise ConfigError(f"--groups: {settings.groups} does not divide --heads {settings.heads}")
    for length in settings.seq_lengths:
        if settings.tokens % length:
            raise ConfigError(f"--tokens: {settings.tokens} is no multiple of --seq-length {length}")
    return settings


def _check(settings: AttentionSettings, length: int, report: Report) -> None:
    """On two sequences, cut short because the scores are written out in float64."""
    shape = settings.shape(length, 2 * length, report.device)
    cases = full_cases(shape, 1, lambda text: None)
    for rho in settings.rhos:
        cases += routed_cases(shape, rho, 1, lambda text: None)
    before = len(report.checks.measured)
    for case in cases:
        check_case(case, f"2×{length} tokens", report.checks)
    for line in report.checks.lines(before):
        report.say(line)


def _time(settings: AttentionSettings, length: int, report: Report, rate: float) -> list[list[str]]:
    shape = settings.shape(length, settings.tokens, report.device)
    sets = rotation(shape.bytes, report.device)
    cases = full_cases(shape, sets, report.note)
    for rho in settings.rhos:
        cases += routed_cases(shape, rho, sets, report.note)
    table = []
    for phase in PRODUCTS:
        runs = {case.name: _run(case, phase) for case in cases}
        timed = time_in_turn(runs, report.device, sets, settings.rounds)
        base = "full cuDNN" if "full cuDNN" in timed else "full torch's choice"
        for case in cases:
            result = _result(case, shape, phase, timed[case.name], rate)
            result |= {"ratio_to_full": timed[case.name].median / timed[base].median, "full_is": base}
            report.add(result)
            table.append(_row(result))
    return table


def _result(case: Case, shape: Shape, phase: str, spread: Spread, rate: float) -> dict[str, Any]:
    useful = shape.tokens if case.rows is None else case.rows.useful
    executed = shape.tokens if case.rows is None else len(case.rows.last_R)
    pairs = useful * (shape.length + 1) / 2  # light queries lie evenly over the sequence
    flops = PRODUCTS[phase] * 2.0 * pairs * shape.heads * shape.head_size
    return {
        "name": case.name,
        "seq_length": shape.length,
        "rho": case.rho,
        "phase": phase,
        "time": spread.record("s"),
        "rows": {"executed": executed, "useful": useful},
        "slack": None if case.rows is None else RouterConfig().slack,
        "useful_flops": flops,
        "floor_seconds": flops / rate,
        "floor_counted_as": f"{PRODUCTS[phase]} products of useful causal scores at the measured rate",
        "times_floor": spread.median * rate / flops,
    }


def _row(result: dict[str, Any]) -> list[str]:
    time, rows = result["time"], result["rows"]
    return [
        str(result["seq_length"]),
        result["name"],
        result["phase"],
        f"{time['median'] * 1e3:.3f}",
        f"{time['quartile_low'] * 1e3:.3f}–{time['quartile_high'] * 1e3:.3f}",
        f"{rows['executed']}/{rows['useful']}",
        f"{result['times_floor']:.2f}",
        f"{result['ratio_to_full']:.3f}",
    ]


def _run(case: Case, phase: str) -> Run:
    def forward(index: int) -> object:
        with torch.no_grad():
            return case.compute(*case.inputs[index])

    def both(index: int) -> object:
        out = case.compute(*case.inputs[index])
        return torch.autograd.grad(out, case.inputs[index], case.grads[index])

    return forward if phase == "forward" else both
