"""Megatron-LM's arguments, as its checkpoints carry them, and our config: each from the other."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from chiar_megatron.config.load import config_from_dict, resolve_config, to_dict
from chiar_megatron.config.problems import shown
from chiar_megatron.config.schedule import parse_schedule
from chiar_megatron.config.schema import (
    DataConfig,
    MetaRouterConfig,
    ModelConfig,
    RotaryScalingConfig,
    RunConfig,
)
from chiar_megatron.config.validate import check_config
from chiar_megatron.errors import CheckpointError
from chiar_megatron.model.tensors import refuse

CHIAR_KEY = "chiar_config"  # our own part of the arguments
_ROPE_SCALING_LENGTH = 8192  # Megatron-LM's --use-rope-scaling knows Llama 3.1's alone
_LOW, _HIGH = 1.0, 4.0
FP8_NOTE = "TransformerEngine's extra states (scaling factors of fp8) are left out, unread"
# What must be as here for a model of ours; Megatron-LM's own default where an argument is absent.
_WANTED: dict[str, tuple[Any, Any]] = {
    "position_embedding_type": ("rope", "learned_absolute"),
    "rotary_percent": (1.0, 1.0),
    "rotary_interleaved": (False, False),
    "num_experts": (None, None),
    "multi_latent_attention": (False, False),
    "qk_layernorm": (False, False),
    "qk_l2_norm": (False, False),
    "softmax_scale": (None, None),
    "attention_output_gate": (False, False),
    "experimental_attention_variant": (None, None),
    "glu_linear_offset": (0.0, 0.0),
    "activation_func_clamp_value": (None, None),
    "apply_residual_connection_post_layernorm": (False, False),
    "squared_relu": (False, False),
    "openai_gelu": (False, False),
    "onnx_safe": (None, None),
    "quick_geglu": (False, False),
    "window_size": (None, None),
    "mtp_num_layers": (None, None),
    "softmax_type": ("vanilla", "vanilla"),
    "expert_model_parallel_size": (1, 1),
    "apply_layernorm_1p": (False, False),
    "no_rope_freq": (None, None),
    "heterogeneous_layers_config_path": (None, None),
}


def config_of(args: Namespace, path: Path, vocab_size: int, tied: bool) -> tuple[RunConfig, list[str]]:
    """The resolved recipe of a checkpoint with these arguments, and notes for the user.

    vocab_size: rows of its token table, used where the arguments do not tell how many are padding.
    Raises CheckpointError naming the arguments that no model of ours can have.
    """
    own = getattr(args, CHIAR_KEY, None)
    if isinstance(own, dict):
        return config_from_dict(own, f"{path}: {CHIAR_KEY}"), []
    told = {name: getattr(args, name, default) for name, (_, default) in _WANTED.items()}
    problems = [
        f"--{name.replace('_', '-')} is {told[name]}; only {wanted} is converted"
        for name, (wanted, _) in _WANTED.items()
        if told[name] != wanted
    ]
    refuse(problems, path, "it is another kind of model")
    notes = []
    if getattr(args, "fp8", None):
        notes.append(FP8_NOTE)
    real = getattr(args, "vocab_size", None)
    if real is None:
        notes.append(f"vocabulary {vocab_size} taken with its padding: the arguments do not tell its size")
    elif not isinstance(real, int) or not 0 < real <= vocab_size:
        raise CheckpointError(
            f"{path}: --vocab-size is {shown(real)}, but the token table has {vocab_size} rows"
        )
    swiglu = bool(getattr(args, "swiglu", False))
    biased = bool(getattr(args, "add_bias_linear", True))
    if not swiglu and biased and getattr(args, "bias_gelu_fusion", False):
        notes.append(
            "--bias-gelu-fusion computes GELU's tanh approximation; here, and in the answers compared, "
            "it is exact"
        )
    dropouts = [_number(args, f"{part}_dropout", 0.0, path) for part in ("hidden", "attention")]
    if dropouts[0] != dropouts[1]:
        notes.append(
            f"--hidden-dropout is {dropouts[0]}, --attention-dropout {dropouts[1]}; model.dropout is one for "
            f"both, {min(dropouts)} taken"
        )
    qkv_biased = biased or bool(getattr(args, "add_qkv_bias", False))
    is_grouped = getattr(args, "group_query_attention", False)
    norm_epsilon = getattr(args, "norm_epsilon", getattr(args, "layernorm_epsilon", 1e-5))
    model = ModelConfig(
        schedule=f"A*{_needed(args, 'num_layers', path)}",
        hidden_size=_needed(args, "hidden_size", path),
        num_attention_heads=_needed(args, "num_attention_heads", path),
        num_query_groups=_needed(args, "num_query_groups", path) if is_grouped else None,
        kv_channels=getattr(args, "kv_channels", None),
        ffn_hidden_size=_needed(args, "ffn_hidden_size", path),
        seq_length=getattr(args, "seq_length", None) or _needed(args, "max_position_embeddings", path),
        vocab_size=vocab_size if real is None else real,
        activation="swiglu" if swiglu else "gelu",
        norm="pre",
        normalization=getattr(args, "normalization", "LayerNorm"),
        norm_epsilon=norm_epsilon,
        add_bias=biased,
        add_qkv_bias=None if qkv_biased == biased else qkv_biased,
        tie_embeddings=tied,
        rotary_base=_number(args, "rotary_base", 10000.0, path),
        rotary_scaling=_scaling_of(args, path),
        dropout=min(dropouts),
        meta_router=MetaRouterConfig(enabled=False),
    )
    eod = getattr(args, "eod_token", None)
    config = RunConfig(run_dir=str(path), model=model, data=DataConfig(eod_token=eod))
    # Read as a recipe is, so that values no field can have are named.
    config = config_from_dict(to_dict(config), f"{path}: its arguments")
    resolved = resolve_config(config, vocab_size=None, eod_token=None)
    check_config(resolved)
    return resolved, notes


def is_plain_gpt(model: ModelConfig) -> bool:
    """Whether Megatron-LM's own GPT can hold this model."""
    return (
        set(parse_schedule(model.schedule)) == {"A"}
        and model.norm == "pre"
        and not model.meta_router.enabled
        and not model.mask_documents
        and _scaling_arguments(model.rotary_scaling) is not None
    )


def args_of(config: RunConfig, tensor_parallel: int, pipeline_parallel: int, padded_vocab: int) -> Namespace:
    """Megatron-LM's arguments for a model; with ours beside them where it is no plain GPT."""
    model = config.model
    args: dict[str, Any] = {
        "num_layers": len(parse_schedule(model.schedule)),
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "kv_channels": model.kv_channels,
        "group_query_attention": model.num_query_groups != model.num_attention_heads,
        "num_query_groups": model.num_query_groups,
        "seq_length": model.seq_length,
        "max_position_embeddings": model.seq_length,
        "vocab_size": model.vocab_size,
        "padded_vocab_size": padded_vocab,
        "position_embedding_type": "rope",
        "use_rotary_position_embeddings": True,
        "rotary_base": int(model.rotary_base) if model.rotary_base.is_integer() else model.rotary_base,
        "rotary_percent": 1.0,
        "swiglu": model.activation == "swiglu",
        "bias_gelu_fusion": False,
        "normalization": model.normalization,
        "norm_epsilon": model.norm_epsilon,
        "add_bias_linear": model.add_bias,
        "add_qkv_bias": bool(model.add_qkv_bias),
        "untie_embeddings_and_output_weights": not model.tie_embeddings,
        "hidden_dropout": model.dropout,
        "attention_dropout": model.dropout,
        "tensor_model_parallel_size": tensor_parallel,
        "pipeline_model_parallel_size": pipeline_parallel,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
        **(_scaling_arguments(model.rotary_scaling) or {}),
    }
    if not is_plain_gpt(model):
        args[CHIAR_KEY] = to_dict(config)
    return Namespace(**args)


def _scaling_of(args: Namespace, path: Path) -> RotaryScalingConfig:
    if getattr(args, "use_rope_scaling", False):
        factor = _number(args, "rope_scaling_factor", 8.0, path)
        return RotaryScalingConfig("llama3", factor, _LOW, _HIGH, _ROPE_SCALING_LENGTH)
    stretch = "rotary_seq_len_interpolation_factor"
    if getattr(args, stretch, None) is None:
        return RotaryScalingConfig()
    return RotaryScalingConfig("linear", _number(args, stretch, 1.0, path))


def _scaling_arguments(scaling: RotaryScalingConfig) -> dict[str, Any] | None:
    """None where Megatron-LM knows no such scaling."""
    if scaling.rope_type == "none":
        return {}
    if scaling.rope_type == "linear":
        whole = scaling.factor.is_integer()
        return {"rotary_seq_len_interpolation_factor": int(scaling.factor) if whole else scaling.factor}
    if scaling == RotaryScalingConfig("llama3", scaling.factor, _LOW, _HIGH, _ROPE_SCALING_LENGTH):
        return {"use_rope_scaling": True, "rope_scaling_factor": scaling.factor}
    return None


def _number(args: Namespace, name: str, default: float, path: Path) -> float:
    """An argument's number; the default where it is absent."""
    value = getattr(args, name, None)
    try:
        if value is None or isinstance(value, (int, float)):
            return default if value is None else float(value)
    except OverflowError:
        pass
    raise CheckpointError(f"{path}: --{name.replace('_', '-')} is {shown(value)}; it must be a number")


def count_of(value: object, what: str, path: Path) -> int:
    """A count that a file tells, 0 where it tells none. Raises CheckpointError for what is none."""
    if value is not None and (not isinstance(value, int) or value < 0):
        raise CheckpointError(f"{path}: its {what} is {shown(value)}; it must be a whole number, 0 or more")
    return value or 0


def _needed(args: Namespace, name: str, path: Path) -> int:
    value = getattr(args, name, None)
    if not isinstance(value, int):
        raise CheckpointError(f"{path}: its arguments have no {name}, so its sizes are unknown")
    return value
