"""The sides of the step benchmark, each behind the same two calls: take a step, tell what was seen."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from chiar_megatron.bench.baselines import PlainGpt, PlainGptSizes, plain_adamw
from chiar_megatron.config.schedule import parse_schedule
from chiar_megatron.config.schema import ModelConfig, RunConfig
from chiar_megatron.data.dataset import TokenBatch, TokenStream
from chiar_megatron.data.loader import BatchLayout, read_ahead
from chiar_megatron.metrics.routing import RoutingSummary
from chiar_megatron.model.accounting import model_flops_per_token, parameter_count
from chiar_megatron.routing.balance import capacity_rows
from chiar_megatron.runtime.distributed import World
from chiar_megatron.training.engine import MegatronEngine, PendingStep, StepResult

_MANY_STEPS = 1_000_000
_READ_LOSS_EVERY = 10  # steps of the plain GPT, as its users log


class Trainee(Protocol):
    """A model with its optimizer and its text."""

    parameters: int

    def step(self) -> None:
        """One whole optimizer step; may return before the device is done."""

    def forget(self) -> None:
        """Start `seen` anew."""

    def seen(self) -> dict[str, Any]:
        """Figures of the steps since `forget`; waits for the device."""


class RandomStream(TokenStream):
    """Random token ids from a fixed generator, frequent ones more often (Zipf's law), so that no side gains
    from equal rows; read like real text."""

    def __init__(self, vocab_size: int, seq_length: int, samples: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        weights_V = 1.0 / torch.arange(1, vocab_size + 1, dtype=torch.float32)
        ids = torch.multinomial(weights_V, samples * (seq_length + 1), replacement=True, generator=generator)
        self._ids = ids.view(samples, seq_length + 1)

    def __len__(self) -> int:
        return _MANY_STEPS * self._ids.shape[0]

    def read(self, positions: Any) -> TokenBatch:
        """The rows at `positions`, over and over."""
        rows = torch.tensor([position % self._ids.shape[0] for position in positions])
        chosen = self._ids[rows]
        tokens_BS, labels_BS = chosen[:, :-1].contiguous(), chosen[:, 1:].contiguous()
        return TokenBatch(tokens_BS, labels_BS, torch.ones(tokens_BS.shape), None, rows)


def batches_of(stream: TokenStream, config: RunConfig) -> Iterator[list[TokenBatch]]:
    """A step's micro-batches after another, read as the training loop reads them."""
    layout = BatchLayout(config.training.global_batch_size, config.training.micro_batch_size)
    last = len(stream) // config.training.global_batch_size
    return read_ahead(stream, layout, 0, last, config.data.num_workers)


class Product:
    """The product's own engine."""

    def __init__(self, config: RunConfig, world: World, stream: TokenStream) -> None:
        self.config = config
        self.parameters = parameter_count(config.model).total
        self.engine = MegatronEngine(config, world)
        self.batches = batches_of(stream, config)
        self.number = 0
        self.pending: PendingStep | None = None
        self.results: list[StepResult] = []

    def step(self) -> None:
        """See Trainee. The figures of a step are read when the next one is on its way."""
        launched = self.engine.launch_step(next(self.batches), self.number)
        self._read()
        self.pending = launched
        self.number += 1

    def _read(self) -> None:
        if self.pending is not None:
            self.results.append(self.pending.result())
            self.pending = None

    def forget(self) -> None:
        """See Trainee."""
        self._read()
        self.results = []

    def seen(self) -> dict[str, Any]:
        """Losses, skipped steps and, for routed models, shares and rows."""
        self._read()
        results = self.results
        figures: dict[str, Any] = {
            "loss_first": float(results[0].sums.loss),
            "loss_last": float(results[-1].sums.loss),
            "grad_norm_last": float(results[-1].grad_norm),
            "steps_not_taken": sum(not result.taken for result in results),
        }
        if "R" in parse_schedule(self.config.model.schedule):
            figures |= routing_figures(self.config, [result.sums.routing for result in results])
        return figures


def routing_figures(config: RunConfig, summaries: list[RoutingSummary]) -> dict[str, Any]:
    """Means over steps of what the product reports a layer, and the rows it amounts to.

    rows are those of one micro-batch in one layer, averaged over layers: executed ones include padding,
    useful ones are light tokens that found a row, overflowed ones light tokens that found none.
    """
    share_L = _means([summary.routed_fraction for summary in summaries])
    # Of light tokens; counted in tokens below.
    overflow_L = _means([summary.overflow_fraction for summary in summaries])
    router, tokens = config.model.router, config.training.micro_batch_size * config.model.seq_length
    share = _mean(share_L)
    overflowed = _mean([s * o for s, o in zip(share_L, overflow_L, strict=True)]) * tokens
    useful = share * tokens - overflowed
    rows = capacity_rows(router, tokens)
    executed = float(tokens) if router.dispatch == "dense" else useful if rows is None else float(rows)
    return {
        "routed_fraction": share,
        "routed_fraction_lowest_layer": min(share_L),
        "routed_fraction_highest_layer": max(share_L),
        "overflow_share_of_light_tokens": overflowed / max(share * tokens, 1.0),
        "overflow_share_of_light_tokens_highest_layer": max(overflow_L),
        "slack": router.slack,
        "rows": {"tokens": tokens, "executed": executed, "useful": useful, "overflowed": overflowed},
        "routed_fraction_by_layer": share_L,
        "overflow_share_by_layer": overflow_L,
        "score_std_by_layer": _means([summary.score_std for summary in summaries]),
    }


def _means(rows: list[list[float]]) -> list[float]:
    """Of every column."""
    return [_mean(list(column)) for column in zip(*rows, strict=True)]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


@dataclass(frozen=True)
class PlainSettings:
    """How the plain GPT is trained."""

    sizes: PlainGptSizes
    precision: str
    compiled: bool
    cudnn: bool
    """Attention by cuDNN rather than flash."""
    lr: float = 1e-4
    clip: float = 1.0

    @staticmethod
    def beside(twin: RunConfig, compiled: bool, cudnn: bool) -> PlainSettings:
        """Of the twin's sizes; the vocabulary padded to 64 rows, as nanoGPT's users do."""
        model = twin.model
        assert model.vocab_size is not None
        sizes = PlainGptSizes(
            layers=len(parse_schedule(model.schedule)),
            hidden=model.hidden_size,
            heads=model.num_attention_heads,
            seq_length=model.seq_length,
            vocab=math.ceil(model.vocab_size / 64) * 64,
        )
        return PlainSettings(sizes, twin.training.precision, compiled, cudnn, twin.optimizer.lr)

    def counted_as(self, twin: ModelConfig) -> ModelConfig:
        """What the FLOP ledger counts for it."""
        return replace(twin, vocab_size=self.sizes.vocab)


class PlainTrainee:
    """The plain GPT: float32 weights under bf16 autocast, one compiled graph, fused AdamW."""

    def __init__(
        self, settings: PlainSettings, config: RunConfig, device: torch.device, stream: TokenStream
    ) -> None:
        """config: the twin's, for the batch."""
        torch.manual_seed(config.training.seed)
        self.settings, self.device = settings, device
        with torch.device(device):
            self.model = PlainGpt(settings.sizes)
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self.compute: Any = torch.compile(self.model) if settings.compiled else self.model
        self.optimizer = plain_adamw(
            self.model, fused=True, lr=settings.lr, betas=(0.9, 0.95), weight_decay=0.01
        )
        self.batches = batches_of(stream, config)
        self.number = 0
        self.losses: list[float] = []

    def step(self) -> None:
        """See Trainee."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr * min(1.0, (self.number + 1) / 1000)
        micro_batches = next(self.batches)
        for batch in micro_batches:
            tokens_BS, labels_BS = (self._to_device(t) for t in (batch.tokens_BS, batch.labels_BS))
            backends = plain_backends(self.device, self.settings.cudnn)
            with autocast(self.device, self.settings.precision), backends:
                loss = self.compute(tokens_BS, labels_BS) / len(micro_batches)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.last = loss.detach() * len(micro_batches)
        self.number += 1
        if self.number % _READ_LOSS_EVERY == 0:
            self.losses.append(float(self.last))

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor

    def forget(self) -> None:
        """See Trainee."""
        self.losses = []

    def seen(self) -> dict[str, Any]:
        """The last loss."""
        return {"loss_last": float(self.last)}


def autocast(device: torch.device, precision: str) -> Any:
    """bf16 autocast; nothing for float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()


@contextmanager
def plain_backends(device: torch.device, cudnn: bool) -> Iterator[None]:
    """Flash before others: torch's own order, which the product changes for its process; or cuDNN first.

    What is compiled meanwhile comes from no cache: torch keeps code of the same graph whatever backend its
    attention takes.
    """
    if device.type != "cuda":
        yield
        return
    order = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    backends = sdpa_kernel([SDPBackend.CUDNN_ATTENTION] * cudnn + order, set_priority=True)
    with backends, torch.compiler.config.patch(force_disable_caches=True):  # type: ignore[attr-defined]
        yield


def flops_per_token(model: ModelConfig, share: float) -> float:
    """Useful training FLOPs a token by the ledger (causal)."""
    return model_flops_per_token(model, model.seq_length, share)
