"""Whether a written checkpoint is the model it was made from: every tensor, then the answers on one batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from chiar_megatron.conversion.canonical import Canonical, digest, size_of
from chiar_megatron.conversion.formats import Answer, ConvertOptions, Format
from chiar_megatron.errors import CheckpointError

LOGIT_TOLERANCE = 1e-4
ENTROPY_TOLERANCE = 1e-5  # also of the MetaRouter's gate
DECISION_MARGIN = 1e-5  # nearer to the threshold than this, rounding may decide
MAX_SLACK = 100.0
BATCH, LENGTH, SEED = 2, 64, 1234


@dataclass(frozen=True)
class Agreement:
    """Largest differences on one seeded batch, and the tokens whose route was compared."""

    tensors: int
    """Read back, their hashes equal."""
    logits: float
    entropy: float
    meta_gate: float
    tokens_routed: int
    tokens_too_near_the_threshold: int
    """Left out: their score lies within 1e-5 of where the decision changes."""
    decisions_differing: int
    slack: float
    """Factor of every tolerance, above 1 only where the source's own rounding is larger than they are."""

    def problems(self) -> list[str]:
        """What exceeds its tolerance, in words; a NaN does."""
        limits = (
            ("logits differ", self.logits, LOGIT_TOLERANCE),
            ("entropies differ", self.entropy, ENTROPY_TOLERANCE),
            ("the MetaRouter's gate differs", self.meta_gate, ENTROPY_TOLERANCE),
        )
        found = [
            f"{what} by {value:.2g} (limit {limit * self.slack:.2g})"
            for what, value, limit in limits
            if not value <= limit * self.slack
        ]
        if self.decisions_differing:
            found.append(f"{self.decisions_differing} of {self.tokens_routed} routing decisions differ")
        return found


@dataclass(frozen=True)
class Side:
    """A format and the file or folder to read by it."""

    format: Format
    path: Path


def verify(
    source: Side,
    target: Side,
    model: Canonical,
    options: ConvertOptions,
    advance: Callable[[int], None] = lambda _: None,
) -> Agreement:
    """Read the target back and compare it with the source: hashes of all tensors, then float32 logits.

    model: the source as it was written. Logits are compared with the source's decisions forced upon the
    target, and decisions apart, so that a token within rounding of the threshold spoils neither.
    Raises CheckpointError if anything differs.
    """
    changed = changed_tensors(model, target.format.read(target.path, options), advance)
    if changed:
        names = ", ".join(changed[:6])
        raise CheckpointError(
            f"what was written is not as converted when read back, nothing was kept: {names}"
        )
    ids_BS = seeded_ids(model)
    # With another precision asked for, the source's own answer is another: then what was written answers.
    side = target if options.dtype is not None else source
    own = side.format.answer(side.path, options, ids_BS)
    forced = own.light_BS
    theirs = target.format.answer(target.path, options, ids_BS, forced)
    agreement = compare(own, theirs, tensors=len(model.tensors))
    if agreement.problems():
        again = side.format.answer(side.path, options, ids_BS, forced, noisy=True)
        agreement = compare(own, theirs, rounding_slack(own, again), tensors=len(model.tensors))
    problems = agreement.problems()
    if problems:
        hint = ""
        if agreement.slack == MAX_SLACK:
            hint = "; the source's own float32 rounding is as large, so only --no-verify can keep it"
        raise CheckpointError(
            "the converted model does not answer as the source does, nothing was kept: "
            + "; ".join(problems)
            + hint
        )
    return agreement


def seeded_ids(model: Canonical) -> Tensor:
    """The batch that both sides answer, int64 `[b, s]`."""
    generator = torch.Generator().manual_seed(SEED)
    assert model.config.model.vocab_size is not None
    return torch.randint(model.config.model.vocab_size, (BATCH, LENGTH), generator=generator)


def changed_tensors(wanted: Canonical, found: Canonical, advance: Callable[[int], None]) -> list[str]:
    """Names of tensors whose values are not the same."""
    changed = [f"{name} is missing" for name in wanted.tensors.keys() - found.tensors.keys()]
    for name, tensor in wanted.tensors.items():
        other = found.tensors.get(name)
        if other is not None and digest(tensor.load()) != digest(other.load()):
            changed.append(name)
        advance(size_of(tensor))
    return changed


def compare(own: Answer, theirs: Answer, slack: float = 1.0, tensors: int = 0) -> Agreement:
    """Differences of a target's answers, given with the source's decisions forced upon it."""
    compared, differing = 0, 0
    for number, score in own.score_BS.items():
        other, border = theirs.score_BS[number], own.border.get(number)
        if border is None:
            is_clear = torch.ones_like(score, dtype=torch.bool)
            is_other = (other - score).abs() > slack * LOGIT_TOLERANCE
        else:
            is_clear = (score - border).abs() >= slack * DECISION_MARGIN
            is_other = (other > theirs.border[number]) != own.light_BS[number]
        compared += int(is_clear.sum())
        differing += int((is_other & is_clear).sum())
    routed = sum(score.numel() for score in own.score_BS.values())
    gates = (own.meta_gate, theirs.meta_gate)
    gate = 0.0 if gates[0] is None or gates[1] is None else abs(gates[0] - gates[1])
    if (gates[0] is None) != (gates[1] is None):
        gate = float("nan")
    return Agreement(
        tensors=tensors,
        logits=_largest(own.logits_BSV, theirs.logits_BSV),
        entropy=max((_largest(own.entropy_BS[n], theirs.entropy_BS[n]) for n in own.entropy_BS), default=0.0),
        meta_gate=gate,
        tokens_routed=routed,
        tokens_too_near_the_threshold=routed - compared,
        decisions_differing=differing,
        slack=slack,
    )


def rounding_slack(own: Answer, again: Answer) -> float:
    """How far rounding alone moves the source's answers, four times over, in units of the tolerances.

    Deep models with saturated attention differ from themselves in float64 by more than 1e-4.
    """
    moved = [_largest(own.logits_BSV, again.logits_BSV) / LOGIT_TOLERANCE]
    shared: Mapping[int, Tensor] = own.entropy_BS
    moved += [_largest(shared[n], again.entropy_BS[n]) / ENTROPY_TOLERANCE for n in shared]
    return min(max(1.0, 4.0 * max(moved)), MAX_SLACK)


def _largest(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).abs().max())
