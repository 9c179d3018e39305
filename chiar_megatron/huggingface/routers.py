"""Routers and MetaRouter of the `transformers` model: the same decisions in plain PyTorch.

Scores are float32 whatever the model's precision. Shapes: b batch, s sequence, h hidden, o operators.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chiar_megatron.huggingface.configuration import ChiarConfig
from chiar_megatron.routing.entropy import spectral_entropy
from chiar_megatron.routing.router import hash_to_unit, straight_through

SPECTRAL, ATTENTION = 0, 1


@dataclass
class Routing:
    """Pass one as `routing=` and it is filled, by layer number from 1: light (bool `[b, s]`, True for
    attention), score and entropy (float32). What is in `forced` replaces the routers' choice."""

    light_BS: dict[int, Tensor] = field(default_factory=dict)
    score_BS: dict[int, Tensor] = field(default_factory=dict)
    entropy_BS: dict[int, Tensor] = field(default_factory=dict)
    forced: dict[int, Tensor] = field(default_factory=dict)
    meta_gate: Tensor | None = None


class Float32Linear(nn.Linear):
    """A linear layer whose product is float32 whatever its parameters' dtype."""

    def forward(self, input: Tensor) -> Tensor:
        """float32 output."""
        with torch.autocast(input.device.type, enabled=False):
            return F.linear(input.float(), self.weight.float(), self.bias.float())


class LinearScore(nn.Module):
    """s(x) = Linear(x / rms(x)), `[b, s, h]` to float32 `[b, s]`."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = Float32Linear(hidden_size, 1)

    def forward(self, x: Tensor) -> Tensor:
        """float32 scores."""
        return self.linear(F.rms_norm(x.float(), x.shape[-1:], eps=1e-6)).squeeze(-1)  # type: ignore[no-any-return]


class Controller(nn.Module):
    """What the training's threshold control remembers; carried along, not used here."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("place", "spread", "started"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float32))


class ChiarRouter(nn.Module):
    """The router of one routed layer; see `chiar_megatron/routing/router.py` for the kinds."""

    threshold: Tensor

    def __init__(self, config: ChiarConfig, number: int) -> None:
        super().__init__()
        self.number = number
        self.kind: str = config.router["kind"]
        self.dc_power_weight: float = config.router["dc_power_weight"]
        self.register_buffer("threshold", torch.zeros((), dtype=torch.float32))
        if config.router["has_controller"]:
            self.controller = Controller()
        if self.kind in ("soft", "hard"):
            operators = 3 if config.router["operators"] == "spectral_attention_rbf" else 2
            self.gate_proj = Float32Linear(config.hidden_size + 1, operators)
        elif self.kind == "learned":
            self.score = LinearScore(config.hidden_size)
        elif self.kind == "entropy_gated":
            self.gate_score = LinearScore(config.hidden_size)

    def forward(
        self, x: Tensor, ids_BS: Tensor | None, position_BS: Tensor, routing: Routing | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """light (bool `[b, s]`), attention's gate `[b, s]` or None, weights `[b, s, o]` or None.

        ids_BS, position_BS: int64, read by the random router.
        """
        entropy = gate = weights = None
        if self.kind in ("soft", "hard"):
            x = x.float()
            entropy = spectral_entropy(x, self.dc_power_weight)
            weights = self.gate_proj(torch.cat((x, entropy[..., None]), dim=-1)).softmax(dim=-1)
            score, light = weights[..., ATTENTION], weights.argmax(dim=-1) == ATTENTION
        elif self.kind == "learned":
            score = self.score(x)
            gate = 2.0 * torch.sigmoid(score)
            light = score > self.threshold
        elif self.kind == "random":
            if ids_BS is None:
                raise ValueError("the random router needs input_ids, not inputs_embeds")
            score = hash_to_unit(position_BS * 1_000_003 + ids_BS * 7_919 + self.number * 104_729)
            light = score > self.threshold
        else:
            with torch.no_grad():
                score = entropy = spectral_entropy(x, self.dc_power_weight)
            light = score > self.threshold
            if self.kind == "entropy_gated":
                gate = 2.0 * torch.sigmoid(self.gate_score(x))
        if self.kind != "soft" and routing is not None and self.number in routing.forced:
            light = routing.forced[self.number]
        if self.kind == "hard" and weights is not None:
            own = weights.argmax(dim=-1)
            choice = torch.where(light == (own == ATTENTION), own, torch.where(light, ATTENTION, SPECTRAL))
            weights = straight_through(choice, weights)
        if routing is not None:
            routing.light_BS[self.number], routing.score_BS[self.number] = light, score.detach()
            if entropy is not None:
                routing.entropy_BS[self.number] = entropy.detach()
        return light, gate, weights


class ChiarMetaRouter(nn.Module):
    """The gate g over layer 1. The running average of `running` stays as it was at the end of pretraining."""

    running_mean_H: Tensor
    running_weight: Tensor

    def __init__(self, config: ChiarConfig) -> None:
        super().__init__()
        self.pooling: str = config.meta_router["pooling"]
        self.gate_proj = Float32Linear(config.hidden_size, 1)
        self.register_buffer("running_mean_H", torch.zeros(config.hidden_size, dtype=torch.float32))
        self.register_buffer("running_weight", torch.zeros((), dtype=torch.float32))

    def forward(
        self, x: Tensor, sums_BSH: Tensor | None, counts_BS1: Tensor | None, present_BS: Tensor | None
    ) -> Tensor:
        """g, float32 `[1, 1, 1]`, or `[b, s, 1]` for `causal`.

        sums_BSH, counts_BS1: of the embeddings up to each token, for `causal`. present_BS: bool, False for
        padding, which `batch` leaves out.
        """
        if self.pooling == "running":
            pooled = (self.running_mean_H.float() / self.running_weight.float().clamp_min(1e-12))[None, None]
        elif self.pooling == "causal":
            assert sums_BSH is not None and counts_BS1 is not None
            pooled = sums_BSH / counts_BS1
        elif present_BS is None:
            pooled = x.float().mean(dim=(0, 1))[None, None]
        else:
            pooled = (x.float() * present_BS[..., None]).sum(dim=(0, 1))[None, None] / present_BS.sum()
        return torch.sigmoid(self.gate_proj(pooled))
