"""A wrong result is not timed: comparison with a reference, by ‖result - reference‖ / ‖reference‖."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


class WrongResult(Exception):
    """What was to be timed disagrees with its reference; the message has the measured error."""


class Checks:
    """Errors measured so far, for the record."""

    def __init__(self) -> None:
        self.measured: list[dict[str, Any]] = []

    def close(self, what: str, result: Tensor, reference: Tensor, limit: float) -> float:
        """The relative error of `result`; raises WrongResult if it is above `limit` or not a number."""
        if result.shape != reference.shape:
            raise WrongResult(
                f"{what}: shape {list(result.shape)}, but the reference has {list(reference.shape)}"
            )
        return self.below(what, relative_error(result, reference), limit)

    def all_close(
        self, what: str, results: Sequence[Tensor], references: Sequence[Tensor], limit: float
    ) -> float:
        """The largest relative error of several tensors (an output and its gradients)."""
        if len(results) != len(references):
            raise WrongResult(f"{what}: {len(results)} tensors for {len(references)} references")
        error = max(relative_error(a, b) for a, b in zip(results, references, strict=True))
        return self.below(what, error, limit)

    def below(self, what: str, error: float, limit: float) -> float:
        """Keep a measured error; raises WrongResult if it is above `limit` or not a number."""
        # JSON knows no infinity.
        self.measured.append({"what": what, "error": error if math.isfinite(error) else None, "limit": limit})
        if not error <= limit:
            raise WrongResult(f"{what}: error {error:.3g} against the reference is above {limit:g}")
        return error

    def lines(self, first: int = 0) -> Iterable[str]:
        """What was found since the measurement of number `first`, one line each."""
        return (
            f"checked {c['what']}: error {c['error']:.1e} (limit {c['limit']:g})"
            for c in self.measured[first:]
        )

    def summary(self, first: int) -> str:
        """The same in one line: how many, and the one nearest to its limit."""
        found = self.measured[first:]
        worst = max(found, key=lambda c: float(c["error"]) / float(c["limit"]))
        return (
            f"{len(found)} comparisons with the reference hold; nearest to its limit: {worst['what']}: "
            f"error {worst['error']:.1e} (limit {worst['limit']:g})"
        )


def relative_error(result: Tensor, reference: Tensor) -> float:
    """‖result - reference‖ / ‖reference‖ in float64; infinite where either is not finite."""
    with torch.no_grad():
        result, reference = result.double(), reference.double().to(result.device)
        difference, norm = float((result - reference).norm()), float(reference.norm())
    if not (math.isfinite(difference) and math.isfinite(norm)):
        return math.inf
    if norm == 0.0:
        return 0.0 if difference == 0.0 else math.inf
    return difference / norm
