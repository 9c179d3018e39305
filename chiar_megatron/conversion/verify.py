"""Whether a written checkpoint is the model it was made from: every tensor, then the answers on one batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from chiar_megatron.conversion.reference import ReferenceCheckpoint, entropy_offset
from chiar_megatron.conversion.reference_forward import ReferenceAnswer, reference_forward
from chiar_megatron.errors import CheckpointError
from chiar_megatron.inference.load import InferenceModel, load_model
from chiar_megatron.operators.context import ForwardContext

LOGIT_TOLERANCE = 1e-4
ENTROPY_TOLERANCE = 1e-5  # also of the MetaRouter's gate
DECISION_MARGIN = 1e-5  # nearer to the threshold than this, rounding may decide
MAX_SLACK = 100.0
BATCH, LENGTH, SEED = 2, 64, 1234


@dataclass(frozen=True)
class Agreement:
    """Largest differences on one seeded batch, and the tokens whose route was compared."""

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


def verify_native(folder: Path, checkpoint: ReferenceCheckpoint) -> Agreement:
    """Load the checkpoint as a user would, in float32 on the CPU, and compare it with the authors' model.

    Logits are compared with the authors' decisions forced upon ours, and decisions apart, so that a token
    within rounding of the threshold spoils neither. Raises CheckpointError if anything differs.
    """
    model = load_model(folder, device="cpu", precision="fp32")
    changed = _changed_tensors(checkpoint.native_tensors(), model)
    if changed:
        raise CheckpointError(f"{folder}: not as converted when read back: {', '.join(changed[:6])}")
    generator = torch.Generator().manual_seed(SEED)
    ids_BS = torch.randint(checkpoint.sizes.vocab, (BATCH, LENGTH), generator=generator)
    agreement = compare(model, checkpoint, ids_BS)
    if agreement.problems():
        agreement = compare(model, checkpoint, ids_BS, _rounding_slack(checkpoint, ids_BS))
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


@torch.no_grad()
def compare(
    model: InferenceModel, checkpoint: ReferenceCheckpoint, ids_BS: Tensor, slack: float = 1.0
) -> Agreement:
    """Differences between a loaded model and the authors' on int64 ids `[b, s]`, both in float32."""
    theirs = reference_forward(checkpoint, ids_BS)
    scores_SB: dict[int, Tensor] = {}
    entropies_SB: dict[int, Tensor] = {}
    context = ForwardContext(
        tokens_BS=ids_BS,
        forced_light_SB={number: light.T for number, light in theirs.light_BS.items()},
        recorded_score_SB=scores_SB,
        recorded_entropy_SB=entropies_SB,
    )
    logits_BSV = model(ids_BS, context=context)
    offset = entropy_offset(checkpoint.sizes.hidden)
    entropy = [_largest(entropies_SB[number].T - offset, own) for number, own in theirs.entropy_BS.items()]
    compared = {number: margin >= slack * DECISION_MARGIN for number, margin in theirs.margin_BS.items()}
    differing = [
        ((scores_SB[number].T > _border(model, number)) != light)[compared[number]]
        for number, light in theirs.light_BS.items()
    ]
    return Agreement(
        logits=_largest(logits_BSV, theirs.logits_BSV),
        entropy=max(entropy, default=0.0),
        meta_gate=_gate_difference(model, theirs),
        tokens_routed=sum(light.numel() for light in theirs.light_BS.values()),
        tokens_too_near_the_threshold=sum(int((~mask).sum()) for mask in compared.values()),
        decisions_differing=sum(int(different.sum()) for different in differing),
        slack=slack,
    )


def _rounding_slack(checkpoint: ReferenceCheckpoint, ids_BS: Tensor) -> float:
    """How far rounding alone moves the source's answers, four times over, in units of the tolerances.

    Deep models with saturated attention differ from themselves in float64 by more than 1e-4.
    """
    single = reference_forward(checkpoint, ids_BS)
    double = reference_forward(checkpoint, ids_BS, torch.float64, single.light_BS)
    moved = [_largest(single.logits_BSV, double.logits_BSV) / LOGIT_TOLERANCE]
    moved += [
        _largest(single.entropy_BS[number], exact) / ENTROPY_TOLERANCE
        for number, exact in double.entropy_BS.items()
    ]
    return min(max(1.0, 4.0 * max(moved)), MAX_SLACK)


def _changed_tensors(written: Mapping[str, Tensor], model: InferenceModel) -> list[str]:
    found = dict(model.module.named_parameters())
    # Ours may have more rows, which pad the vocabulary.
    return [name for name, tensor in written.items() if not torch.equal(tensor, found[name][: len(tensor)])]


def _border(model: InferenceModel, number: int) -> float:
    """The score above which the converted model's layer (from 1) attends; a hard router's is a weight."""
    router = model.module.chiar_layers[number - 1].router
    assert router is not None
    return float(router.threshold) if router.config.kind == "entropy" else 0.5


def _gate_difference(model: InferenceModel, theirs: ReferenceAnswer) -> float:
    if theirs.meta_gate is None:
        return 0.0
    meta_router = model.module.chiar_layers[0].meta_router
    assert meta_router is not None
    return abs(float(meta_router.last_gate) - theirs.meta_gate)


def _largest(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max())
