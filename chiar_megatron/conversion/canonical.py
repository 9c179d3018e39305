"""The form that every format is read into and written from: native names, whole tensors, our config.

Tensors are read when asked for, one at a time, so that a model of any size passes through. The vocabulary
has no padding rows, qkv is fused in megatron-core's order, SwiGLU's gate and up are stacked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chiar_megatron.config.schema import RunConfig
from chiar_megatron.model.tensors import EMBEDDING, HEAD, LazyTensor, mismatches, refuse, tensor_specs

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Canonical:
    """A model as it passes from one format to another."""

    config: RunConfig
    """Resolved, for one process."""
    tensors: Mapping[str, LazyTensor]
    """Exactly those of `tensor_specs(config.model)`."""
    step: int = 0
    tokens_seen: int = 0
    notes: tuple[str, ...] = ()
    """What was assumed, dropped or is worth knowing, in sentences for the user."""
    tokenizer: Path | None = None
    """Of the source: file or folder as `load_tokenizer` takes it."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What only this format tells, for the report."""

    @property
    def dtypes(self) -> list[str]:
        """Kinds of numbers the parameters are stored in."""
        specs = tensor_specs(self.config.model)
        found = {
            str(t.dtype).removeprefix("torch.") for n, t in self.tensors.items() if not specs[n].is_buffer
        }
        return sorted(found)

    @property
    def parameters(self) -> int:
        """Trained parameters, vocabulary padding left out."""
        specs = tensor_specs(self.config.model).values()
        return sum(torch.Size(spec.shape).numel() for spec in specs if not spec.is_buffer)

    @property
    def bytes(self) -> int:
        """Size of all tensors."""
        return sum(size_of(tensor) for tensor in self.tensors.values())


def describe(model: Canonical) -> dict[str, Any]:
    """What a model is, in plain values."""
    config = model.config.model
    return {
        "schedule": config.schedule,
        "router": config.router.kind if "R" in config.schedule else None,
        "sizes": {
            "vocab": config.vocab_size,
            "hidden": config.hidden_size,
            "ffn": config.ffn_hidden_size,
            "heads": config.num_attention_heads,
            "head_size": config.kv_channels,
            "groups": config.num_query_groups,
        },
        "tied": config.tie_embeddings,
        "dtype": ", ".join(model.dtypes),
        "step": model.step,
        "tokens_seen": model.tokens_seen,
        "parameters": model.parameters,
        "bytes": model.bytes,
        "tokenizer": None if model.tokenizer is None else str(model.tokenizer),
        **model.facts,
        "notes": list(model.notes),
    }


def size_of(tensor: LazyTensor) -> int:
    """Bytes of a tensor."""
    return torch.Size(tensor.shape).numel() * tensor.dtype.itemsize


def without_padding(name: str, tensor: LazyTensor, vocab_size: int) -> LazyTensor:
    """The rows of the token table or head that stand for tokens; other tensors as they are."""
    if name not in (EMBEDDING, HEAD) or tensor.shape[0] <= vocab_size:
        return tensor
    return LazyTensor((vocab_size, *tensor.shape[1:]), tensor.dtype, lambda: tensor.load()[:vocab_size])


def with_padding(tensor: LazyTensor, rows: int) -> LazyTensor:
    """The same with zero rows added up to `rows`."""
    missing = rows - tensor.shape[0]
    if missing == 0:
        return tensor

    def load() -> Tensor:
        own = tensor.load()
        return torch.cat((own, own.new_zeros(missing, *own.shape[1:])))

    return LazyTensor((rows, *tensor.shape[1:]), tensor.dtype, load)


def cast(model: Canonical, dtype: str | None) -> Canonical:
    """The same with parameters in another precision (`fp32`, `bf16`, `fp16`); None leaves them."""
    if dtype is None or model.dtypes == [str(DTYPES[dtype]).removeprefix("torch.")]:
        return model
    specs, wanted = tensor_specs(model.config.model), DTYPES[dtype]

    def converted(tensor: LazyTensor) -> LazyTensor:
        return LazyTensor(tensor.shape, wanted, lambda: tensor.load().to(wanted))

    tensors = {n: t if specs[n].is_buffer else converted(t) for n, t in model.tensors.items()}
    note = f"weights stored as {', '.join(model.dtypes)} are written as {dtype} (--dtype)"
    return replace(model, tensors=tensors, notes=(*model.notes, note))


def check_tensors(model: Canonical, source: Path) -> None:
    """Raise CheckpointError, naming them, if tensors are missing, surplus or of another shape."""
    wanted = {name: spec.shape for name, spec in tensor_specs(model.config.model).items()}
    found = {name: tensor.shape for name, tensor in model.tensors.items()}
    refuse(mismatches(wanted, found), source, "its tensors do not fit its config")


def digest(tensor: Tensor) -> str:
    """BLAKE2b-128 of a tensor's values, widened to float32 (exactly, for smaller floats)."""
    values = tensor.detach().to(torch.float32).contiguous().reshape(-1)
    return hashlib.blake2b(values.numpy().data, digest_size=16).hexdigest()
