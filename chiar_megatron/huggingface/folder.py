"""A folder of `transformers`: its config and safetensors files, read without loading the model.

Nothing in it is executed: JSON and safetensors only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from chiar_megatron.config.load import config_from_dict, resolve_config, to_dict
from chiar_megatron.config.schema import (
    DataConfig,
    MetaRouterConfig,
    ModelConfig,
    RotaryScalingConfig,
    RouterConfig,
    RunConfig,
)
from chiar_megatron.config.validate import check_config
from chiar_megatron.errors import CheckpointError
from chiar_megatron.huggingface.configuration import ChiarConfig
from chiar_megatron.huggingface.names import Group, foreign_shapes, groups
from chiar_megatron.model.tensors import LazyTensor, mismatches, read_values, refuse

CONFIG = "config.json"
_TABLE, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_KINDS: tuple[tuple[tuple[str, ...], Any, str], ...] = (
    (
        (
            "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
            "head_dim", "max_position_embeddings", "mup_base_hidden_size",
        ),
        int,
        "a whole number",
    ),
    (("norm_epsilon", "rotary_base", "dropout", "initializer_range"), (int, float), "a number"),
    (("use_bias", "attention_bias", "mask_documents", "tie_word_embeddings"), bool, "true or false"),
    (("router", "meta_router", "rbf", "rotary_scaling", "pretraining"), dict, "an object"),
    (("schedule", "norm", "normalization", "hidden_act"), str, "a text"),
)  # fmt: skip
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip


KINDS = {dtype: kind for kind, dtype in _DTYPES.items()}
"""What safetensors calls the kinds of numbers."""


def is_folder(path: Path) -> bool:
    """Whether this looks like a folder of `transformers`."""
    return (path / CONFIG).is_file() and not (path / "checkpoint.json").is_file()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError if it is missing or torn."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is no JSON, or is torn: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return content


def stored_tensors(folder: Path) -> dict[str, LazyTensor]:
    """Every tensor of the folder's safetensors files by its name.

    Raises CheckpointError if there are none, a shard is missing or torn, or index and files disagree.
    """
    found: dict[str, LazyTensor] = {}
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX).get("weight_map")
        if not isinstance(index, dict) or not all(_is_plain(file) for file in index.values()):
            raise CheckpointError(f"{folder / INDEX}: weight_map must name files of this folder")
        for file in sorted(set(index.values())):
            found |= _tensors_of(folder / file)
        lost = sorted(name for name in index if name not in found)
        refuse(
            [f"{name} is not in {index[name]}" for name in lost], folder / INDEX, "names what is not there"
        )
        return found
    if not (folder / SINGLE).is_file():
        others = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".safetensors"))
        raise CheckpointError(
            f"{folder} has neither {SINGLE} nor {INDEX}{f' (it has {others[:4]})' if others else ''}; "
            "save the model again by save_pretrained"
        )
    return _tensors_of(folder / SINGLE)


def _is_plain(file: object) -> bool:
    return isinstance(file, str) and Path(file).name == file


def _tensors_of(path: Path) -> dict[str, LazyTensor]:
    """safetensors checks the header; numbers are read by ourselves, for it would map the whole file."""
    try:
        # Opened here first: of a file that may not be read safetensors says that it is missing.
        with path.open("rb") as raw, safe_open(path, framework="pt") as file:
            names = list(file.keys())
            size = int.from_bytes(raw.read(8), "little")
            header = json.loads(raw.read(size))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; copy the folder again") from None
    except PermissionError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is torn or no safetensors file: {error}") from None
    unknown = sorted({header[name]["dtype"] for name in names} - _DTYPES.keys())
    if unknown:
        raise CheckpointError(f"{path} holds numbers of kind {unknown}; quantised weights are not converted")
    return {name: _lazy(path, 8 + size, header[name]) for name in names}


def _lazy(path: Path, first: int, entry: Mapping[str, Any]) -> LazyTensor:
    shape, dtype = tuple(entry["shape"]), _DTYPES[entry["dtype"]]
    begin, numel = first + entry["data_offsets"][0], torch.Size(shape).numel()
    return LazyTensor(shape, dtype, lambda: read_values(path, begin, dtype, numel).view(shape))


def read_chiar_config(folder: Path) -> ChiarConfig:
    """The config of a CHIAR model. Raises CheckpointError for another model or a malformed one."""
    content = read_json(folder / CONFIG)
    kind = content.get("model_type")
    if kind != ChiarConfig.model_type:
        raise CheckpointError(
            f"{folder} holds a {kind!r} model, not a CHIAR-Former; `chiar convert --from huggingface --to "
            "native --schedule ...` makes one of a dense Llama, Mistral or Qwen2"
        )
    _check_kinds(content, folder / CONFIG)
    try:
        return ChiarConfig.from_dict(content)
    except Exception as error:  # transformers and our own checks raise many kinds
        raise CheckpointError(f"{folder / CONFIG}: {error}") from None


def _check_kinds(content: Mapping[str, Any], path: Path) -> None:
    """Raise CheckpointError naming fields whose values are of another kind than they must be."""
    problems = [
        f"{name} is {content[name]!r}; it must be {what}"
        for names, kind, what in _KINDS
        for name in names
        if content.get(name) is not None
        and (not isinstance(content[name], kind) or (kind is int and isinstance(content[name], bool)))
    ]
    progress = content.get("pretraining")
    if isinstance(progress, dict):
        counts = ((name, progress.get(name, 0)) for name in ("step", "tokens_seen"))
        problems += [f"pretraining.{n} is {v!r}; it must be a count" for n, v in counts if not _is_count(v)]
    if content.get("hidden_act", "gelu") not in ("gelu", "silu"):
        problems.append(f"hidden_act is {content['hidden_act']!r}; it must be gelu or silu")
    refuse(problems, path, "it describes no CHIAR model")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def native_config(config: ChiarConfig, run_dir: Path) -> RunConfig:
    """The recipe of such a model, resolved; data and training are defaults.

    Raises ConfigError for values that no model can have.
    """
    try:
        router = RouterConfig(**{k: v for k, v in config.router.items() if k != "has_controller"})
        meta_router = MetaRouterConfig(**config.meta_router)
        scaling = RotaryScalingConfig(**config.rotary_scaling)
    except TypeError as error:
        raise CheckpointError(f"{run_dir / CONFIG}: router, meta_router or rotary_scaling: {error}") from None
    model = ModelConfig(
        schedule=config.schedule,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_key_value_heads,
        kv_channels=config.head_dim,
        ffn_hidden_size=config.intermediate_size,
        seq_length=config.max_position_embeddings,
        vocab_size=config.vocab_size,
        activation="swiglu" if config.hidden_act == "silu" else "gelu",
        norm=config.norm,  # type: ignore[arg-type]
        normalization=config.normalization,  # type: ignore[arg-type]
        norm_epsilon=config.norm_epsilon,
        add_bias=config.use_bias,
        add_qkv_bias=None if config.attention_bias == config.use_bias else config.attention_bias,
        tie_embeddings=config.tie_word_embeddings,
        rotary_base=config.rotary_base,
        rotary_scaling=scaling,
        dropout=config.dropout,
        init_std=config.initializer_range,
        mup_base_hidden_size=config.mup_base_hidden_size,
        rbf_features=config.rbf["features"],
        rbf_gamma=config.rbf["gamma"],
        mask_documents=config.mask_documents,
        router=router,
        meta_router=meta_router,
    )
    data = DataConfig(eod_token=config.document_end)
    given = RunConfig(run_dir=str(run_dir), model=model, data=data)
    # Read as a recipe is, so that values no field can have are named.
    given = config_from_dict(to_dict(given), f"{run_dir / CONFIG}")
    resolved = resolve_config(given, vocab_size=None, eod_token=None)
    check_config(resolved)
    return resolved


def foreign_config(config: RunConfig, dtype: str, progress: Mapping[str, int]) -> ChiarConfig:
    """The `transformers` config of a resolved recipe. progress: step and tokens seen, for the record."""
    model, eod = config.model, config.data.eod_token
    blends = model.router.kind in ("soft", "hard")
    return ChiarConfig(
        schedule=model.schedule,
        vocab_size=model.vocab_size or 0,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_query_groups,
        head_dim=model.kv_channels,
        max_position_embeddings=model.seq_length,
        hidden_act="silu" if model.activation == "swiglu" else "gelu",
        norm=model.norm,
        normalization=model.normalization,
        norm_epsilon=model.norm_epsilon,
        use_bias=model.add_bias,
        attention_bias=model.add_qkv_bias,
        rotary_base=model.rotary_base,
        rotary_scaling=asdict(model.rotary_scaling),
        dropout=model.dropout,
        initializer_range=model.init_std,
        mup_base_hidden_size=model.mup_base_hidden_size,
        mask_documents=model.mask_documents,
        router={
            **asdict(model.router),
            "has_controller": model.router.target is not None and not blends,
        },
        meta_router=asdict(model.meta_router),
        rbf={"features": model.rbf_features, "gamma": model.rbf_gamma},
        tie_word_embeddings=model.tie_embeddings,
        eos_token_id=eod,
        bos_token_id=eod,  # a document begins after one's end
        architectures=["ChiarForCausalLM"],
        dtype=dtype,
        pretraining=dict(progress),
    )


def native_tensors(
    model: ModelConfig, stored: Mapping[str, LazyTensor], folder: Path
) -> dict[str, LazyTensor]:
    """Our tensors from the `transformers` model's.

    Raises CheckpointError naming those that are missing, surplus or of another shape, and for a head of its
    own where the config says that there is none.
    """
    wanted = foreign_shapes(model)
    found = {name: tensor.shape for name, tensor in stored.items()}
    if model.tie_embeddings:
        found.pop(_HEAD, None)  # some tools write the shared table twice
    refuse(mismatches(wanted, found), folder, "its tensors do not fit its config")
    if model.tie_embeddings and _HEAD in stored and not _same_values(stored[_HEAD], stored[_TABLE]):
        raise CheckpointError(
            f"{folder}: {CONFIG} has tie_word_embeddings true, but {_HEAD} differs from {_TABLE}; set it to "
            "false, as transformers loads such a folder, or remove the one that is not used"
        )
    wrong = [f"{n} has dtype {stored[n].dtype}" for n in wanted if not stored[n].dtype.is_floating_point]
    refuse(wrong, folder, "weights must be floating-point")
    return {group.native: _joined(group, [stored[name] for name in group.foreign]) for group in groups(model)}


def _same_values(first: LazyTensor, second: LazyTensor) -> bool:
    """One after the other, so that no two are in memory."""
    return first is second or (first.shape == second.shape and _digest(first) == _digest(second))


def _digest(tensor: LazyTensor) -> bytes:
    """Of the values, whatever kind of numbers holds them."""
    found = hashlib.blake2b(digest_size=16)
    for rows in tensor.load().split(256):
        found.update(rows.double().contiguous().numpy().data)
    return found.digest()


def _joined(group: Group, parts: list[LazyTensor]) -> LazyTensor:
    if len(parts) == 1:
        return parts[0]
    return LazyTensor(
        group.spec.shape, parts[0].dtype, lambda: group.join(tuple(part.load() for part in parts))
    )
