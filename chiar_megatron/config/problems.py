"""How several problems of one recipe become one error of at most twelve lines."""

from __future__ import annotations

from collections.abc import Sequence

from chiar_megatron.errors import ConfigError

MAX_LINES = 12
_MAX_VALUE_CHARACTERS = 80


def raise_problems(problems: Sequence[str]) -> None:
    """Raise one `ConfigError` with a line for each of `problems`; return if there are none.

    The message never has more than `MAX_LINES` lines: what does not fit is counted in the last one.
    """
    if not problems:
        return
    if len(problems) > MAX_LINES:
        kept = MAX_LINES - 1
        problems = [*problems[:kept], f"and {len(problems) - kept} more"]
    raise ConfigError("\n".join(problems))


def shown(value: object) -> str:
    """`value` as a user would write it in a recipe, on one line and not too long."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value)
    if len(text) > _MAX_VALUE_CHARACTERS:
        text = text[: _MAX_VALUE_CHARACTERS - 3] + "..."
    return text
