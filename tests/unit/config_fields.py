"""Configs for tests, by the fields in which they differ from the default."""

from __future__ import annotations

from typing import Any

from chiar_megatron.config.load import config_from_dict
from chiar_megatron.config.schema import RunConfig


def with_fields(**by_path: Any) -> RunConfig:
    """The default config with some fields changed; `__` stands for the dot of a path."""
    nested: dict[str, Any] = {}
    for name, value in by_path.items():
        *sections, last = name.split("__")
        target = nested
        for section in sections:
            target = target.setdefault(section, {})
        target[last] = value
    return config_from_dict(nested)
