"""Where a run continues from: its own newest checkpoint, an earlier one on request, or other weights."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

from chiar_megatron.checkpoint.agree import on_main
from chiar_megatron.checkpoint.files import CheckpointInfo, resolve_checkpoint
from chiar_megatron.checkpoint.store import CheckpointStore, load_state
from chiar_megatron.config.load import to_dict
from chiar_megatron.config.schedule import parse_schedule
from chiar_megatron.config.schema import RunConfig
from chiar_megatron.data.dataset import parse_skipped
from chiar_megatron.errors import CheckpointError
from chiar_megatron.training.engine import MegatronEngine

_log = logging.getLogger(__name__)

# Fields that decide which tensors there are and of which shape.
_SHAPE_FIELDS = (
    "schedule", "hidden_size", "num_attention_heads", "num_query_groups", "kv_channels", "ffn_hidden_size",
    "vocab_size", "activation", "norm", "normalization", "add_bias", "add_qkv_bias", "tie_embeddings",
    "router.kind", "router.operators", "meta_router.enabled",
)  # fmt: skip
# Fields that change what the same tensors compute.
_MEANING_FIELDS = (
    "norm_epsilon", "rotary_base", "rotary_scaling",
    "router.dc_power_weight", "router.keys_values", "meta_router.pooling",
)  # fmt: skip
# Fields on which the order of samples rests: changed in mid-run, samples would be skipped or repeated.
_ORDER_FIELDS = (
    "training.global_batch_size", "training.seed", "model.seq_length", "data.train", "data.split",
)  # fmt: skip
# Fields that decide which state an optimizer has.
_OPTIMIZER_FIELDS = ("training.precision", "parallel.distributed_optimizer")


@dataclass(frozen=True)
class Restored:
    """Where a run stands."""

    step: int
    tokens_seen: int
    problems: list[str]
    """What was wrong with checkpoints newer than the one taken, or does not suit the weights taken."""


def restore(config: RunConfig, engine: MegatronEngine, store: CheckpointStore) -> Restored:
    """Load what this run continues from.

    Raises CheckpointError, on every rank, if it does not fit the recipe.
    """
    going_back = _going_back(config, store)
    found = store.find(config.checkpoint.load_step if going_back else None)
    folder = found.folder
    if folder is None:
        if config.training.init_from is not None:
            found.problems.extend(_load_weights(config, engine, store))
        return Restored(0, 0, found.problems)
    info = on_main(lambda: _read_fitting(config, folder))
    engine.load_state(load_state(folder, engine.sharded_state(is_loading=True)))
    if going_back:
        store.set_newer_aside(info.step, _marker(config))
    return Restored(info.step, info.tokens_seen, found.problems)


def _read_fitting(config: RunConfig, folder: Path) -> CheckpointInfo:
    info = CheckpointInfo.read(folder)
    check_fits(config, info, folder)
    _check_kept(config, info, folder)
    _check_skipped(config, info, folder)
    return info


def check_fits(config: RunConfig, info: CheckpointInfo, folder: Path) -> None:
    """Raise CheckpointError naming the fields in which a checkpoint's model differs from the recipe's."""
    wanted, found = to_dict(config)["model"], info.config["model"]
    differing = [
        f"model.{field} is {_at(wanted, field)}, the checkpoint's {_at(found, field)}"
        for field in _SHAPE_FIELDS
        if _meant(field, _at(wanted, field)) != _meant(field, _at(found, field))
    ]
    if differing:
        raise CheckpointError(
            f"{folder} holds another model: "
            + "; ".join(differing[:6])
            + ". Use its values, or another run_dir"
        )


def _check_kept(config: RunConfig, info: CheckpointInfo, folder: Path) -> None:
    wanted = to_dict(config)
    for fields, what in (
        (_ORDER_FIELDS, "samples would be skipped or repeated"),
        (_OPTIMIZER_FIELDS, "its optimizer state does not fit"),
    ):
        for field in fields:
            new, old = _at(wanted, field), _at(info.config, field)
            if _meant(field, new) != _meant(field, old):
                raise CheckpointError(
                    f"{field} is {new}, but {folder} was trained with {old}: {what}; "
                    f"keep it, or start a new run_dir with training.init_from={folder}"
                )


def _check_skipped(config: RunConfig, info: CheckpointInfo, folder: Path) -> None:
    """`data.skip_samples` may change, but not among samples that this checkpoint has trained on."""
    old = parse_skipped([str(text) for text in info.config["data"]["skip_samples"]])
    new = parse_skipped(config.data.skip_samples)
    end = info.step * config.training.global_batch_size  # of what was trained, before skipping
    for first, last in old:
        if end > first:
            end += last - first
    if [r for r in old if r[0] < end] != [r for r in new if r[0] < end]:
        raise CheckpointError(
            f"data.skip_samples is {list(config.data.skip_samples)}, but {folder} was trained with "
            f"{info.config['data']['skip_samples']} up to sample {end}: only samples after that can still be "
            "left out; go back further with checkpoint.load_step, or keep the ranges before it"
        )


def _load_weights(config: RunConfig, engine: MegatronEngine, store: CheckpointStore) -> list[str]:
    """Take the weights of `training.init_from`; returns what the recipe computes otherwise with them."""
    folder, info = on_main(lambda: _read_source(config))
    damage = store.verify(folder)
    if damage is not None:
        raise CheckpointError(f"training.init_from {folder} is damaged: {damage}")
    engine.load_weights(load_state(folder, engine.sharded_weights()))
    _log.info("weights from %s (step %d)", folder, info.step)
    wanted, found = to_dict(config)["model"], info.config["model"]
    return [
        f"model.{field} is {_at(wanted, field)}, but the weights of {folder} were trained with "
        f"{_at(found, field)}"
        for field in _MEANING_FIELDS
        if _at(wanted, field) != _at(found, field)
    ]


def _read_source(config: RunConfig) -> tuple[Path, CheckpointInfo]:
    folder = resolve_checkpoint(Path(str(config.training.init_from)))
    info = CheckpointInfo.read(folder)
    check_fits(config, info, folder)
    return folder, info


def _going_back(config: RunConfig, store: CheckpointStore) -> bool:
    """Whether `load_step` still has to be obeyed: a run that went back must not do so at each restart."""
    if config.checkpoint.load_step is None:
        return False
    return not store.has_marker(_marker(config))


def _marker(config: RunConfig) -> str:
    skipped = hashlib.blake2b(repr(config.data.skip_samples).encode(), digest_size=4).hexdigest()
    return f"went_back_to_{config.checkpoint.load_step}_skipping_{skipped}"


def _meant(field: str, value: object) -> object:
    """A value without what may differ: the spelling of a schedule, the folder of tokenised files."""
    if field == "schedule" and isinstance(value, str):
        return parse_schedule(value)
    if field == "data.train" and isinstance(value, list):
        return [Path(str(entry)).name for entry in value]
    return value


def _at(tree: object, path: str) -> object:
    for key in path.split("."):
        tree = tree.get(key) if isinstance(tree, dict) else None
    return list(tree) if isinstance(tree, tuple) else tree
