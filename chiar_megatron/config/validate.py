"""What spans several fields of a recipe, or limits one beyond its type: all problems, in one error."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from chiar_megatron.config.fields import nearest_name, value_at
from chiar_megatron.config.load import default_ffn_hidden_size, default_wsd_decay_steps, indivisible_heads
from chiar_megatron.config.pipeline import check_interleaved_batch, check_pipeline
from chiar_megatron.config.problems import raise_problems, shown
from chiar_megatron.config.schedule import parse_schedule
from chiar_megatron.config.schema import OptimizerConfig, RunConfig
from chiar_megatron.errors import ConfigError


class _Limit(NamedTuple):
    """A limit on single numbers: in words, as a test, and the fields it holds for (null passes)."""

    words: str
    holds: Callable[[float], bool]
    fields: tuple[str, ...]


LIMITS = (
    _Limit(
        "at least 1",
        lambda value: value >= 1,
        (
            "model.hidden_size", "model.num_attention_heads", "model.num_query_groups", "model.kv_channels",
            "model.ffn_hidden_size", "model.seq_length", "model.mup_base_hidden_size", "model.rbf_features",
            "parallel.tensor_model_parallel_size", "parallel.pipeline_model_parallel_size",
            "parallel.virtual_pipeline_model_parallel_size",
            "parallel.context_parallel_size", "parallel.data_parallel_size",
            "optimizer.decay_steps", "optimizer.wsd_decay_steps",
            "training.steps", "training.global_batch_size", "training.micro_batch_size",
            "training.max_bad_steps", "logging.log_interval_steps", "runtime.threads_per_process",
        ),
    ),
    _Limit("at least 2", lambda value: value >= 2, ("model.vocab_size",)),
    _Limit(
        "above 0",
        lambda value: value > 0,
        (
            "model.norm_epsilon", "model.rotary_base", "model.rotary_scaling.factor",
            "model.rotary_scaling.low_freq_factor", "model.rotary_scaling.high_freq_factor",
            "model.rotary_scaling.original_max_position_embeddings",
            "model.init_std", "model.rbf_gamma",
            "model.router.controller_gain", "optimizer.lr", "optimizer.eps",
            "runtime.start_timeout_seconds", "runtime.collective_timeout_seconds",
        ),
    ),
    _Limit(
        "0 or more",
        lambda value: value >= 0,
        (
            "runtime.hang_seconds",
            "model.router.dc_power_weight", "model.router.collapse_weight", "model.router.slack",
            "data.eod_token", "data.num_workers",
            "optimizer.min_lr", "optimizer.warmup_steps", "optimizer.weight_decay", "optimizer.clip_grad",
            "training.z_loss", "training.eval_interval_steps", "training.eval_steps",
            "training.exit_after_steps", "training.exit_after_minutes",
            "checkpoint.save_interval_steps", "checkpoint.save_interval_minutes", "checkpoint.keep_last",
            "checkpoint.keep_every_minutes", "checkpoint.load_step", "logging.routing_traces",
        ),
    ),
    _Limit("between 0 and 1", lambda value: 0 <= value <= 1, ("model.router.random_fraction",)),
    _Limit("above 0 and below 1, or none", lambda value: 0 < value < 1, ("model.router.target",)),
    _Limit(
        "0 or more and below 1",
        lambda value: 0 <= value < 1,
        ("model.dropout", "model.meta_router.decay", "optimizer.beta1", "optimizer.beta2"),
    ),
    _Limit("between 0 and 4294967295", lambda value: 0 <= value < 2**32, ("training.seed",)),
    _Limit("a number", math.isfinite, ("model.router.threshold", "model.meta_router.bias_init")),
)  # fmt: skip
"""Every numeric field of the schema, under the limit that holds for it alone."""


def check_config(config: RunConfig, world_size: int | None = None) -> None:
    """Check what spans fields, before or after `resolve_config`, with no look at files.

    `world_size` is the number of processes, if known. Raises one `ConfigError` with a line for each
    problem: field, value, limit, remedy.
    """
    problems: list[str] = []
    for limit in LIMITS:
        for path in limit.fields:
            value = value_at(config, path)
            if value is None:
                continue
            if not math.isfinite(value):
                problems.append(f"{path}: {shown(value)} must be finite and {limit.words}")
            elif not limit.holds(value):
                problems.append(f"{path}: {shown(value)} must be {limit.words}")
    if not config.run_dir.strip():
        problems.append("run_dir: is empty; name a folder such as runs/default")
    _check_model(config, problems)
    _check_layout(config, problems)
    _check_batch(config, world_size, problems)
    _check_data(config, problems)
    _check_optimizer(config.optimizer, config.training.steps, problems)
    if config.training.precision == "fp8":
        problems.append("training.precision: fp8 is not built yet; use bf16 (or fp32)")
    raise_problems(problems)


def check_paths(config: RunConfig) -> None:
    """Check that the tokenizer, the checkpoint to start from and the tokenised text exist.

    Raises one `ConfigError` with a line for each missing path and the name nearest to it on disk.
    """
    problems: list[str] = []
    for path in ("data.tokenizer", "training.init_from"):
        value = value_at(config, path)
        if value is not None and not Path(value).exists():
            problems.append(_missing(path, value, Path(value)))
    if not config.data.train:
        problems.append("data.train: is empty; give prefixes of .bin/.idx files, made by `chiar preprocess`")
    for name in ("train", "validation", "test"):
        for prefix in data_prefixes(value_at(config, f"data.{name}")):
            problems.extend(_missing_data(f"data.{name}", prefix))
    raise_problems(problems)


def _check_model(config: RunConfig, problems: list[str]) -> None:
    model = config.model
    heads, groups = model.num_attention_heads, model.num_query_groups
    head_size, origin = model.kv_channels, ""
    if head_size is None and heads > 0:
        head_size, origin = model.hidden_size // heads, " (hidden_size / num_attention_heads)"
    if model.kv_channels is None and heads > 0 and model.hidden_size % heads:
        problems.append(indivisible_heads(model))
    elif head_size is not None and head_size % 2:
        problems.append(
            f"model.kv_channels: {head_size}{origin} is odd, but rotary positions need an even head size; "
            "set model.kv_channels to an even number"
        )
    if groups is not None:
        _divide(problems, "model.num_attention_heads", heads, "model.num_query_groups", groups)
    if model.router.kind in ("soft", "hard") and model.router.keys_values == "routed":
        problems.append(
            f"model.router.keys_values: routed does not go with model.router.kind {model.router.kind}, which "
            "gives every token to all operators; use keys_values: all"
        )
    if model.router.kind in ("soft", "hard") and model.router.target is not None:
        problems.append(
            f"model.router.target: {model.router.target} needs a router with a threshold, which "
            f"{model.router.kind} has not; use target: none, or another model.router.kind"
        )
    if (model.mup_base_hidden_size or 0) >= 1 and model.tie_embeddings:
        problems.append(
            f"model.mup_base_hidden_size: {model.mup_base_hidden_size} needs a head whose scale is its own; "
            "set model.tie_embeddings to false"
        )
    vocab, eod = model.vocab_size, config.data.eod_token
    if vocab is not None and eod is not None and eod >= vocab:
        problems.append(
            f"data.eod_token: {eod} must be below model.vocab_size {vocab}; use the tokenizer's (null)"
        )
    if model.mask_documents and eod is None and config.data.tokenizer is None:
        problems.append(
            "model.mask_documents: true needs the token that ends documents; "
            "set data.tokenizer or data.eod_token"
        )


def _check_layout(config: RunConfig, problems: list[str]) -> None:
    model, parallel = config.model, config.parallel
    tensor = parallel.tensor_model_parallel_size
    groups = model.num_query_groups
    tensor_field = "parallel.tensor_model_parallel_size"
    _divide(problems, "model.num_attention_heads", model.num_attention_heads, tensor_field, tensor)
    if groups is not None:
        _divide(problems, "model.num_query_groups", groups, tensor_field, tensor)
    ffn = default_ffn_hidden_size(model) if model.ffn_hidden_size is None else model.ffn_hidden_size
    _divide(problems, "model.ffn_hidden_size", ffn, tensor_field, tensor)
    if parallel.sequence_parallel and tensor == 1:
        problems.append(
            f"parallel.sequence_parallel: true needs {tensor_field} above 1, which is 1; set it to false"
        )
    _check_parts(config, problems)
    try:
        layers = len(parse_schedule(model.schedule))
    except ConfigError as error:
        problems.append(str(error))
        return
    check_pipeline(model, parallel, layers, problems)


def _check_parts(config: RunConfig, problems: list[str]) -> None:
    """The sequence over context and sequence parallel ranks, and heads over context parallel ones."""
    model, parallel = config.model, config.parallel
    tensor, context = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    parts, of = context, "parallel.context_parallel_size"
    if parallel.sequence_parallel and tensor > 1:
        parts, of = tensor, "parallel.tensor_model_parallel_size"
        if context > 1:
            parts, of = tensor * context, f"tensor {tensor} × context {context} parallel size ="
    _divide(problems, "model.seq_length", model.seq_length, of, parts)
    heads = model.num_attention_heads
    if min(tensor, context) < 1 or heads % tensor:
        return  # reported already
    if heads // tensor % context:
        problems.append(
            f"parallel.context_parallel_size: {context} does not divide the {heads // tensor} query heads of "
            f"a process (model.num_attention_heads {heads} / tensor_model_parallel_size {tensor}); "
            f"use a divisor of {heads // tensor}, or change the heads"
        )


def _check_batch(config: RunConfig, world_size: int | None, problems: list[str]) -> None:
    parallel, training = config.parallel, config.training
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    context, replicas = parallel.context_parallel_size, parallel.data_parallel_size
    one_replica = tensor * pipeline * context
    if min(tensor, pipeline, context, training.micro_batch_size, training.global_batch_size) < 1:
        return  # reported as limits of single fields
    product = f"tensor {tensor} × pipeline {pipeline} × context {context}"
    if world_size is not None and replicas is not None and world_size != one_replica * replicas:
        problems.append(
            f"parallel.data_parallel_size: {replicas} × {product} = {one_replica * replicas} processes, but "
            f"{world_size} are started; start {one_replica * replicas}, or set data_parallel_size to null"
        )
    elif world_size is not None and world_size % one_replica:
        problems.append(
            f"parallel: {product} = {one_replica} does not divide the {world_size} processes started; "
            f"start {_multiples(world_size, one_replica)}, or change the sizes"
        )
    if replicas is None:
        replicas = 1 if world_size is None else max(1, world_size // one_replica)
    _divide(
        problems,
        "training.global_batch_size",
        training.global_batch_size,
        f"micro_batch_size {training.micro_batch_size} × {replicas} replicas =",
        training.micro_batch_size * replicas,
    )
    check_interleaved_batch(parallel, training, replicas, problems)


def _check_data(config: RunConfig, problems: list[str]) -> None:
    data = config.data
    shares = [_number(part) for part in data.split.split(",")]
    if len(shares) != 3 or any(share is None or share < 0 for share in shares) or not any(shares):
        problems.append(
            f"data.split: {shown(data.split)} must be three shares, 0 or more, not all 0: train, validation "
            'and test, such as "98,1,1"'
        )
    for name in ("train", "validation", "test"):
        _check_blend(f"data.{name}", value_at(config, f"data.{name}"), problems)
    for sample_range in data.skip_samples:
        match = re.fullmatch(r"(\d+):(\d+)", sample_range)
        if match is None or int(match[1]) > int(match[2]):
            problems.append(
                f'data.skip_samples: {shown(sample_range)} must be "first:last" in whole numbers, '
                'first not above last, such as "1000:1200"'
            )


def _check_blend(path: str, entries: Sequence[str], problems: list[str]) -> None:
    """Either prefixes alone, or a weight before each prefix."""
    weights = [_number(entry) for entry in entries]
    if any(not entry.strip() for entry in entries):
        problems.append(f"{path}: has an empty entry; name prefixes of .bin/.idx files")
    if all(weight is None for weight in weights):
        return
    alternate = len(entries) % 2 == 0 and all(weight is not None for weight in weights[::2])
    if not alternate or any(weight is not None for weight in weights[1::2]):
        problems.append(
            f"{path}: {shown(list(entries))} must have a weight before every prefix or before none: "
            '["0.7", "a", "0.3", "b"] or ["a", "b"] (write ./2024 for a prefix that is a number)'
        )
        return
    for entry, weight in zip(entries[::2], weights[::2], strict=True):
        if weight is not None and weight <= 0:
            problems.append(f"{path}: weight {shown(entry)} must be above 0; leave out the prefix instead")


def _check_optimizer(optimizer: OptimizerConfig, steps: int, problems: list[str]) -> None:
    decay_steps, remedy = optimizer.decay_steps, ""
    if decay_steps is None:
        decay_steps, remedy = steps, " (training.steps)"
    if optimizer.warmup_steps > decay_steps:
        problems.append(
            f"optimizer.warmup_steps: {optimizer.warmup_steps} must not be above optimizer.decay_steps "
            f"{decay_steps}{remedy}; warm up for fewer steps or train longer"
        )
    elif optimizer.schedule == "wsd":
        room, wsd_steps = decay_steps - optimizer.warmup_steps, optimizer.wsd_decay_steps
        if wsd_steps is None:
            wsd_steps = default_wsd_decay_steps(decay_steps)
        if wsd_steps > room:
            problems.append(
                f"optimizer.wsd_decay_steps: {wsd_steps} must not be above the {room} steps "
                f"between warmup and optimizer.decay_steps {decay_steps}{remedy}; shorten it or the warmup"
            )
    if optimizer.min_lr > optimizer.lr:
        problems.append(
            f"optimizer.min_lr: {optimizer.min_lr} must not be above optimizer.lr {optimizer.lr}; lower it"
        )


def _divide(problems: list[str], path: str, value: int, by_name: str, by: int) -> None:
    if value < 1 or by < 1 or value % by == 0:
        return  # what is below 1 is reported as a limit of its own field
    problems.append(
        f"{path}: {value} is not divisible by {by_name} {by}; "
        f"use {_multiples(value, by)}, or change the divisor"
    )


def _multiples(value: int, by: int) -> str:
    """The multiples of `by` around `value`, which is none."""
    below = value // by * by
    return f"{below} or {below + by}" if below else str(by)


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def data_prefixes(entries: Sequence[str]) -> Sequence[str]:
    """The prefixes of `data.train` and its like, without weights."""
    weighted = bool(entries) and _number(entries[0]) is not None
    return entries[1::2] if weighted else entries


# Paths are shown whole, however long: their end is what differs.


def _missing(field: str, value: str, path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"{field}: {value!r} does not exist, nor does its folder {folder}; correct the path"
    nearest = nearest_name(path.name, sorted(entry.name for entry in folder.iterdir()))
    return f"{field}: {value!r} does not exist{nearest or f'; {folder} has nothing like it'}"


def _missing_data(field: str, prefix: str) -> list[str]:
    files = [Path(f"{prefix}.bin"), Path(f"{prefix}.idx")]
    absent = [file for file in files if not file.is_file()]
    stem, _, suffix = prefix.rpartition(".")
    if not absent:
        return []
    if suffix in ("bin", "idx") and Path(prefix).is_file():
        return [f"{field}: {prefix!r} must be the prefix alone; use {stem!r}"]
    if len(absent) == 1:
        return [f"{field}: {prefix!r} lacks {absent[0]}; run `chiar preprocess` again"]
    folder = Path(prefix).parent
    if not folder.is_dir():
        return [_missing(field, prefix, Path(prefix))]
    nearest = nearest_name(Path(prefix).name, sorted({file.stem for file in folder.glob("*.idx")}))
    return [f"{field}: no files {prefix}.bin and .idx{nearest or '; make them with `chiar preprocess`'}"]
