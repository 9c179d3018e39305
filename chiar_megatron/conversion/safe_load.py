"""torch.load with a list of its own of what a pickle may call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch.serialization import add_safe_globals, clear_safe_globals, get_safe_globals


@contextmanager
def only_globals(classes: Sequence[Any] = ()) -> Iterator[None]:
    """Within, `weights_only` loading accepts these classes and torch's own, and no others (megatron-core has
    torch accept more, for its files); afterwards what it accepted before."""
    before = get_safe_globals()
    clear_safe_globals()
    add_safe_globals(list(classes))
    try:
        yield
    finally:
        clear_safe_globals()
        add_safe_globals(before)
