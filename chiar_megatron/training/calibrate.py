"""`chiar calibrate`: thresholds τ of routed layers, from a trained checkpoint and a text.

As published: one τ for all layers, the midpoint of the 33rd and 67th percentile of the spectral entropies
of the token embeddings (the input of layer 1) of a trained full-attention model over validation text.

With a target ρ: each routed layer's τ is the (1 - ρ) quantile of its own scores on the text, as near to it
as equal scores allow. A layer's scores depend on the decisions of the layers before it, so all of the text
goes through one layer, with its threshold found, before it reaches the next.

Every token that the model reads counts, end-of-document tokens too: they are routed like any other. In
float32, in one process, without gradients.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from chiar_megatron.checkpoint.claim import FOLDER
from chiar_megatron.checkpoint.files import CheckpointInfo, resolve_checkpoint, sync_folder, write_durably
from chiar_megatron.checkpoint.store import CheckpointStore, make_info
from chiar_megatron.config.schedule import parse_schedule
from chiar_megatron.config.schema import CheckpointConfig, ParallelConfig, RunConfig
from chiar_megatron.errors import CheckpointError, ChiarError, ConfigError
from chiar_megatron.inference.load import InferenceModel, checkpoint_config, load_model, load_weights
from chiar_megatron.model.build import SHARDING_METADATA
from chiar_megatron.model.layer import ChiarLayer
from chiar_megatron.operators.context import ForwardContext
from chiar_megatron.routing.entropy import spectral_entropy
from chiar_megatron.runtime.distributed import single_process_world
from chiar_megatron.training.evaluation_text import EvaluationText, read_preprocessed, read_text

PERCENTILES = (33.0, 67.0)
REPORT = "calibration.json"

Batch = tuple[Tensor, Tensor | None]
"""Token ids `[b, s]` int64, and document numbers `[b, s]` where documents are masked from each other."""


@dataclass(frozen=True)
class CalibrationSettings:
    """What is calibrated, and how; one of `text` and `data` is given."""

    checkpoint: str
    """A run folder (its newest checkpoint) or a `step_…` folder."""

    text: tuple[str, ...] = ()
    """Text files, as `chiar preprocess` reads them."""

    data: str | None = None
    """Prefix of `.bin/.idx` files."""

    tokenizer: str | None = None
    """Path of a tokenizer; None: the one the checkpoint names."""

    target: float | None = None
    """ρ, share of tokens to attention in each routed layer; None: one τ from percentiles, as published."""

    tokens: int = 65536
    """At most so many tokens are read, in whole windows spread evenly over the text (at least one)."""

    batch_size: int = 8
    """Windows in one forward pass; 1 with MetaRouter's `batch` pooling, as in evaluation."""

    device: str = "auto"
    """`auto`, `cpu` or `cuda`."""

    dc_power_weight: float | None = None
    """Weight of the DC power in the entropies of a model without routed layers; None: the checkpoint's."""

    output: str | None = None
    """Folder to make: a copy of the checkpoint with the thresholds found."""


@dataclass(frozen=True)
class Calibration:
    """Thresholds, and the shares of the text's tokens that they send to attention."""

    checkpoint: str
    step: int
    tokens: int
    windows: int
    target: float | None
    dc_power_weight: float
    percentiles: tuple[float, ...]
    """Entropies at the percentiles 33 and 67; empty with a target."""
    share_of_embeddings: float | None
    """Share of embeddings whose entropy is above the published τ; None with a target."""
    layers: tuple[int, ...]
    """Routed layers, from 1. What follows is in their order."""
    thresholds_before: tuple[float, ...]
    thresholds: tuple[float, ...]
    fractions: tuple[float, ...]
    output: str | None

    @property
    def threshold(self) -> float | None:
        """The published τ; None with a target."""
        return sum(self.percentiles) / 2 if self.percentiles else None

    def json_line(self) -> str:
        """One line of JSON; per-layer figures are objects keyed by the layer's number."""
        figures: dict[str, Any] = {"mode": "percentiles" if self.target is None else "target"}
        figures.update(asdict(self), threshold=self.threshold)
        figures["percentiles"] = dict(zip(("33", "67"), self.percentiles, strict=False)) or None
        del figures["layers"]
        for name in ("thresholds_before", "thresholds", "fractions"):
            figures[name] = dict(zip(map(str, self.layers), figures[name], strict=True))
        return json.dumps(figures)

    def lines(self) -> Iterator[str]:
        """The same for people."""
        yield f"{self.checkpoint}, step {self.step}: {self.tokens:,} tokens read in {self.windows:,} windows"
        if self.percentiles:
            low, high = self.percentiles
            yield (
                f"entropies of the embeddings (dc_power_weight {self.dc_power_weight:g}): 33rd percentile "
                f"{low:.6f}, 67th {high:.6f}; midpoint τ = {self.threshold:.6f}, "
                f"{self.share_of_embeddings:.1%} of the tokens above it"
            )
        if self.layers:
            yield "layer  threshold before       after  to attention"
        rows = zip(self.layers, self.thresholds_before, self.thresholds, self.fractions, strict=True)
        for layer, before, after, fraction in rows:
            yield f"{layer:5d}  {before:16.6f}  {after:10.6f}  {fraction:12.1%}"
        if self.output is not None:
            yield f"written to {self.output}"
        elif not self.layers:
            yield "for a routed model: model.router.threshold=τ in its recipe"


def calibrate(settings: CalibrationSettings) -> Calibration:
    """Find thresholds, and write them if asked.

    Raises CheckpointError for a checkpoint that is missing or damaged or an output that exists or cannot be
    written, DataError for text or tokenizer (see `read_text`), ConfigError for settings that do not go with
    each other or with the checkpoint, ChiarError if scores are not finite.
    """
    folder = resolve_checkpoint(Path(settings.checkpoint))
    config = checkpoint_config(folder, ParallelConfig(), "fp32")
    _check(settings, config)
    if settings.output is not None and os.path.lexists(settings.output):
        raise CheckpointError(f"--output: {settings.output} exists already; give another folder")
    if settings.data is not None:
        text = read_preprocessed(settings.data, settings.tokenizer, config)
    else:
        text = read_text(settings.text, settings.tokenizer, config)
    model = load_model(folder, settings.device, "fp32")
    batches = _batches(text, model.config, settings)
    routed = _routed_layers(model)
    before = tuple(_threshold(layer) for layer in routed)
    weight = config.model.router.dc_power_weight
    if settings.dc_power_weight is not None:
        weight = settings.dc_power_weight
    percentiles: tuple[float, ...] = ()
    share = None
    with torch.inference_mode():
        if settings.target is None:
            entropies_N = _embedding_entropies(model, batches, weight)
            low, high = np.percentile(entropies_N, PERCENTILES)
            percentiles = (float(low), float(high))
            share = float((entropies_N > (low + high) / 2).mean())
            for layer in routed:
                _set_threshold(layer, (low + high) / 2)
        else:
            _set_quantiles(model, batches, settings.target)
        fractions = _fractions(model, batches) if routed else {}
    calibration = Calibration(
        checkpoint=str(folder),
        step=CheckpointInfo.read(folder).step,
        tokens=sum(ids_BS.numel() for ids_BS, _ in batches),
        windows=sum(len(ids_BS) for ids_BS, _ in batches),
        target=settings.target,
        dc_power_weight=weight,
        percentiles=percentiles,
        share_of_embeddings=share,
        layers=tuple(layer.layer_number for layer in routed),
        thresholds_before=before,
        thresholds=tuple(_threshold(layer) for layer in routed),
        fractions=tuple(fractions[layer.layer_number] for layer in routed),
        output=settings.output,
    )
    if settings.output is not None:
        _write(folder, calibration, Path(settings.output), settings.device)
    return calibration


def _check(settings: CalibrationSettings, config: RunConfig) -> None:
    router, where = config.model.router, settings.checkpoint
    has_routed = "R" in parse_schedule(config.model.schedule)
    for name, number in (("--tokens", settings.tokens), ("--batch-size", settings.batch_size)):
        if number < 1:
            raise ConfigError(f"{name}: {number} must be at least 1")
    weight = settings.dc_power_weight
    if weight is not None and not 0.0 < weight < math.inf:
        raise ConfigError(f"--dc-power-weight: {weight} must be above 0 and finite; 1 is exact")
    if settings.target is not None and not 0.0 < settings.target < 1.0:
        raise ConfigError(f"--target: {settings.target} must lie between 0 and 1, such as 0.5")
    if not has_routed and (settings.target is not None or settings.output is not None):
        option = "--output" if settings.target is None else "--target"
        raise ConfigError(
            f"{option}: {where} has no routed layers (model.schedule {config.model.schedule}) to take a "
            "threshold; without it the published τ is computed, for model.router.threshold of a routed model"
        )
    if has_routed and router.kind in ("soft", "hard"):
        raise ConfigError(
            f"model.router.kind: {where} has a {router.kind} router, which has no threshold; "
            "calibrate a model with another router, or a full-attention twin"
        )
    if has_routed and settings.target is None and router.kind in ("learned", "random"):
        raise ConfigError(
            f"model.router.kind: thresholds of {where} are on {router.kind} scores, not on entropies; "
            "give the share of tokens to attention by --target"
        )
    if has_routed and weight is not None and weight != router.dc_power_weight:
        raise ConfigError(
            f"--dc-power-weight: {weight}, but the routers of {where} compute with "
            f"{router.dc_power_weight}; leave it out (it is for models without routed layers)"
        )


def _batches(text: EvaluationText, config: RunConfig, settings: CalibrationSettings) -> list[Batch]:
    """Windows of `seq_length` tokens without overlap; a shorter last one is a batch of its own."""
    window, meta = config.model.seq_length, config.model.meta_router
    size = 1 if meta.enabled and meta.pooling == "batch" else settings.batch_size
    ids_N = text.ids_N
    whole = len(ids_N) // window
    rows, rest_S = list(ids_N[: whole * window].reshape(whole, window)), ids_N[whole * window :]
    if rows and len(ids_N) > settings.tokens:
        places = np.linspace(0, whole - 1, max(1, min(whole, settings.tokens // window)))
        rows, rest_S = [rows[place] for place in places.round().astype(int)], rest_S[:0]
    parts = [np.stack(rows[first : first + size]) for first in range(0, len(rows), size)]
    if len(rest_S):
        parts.append(rest_S[None])
    batches: list[Batch] = []
    for part in parts:
        ids_BS = torch.from_numpy(part)
        ends_BS = (ids_BS == text.eod).long()
        batches.append((ids_BS, ends_BS.cumsum(dim=1) - ends_BS if config.model.mask_documents else None))
    return batches


def _context(batch: Batch, model: InferenceModel, **recorded: Any) -> ForwardContext:
    ids_BS, documents_BS = batch
    if documents_BS is not None:
        documents_BS = documents_BS.to(model.device)
    return ForwardContext(tokens_BS=ids_BS.to(model.device), document_ids_BS=documents_BS, **recorded)


def _embeddings(model: InferenceModel, batch: Batch) -> Tensor:
    """Input of layer 1, `[s, b, h]`."""
    ids_BS = batch[0].to(model.device)
    return model.module.embedding(input_ids=ids_BS, position_ids=None)  # type: ignore[no-any-return]


def _embedding_entropies(
    model: InferenceModel, batches: Sequence[Batch], dc_power_weight: float
) -> npt.NDArray[np.float64]:
    """Entropies of all tokens' embeddings, `[tokens]`."""
    found = [spectral_entropy(_embeddings(model, batch), dc_power_weight) for batch in batches]
    return _finite(found, "the embeddings' entropies")


def _set_quantiles(model: InferenceModel, batches: Sequence[Batch], target: float) -> None:
    """Set each routed layer's threshold to the (1 - target) quantile of its scores, in order."""
    hidden_SBH = [_embeddings(model, batch) for batch in batches]
    for layer in model.module.chiar_layers:
        if layer.router is not None:
            scores: list[Tensor] = []
            for x_SBH, batch in zip(hidden_SBH, batches, strict=True):
                context = _context(batch, model, recorded_score_SB={})
                layer(hidden_states=x_SBH, packed_seq_params=context)
                assert context.recorded_score_SB is not None
                scores.append(context.recorded_score_SB[layer.layer_number])
            scores_N = _finite(scores, f"the scores of layer {layer.layer_number}")
            _set_threshold(layer, quantile_threshold(scores_N, target))
        for place, batch in enumerate(batches):
            context = _context(batch, model)
            hidden_SBH[place] = layer(hidden_states=hidden_SBH[place], packed_seq_params=context)[0]


def quantile_threshold(scores_N: npt.NDArray[np.float64], target: float) -> float:
    """The (1 - target) quantile of finite scores, moved to the nearest gap between different ones.

    Scores that rounding may tell apart or not (one token's at every place of the text, as long as no
    attention has been computed) go one way together: what the threshold decides does not hang on the batch.
    """
    sorted_N = np.sort(scores_N)
    rounding = 4.0 * float(np.spacing(np.float32(np.abs(sorted_N).max())))
    below = np.flatnonzero(np.diff(sorted_N) > rounding)
    if not len(below):
        return float(np.quantile(sorted_N, 1.0 - target))
    shares = 1.0 - (below + 1) / len(sorted_N)
    place = int(below[np.abs(shares - target).argmin()])
    return float(sorted_N[place] + sorted_N[place + 1]) / 2.0


def _fractions(model: InferenceModel, batches: Sequence[Batch]) -> dict[int, float]:
    """Share of the tokens to attention by routed layer, by whole forward passes of the model."""
    light = {layer.layer_number: 0 for layer in _routed_layers(model)}
    for batch in batches:
        context = _context(batch, model, recorded_light_SB={})
        model(batch[0], context=context)
        for number, light_SB in (context.recorded_light_SB or {}).items():
            light[number] += int(light_SB.sum())
    tokens = sum(ids_BS.numel() for ids_BS, _ in batches)
    return {number: count / tokens for number, count in light.items()}


def _routed_layers(model: InferenceModel) -> list[ChiarLayer]:
    return [layer for layer in model.module.chiar_layers if layer.router is not None]


def _threshold(layer: ChiarLayer) -> float:
    assert layer.router is not None
    return float(layer.router.threshold)


@torch.no_grad()
def _set_threshold(layer: ChiarLayer, threshold: float) -> None:
    assert layer.router is not None
    layer.router.threshold.fill_(threshold)


def _finite(parts: Sequence[Tensor], what: str) -> npt.NDArray[np.float64]:
    numbers_N = torch.cat([part.flatten() for part in parts]).double().cpu().numpy()
    if not np.isfinite(numbers_N).all():
        raise ChiarError(f"{what} are not all finite; the checkpoint's weights hold numbers out of range")
    return numbers_N


def _write(source: Path, calibration: Calibration, destination: Path, device: str) -> None:
    """A weights-only copy of a checkpoint in its own precision, with the thresholds found.

    It appears whole, under its final name, or not at all.
    """
    info = CheckpointInfo.read(source)
    config = checkpoint_config(source, ParallelConfig(), None)
    module = load_weights(source, config, single_process_world(device))
    for number, threshold in zip(calibration.layers, calibration.thresholds, strict=True):
        _set_threshold(module.chiar_layers[number - 1], threshold)
    config_tree = json.loads(json.dumps(info.config)) | {"run_dir": str(destination)}
    if calibration.threshold is not None:
        config_tree["model"]["router"]["threshold"] = calibration.threshold
    layout = {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "data_parallel_size": 1}
    written = make_info(info.step, info.tokens_seen, False, layout, config_tree)
    temporary = destination.absolute().parent / f".{destination.name}.calibrating"
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # of a calibration that was killed
        temporary.mkdir(parents=True)
        state = {"model": module.sharded_state_dict(metadata=dict(SHARDING_METADATA))}
        CheckpointStore(temporary, CheckpointConfig()).save(state, written)
        shutil.rmtree(temporary / FOLDER)
        write_durably(temporary / REPORT, calibration.json_line() + "\n")
        temporary.rename(destination)
        sync_folder(temporary.parent)
    except OSError as error:
        raise CheckpointError(f"--output: {destination} cannot be written: {error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
