"""Where a run continues from: its own newest checkpoint, an earlier one on request, or other weights."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

from chiar_megatron.checkpoint.files import CheckpointInfo, resolve_checkpoint
from chiar_megatron.checkpoint.store import CheckpointStore, load_state
from chiar_megatron.config.load import to_dict
from chiar_megatron.config.schema import RunConfig
from chiar_megatron.errors import CheckpointError
from chiar_megatron.model.build import SHARDING_METADATA
from chiar_megatron.training.engine import MegatronEngine

_log = logging.getLogger(__name__)

# Fields that decide which tensors there are and of which shape.
_SHAPE_FIELDS = (
    "schedule", "hidden_size", "num_attention_heads", "num_query_groups", "kv_channels", "ffn_hidden_size",
    "vocab_size", "activation", "norm", "normalization", "add_bias", "tie_embeddings",
    "router.kind", "router.operators", "meta_router.enabled",
)  # fmt: skip
# Fields on which the order of samples rests: changed in mid-run, samples would be skipped or repeated.
_ORDER_FIELDS = ("training.global_batch_size", "training.seed", "model.seq_length", "data.train")


def restore(config: RunConfig, engine: MegatronEngine, store: CheckpointStore) -> tuple[int, int]:
    """Load what this run continues from; returns (steps done, tokens seen).

    Raises CheckpointError if it does not fit the recipe.
    """
    going_back = _going_back(config, store)
    folder = store.find(config.checkpoint.load_step if going_back else None)
    if folder is None:
        if config.training.init_from is not None:
            _load_weights(config, engine, store)
        return 0, 0
    info = CheckpointInfo.read(folder)
    check_fits(config, info, folder)
    _check_order(config, info, folder)
    engine.load_state(load_state(folder, engine.sharded_state(is_loading=True)))
    if going_back:
        store.set_newer_aside(info.step, _marker(config))
    return info.step, info.tokens_seen


def check_fits(config: RunConfig, info: CheckpointInfo, folder: Path) -> None:
    """Raise CheckpointError naming the fields in which a checkpoint's model differs from the recipe's."""
    wanted, found = to_dict(config)["model"], info.config["model"]
    differing = [
        f"model.{field} is {_at(wanted, field)}, the checkpoint's {_at(found, field)}"
        for field in _SHAPE_FIELDS
        if _at(wanted, field) != _at(found, field)
    ]
    if differing:
        raise CheckpointError(
            f"{folder} holds another model: "
            + "; ".join(differing[:6])
            + ". Use its values, or another run_dir"
        )


def _check_order(config: RunConfig, info: CheckpointInfo, folder: Path) -> None:
    wanted = to_dict(config)
    for field in _ORDER_FIELDS:
        new, old = _at(wanted, field), _at(info.config, field)
        if new != old:
            raise CheckpointError(
                f"{field} is {new}, but {folder} was trained with {old}: samples would be skipped or "
                f"repeated; keep it, or start a new run_dir with training.init_from={folder}"
            )


def _load_weights(config: RunConfig, engine: MegatronEngine, store: CheckpointStore) -> None:
    folder = resolve_checkpoint(Path(str(config.training.init_from)))
    info = CheckpointInfo.read(folder)
    check_fits(config, info, folder)
    damage = store.verify(folder)
    if damage is not None:
        raise CheckpointError(f"training.init_from {folder} is damaged: {damage}")
    state = load_state(folder, {"model": engine.module.sharded_state_dict(metadata=dict(SHARDING_METADATA))})
    engine.load_weights(state["model"])
    _log.info("weights from %s (step %d)", folder, info.step)


def _going_back(config: RunConfig, store: CheckpointStore) -> bool:
    """Whether `load_step` still has to be obeyed: a run that went back must not do so at each restart."""
    if config.checkpoint.load_step is None:
        return False
    return not store.has_marker(_marker(config))


def _marker(config: RunConfig) -> str:
    skipped = hashlib.blake2b(repr(config.data.skip_samples).encode(), digest_size=4).hexdigest()
    return f"went_back_to_{config.checkpoint.load_step}_skipping_{skipped}"


def _at(tree: object, path: str) -> object:
    for key in path.split("."):
        tree = tree.get(key) if isinstance(tree, dict) else None
    return list(tree) if isinstance(tree, tuple) else tree
