"""`chiar evaluate`: what a model makes of a text, in figures that layout and batch size do not change.

Every token of the text is predicted and scored once, the first one from an end-of-document token (eod).
Eods are context but are not scored: they are no part of the text, so that models with different
tokenizers compare. With L the negative log likelihood of the text's tokens in nats:

    token perplexity = exp(L / tokens), word perplexity = exp(L / words), bits per byte = L / ln 2 / bytes

words and bytes are the raw text's (words: what whitespace separates; bytes: UTF-8). Windows slide by
`stride`: the first scores all its tokens, each later one its last `stride`, which have the rest of the
window before them. Always in float32. Replicas share the windows.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor
from tqdm import tqdm

from chiar_megatron.checkpoint.files import CheckpointInfo, resolve_checkpoint
from chiar_megatron.checkpoint.store import CheckpointStore
from chiar_megatron.config.schedule import parse_schedule
from chiar_megatron.config.schema import CheckpointConfig, ModelConfig, ParallelConfig, RunConfig
from chiar_megatron.config.validate import check_config
from chiar_megatron.data.dataset import TokenBatch
from chiar_megatron.errors import CheckpointError, ChiarError, ConfigError
from chiar_megatron.inference.load import checkpoint_config, load_weights
from chiar_megatron.model.gpt import ChiarModel
from chiar_megatron.operators.context import ForwardContext
from chiar_megatron.runtime.distributed import World
from chiar_megatron.training.evaluation_text import (
    EvaluationText,
    Window,
    read_preprocessed,
    read_text,
    slide,
    window_batch,
)


@dataclass(frozen=True)
class EvaluationSettings:
    """What is evaluated, and how; one of `text` and `data` is given."""

    checkpoint: str
    """A run folder (its newest checkpoint) or a `step_…` folder."""

    text: tuple[str, ...] = ()
    """Text files, as `chiar preprocess` reads them."""

    data: str | None = None
    """Prefix of `.bin/.idx` files."""

    tokenizer: str | None = None
    """Path of a tokenizer; None: the one the checkpoint names."""

    window: int | None = None
    """Tokens in one window; None: the model's `seq_length`."""

    stride: int | None = None
    """Tokens from one window to the next; None: half a window."""

    batch_size: int = 8
    """Windows in one forward pass of one replica."""


@dataclass(frozen=True)
class Evaluation:
    """The figures of one text. Perplexities beyond the range of a double are infinite."""

    checkpoint: str
    step: int
    loss: float
    """Nats a token."""
    tokens: int
    """Scored tokens: the text's, without eods."""
    words: int | None
    """Of the raw text; None if not known. So are `bytes`."""
    bytes: int | None
    window: int
    stride: int
    batch_size: int
    """Windows in one forward pass; 1 with MetaRouter's `batch` pooling."""
    sees_future: bool
    """MetaRouter's `batch` pooling reads later tokens of the window."""
    routed_layers: tuple[int, ...]
    routed_fraction: tuple[float, ...]
    """Share of the scored tokens that went to attention, by routed layer."""

    @property
    def token_perplexity(self) -> float:
        """exp(loss)."""
        return _exp(self.loss)

    @property
    def word_perplexity(self) -> float | None:
        """Per whitespace word of the raw text."""
        return None if self.words is None else _exp(self.loss * self.tokens / self.words)

    @property
    def bits_per_byte(self) -> float | None:
        """Per UTF-8 byte of the raw text."""
        return None if self.bytes is None else self.loss * self.tokens / math.log(2) / self.bytes

    def json_line(self) -> str:
        """One line of JSON; what is unknown or infinite is null."""
        figures: dict[str, Any] = {
            "token_perplexity": self.token_perplexity,
            "word_perplexity": self.word_perplexity,
            "bits_per_byte": self.bits_per_byte,
            "loss": self.loss,
            "tokens": self.tokens,
            "words": self.words,
            "bytes": self.bytes,
            "window": self.window,
            "stride": self.stride,
            "batch_size": self.batch_size,
            "checkpoint": self.checkpoint,
            "step": self.step,
        }
        if self.routed_layers:
            figures["routed_fraction"] = self.routed_fraction
        return json.dumps({name: None if value == math.inf else value for name, value in figures.items()})

    def lines(self) -> Iterator[str]:
        """The same for people."""
        raw = "words and bytes of the raw text not known (no PREFIX.json of `chiar preprocess`)"
        if self.words is not None and self.bytes is not None:
            raw = f"{self.words:,} words, {self.bytes:,} bytes"
        yield f"{self.checkpoint}, step {self.step}: {self.tokens:,} tokens, {raw}"
        yield (
            f"windows of {self.window} tokens, {self.stride} apart: beyond the first window each token is "
            f"predicted from {self.window - self.stride + 1} to {self.window} before it"
        )
        if self.sees_future:
            yield (
                "model.meta_router.pooling is batch: the gate averages each window, later tokens included; "
                "one window a batch"
            )
        for layer, fraction in zip(self.routed_layers, self.routed_fraction, strict=True):
            yield f"layer {layer}: {fraction:.1%} of the tokens to attention"
        yield f"loss              {self.loss:.4f} nats a token"
        yield f"token perplexity  {self.token_perplexity:,.2f}"
        if self.word_perplexity is not None:
            yield f"word perplexity   {self.word_perplexity:,.2f}"
        if self.bits_per_byte is not None:
            yield f"bits per byte     {self.bits_per_byte:.4f}"


def evaluation_config(
    settings: EvaluationSettings, parallel: ParallelConfig, world_size: int | None = None
) -> RunConfig:
    """The checkpoint's config for this evaluation: its layout, and windows as the model's `seq_length`.

    Raises CheckpointError if there is no checkpoint, ConfigError if the layout does not divide the model
    or a setting is out of range.
    """
    config = checkpoint_config(resolve_checkpoint(Path(settings.checkpoint)), parallel, "fp32")
    window = config.model.seq_length if settings.window is None else settings.window
    for name, value in (("--seq-length", window), ("--batch-size", settings.batch_size)):
        if value < 1:
            raise ConfigError(f"{name}: {value} must be at least 1")
    if settings.stride is not None and not 1 <= settings.stride <= window:
        raise ConfigError(
            f"--stride: {settings.stride} must be at least 1 and at most a window's {window} tokens"
        )
    sees_future = _sees_future(config.model)
    micro_batch_size = 1 if sees_future else settings.batch_size
    config = replace(
        config,
        model=replace(config.model, seq_length=window),
        training=replace(
            config.training,
            micro_batch_size=micro_batch_size,
            global_batch_size=micro_batch_size * (world_size or 1),
        ),
    )
    check_config(config, world_size)
    return config


def evaluate(settings: EvaluationSettings, parallel: ParallelConfig, world: World) -> Evaluation:
    """Evaluate a checkpoint on a text, by all processes together; every one gets the figures.

    Raises CheckpointError if the checkpoint is missing or damaged, DataError for text or tokenizer (see
    `read_text`), ConfigError for settings and for a text too short to be shared, ChiarError if the loss is
    not finite.
    """
    config = evaluation_config(settings, parallel, world.size)
    folder = resolve_checkpoint(Path(settings.checkpoint))
    if settings.data is not None:
        text = read_preprocessed(settings.data, settings.tokenizer, config)
    else:
        text = read_text(settings.text, settings.tokenizer, config)
    damage = CheckpointStore(folder.parent, CheckpointConfig()).verify(folder)
    if damage is not None:
        raise CheckpointError(f"{folder} is damaged: {damage}")
    module = load_weights(folder, config, world).eval()
    window = config.model.seq_length
    stride = max(1, window // 2) if settings.stride is None else settings.stride
    windows = slide(len(text.ids_N) - 1, window, stride)
    length = windows[0].last
    if length % parallel.context_parallel_size:
        raise ConfigError(
            f"--context-parallel: {parallel.context_parallel_size} does not divide the text's {length} "
            "tokens, which are fewer than a window; use 1"
        )
    sums = _sum_over_windows(module, text, windows, config, world)
    loss = sums.nats / sums.tokens
    if not math.isfinite(loss):
        raise ChiarError(f"{folder}: the loss on this text is {loss}; its weights hold numbers out of range")
    return Evaluation(
        checkpoint=str(folder),
        step=CheckpointInfo.read(folder).step,
        loss=loss,
        tokens=sums.tokens,
        words=text.words,
        bytes=text.bytes,
        window=window,
        stride=stride,
        batch_size=config.training.micro_batch_size,
        sees_future=_sees_future(config.model),
        routed_layers=tuple(sums.light),
        routed_fraction=tuple(light / sums.tokens for light in sums.light.values()),
    )


def _sees_future(model: ModelConfig) -> bool:
    return model.meta_router.enabled and model.meta_router.pooling == "batch"


@dataclass(frozen=True)
class _Sums:
    """Over all scored tokens."""

    nats: float
    tokens: int
    light: dict[int, int]
    """By routed layer."""


class _WindowStep:
    """megatron-core's forward step function: one batch of windows through this stage."""

    def __init__(self, model: ChiarModel, world: World) -> None:
        self.world = world
        self.light_L = torch.zeros(model.config.num_layers + 1, dtype=torch.int64, device=world.device)

    def __call__(
        self, batches: Iterator[TokenBatch], model: ChiarModel
    ) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]]:
        """(output of this stage, function from the last stage's output to its loss)."""
        batch = next(batches)
        device, part = self.world.device, self.world.context_part
        tokens_BS, mask_BS = batch.tokens_BS.to(device), part(batch.loss_mask_BS.to(device))
        context = ForwardContext(tokens_BS=tokens_BS, recorded_light_SB={})
        if batch.document_ids_BS is not None:
            context.document_ids_BS = batch.document_ids_BS.to(device)
        output = model(part(tokens_BS), context, labels=part(batch.labels_BS.to(device)))
        for layer, light_SB in (context.recorded_light_SB or {}).items():
            self.light_L[layer] += (light_SB.transpose(0, 1) & mask_BS.bool()).sum()
        return output, partial(_sum_nats, mask_BS)


def _sum_nats(mask_BS: Tensor, losses_TBS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of the losses, number of tokens, and both for the report (float64 `[2]`)."""
    nats = (losses_TBS[0].double() * mask_BS).sum()
    tokens = mask_BS.sum()
    return nats, tokens.int(), torch.stack((nats, tokens.double()))


@torch.no_grad()
def _sum_over_windows(
    model: ChiarModel, text: EvaluationText, windows: Sequence[Window], config: RunConfig, world: World
) -> _Sums:
    own = windows[world.data_parallel_rank :: world.data_parallel_size]
    largest_share = -(-len(windows) // world.data_parallel_size)
    rows = min(config.training.micro_batch_size, largest_share)
    step = _WindowStep(model, world)
    starts = range(0, len(own), rows)
    progress = tqdm(starts, desc="evaluate", disable=not (world.is_main and sys.stderr.isatty()), leave=False)
    batches = (window_batch(text, own[i : i + rows], rows, config.model.mask_documents) for i in progress)
    reports: list[Tensor] = []
    if own:
        reports = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=batches,
            model=[model],
            num_microbatches=len(starts),
            seq_length=windows[0].last - windows[0].first,
            micro_batch_size=rows,
            forward_only=True,
        )
    sums = torch.zeros(2 + len(step.light_L), dtype=torch.float64, device=world.device)
    if world.tensor_parallel_rank == 0:  # these count alike; other parts and stages count their own
        sums[2:] = step.light_L
        if reports and world.is_last_stage:
            sums[:2] = torch.stack(reports).sum(0)
    dist.all_reduce(sums)
    nats, tokens, *light = sums.tolist()
    routed = [layer for layer, kind in enumerate(parse_schedule(config.model.schedule), 1) if kind == "R"]
    return _Sums(nats, int(tokens), {layer: int(light[layer]) for layer in routed})


def _exp(nats: float) -> float:
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf
