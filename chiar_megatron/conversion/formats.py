"""What a format has to offer the hub (`convert.py`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from chiar_megatron.conversion.canonical import Canonical, describe
from chiar_megatron.conversion.journal import Journal

RoutingMode = Literal["threshold", "soft", "hard"]


@dataclass(frozen=True)
class ReferenceOptions:
    """What a user may overrule or must add to one of the authors' files; None: what it tells."""

    num_heads: int | None = None
    tau_low: float | None = None
    tau_high: float | None = None
    routing_mode: RoutingMode | None = None


@dataclass(frozen=True)
class MegatronOptions:
    """The form of Megatron-LM's files to write."""

    checkpoint_format: Literal["torch_dist", "torch"] = "torch_dist"
    """`torch_dist`, or the older `torch`: mp_rank_XX[_YYY]/model_optim_rng.pt."""

    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    """Shards of the older form; `torch_dist` can be loaded in any layout."""

    transformer_impl: Literal["local", "transformer_engine"] = "transformer_engine"
    """Whose names the older form bears."""


@dataclass(frozen=True)
class ConvertOptions:
    """How to convert."""

    reference: ReferenceOptions = field(default_factory=ReferenceOptions)
    """What overrules or completes one of the authors' files."""

    megatron: MegatronOptions = field(default_factory=MegatronOptions)
    """How to write Megatron-LM's."""

    tokenizer: str | None = None
    """Path of the tokenizer the model was trained with; None: the one that the source names."""

    config: str | None = None
    """Path of the `config.json` of a model whose files do not hold it (deepspeed)."""

    schedule: str | None = None
    """Layers of the CHIAR model that a dense one becomes."""

    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """Precision of the weights written; None: the source's."""

    shard_bytes: int = 2 * 10**9
    """Largest file of a format that cuts tensors into several."""

    verify: bool = True
    """Compare the result with the source, and refuse it if they differ."""


@dataclass
class Answer:
    """What one side answers to a batch of ids, in float32; layers by number from 1."""

    logits_BSV: Tensor
    light_BS: dict[int, Tensor] = field(default_factory=dict)
    """bool: who took attention (soft: where attention weighs most)."""
    score_BS: dict[int, Tensor] = field(default_factory=dict)
    border: dict[int, float] = field(default_factory=dict)
    """The score above which a token goes to attention; blends, scored by attention's weight, have none."""
    entropy_BS: dict[int, Tensor] = field(default_factory=dict)
    meta_gate: float | None = None


class Format(ABC):
    """One format, both ways."""

    name: str
    writes = True
    """Whether there is a way to it."""
    is_single_file = False
    """Whether it is one file, not a folder."""

    @abstractmethod
    def recognises(self, path: Path) -> bool:
        """Whether a file or folder looks like this format."""

    @abstractmethod
    def read(self, path: Path, options: ConvertOptions) -> Canonical:
        """Headers and config now, tensors when asked for.

        Raises CheckpointError for what is torn, malicious or does not fit together, ConfigError for an
        option that contradicts it.
        """

    def describe(self, path: Path) -> dict[str, Any]:
        """What `--inspect` shows besides `read`'s: the layout, whether there is optimizer state, ..."""
        return {}

    def inspect(self, path: Path, options: ConvertOptions) -> dict[str, Any]:
        """What a checkpoint is, in plain values, no tensor read. Raises as `read` does."""
        return {**describe(self.read(path, options)), **self.describe(path)}

    def losses(self, model: Canonical, options: ConvertOptions) -> list[str]:
        """What this format cannot carry but the model does without, in sentences.

        Raises CheckpointError for a model that it cannot hold at all.
        """
        return []

    @abstractmethod
    def write(self, model: Canonical, journal: Journal, options: ConvertOptions) -> None:
        """Write every file of the destination into the journal. Raises OSError."""

    @abstractmethod
    def answer(
        self,
        path: Path,
        options: ConvertOptions,
        ids_BS: Tensor,
        forced_BS: Mapping[int, Tensor] | None = None,
        noisy: bool = False,
    ) -> Answer:
        """What the model in this file or folder answers, computed layer by layer from its own tensors.

        forced_BS: bool decisions by layer that replace the routers' own. noisy: with other rounding errors,
        to see how far these alone move the answer.
        """
