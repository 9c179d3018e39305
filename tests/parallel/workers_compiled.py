"""What each process of the compiled layouts' tests runs."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from tests.gpu import workers_layouts


def train(**arguments: Any) -> dict[str, workers_layouts.Trained]:
    """As there, but no code is made for the graphs, which would take most of the time: what gradients they
    have, and what is in them, is settled before."""
    torch.compile = partial(torch.compile, backend="aot_eager")  # type: ignore[assignment]
    return workers_layouts.train(**arguments)
