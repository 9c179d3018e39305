"""The routers: each turns a routed layer's input into a `RouteDecision`.

Scores are float32 whatever the model's precision, per token, and blind to other tokens: selection at
evaluation and in generation is causal by construction (DESIGN, decision 4).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from chiar_megatron.config.schema import RouterConfig
from chiar_megatron.operators.context import ForwardContext, sequence_shard
from chiar_megatron.operators.linear import Float32Linear, normalised_score
from chiar_megatron.operators.rows import as_rows, from_rows
from chiar_megatron.routing.balance import ThresholdController
from chiar_megatron.routing.decision import ATTENTION, RBF, SPECTRAL, RouteDecision
from chiar_megatron.routing.entropy import spectral_entropy, token_entropy
from chiar_megatron.runtime.device import current_device

_BLENDING = ("soft", "hard")
_GATED = ("learned", "entropy_gated")


class Router(torch.nn.Module, ABC):
    """Base: holds the threshold τ, a float32 buffer of shape `[]` that belongs to the checkpoint."""

    threshold: Tensor

    def __init__(self, config: RouterConfig, hidden_size: int, layer_number: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.hidden_size = hidden_size
        self.layer_number = layer_number
        self.register_buffer(
            "threshold", torch.tensor(config.threshold or 0.0, dtype=torch.float32, device=current_device())
        )
        self.controller = None
        if config.target is not None and config.kind not in _BLENDING:
            self.controller = ThresholdController()

    def forward(self, x_SBH: Tensor, context: ForwardContext, shard: tuple[int, int]) -> RouteDecision:
        """Decide for this rank's tokens; `shard` is (rank, size) of the split along the sequence.

        A decision forced by the context replaces the router's choice, not its scores or gates.
        """
        decision = self.decide(x_SBH, context, shard)
        if context.recorded_score_SB is not None:
            context.recorded_score_SB[self.layer_number] = decision.score_SB.detach()
        if context.recorded_entropy_SB is not None and decision.entropy_SB is not None:
            context.recorded_entropy_SB[self.layer_number] = decision.entropy_SB
        # Asked in this order so that a compiled layer reads its number only where it must.
        if context.forced_light_SB is not None and self.layer_number in context.forced_light_SB:
            forced_SB = context.forced_light_SB[self.layer_number]
            decision = self.force(decision, sequence_shard(forced_SB, *shard))
        if context.recorded_light_SB is not None:
            context.recorded_light_SB[self.layer_number] = decision.light_SB
        return decision

    @abstractmethod
    def decide(self, x_SBH: Tensor, context: ForwardContext, shard: tuple[int, int]) -> RouteDecision:
        """The router's own choice."""

    def force(self, decision: RouteDecision, light_SB: Tensor) -> RouteDecision:
        """The same decision with another choice of operator."""
        return RouteDecision(light_SB, decision.score_SB, decision.entropy_SB, decision.gate_SB)


class EntropyRouter(Router):
    """`entropy` (paper): attention iff H(x) > τ. `entropy_gated`: the same, its output times 2σ(s(x))."""

    def __init__(self, config: RouterConfig, hidden_size: int, layer_number: int, dtype: torch.dtype) -> None:
        super().__init__(config, hidden_size, layer_number, dtype)
        self.gate_score = LinearScore(hidden_size, dtype) if config.kind == "entropy_gated" else None

    def decide(self, x_SBH: Tensor, context: ForwardContext, shard: tuple[int, int]) -> RouteDecision:
        """See the class."""
        with torch.no_grad():  # a threshold passes no gradient
            entropy_SB = token_entropy(x_SBH, self.config.dc_power_weight)
        gate_SB = None if self.gate_score is None else 2.0 * torch.sigmoid(self.gate_score(x_SBH))
        return RouteDecision(entropy_SB > self.threshold, entropy_SB, entropy_SB, gate_SB)


class LearnedRouter(Router):
    """Attention iff s(x) > τ; attention's output times 2σ(s(x)), so that the score is trained."""

    def __init__(self, config: RouterConfig, hidden_size: int, layer_number: int, dtype: torch.dtype) -> None:
        super().__init__(config, hidden_size, layer_number, dtype)
        self.score = LinearScore(hidden_size, dtype)

    def decide(self, x_SBH: Tensor, context: ForwardContext, shard: tuple[int, int]) -> RouteDecision:
        """See the class."""
        score_SB = self.score(x_SBH)
        detached_SB = score_SB.detach()
        return RouteDecision(detached_SB > self.threshold, detached_SB, gate_SB=2.0 * torch.sigmoid(score_SB))


class BlendRouter(Router):
    """`soft` and `hard` (paper): g = softmax(Linear([x; H])) over the operators.

    soft blends every operator's output by g; hard takes the largest, straight-through to the softmax.
    """

    def __init__(self, config: RouterConfig, hidden_size: int, layer_number: int, dtype: torch.dtype) -> None:
        super().__init__(config, hidden_size, layer_number, dtype)
        operators = 1 + (RBF if config.operators == "spectral_attention_rbf" else ATTENTION)
        self.gate_proj = Float32Linear(hidden_size + 1, operators, dtype)

    def decide(self, x_SBH: Tensor, context: ForwardContext, shard: tuple[int, int]) -> RouteDecision:
        """See the class."""
        x_SBH = x_SBH.float()
        entropy_SB = spectral_entropy(x_SBH, self.config.dc_power_weight)
        logits_SBO = self.gate_proj(torch.cat((x_SBH, entropy_SB[..., None]), dim=-1))
        weights_SBO = torch.softmax(logits_SBO, dim=-1)
        choice_SB = weights_SBO.argmax(dim=-1)
        score_SB = weights_SBO[..., ATTENTION].detach()
        if self.config.kind == "hard":
            if not self.training and not torch.is_grad_enabled() and weights_SBO.shape[-1] == RBF:
                # Nothing to train: a choice between two operators, each computed for its tokens alone.
                return RouteDecision(choice_SB == ATTENTION, score_SB, entropy_SB)
            weights_SBO = straight_through(choice_SB, weights_SBO)
        return RouteDecision(choice_SB == ATTENTION, score_SB, entropy_SB.detach(), weights_SBO=weights_SBO)

    def force(self, decision: RouteDecision, light_SB: Tensor) -> RouteDecision:
        """`hard` takes the forced operator (attention or spectral); `soft` has no choice to force."""
        weights_SBO = decision.weights_SBO
        if weights_SBO is None:
            return super().force(decision, light_SB)
        if self.config.kind == "hard":
            own_SB = decision.light_SB
            forced_SB = torch.where(light_SB, ATTENTION, SPECTRAL)
            keep_SB = own_SB == light_SB
            choice_SB = torch.where(keep_SB, weights_SBO.argmax(dim=-1), forced_SB)
            weights_SBO = straight_through(choice_SB, weights_SBO)
        else:
            light_SB = decision.light_SB
        return RouteDecision(light_SB, decision.score_SB, decision.entropy_SB, weights_SBO=weights_SBO)


class RandomRouter(Router):
    """The chance baseline: attention iff a hash of (layer, position, token id) in [0, 1) is above τ.

    A hash rather than a generator, so that the choice depends neither on layout nor on batch, and is
    the same in training, evaluation and cached generation.
    """

    def __init__(self, config: RouterConfig, hidden_size: int, layer_number: int, dtype: torch.dtype) -> None:
        super().__init__(config, hidden_size, layer_number, dtype)
        # A tensor, so that all layers run the same compiled code.
        self.salt = torch.tensor(layer_number * 104_729, device=current_device())

    def decide(self, x_SBH: Tensor, context: ForwardContext, shard: tuple[int, int]) -> RouteDecision:
        """See the class."""
        assert context.tokens_BS is not None, "the random router needs token ids"
        tokens_SB = context.tokens_BS.transpose(0, 1)
        positions_S1 = torch.arange(tokens_SB.shape[0], device=tokens_SB.device)[:, None]
        score_SB = hash_to_unit(
            (positions_S1 + context.position_offset) * 1_000_003 + tokens_SB * 7_919 + self.salt
        )
        score_SB = sequence_shard(score_SB, *shard)
        return RouteDecision(score_SB > self.threshold, score_SB)


class LinearScore(torch.nn.Module):
    """s(x) = Linear(x / rms(x)), float32 `[..., h]` -> `[...]`: blind to the residual stream's growth."""

    def __init__(self, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear = Float32Linear(hidden_size, 1, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """float32 scores."""
        weight_H, bias = self.linear.weight.squeeze(0), self.linear.bias.squeeze(0)
        if x.dim() != 3:
            return normalised_score(x, weight_H, bias)
        rows_NH, swapped = as_rows(x)  # in the order that tokens have in memory
        return from_rows(normalised_score(rows_NH, weight_H, bias), x, swapped)


def build_router(
    config: RouterConfig, hidden_size: int, layer_number: int, dtype: torch.dtype = torch.float32
) -> Router:
    """The router of one routed layer, its parameters in `dtype`."""
    if config.kind in _BLENDING:
        return BlendRouter(config, hidden_size, layer_number, dtype)
    if config.kind == "learned":
        return LearnedRouter(config, hidden_size, layer_number, dtype)
    if config.kind == "random":
        return RandomRouter(config, hidden_size, layer_number, dtype)
    return EntropyRouter(config, hidden_size, layer_number, dtype)


def blend_entropy(weights_SBO: Tensor, sum_over_shards: Callable[[Tensor], Tensor]) -> Tensor:
    """U = -Σ q ln q, q the gate vector averaged over batch and time of one micro-batch (paper's collapse
    regulariser); `sum_over_shards` adds up what the parts of one sequence hold."""
    total_O = sum_over_shards(weights_SBO.sum(dim=(0, 1)))
    q_O = total_O / total_O.detach().sum()  # weights of a token sum to 1, so this counts tokens
    entropy: Tensor = -torch.special.xlogy(q_O, q_O).sum()
    return entropy


def straight_through(choice_SB: Tensor, weights_SBO: Tensor) -> Tensor:
    """The one-hot of a choice, with the gradient of the weights it was taken from."""
    one_hot = F.one_hot(choice_SB, weights_SBO.shape[-1]).to(weights_SBO.dtype)
    return one_hot + weights_SBO - weights_SBO.detach()


def hash_to_unit(numbers: Tensor) -> Tensor:
    """SplitMix64's finaliser (Steele et al., 2014) on int64, to float32 in [0, 1)."""
    z = numbers * -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed number
    z = (z ^ _shift_right(z, 30)) * -4658895280553007687
    z = (z ^ _shift_right(z, 27)) * -7723592293110705685
    z = z ^ _shift_right(z, 31)
    return _shift_right(z, 40).float() / float(1 << 24)


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """Logical, where torch's own shift of a negative number carries the sign along."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
