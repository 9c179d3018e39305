"""The authors' files as a format of the hub: import with their conventions folded in, and export with them.

Their transform is not orthonormal and their entropy counts the DC power twice (DESIGN, section 1): w is
halved on the way back, and a router of ours that counts it once has no counterpart there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chiar_megatron.config.load import resolve_config
from chiar_megatron.config.schedule import parse_schedule
from chiar_megatron.config.schema import (
    MetaRouterConfig,
    ModelConfig,
    RouterConfig,
    RunConfig,
)
from chiar_megatron.config.validate import check_config
from chiar_megatron.conversion.canonical import Canonical
from chiar_megatron.conversion.formats import Answer, ConvertOptions, Format
from chiar_megatron.conversion.journal import Journal
from chiar_megatron.conversion.keymap import Rule, Sizes, reference_rules
from chiar_megatron.conversion.reference import (
    ROTARY_BASE,
    ReferenceCheckpoint,
    entropy_offset,
    read_reference,
)
from chiar_megatron.conversion.reference_forward import reference_forward
from chiar_megatron.conversion.torch_files import in_memory, write_torch_file
from chiar_megatron.model.tensors import LazyTensor, refuse, tensor_specs

SEQ_LENGTH = 256  # the paper's; the authors' files do not tell
ROUTER_KINDS = {"threshold": "entropy", "soft": "soft", "hard": "hard"}


class Reference(Format):
    """One `.pt` file."""

    name = "reference"
    is_single_file = True

    def recognises(self, path: Path) -> bool:
        """By its ending."""
        return path.is_file() and path.suffix in (".pt", ".pth")

    def read(self, path: Path, options: ConvertOptions) -> Canonical:
        """With their conventions folded into ours."""
        checkpoint = read_reference(path, options.reference)
        config = _native_config(checkpoint)
        specs = tensor_specs(config.model)
        tensors = checkpoint.native_tensors()
        for name, spec in specs.items():
            if spec.is_buffer:
                value = checkpoint.threshold if name.endswith(".threshold") else 0.0
                if checkpoint.routing_mode != "threshold":
                    value = 0.0
                tensors[name] = _constant(spec.shape, value)
        assert tensors.keys() == specs.keys(), tensors.keys() ^ specs.keys()
        return Canonical(
            config,
            {name: tensors[name] for name in specs},
            step=checkpoint.step,
            notes=tuple(_notes(checkpoint)),
            facts=_facts(checkpoint),
        )

    def losses(self, model: Canonical, options: ConvertOptions) -> list[str]:
        """What their code has no way to compute is refused."""
        refuse(
            _unknown_there(model), Path(model.config.run_dir), "the authors' code cannot compute this model"
        )
        notes = ["written as float32; their files hold no tokenizer, tokens seen or optimizer state"]
        letters = parse_schedule(model.config.model.schedule)
        if model.config.model.meta_router.enabled and letters != ("D", *"R" * (len(letters) - 2), "A"):
            notes.append(
                f"the authors' own script builds D R*{max(len(letters) - 2, 0)} A: it will not load "
                f"{model.config.model.schedule}"
            )
        return notes

    def write(self, model: Canonical, journal: Journal, options: ConvertOptions) -> None:
        """The file, with `lm_head.weight` and rotary buffers as their code saves them."""
        journal.file(journal.destination.name, lambda path: self._save(model, path, journal), model.bytes)

    def _save(self, model: Canonical, path: Path, journal: Journal) -> None:
        config = model.config.model
        kind, letters = _kind(config), parse_schedule(config.schedule)
        head_size = config.kv_channels or 0
        sizes = Sizes(
            config.vocab_size or 0, config.hidden_size, config.ffn_hidden_size or 0,
            config.num_attention_heads, head_size,
        )  # fmt: skip
        blends = config.router.kind in ("soft", "hard") and "R" in letters
        rules = reference_rules(kind, letters, sizes, has_router=blends, has_head=not config.tie_embeddings)
        state = {rule.source: _inverse(rule, model.tensors[rule.native]) for rule in rules}
        if config.tie_embeddings:
            state["lm_head.weight"] = state["token_emb.weight"]
        rope = _rope_buffers(head_size, config.seq_length)
        for index, letter in enumerate(letters):
            if letter in "AR":
                layer = f"attns.{index}" if kind == "baseline" else f"layers.{index}.attn"
                state |= {f"{layer}.rope.{name}": in_memory(tensor) for name, tensor in rope.items()}
        cfg: dict[str, Any] = {"vocab_size": sizes.vocab, "routing_mode": "threshold"}
        if kind == "chiar" and "R" in letters:
            modes = {native: theirs for theirs, native in ROUTER_KINDS.items()}
            cfg["routing_mode"] = modes[config.router.kind]
            if config.router.kind == "entropy":
                cfg["tau_low"] = cfg["tau_high"] = _thresholds(model)[0] - entropy_offset(config.hidden_size)
        content = {"step": model.step, "model": state, "val_ppl": math.nan, "cfg": cfg}
        write_torch_file(path, content, journal.advance)

    def answer(
        self,
        path: Path,
        options: ConvertOptions,
        ids_BS: Tensor,
        forced_BS: Mapping[int, Tensor] | None = None,
        noisy: bool = False,
    ) -> Answer:
        """By their model, written down from its description (`reference_forward.py`)."""
        checkpoint = read_reference(path, options.reference)
        theirs = reference_forward(checkpoint, ids_BS, torch.float64 if noisy else torch.float32, forced_BS)
        offset = entropy_offset(checkpoint.sizes.hidden)
        is_threshold = checkpoint.routing_mode == "threshold"
        entropy = {number: values + offset for number, values in theirs.entropy_BS.items()}
        # A float32 threshold, as the checkpoint holds it.
        border = float(torch.tensor(checkpoint.threshold))
        return Answer(
            theirs.logits_BSV,
            theirs.light_BS,
            entropy if is_threshold else theirs.weight_BS,
            dict.fromkeys(theirs.light_BS, border) if is_threshold else {},
            entropy,
            theirs.meta_gate,
        )


def schedule_text(letters: Sequence[str]) -> str:
    """The schedule string of a letter a layer: "D R*26 A"."""
    runs = [(letter, len(list(group))) for letter, group in groupby(letters)]
    return " ".join(letter if count == 1 else f"{letter}*{count}" for letter, count in runs)


def _native_config(checkpoint: ReferenceCheckpoint) -> RunConfig:
    """The resolved recipe of an imported model; data and training are defaults.

    Raises ConfigError where sizes contradict each other.
    """
    sizes = checkpoint.sizes
    routes_by_entropy = checkpoint.routing_mode == "threshold" and "R" in checkpoint.schedule
    model = ModelConfig(
        schedule=schedule_text(checkpoint.schedule),
        hidden_size=sizes.hidden,
        num_attention_heads=sizes.heads,
        kv_channels=sizes.head_size,
        ffn_hidden_size=sizes.ffn,
        seq_length=SEQ_LENGTH,
        vocab_size=sizes.vocab,
        activation="gelu",
        norm="post",
        normalization="LayerNorm",
        norm_epsilon=1e-5,
        add_bias=True,
        tie_embeddings=checkpoint.tied,
        rotary_base=ROTARY_BASE,
        router=RouterConfig(
            kind=ROUTER_KINDS[checkpoint.routing_mode],  # type: ignore[arg-type]
            threshold=checkpoint.threshold if routes_by_entropy else None,
            dc_power_weight=2.0,
        ),
        # The pooling it was trained with, so that logits agree; it sees future tokens.
        meta_router=MetaRouterConfig(enabled=checkpoint.kind == "chiar", pooling="batch"),
    )
    config = resolve_config(RunConfig(model=model), vocab_size=None, eod_token=None)
    check_config(config)
    return config


def _notes(checkpoint: ReferenceCheckpoint) -> list[str]:
    notes = [*checkpoint.notes, f"model.seq_length {SEQ_LENGTH} assumed: the file does not tell it"]
    if checkpoint.kind == "chiar":
        notes.append(
            "meta_router.pooling stays batch, as trained, so that logits agree: it sees future tokens"
        )
    return notes


def _facts(checkpoint: ReferenceCheckpoint) -> dict[str, Any]:
    routes_by_entropy = checkpoint.routing_mode == "threshold" and "R" in checkpoint.schedule
    return {
        "kind": checkpoint.kind,
        "routing_mode": checkpoint.routing_mode if "R" in checkpoint.schedule else None,
        "tau": checkpoint.tau if routes_by_entropy else None,
        "threshold": checkpoint.threshold if routes_by_entropy else None,
        "val_ppl": checkpoint.val_ppl,
    }


def _rope_buffers(head_size: int, length: int) -> dict[str, Tensor]:
    """What their rotary module saves: frequencies, and tables of both halves `[length, d]`."""
    inv_freq_D = 1.0 / ROTARY_BASE ** (torch.arange(0, head_size, 2, dtype=torch.float32) / head_size)
    angle_SD = torch.outer(torch.arange(length, dtype=torch.float32), inv_freq_D).repeat(1, 2)
    return {"inv_freq": inv_freq_D, "cos_cache": angle_SD.cos(), "sin_cache": angle_SD.sin()}


def _inverse(rule: Rule, tensor: LazyTensor) -> LazyTensor:
    return LazyTensor(rule.shape, torch.float32, lambda: rule.invert(tensor.load().float()))


def _constant(shape: tuple[int, ...], value: float) -> LazyTensor:
    return LazyTensor(shape, torch.float32, lambda: torch.full(shape, value))


def _kind(config: ModelConfig) -> str:
    return "chiar" if config.meta_router.enabled else "baseline"


def _thresholds(model: Canonical) -> list[float]:
    return [float(t.load()) for name, t in model.tensors.items() if name.endswith(".router.threshold")]


def _unknown_there(model: Canonical) -> list[str]:
    """What the authors' code has no way to compute, a line each."""
    config = model.config.model
    router, letters = config.router, parse_schedule(config.schedule)
    wanted: list[tuple[str, object, object]] = [
        ("norm", config.norm, "post"),
        ("normalization", config.normalization, "LayerNorm"),
        ("norm_epsilon", config.norm_epsilon, 1e-5),
        ("activation", config.activation, "gelu"),
        ("add_bias", config.add_bias, True),
        ("add_qkv_bias", config.add_qkv_bias is not False, True),
        ("num_query_groups", config.num_query_groups, config.num_attention_heads),
        ("rotary_base", config.rotary_base, ROTARY_BASE),
        ("rotary_scaling.rope_type", config.rotary_scaling.rope_type, "none"),
        ("mask_documents", config.mask_documents, False),
    ]
    if config.meta_router.enabled:
        wanted.append(("meta_router.pooling", config.meta_router.pooling, "batch"))
    if "R" in letters:
        wanted += [
            ("router.dc_power_weight", router.dc_power_weight, 2.0),
            ("router.operators", router.operators, "spectral_attention"),
            ("router.keys_values", router.keys_values, "all"),
        ]
    problems = [
        f"model.{name} is {own}; it knows {theirs} alone" for name, own, theirs in wanted if own != theirs
    ]
    if "R" in letters and router.kind not in ROUTER_KINDS.values():
        problems.append(f"model.router.kind is {router.kind}; it knows entropy, soft and hard alone")
    if not config.meta_router.enabled and set(letters) != {"A"}:
        problems.append(
            f"model.schedule is {config.schedule} without a MetaRouter; it knows A layers alone so"
        )
    if router.kind == "entropy" and len(set(_thresholds(model))) > 1:
        problems.append("thresholds differ from layer to layer; it knows one for all")
    return problems
