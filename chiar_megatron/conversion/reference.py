"""The authors' published `.pt` files (DESIGN, section 1): CHIAR with a threshold, soft or hard router,
mixed training's files, and the full-attention baseline. Nothing in a file is executed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from chiar_megatron.config.fields import nearest_name
from chiar_megatron.config.problems import shown
from chiar_megatron.conversion.formats import ReferenceOptions, RoutingMode
from chiar_megatron.conversion.keymap import Rule, Sizes, reference_rules, unwrapped_names
from chiar_megatron.conversion.torch_files import (
    StoredTensor,
    read_torch_file,
    same_values,
    tensors_of,
)
from chiar_megatron.errors import CheckpointError, ConfigError
from chiar_megatron.model.tensors import LazyTensor, mismatches, refuse

Kind = Literal["chiar", "baseline"]
ROUTING_MODES = ("threshold", "soft", "hard")
TAU_LOW, TAU_HIGH = 0.8935, 0.8973  # the paper's 33rd and 67th percentile
WRAPPERS = ("model", "model_state_dict", "state_dict")  # theirs, and what other scripts write
HEAD_SIZE = 64  # where a file has no rope.inv_freq
ROTARY_BASE = 10000.0
ENTROPY_EPSILON = 1e-8  # inside their logarithm

_LAYER = re.compile(r"(layers|attns|ffns|ffn_norms)\.(\d+)\.")


@dataclass(frozen=True)
class ReferenceCheckpoint:
    """One file, checked: every tensor is there, of the right shape, finite."""

    kind: Kind
    schedule: tuple[str, ...]
    routing_mode: RoutingMode
    """Of its routed layers; "threshold" where there are none."""
    sizes: Sizes
    tau: float
    """Midpoint of the thresholds, to be compared with the authors' entropy."""
    tied: bool
    tensors: dict[str, Callable[[], Tensor]]
    """Each read when called; CheckpointError if a value is not finite."""
    rules: tuple[Rule, ...]
    step: int
    val_ppl: float | None
    notes: tuple[str, ...]
    """What was dropped, assumed or overruled, in sentences for the user."""

    @property
    def threshold(self) -> float:
        """τ for our entropy: theirs, `-Σ p ln(p + 1e-8)/ln h`, lies lower by nearly `h·1e-8/ln h`."""
        return self.tau + entropy_offset(self.sizes.hidden)

    def native_tensors(self) -> dict[str, LazyTensor]:
        """The model's parameters under native names and in native layout, float32."""
        return {rule.native: self._lazy(rule) for rule in self.rules}

    def _lazy(self, rule: Rule) -> LazyTensor:
        source = self.tensors[rule.source]
        return LazyTensor(rule.shape, torch.float32, lambda: rule.convert(source().float()))


def entropy_offset(hidden: int) -> float:
    """By how much the authors' entropy lies below ours (with `dc_power_weight` 2), to first order."""
    return hidden * ENTROPY_EPSILON / math.log(hidden) if hidden > 1 else 0.0


def read_reference(path: Path, options: ReferenceOptions) -> ReferenceCheckpoint:
    """Read and check one of the authors' files.

    Raises CheckpointError if it is none, would execute code, is torn, or its tensors do not fit together
    (each named with its nearest match); ConfigError if an option contradicts the file.
    """
    content = read_torch_file(path)
    notes: list[str] = []
    state, extras = _state_of(content, path, notes)
    notes += _drop_extras(extras)
    tied = "lm_head.weight" in state and same_values(state["lm_head.weight"], state["token_emb.weight"])
    if tied:
        del state["lm_head.weight"]
    kind: Kind = "baseline" if any(name.startswith("attns.") for name in state) else "chiar"
    schedule = _schedule(kind, state, path)
    sizes = _sizes(kind, state, extras, options, notes)
    mode = _routing_mode(content.get("cfg"), state, schedule, options, path)
    rules = reference_rules(kind, schedule, sizes, has_router=mode != "threshold", has_head=not tied)
    shapes = {name: tensor.shape for name, tensor in state.items()}
    wanted = {rule.source: rule.shape for rule in rules}
    refuse(mismatches(wanted, shapes), path, "its tensors do not fit its layers")
    _check_floats(state, path, notes)
    return ReferenceCheckpoint(
        kind=kind,
        schedule=schedule,
        routing_mode=mode,
        sizes=sizes,
        tau=_tau(options, content.get("cfg"), "R" in schedule and mode == "threshold", notes),
        tied=tied,
        tensors={name: partial(_finite, tensor, name, path) for name, tensor in state.items()},
        rules=tuple(rules),
        step=_step(content.get("step"), notes),
        val_ppl=_number(content.get("val_ppl"), float),
        notes=tuple(notes),
    )


def _state_of(
    content: Mapping[str, Any], path: Path, notes: list[str]
) -> tuple[dict[str, StoredTensor], dict[str, StoredTensor]]:
    """The model's tensors, and those that are not the language model's (rotary buffers, classifiers)."""
    key = next((key for key in WRAPPERS if isinstance(content.get(key), dict)), None)
    found = content if key is None else content[key]
    if key is None and not any(str(name).endswith("token_emb.weight") for name in content):
        keys = ", ".join(map(str, list(content)[:6]))
        raise CheckpointError(
            f"{path} is none of the authors' checkpoints: it has no 'model' with tensors (it has {keys})"
        )
    given = tensors_of(found, path, key or "its")
    names = unwrapped_names(given, "token_emb.weight")
    model = {names[name]: tensor for name, tensor in given.items()}
    if model.keys() != given.keys():
        notes.append("names are read without the prefixes of wrapping modules (module., _orig_mod.)")
    extras = {name for name in model if _is_extra(name)}
    state = {name: value for name, value in model.items() if name not in extras}
    embedding = state.get("token_emb.weight")
    if embedding is None or len(embedding.shape) != 2 or 0 in embedding.shape:
        nearest = nearest_name("token_emb.weight", list(state))
        raise CheckpointError(
            f"{path} is none of the authors' checkpoints: no token_emb.weight of shape [vocab, h]{nearest}"
        )
    return state, {name: model[name] for name in extras}


def _is_extra(name: str) -> bool:
    return name.startswith("_cls_head_") or "rope" in name.split(".")


def _drop_extras(extras: Mapping[str, StoredTensor]) -> list[str]:
    heads = sorted(name for name in extras if name.startswith("_cls_head_"))
    return [f"dropped mixed training's classifiers: {', '.join(heads)}"] if heads else []


def _schedule(kind: Kind, state: Mapping[str, StoredTensor], path: Path) -> tuple[str, ...]:
    """A letter a layer, read off the names."""
    folders = {"layers"} if kind == "chiar" else {"attns", "ffns", "ffn_norms"}
    matches = [_LAYER.match(name) for name in state]
    present = {int(match[2]) for match in matches if match and match[1] in folders}
    absent = next(index for index in range(len(present) + 1) if index not in present)
    if not present or absent < len(present):
        raise CheckpointError(f"{path}: layer {absent} is missing: no {min(folders)}.{absent}.… in it")
    if kind == "baseline":
        return ("A",) * len(present)
    letters = []
    for index in range(len(present)):
        mixes = any(name.startswith(f"layers.{index}.dct_mix.") for name in state)
        attends = any(name.startswith(f"layers.{index}.attn.") for name in state)
        if not mixes and not attends:
            raise CheckpointError(f"{path}: layers.{index} has tensors of neither dct_mix nor attn")
        letters.append("R" if mixes and attends else "D" if mixes else "A")
    return tuple(letters)


def _sizes(
    kind: Kind,
    state: Mapping[str, StoredTensor],
    extras: Mapping[str, StoredTensor],
    options: ReferenceOptions,
    notes: list[str],
) -> Sizes:
    vocab, hidden = state["token_emb.weight"].shape
    ffn_name = r"ffns\.\d+\.0\.weight" if kind == "baseline" else r"layers\.\d+\.ffn\.0\.weight"
    ffn = _rows(state, ffn_name) or 4 * hidden
    width = (_rows(state, r"(attns\.\d+|layers\.\d+\.attn)\.qkv\.weight") or 0) // 3 or hidden
    if options.num_heads is not None:
        if options.num_heads < 1 or width % options.num_heads:
            raise ConfigError(f"--num-heads {options.num_heads} does not divide the attention width {width}")
        heads = options.num_heads
    else:
        head_size = _head_size(extras, notes)
        if width % head_size:
            raise ConfigError(
                f"heads of {head_size} do not divide the attention width {width}; give --num-heads"
            )
        heads = width // head_size
    return Sizes(vocab, hidden, ffn, heads, width // heads)


def _rows(state: Mapping[str, StoredTensor], pattern: str) -> int | None:
    """Rows of the first tensor of this name."""
    return next((t.shape[0] for name, t in state.items() if re.fullmatch(pattern, name) and t.shape), None)


def _head_size(extras: Mapping[str, StoredTensor], notes: list[str]) -> int:
    frequencies = [tensor.load() for name, tensor in extras.items() if name.endswith("rope.inv_freq")]
    lengths = {tensor.numel() for tensor in frequencies}
    if not lengths:
        notes.append(f"no rope.inv_freq in the file: heads of {HEAD_SIZE} assumed (--num-heads overrules)")
        return HEAD_SIZE
    if len(lengths) > 1 or 0 in lengths:
        raise ConfigError(f"rope.inv_freq has lengths {sorted(lengths)}, so no head size; give --num-heads")
    head_size = 2 * lengths.pop()
    expected = ROTARY_BASE ** -(torch.arange(0, head_size, 2) / head_size)
    if not all(torch.allclose(tensor.float(), expected, rtol=1e-2) for tensor in frequencies):
        notes.append(f"rope.inv_freq is not that of base {ROTARY_BASE:.0f}, which is used all the same")
    return head_size


def _routing_mode(
    cfg: object,
    state: Mapping[str, StoredTensor],
    schedule: tuple[str, ...],
    options: ReferenceOptions,
    path: Path,
) -> RoutingMode:
    """Of the option, else of the file's cfg, else of the names: only a threshold has no router tensors."""
    if "R" not in schedule:
        if options.routing_mode in ("soft", "hard"):
            raise ConfigError(f"--routing-mode {options.routing_mode}: {path} has no routed layers")
        return "threshold"
    mode, source = options.routing_mode, "--routing-mode"
    if mode is None and isinstance(cfg, dict):
        mode, source = cfg.get("routing_mode"), f"{path}: cfg.routing_mode"
    has_gates = any(".router." in name for name in state)
    if mode is None:
        if has_gates:
            raise ConfigError(
                f"{path} has routers but does not say of which kind; give --routing-mode soft or hard"
            )
        return "threshold"
    if mode not in ROUTING_MODES:
        raise CheckpointError(f"{source} {shown(mode)} is unknown; give --routing-mode threshold|soft|hard")
    if has_gates != (mode != "threshold"):
        found = "has router tensors, which a threshold has not" if has_gates else "has no router tensors"
        raise ConfigError(f"{source} {mode} does not fit: {path} {found}")
    return mode


def _tau(options: ReferenceOptions, cfg: object, is_used: bool, notes: list[str]) -> float:
    """The midpoint: of the flags, else of the file's cfg, else of what was published."""
    told = cfg if isinstance(cfg, dict) else {}
    low, high = (
        flag if flag is not None else _number(told.get(name), float)
        for flag, name in ((options.tau_low, "tau_low"), (options.tau_high, "tau_high"))
    )
    if is_used and (low is None or high is None):
        assumed = (TAU_LOW if low is None else low, TAU_HIGH if high is None else high)
        notes.append(
            f"thresholds {assumed[0]} and {assumed[1]} assumed: the file does not tell "
            "(--tau-low, --tau-high)"
        )
    low, high = TAU_LOW if low is None else low, TAU_HIGH if high is None else high
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise ConfigError(f"--tau-low {low} and --tau-high {high} must be numbers, low not above high")
    return (low + high) / 2


def _check_floats(state: Mapping[str, StoredTensor], path: Path, notes: list[str]) -> None:
    """Half precision is widened exactly, double precision rounded; other types are no weights."""
    wrong = [f"{name} has dtype {t.dtype}" for name, t in state.items() if not t.dtype.is_floating_point]
    refuse(wrong, path, "weights must be floating-point")
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in state.values()} - {"float32"}
    if dtypes:
        notes.append(f"weights stored as {', '.join(sorted(dtypes))} are written as float32")


def _finite(tensor: StoredTensor, name: str, path: Path) -> Tensor:
    values = tensor.load()
    if not values.float().isfinite().all():
        raise CheckpointError(f"{path}: {name} has values that are not finite; it holds no usable weights")
    return values


def _step(value: object, notes: list[str]) -> int:
    if isinstance(value, StoredTensor) and math.prod(value.shape) == 1:
        value = value.load().item()
    step = _number(value, int)
    if step is None and value is not None:
        notes.append(f"step 0 assumed: the file says {shown(value)}")
    return step or 0


def _number(value: object, kind: type) -> Any:
    """A plain number of 0 or more; None for anything else."""
    try:
        is_number = isinstance(value, (int, float)) and math.isfinite(value)
    except OverflowError:  # a whole number beyond all floats
        return None
    return kind(value) if is_number and value >= 0 else None  # type: ignore[operator]
