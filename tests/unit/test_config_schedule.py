"""The schedule string, and what its errors say."""

from __future__ import annotations

import pytest

from chiar_megatron.config.schedule import parse_schedule
from chiar_megatron.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("A", "A"),
        ("D R*2 A", "DRRA"),
        ("D R*26 A", "D" + "R" * 26 + "A"),
        ("A*28", "A" * 28),
        ("(D A)*14", "DA" * 14),
        ("DRA", "DRA"),
        ("D(R A)*2(D)A*3", "DRARADAAA"),
        ("((D R)*2 A)*2", "DRDRADRDRA"),
        (" D  R * 2\tA ", "DRRA"),
        ("A*02", "AA"),
    ],
)
def test_schedule_is_expanded(text: str, layers: str) -> None:
    assert parse_schedule(text) == tuple(layers)


@pytest.mark.parametrize(
    ("text", "position", "reason"),
    [
        ("", 1, "no layers"),
        ("   ", 1, "no layers"),
        ("D X A", 3, "unexpected 'X'"),
        ("d", 1, "unexpected 'd'"),
        ("D R*", 5, "'*' needs a count of at least 1"),
        ("D R*x", 5, "'*' needs a count of at least 1"),
        ("R*0 A", 3, "'*' needs a count of at least 1"),
        ("R*-1", 3, "'*' needs a count of at least 1"),
        ("*2", 1, "'*' must follow a letter or ')'"),
        ("R*2*3", 4, "'*' must follow a letter or ')'"),
        ("D (R A", 3, "'(' is never closed"),
        ("D R) A", 4, "')' without '('"),
        ("D ()*2", 3, "empty group"),
        ("A*999999999999999999", 3, "more than 10000 layers"),
        ("((A*100)*100)*2", 13, "more than 10000 layers"),
    ],
)
def test_schedule_error_names_position_and_grammar(text: str, position: int, reason: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_schedule(text)
    message = str(error.value)
    assert message.startswith(f"model.schedule: {text!r}, character {position}: {reason}; ")
    assert '"(D A)*14"' in message
    assert "\n" not in message


def test_schedule_of_deeply_nested_groups_needs_no_recursion() -> None:
    assert parse_schedule("(" * 5000 + "A" + ")" * 5000) == ("A",)
