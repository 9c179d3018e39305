"""`load_model`: a checkpoint as a plain module in one process."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from chiar_megatron.checkpoint.files import CheckpointInfo, find_damage, read_manifest, resolve_checkpoint
from chiar_megatron.checkpoint.store import load_state
from chiar_megatron.config.load import config_from_dict
from chiar_megatron.config.schema import ParallelConfig, RunConfig
from chiar_megatron.data.tokenizer import Tokenizer, load_tokenizer
from chiar_megatron.errors import CheckpointError, ChiarError, ConfigError, DataError
from chiar_megatron.model.build import SHARDING_METADATA, build_model
from chiar_megatron.model.gpt import ChiarModel
from chiar_megatron.operators.context import ForwardContext, GenerationState
from chiar_megatron.runtime.distributed import World, single_process_world

_log = logging.getLogger(__name__)


class InferenceModel(torch.nn.Module):
    """A whole model in one process: `[b, s]` int64 ids to `[b, s, vocab]` float32 logits.

    With `meta_router.pooling: batch` the logits depend on the whole batch (and see the future), as the
    paper's model does.
    """

    def __init__(self, module: ChiarModel, config: RunConfig) -> None:
        super().__init__()
        self.module = module
        self.config = config

    @property
    def vocab_size(self) -> int:
        """Entries of the vocabulary, without padding."""
        assert self.config.model.vocab_size is not None
        return self.config.model.vocab_size

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def forward(
        self,
        input_ids: Tensor,
        document_ids: Tensor | None = None,
        generation: GenerationState | None = None,
        context: ForwardContext | None = None,
    ) -> Tensor:
        """Logits of every position; `input_ids` may lie on any device.

        document_ids: int64 `[b, s]`, tokens see only their own document. generation: keys and values of
        the tokens before these; the caller advances its `length`, and `document_ids` covers those tokens
        too. context: given, used as it is.
        Raises ChiarError for ids of another dtype or shape, or outside the vocabulary.
        """
        self._check(input_ids, generation)
        input_ids = input_ids.to(self.device)
        if context is None:
            context = ForwardContext(tokens_BS=input_ids, document_ids_BS=document_ids, generation=generation)
        logits_BSV = self.module(input_ids, context)
        return logits_BSV[..., : self.vocab_size].float()  # type: ignore[no-any-return]

    def _check(self, input_ids: Tensor, generation: GenerationState | None) -> None:
        if input_ids.dtype != torch.int64 or input_ids.dim() != 2 or input_ids.numel() == 0:
            raise ChiarError(
                f"input_ids: {input_ids.dtype} of shape {list(input_ids.shape)} must be int64 of shape "
                "[batch, sequence], neither of them 0; a single row needs input_ids[None]"
            )
        low, high = int(input_ids.min()), int(input_ids.max())
        if low < 0 or high >= self.vocab_size:
            raise ChiarError(
                f"input_ids: {low if low < 0 else high} lies outside the model's vocabulary, 0 to "
                f"{self.vocab_size - 1}; use the tokenizer it was trained with"
            )
        if generation is not None and generation.length + input_ids.shape[1] > generation.capacity:
            raise ChiarError(
                f"generation.capacity: {generation.capacity} tokens are too few for {generation.length} "
                f"cached and {input_ids.shape[1]} new ones; make the GenerationState larger"
            )


def load_model(path: str | Path, device: str = "auto", precision: str | None = None) -> InferenceModel:
    """Load a native checkpoint (its folder, or a run folder: the newest), or a folder written by
    `chiar convert --to huggingface` or `save_pretrained`, for one process, in evaluation mode.

    precision: `fp32` or `bf16`; None keeps the run's, or the weights'. Raises CheckpointError if there is
    no whole checkpoint, or one of another kind.
    """
    if precision not in (None, "fp32", "bf16"):
        raise ConfigError(f"precision: {precision!r} must be 'fp32', 'bf16', or None for the run's own")
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device: {device!r} must be 'auto', 'cpu' or 'cuda'")
    if (Path(path) / "config.json").is_file() and not (Path(path) / "checkpoints").is_dir():
        return _load_hugging_face(Path(path), device, precision)
    folder = resolve_checkpoint(Path(path))
    manifest = read_manifest(folder)
    damage = find_damage(folder, sorted(manifest), manifest)
    if damage is not None:
        raise CheckpointError(f"{folder} is damaged: {damage}")
    world = single_process_world(device)
    config = checkpoint_config(folder, ParallelConfig(), precision)
    module = load_weights(folder, config, world)
    return InferenceModel(module, config).eval()


@torch.no_grad()
def _load_hugging_face(folder: Path, device: str, precision: str | None) -> InferenceModel:
    from chiar_megatron.huggingface import folder as hugging_face

    foreign = hugging_face.read_chiar_config(folder)
    config = hugging_face.native_config(foreign, folder)
    stored = hugging_face.stored_tensors(folder)
    tensors = hugging_face.native_tensors(config.model, stored, folder)
    in_half = stored["model.embed_tokens.weight"].dtype == torch.bfloat16
    own = "bf16" if in_half else "fp32"
    config = replace(
        config,
        training=replace(config.training, precision=precision or own),  # type: ignore[arg-type]
        data=replace(config.data, tokenizer=str(folder)),
    )
    module = build_model(config, single_process_world(device))
    for name, tensor in module.state_dict().items():
        if tensor is not None:  # megatron-core's linear layers have an empty extra state
            values = tensors[name].load()
            rows = values.shape[:1]
            target = tensor[: rows[0]] if rows else tensor
            target.copy_(values)
            if rows:
                tensor[rows[0] :].zero_()  # padding of the vocabulary
    return InferenceModel(module, config).eval()


def checkpoint_config(folder: Path, parallel: ParallelConfig, precision: str | None) -> RunConfig:
    """The config a checkpoint was trained with, for use in another layout and precision."""
    config = config_from_dict(CheckpointInfo.read(folder).config, str(folder))
    training = config.training
    if precision is not None:
        training = replace(training, precision=precision)  # type: ignore[arg-type]
    return replace(config, parallel=parallel, training=training)


def load_weights(folder: Path, config: RunConfig, world: World) -> ChiarModel:
    """This process's stage of a checkpoint's model, in the layout of `config.parallel`."""
    module = build_model(config, world)
    state = load_state(folder, {"model": module.sharded_state_dict(metadata=dict(SHARDING_METADATA))})
    module.load_state_dict(state["model"])
    return module


def checkpoint_tokenizer(config: RunConfig, path: str | Path | None = None) -> Tokenizer:
    """The tokenizer a model was trained with, or the one at `path` in its place (files move).

    Raises DataError if there is none, or if its vocabulary is not the model's.
    """
    own_path = config.data.tokenizer
    own = load_tokenizer(own_path) if own_path is not None and _holds_tokenizer(Path(own_path)) else None
    if path is None and own is None:
        state = (
            "names no tokenizer" if own_path is None else f"was trained with {own_path}, which is not there"
        )
        raise DataError(f"the checkpoint {state}; give the tokenizer's path by --tokenizer")
    tokenizer = own if path is None else load_tokenizer(path)
    assert tokenizer is not None and config.model.vocab_size is not None
    # model.vocab_size may be larger than the tokenizer's, so the tokenizer of the training tells more.
    expected = config.model.vocab_size if own is None else own.vocab_size
    if tokenizer.vocab_size > config.model.vocab_size or (own and tokenizer.vocab_size != expected):
        raise DataError(
            f"tokenizer {path or own_path} has {tokenizer.vocab_size} entries, the model's {expected}; "
            "give the tokenizer it was trained with by --tokenizer"
        )
    if tokenizer.vocab_size < expected:
        _log.warning(
            "tokenizer %s has %d entries, model.vocab_size is %d: is it the tokenizer of the training?",
            path, tokenizer.vocab_size, expected,
        )  # fmt: skip
    return tokenizer


def _holds_tokenizer(path: Path) -> bool:
    """Whether there is one; a model's folder need not have one."""
    if not path.is_dir():
        return path.exists()
    return any((path / name).is_file() for name in ("tokenizer.json", "vocab.json")) or any(
        path.glob("*.model")
    )
