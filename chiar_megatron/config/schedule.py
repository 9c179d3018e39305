"""The schedule string: which kind each layer is, in order ("D R*26 A")."""

from __future__ import annotations

from chiar_megatron.config.problems import shown
from chiar_megatron.errors import ConfigError

LAYER_KINDS = "DRA"
MAX_LAYERS = 10_000  # a slipped digit such as A*999999999 must not fill the memory
_GRAMMAR = (
    "write D (spectral), R (routed), A (attention) or a group in parentheses, each with an optional *N: "
    '"D R*26 A", "A*28", "(D A)*14"'
)


def parse_schedule(text: str) -> tuple[str, ...]:
    """Kinds of the layers, first to last, each "D", "R" or "A".

    `*N` (N at least 1) repeats the letter or the parenthesised group before it; groups nest; spaces
    are free. Raises `ConfigError` (one line) with the position, counted in characters from 1.
    """
    groups: list[list[str]] = [[]]  # the layers of each group that is still open, outermost first
    opened_at: list[int] = []
    position = 0
    while position < len(text):
        start, character = position, text[position]
        position += 1
        if character.isspace():
            continue
        if character == "(":
            groups.append([])
            opened_at.append(start)
            continue
        if character == ")":
            if not opened_at:
                raise _error(text, start, "')' without '('")
            unit = groups.pop()
            if not unit:
                raise _error(text, opened_at[-1], "empty group")
            opened_at.pop()
        elif character in LAYER_KINDS:
            unit = [character]
        elif character == "*":
            raise _error(text, start, "'*' must follow a letter or ')'")
        else:
            raise _error(text, start, f"unexpected {shown(character)}")
        count, position = _read_repeat(text, position)
        if len(groups[-1]) + len(unit) * count > MAX_LAYERS:
            raise _error(text, start, f"more than {MAX_LAYERS} layers")
        groups[-1].extend(unit * count)
    if opened_at:
        raise _error(text, opened_at[-1], "'(' is never closed")
    if not groups[0]:
        raise _error(text, 0, "no layers")
    return tuple(groups[0])


def _read_repeat(text: str, position: int) -> tuple[int, int]:
    """The count of a `*N` at `position` (1 if there is none) and the position after it."""
    star = _skip_spaces(text, position)
    if not text.startswith("*", star):
        return 1, position
    first = _skip_spaces(text, star + 1)
    end = first
    while end < len(text) and text[end] in "0123456789":
        end += 1
    digits = text[first:end].lstrip("0")
    if not digits:
        raise _error(text, first, "'*' needs a count of at least 1")
    if len(digits) > len(str(MAX_LAYERS)):
        raise _error(text, first, f"more than {MAX_LAYERS} layers")
    return int(digits), end


def _skip_spaces(text: str, position: int) -> int:
    while position < len(text) and text[position].isspace():
        position += 1
    return position


def _error(text: str, position: int, reason: str) -> ConfigError:
    return ConfigError(f"model.schedule: {shown(text)}, character {position + 1}: {reason}; {_GRAMMAR}")
