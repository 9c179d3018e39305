"""Dense Hugging Face models of the Llama architecture, upcycled: layers get a router and a filter.

The router is a learned one that starts near "all light": tiny random weights, so that scores differ from
token to token and attention's gate 2σ(score) is 1 within 1e-5, and a threshold far below. So the model
answers as the source does, until a run with `model.router.target` moves the threshold. Filters start at 0:
a token that goes dark first passes the operator unchanged.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig

from chiar_megatron.config.load import resolve_config
from chiar_megatron.config.schedule import parse_schedule
from chiar_megatron.config.schema import (
    DataConfig,
    MetaRouterConfig,
    ModelConfig,
    RotaryScalingConfig,
    RouterConfig,
    RunConfig,
)
from chiar_megatron.config.validate import check_config
from chiar_megatron.conversion.canonical import Canonical
from chiar_megatron.conversion.formats import Answer, ConvertOptions
from chiar_megatron.conversion.hf_tokenizers import find_tokenizer
from chiar_megatron.conversion.native_forward import with_rounding_noise
from chiar_megatron.errors import CheckpointError, ConfigError
from chiar_megatron.huggingface.folder import CONFIG, native_tensors, read_json, stored_tensors
from chiar_megatron.model.tensors import LazyTensor, refuse, tensor_specs

DENSE = ("llama", "mistral", "qwen2")
SCORE_STD = 1e-6  # of a token's first score
THRESHOLD = -1.0  # far below every first score
TARGET = 0.9  # share of light tokens that training begins to hold, unless told otherwise


def is_dense(folder: Path) -> bool:
    """Whether the folder's model is one of those that can be upcycled."""
    return read_json(folder / CONFIG).get("model_type") in DENSE


def read_dense(folder: Path, options: ConvertOptions) -> Canonical:
    """The CHIAR model that a dense one becomes.

    Raises ConfigError without a schedule or for one that does not fit, CheckpointError for what the
    architecture here does not have.
    """
    config = _native_config(folder, options.schedule)
    stored = stored_tensors(folder)
    # The same tensors, were every layer an attention layer.
    layers = len(parse_schedule(config.model.schedule))
    dense = native_tensors(replace(config.model, schedule=f"A*{layers}"), _without_buffers(stored), folder)
    dtype = dense["embedding.word_embeddings.weight"].dtype
    tensors = {
        name: dense[name]
        if name in dense
        else _new(name, spec.shape, torch.float32 if spec.is_buffer else dtype)
        for name, spec in tensor_specs(config.model).items()
    }
    tokenizer, missing = find_tokenizer(folder, options.tokenizer)
    return Canonical(
        config,
        tensors,
        notes=(
            *missing,
            f"upcycled: routers start near all light (threshold {THRESHOLD}), filters at 0; go on by "
            f"`chiar pretrain DST/config.yaml --init-from DST run_dir=...` at model.router.target {TARGET}",
        ),
        tokenizer=tokenizer,
        facts={"source_model": read_json(folder / CONFIG).get("model_type")},
    )


@torch.no_grad()
def dense_answer(folder: Path, ids_BS: Tensor, noisy: bool) -> Answer:
    """By transformers' own layers, one at a time, with attention computed eagerly in float32."""
    config = _hf_config(folder)
    config._attn_implementation = "eager"
    parts, stored = _modules(config), stored_tensors(folder)
    rotary = parts["RotaryEmbedding"](config)
    x = F.embedding(ids_BS, stored["model.embed_tokens.weight"].load().float())
    x = with_rounding_noise(x) if noisy else x
    s = ids_BS.shape[1]
    position_1S = torch.arange(s)[None]
    turns = rotary(x, position_1S)
    mask_11SS = torch.full((s, s), torch.finfo(torch.float32).min).triu(1)[None, None]
    for index in range(config.num_hidden_layers):
        layer = parts["DecoderLayer"](config, index).eval()
        _fill(layer, stored, f"model.layers.{index}.")
        out = layer(x, attention_mask=mask_11SS, position_ids=position_1S, position_embeddings=turns)
        x = out[0] if isinstance(out, tuple) else out
    norm = parts["RMSNorm"](config.hidden_size, eps=config.rms_norm_eps)
    _fill(norm, stored, "model.norm.")
    head = stored["model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"]
    return Answer(norm(x) @ head.load().float().T)


def _modules(config: Any) -> dict[str, Any]:
    """transformers' classes of this architecture, by their names without the model's."""
    from transformers.models.llama import modeling_llama
    from transformers.models.mistral import modeling_mistral
    from transformers.models.qwen2 import modeling_qwen2

    sources = {
        "llama": (modeling_llama, "Llama"),
        "mistral": (modeling_mistral, "Mistral"),
        "qwen2": (modeling_qwen2, "Qwen2"),
    }
    source, prefix = sources[config.model_type]
    return {name: getattr(source, prefix + name) for name in ("RotaryEmbedding", "DecoderLayer", "RMSNorm")}


def _hf_config(folder: Path) -> Any:
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises many kinds
        raise CheckpointError(f"{folder / CONFIG}: {error}") from None


def _native_config(folder: Path, schedule: str | None) -> RunConfig:
    theirs = _hf_config(folder)
    layers = theirs.num_hidden_layers
    if schedule is None:
        raise ConfigError(
            f"--schedule is missing: {folder} holds a dense {theirs.model_type} of {layers} layers; say "
            f'which of them become routed, such as --schedule "R*{layers}"'
        )
    letters = parse_schedule(schedule)
    if len(letters) != layers or "D" in letters:
        raise ConfigError(
            f"--schedule {schedule}: {len(letters)} layers{', some D' if 'D' in letters else ''}; the source "
            f"has {layers} attention layers, each of which stays A or becomes R"
        )
    refuse(_unknown_here(theirs), folder, "this architecture has no counterpart here")
    eos = getattr(theirs, "eos_token_id", None)
    model = ModelConfig(
        schedule=schedule,
        hidden_size=theirs.hidden_size,
        num_attention_heads=theirs.num_attention_heads,
        num_query_groups=theirs.num_key_value_heads,
        kv_channels=getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads,
        ffn_hidden_size=theirs.intermediate_size,
        seq_length=theirs.max_position_embeddings,
        vocab_size=theirs.vocab_size,
        activation="swiglu",
        norm="pre",
        normalization="RMSNorm",
        norm_epsilon=theirs.rms_norm_eps,
        add_bias=False,
        add_qkv_bias=True if theirs.model_type == "qwen2" else None,
        tie_embeddings=bool(theirs.tie_word_embeddings),
        rotary_base=float(_rope(theirs)["rope_theta"]),
        rotary_scaling=_scaling(_rope(theirs)),
        init_std=theirs.initializer_range,
        router=RouterConfig(kind="learned", threshold=THRESHOLD, target=TARGET),
        meta_router=MetaRouterConfig(enabled=False),
    )
    data = DataConfig(eod_token=next(iter(eos), None) if isinstance(eos, list) else eos)
    config = resolve_config(
        RunConfig(run_dir=str(folder), model=model, data=data), vocab_size=None, eod_token=None
    )
    check_config(config)
    return config


def _rope(theirs: Any) -> dict[str, Any]:
    """Base and scaling: transformers 5 keeps them in one dict, 4 in two fields."""
    found = getattr(theirs, "rope_parameters", None)
    if isinstance(found, dict):
        return found
    scaling = getattr(theirs, "rope_scaling", None) or {}
    return {"rope_theta": theirs.rope_theta, "rope_type": "default", **scaling}


def _scaling(rope: Mapping[str, Any]) -> RotaryScalingConfig:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "linear":
        return RotaryScalingConfig("linear", float(rope["factor"]))
    if kind == "llama3":
        return RotaryScalingConfig(
            "llama3",
            float(rope["factor"]),
            float(rope["low_freq_factor"]),
            float(rope["high_freq_factor"]),
            int(rope["original_max_position_embeddings"]),
        )
    return RotaryScalingConfig()


def _unknown_here(theirs: Any) -> list[str]:
    """What these models may have and ours have not, a line each."""
    problems = []
    rope = _rope(theirs)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        problems.append(f"rope_type is {kind}; default, linear and llama3 are converted")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        problems.append(f"partial_rotary_factor is {rope['partial_rotary_factor']}; it must be 1")
    if theirs.hidden_act not in ("silu", "swish"):
        problems.append(f"hidden_act is {theirs.hidden_act}; silu is converted")
    if theirs.model_type == "mistral" and getattr(theirs, "sliding_window", None) is not None:
        problems.append(f"sliding_window is {theirs.sliding_window}; only full attention is converted")
    if theirs.model_type == "qwen2" and getattr(theirs, "use_sliding_window", False):
        problems.append("use_sliding_window is true; only full attention is converted")
    for name in ("attention_bias", "mlp_bias"):
        if getattr(theirs, name, False):
            problems.append(f"{name} is true; biases of queries, keys and values alone (Qwen2) are converted")
    return problems


def _without_buffers(stored: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Older files hold rotary tables."""
    return {name: tensor for name, tensor in stored.items() if not name.endswith("rotary_emb.inv_freq")}


def _new(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> LazyTensor:
    """A tensor that the dense model has not: of a router, a spectral filter or its norm."""

    def load() -> Tensor:
        if name.endswith("router.threshold"):
            return torch.full(shape, THRESHOLD)
        if name.endswith("router.score.linear.weight"):
            seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "little")
            weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
            scaled: Tensor = weight * (SCORE_STD / math.sqrt(shape[-1]))
            return scaled.to(dtype)
        if name.endswith("spectral_norm.weight"):
            return torch.ones(shape, dtype=dtype)
        return torch.zeros(shape, dtype=dtype)

    return LazyTensor(shape, dtype, load)


def _fill(module: torch.nn.Module, stored: Mapping[str, LazyTensor], prefix: str) -> None:
    for name, tensor in module.state_dict().items():
        tensor.copy_(stored[prefix + name].load())
