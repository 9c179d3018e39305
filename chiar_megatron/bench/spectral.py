"""`chiar bench spectral`: entropy and spectral mixing of one layer, against what memory would allow."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from chiar_megatron.bench.baselines import fft_way
from chiar_megatron.bench.checks import Checks, WrongResult
from chiar_megatron.bench.record import Report
from chiar_megatron.bench.timing import Run, Spread, copy_bandwidth, rotation, time_in_turn
from chiar_megatron.errors import ConfigError
from chiar_megatron.operators.spectral_mixing import spectral_mixing
from chiar_megatron.routing.entropy import spectral_entropy
from chiar_megatron.runtime.device import select_device
from chiar_megatron.runtime.paths import kernels_available

Outcome = tuple[Tensor | None, Tensor | None]
"""Entropies [n] and mixed tokens [n, h]; None where a way computes only the other."""

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class SpectralSettings:
    """Sizes; filled in for the device."""

    rows: int
    hidden: int
    dtype: str
    rounds: int

    @property
    def bytes(self) -> int:
        """Of the tokens."""
        return self.rows * self.hidden * _DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Way:
    """One way to compute entropies, mixed tokens, or both."""

    name: str
    compute: Callable[[Tensor, Tensor], Outcome]
    """Of tokens [n, h] and the filter [h]."""
    entropy_limit: float = 0.0
    """Largest error of an entropy against float64."""
    mixing_limit: float = 0.0
    """Relative error of mixed tokens and gradients against float64."""
    as_authors: bool = False
    """Twice the mixing, the DC power counted twice (DESIGN section 1)."""


def bench_spectral(parsed: Any) -> int:
    """Check and time every way; 0, or WrongResult."""
    device = select_device(parsed.device, 0)
    cuda = device.type == "cuda"
    settings = SpectralSettings(
        rows=parsed.rows or (32768 if cuda else 512),
        hidden=parsed.hidden or (1024 if cuda else 128),
        dtype=parsed.dtype or ("bf16" if cuda else "fp32"),
        rounds=parsed.rounds or (30 if cuda else 5),
    )
    if settings.hidden < 2:
        raise ConfigError(f"--hidden must be at least 2, not {settings.hidden}: one value has no entropy")
    report = Report("spectral", settings, device, parsed)
    generator = torch.Generator(device).manual_seed(parsed.seed)
    ways = ways_of(settings, device)
    inputs = [_inputs(settings, device, generator) for _ in range(rotation(2 * settings.bytes, device))]
    found: dict[str, dict[str, float]] = {}
    if not report.out_of_time:  # what is skipped here is skipped below too
        found = check_ways(ways, inputs[0], report.checks)
    for line in report.checks.lines():
        report.say(line)
    _time(report, settings, ways, inputs, found)
    return 0


def ways_of(settings: SpectralSettings, device: torch.device) -> list[Way]:
    """Ways that run on this device."""
    half = settings.dtype == "bf16"
    exact = 6e-3 if half else 2e-5  # bfloat16 results are rounded to 2^-9
    ways = [
        Way("authors' FFT way", lambda x, w: fft_way(x, w), 2e-5, 2 * exact, as_authors=True),
        Way("operators: entropy", lambda x, w: (spectral_entropy(x), None), 5e-6),
        Way("operators: mixing", lambda x, w: (None, spectral_mixing(x, w)), mixing_limit=exact),
        Way(
            "operators: entropy, mixing", lambda x, w: (spectral_entropy(x.detach()), spectral_mixing(x, w)),
            5e-6, exact,
        ),
    ]  # fmt: skip
    cosines = cosine_matrix(settings.hidden, device).to(_DTYPES[settings.dtype])
    rounded = (5e-4, 1.5e-2) if half else (5e-6, 2e-5)
    ways.append(
        Way("two GEMMs: mixing", lambda x, w: (None, _two_products(x, w, cosines)[1]), 0.0, rounded[1])
    )
    ways.append(
        Way("two GEMMs: entropy, mixing", lambda x, w: _entropy_and_products(x, w, cosines), *rounded)
    )
    if kernels_available(device):
        ways += _kernel_ways()
    return ways


def _kernel_ways() -> list[Way]:
    from chiar_megatron.operators.kernels import spectral

    ways = []
    for precision, entropy_limit in (("bf16", 5e-4), ("tf32", 5e-5)):
        ways += [
            Way(
                f"kernel {precision}: entropy",
                lambda x, w, p=precision: (spectral.spectral_entropy(x, 1.0, p), None),  # type: ignore[misc]
                entropy_limit,
            ),
            Way(
                f"kernel {precision}: mixing",
                lambda x, w, p=precision: (None, spectral.spectral_mixing(x, w, precision=p)),  # type: ignore[misc]
                mixing_limit=1.5e-2,
            ),
            Way(
                f"kernel {precision}: entropy and mixing",
                lambda x, w, p=precision: spectral.entropy_and_mixing(x, w, 1.0, p),  # type: ignore[misc]
                entropy_limit,
                1.5e-2,
            ),
        ]
    return ways


def cosine_matrix(hidden: int, device: torch.device) -> Tensor:
    """The orthonormal DCT-II by its formula, float64 [k, n]."""
    k, n = (torch.arange(hidden, dtype=torch.float64, device=device) for _ in range(2))
    matrix = torch.cos(math.pi / hidden * k[:, None] * (n[None, :] + 0.5)) * math.sqrt(2 / hidden)
    matrix[0] /= math.sqrt(2)
    return matrix


def _two_products(x: Tensor, w: Tensor, cosines: Tensor) -> tuple[Tensor, Tensor]:
    spectrum = x @ cosines.T
    return spectrum, (spectrum * w) @ cosines


def _entropy_and_products(x: Tensor, w: Tensor, cosines: Tensor) -> Outcome:
    spectrum, mixed = _two_products(x, w, cosines)
    return _entropy(spectrum.detach().float().square()), mixed


def _entropy(power: Tensor) -> Tensor:
    total = power.sum(-1)
    return (total.log() - torch.xlogy(power, power).sum(-1) / total) / math.log(power.shape[-1])


@dataclass(frozen=True)
class Inputs:
    """Tokens [n, h], the filter [h] and the gradient of the result [n, h]."""

    x: Tensor
    w: Tensor
    grad: Tensor


def _inputs(settings: SpectralSettings, device: torch.device, generator: torch.Generator) -> Inputs:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator)

    dtype = _DTYPES[settings.dtype]
    x, grad = (normal(settings.rows, settings.hidden).to(dtype) for _ in range(2))
    w = (1.0 + 0.3 * normal(settings.hidden)).to(dtype)
    return Inputs(x.requires_grad_(), w.requires_grad_(), grad)


def check_ways(ways: list[Way], inputs: Inputs, checks: Checks) -> dict[str, dict[str, float]]:
    """Errors of every way against float64 on all tokens; raises WrongResult.

    Returns, for ways with entropies, the largest error and the share of decisions that agree with float64
    at a threshold in the middle of the tokens' entropies.
    """
    x, w, grad = (t.detach().double() for t in (inputs.x, inputs.w, inputs.grad))
    cosines = cosine_matrix(x.shape[-1], x.device)
    spectrum, grad_spectrum = x @ cosines.T, grad @ cosines.T
    mixed = (spectrum * w) @ cosines
    wanted = [mixed, (grad_spectrum * w) @ cosines, (grad_spectrum * spectrum).sum(0)]
    found: dict[str, dict[str, float]] = {}
    for way in ways:
        entropy, y = way.compute(inputs.x, inputs.w)
        if entropy is not None:
            power = spectrum.square()
            if way.as_authors:
                power[:, 0] *= 2
            reference = _entropy(power)
            found[way.name] = _check_entropy(way, entropy.detach().double(), reference, checks)
        if y is not None:
            factor = 2.0 if way.as_authors else 1.0
            results = [y.detach(), *torch.autograd.grad(y, (inputs.x, inputs.w), inputs.grad)]
            checks.all_close(
                f"{way.name}: mixing and gradients against float64",
                results, [factor * tensor for tensor in wanted], way.mixing_limit,
            )  # fmt: skip
    return found


def _check_entropy(way: Way, entropy: Tensor, reference: Tensor, checks: Checks) -> dict[str, float]:
    if entropy.shape != reference.shape:
        raise WrongResult(f"{way.name}: entropies of shape {list(entropy.shape)}")
    error = float((entropy - reference).abs().max())
    checks.below(f"{way.name}: largest error of an entropy", error, way.entropy_limit)
    middle = reference.median()
    agree = float(((entropy > middle) == (reference > middle)).double().mean())
    return {"entropy_error_max": error, "decisions_as_float64": agree}


def _time(
    report: Report,
    settings: SpectralSettings,
    ways: list[Way],
    inputs: list[Inputs],
    found: dict[str, dict[str, float]],
) -> None:
    device, sets = report.device, len(inputs)
    bandwidth = copy_bandwidth(device)
    report.note(f"copy bandwidth {bandwidth / 1e12:.3f} TB/s, bytes read and written, measured in this run")
    floors = {
        "forward": (2 * settings.bytes / bandwidth, "one read and one write of the tokens"),
        "forward+backward": (
            5 * settings.bytes / bandwidth,
            "forward one read and one write, backward two reads (tokens, gradient) and one write",
        ),
    }
    target = torch.empty_like(inputs[0].x, requires_grad=False)
    rows = []
    for phase, (floor, counted) in floors.items():
        if report.out_of_time:
            report.note(f"{phase}: skipped, --time-limit has passed")
            continue
        runs: dict[str, Run] = {}
        if phase == "forward":
            runs["copy"] = lambda index: target.copy_(inputs[index].x.detach())
        for way in ways:
            if phase == "forward" or way.mixing_limit > 0.0:
                runs[way.name] = _run(way, phase, inputs)
        for name, spread in time_in_turn(runs, device, sets, settings.rounds).items():
            report.add(
                {
                    "name": name, "phase": phase, "time": spread.record("s"), "floor_seconds": floor,
                    "floor_counted_as": counted + " over measured copy bandwidth",
                    "times_floor": spread.median / floor, **found.get(name, {}),
                }
            )  # fmt: skip
            rows.append(_row(phase, name, spread, floor, found.get(name, {})))
    report.table(["phase", "way", "ms", "quartiles", "×floor", "error of H", "decisions as float64"], rows)


def _run(way: Way, phase: str, inputs: list[Inputs]) -> Run:
    def forward(index: int) -> object:
        with torch.no_grad():
            return way.compute(inputs[index].x, inputs[index].w)

    def both(index: int) -> object:
        given = inputs[index]
        _, y = way.compute(given.x, given.w)
        assert y is not None
        return torch.autograd.grad(y, (given.x, given.w), given.grad)

    return forward if phase == "forward" else both


def _row(phase: str, name: str, spread: Spread, floor: float, found: dict[str, float]) -> list[str]:
    return [
        phase,
        name,
        f"{spread.median * 1e3:.4f}",
        f"{spread.low * 1e3:.4f}–{spread.high * 1e3:.4f}",
        f"{spread.median / floor:.2f}",
        f"{found['entropy_error_max']:.1e}" if found else "",
        f"{found['decisions_as_float64']:.2%}" if found else "",
    ]
