"""The schema seen as dotted paths: every field's type, its words in messages, and the nearest names."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from chiar_megatron.config.schema import RunConfig


def field_types() -> Mapping[str, Any]:
    """Type of every field that holds a value, by dotted path ("model.router.kind")."""
    return _schema()[0]


def section_types() -> Mapping[str, type]:
    """Dataclass of every section, by dotted path ("model.router"); the recipe itself is not among them."""
    return _schema()[1]


def names_in(section: str) -> list[str]:
    """Names of the fields and sections directly inside `section`; "" is the recipe."""
    cls = section_types()[section] if section else RunConfig
    return [field.name for field in dataclasses.fields(cls)]


def value_at(config: RunConfig, path: str) -> Any:
    """The value of the field at the dotted `path`."""
    return functools.reduce(getattr, path.split("."), config)


def is_optional(field_type: Any) -> bool:
    """Whether null is a value of `field_type`."""
    return type(None) in typing.get_args(field_type)


def describe_type(field_type: Any) -> str:
    """The accepted type, in words that follow "is not"."""
    arguments = typing.get_args(field_type)
    if is_optional(field_type):
        return f"{describe_type(arguments[0])} or null"
    if typing.get_origin(field_type) is Literal:
        return f"one of {', '.join(arguments)}"
    words = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}
    return words.get(field_type, 'a list of texts, such as ["a", "b"]')


def nearest_name(name: str, candidates: Sequence[str]) -> str:
    """`; nearest: ...` for a mistyped `name`, or nothing where no candidate is like it."""
    close = difflib.get_close_matches(name, candidates, n=1)
    return f"; nearest: {close[0]}" if close else ""


def nearest_fields(path: str, is_section: bool) -> str:
    """The valid paths most like the unknown `path`, over all sections, or else those of its section."""
    parent, _, name = path.rpartition(".")

    def likeness(candidate: str) -> float:
        candidate_parent, _, candidate_name = candidate.rpartition(".")
        by_name = difflib.SequenceMatcher(None, name, candidate_name).ratio()
        if len(name) > 2 and name in candidate_name:
            by_name = max(by_name, 0.7)  # "heads" for num_attention_heads
        if candidate_parent == parent:
            return by_name
        by_path = difflib.SequenceMatcher(None, path, candidate).ratio()
        mistyped_section = bool(parent) and parent not in section_types()
        return max(0.9 * by_name, by_path if mistyped_section else 0.0)

    candidates = section_types() if is_section else field_types()
    scores = {candidate: likeness(candidate) for candidate in candidates}
    best = max(scores.values())
    if best >= 0.55:
        close = sorted((c for c in scores if scores[c] >= best - 0.05), key=scores.__getitem__, reverse=True)
        return f"nearest: {', '.join(close[:3])}"
    section = parent if parent in section_types() else ""
    return f"fields of {section or 'a recipe'}: {', '.join(names_in(section))}"


@functools.cache
def _schema() -> tuple[dict[str, Any], dict[str, type]]:
    fields: dict[str, Any] = {}
    sections: dict[str, type] = {}

    def visit(cls: type, prefix: str) -> None:
        for name, field_type in typing.get_type_hints(cls).items():
            if dataclasses.is_dataclass(field_type):
                sections[prefix + name] = typing.cast(type, field_type)
                visit(sections[prefix + name], f"{prefix}{name}.")
            else:
                fields[prefix + name] = field_type

    visit(RunConfig, "")
    return fields, sections
