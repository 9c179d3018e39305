"""chiar-megatron: pretrain CHIAR-Former language models on megatron-core."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chiar_megatron.inference.load import load_model

__version__ = "0.1.0"
__all__ = ["__version__", "load_model"]

# What megatron-core says at import or from its call sites, many times over and to no one's use here:
# that optional parts are missing (`chiar doctor` reports that, with what it costs), and names that a
# newer torch would rather see.
for _message in (
    ".*Transformer Engine and Apex are not installed.*",
    ".*Apex is not installed.*",
    "full scope is deprecated.*",
    ".*recommended to set the environment variable CUDA_DEVICE_MAX_CONNECTIONS.*",
    "The .grad attribute of a Tensor that is not a leaf.*",
):
    warnings.filterwarnings("ignore", message=_message, category=UserWarning)
for _message in (".*torch.distributed.*is deprecated.*", "`load_state_dict` is deprecated.*"):
    warnings.filterwarnings("ignore", message=_message, category=FutureWarning)


def __getattr__(name: str) -> Any:
    """`load_model`, imported when it is first asked for: torch and megatron-core take seconds."""
    if name == "load_model":
        from chiar_megatron.inference.load import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
