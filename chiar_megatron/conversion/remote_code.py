"""The model's code as files for `trust_remote_code`: they need nothing but torch and transformers.

They are made from this package's own sources by one rule. Beginning with `ChiarConfig` and
`ChiarForCausalLM`, every definition of this package that is named there is copied, and every one that those
name, and so on, in the order in which they need each other. A definition is a function, a class or a
constant; names that occur only in annotations do not count. What a file imports from elsewhere it keeps.
"""

from __future__ import annotations

import ast
import importlib.util
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

PACKAGE = "chiar_megatron"
AUTO_MAP = {
    "AutoConfig": "configuration_chiar.ChiarConfig",
    "AutoModel": "modeling_chiar.ChiarModel",
    "AutoModelForCausalLM": "modeling_chiar.ChiarForCausalLM",
}
_FILES = {
    "configuration_chiar.py": (f"{PACKAGE}.huggingface.configuration", "ChiarConfig"),
    "modeling_chiar.py": (f"{PACKAGE}.huggingface.modeling", "ChiarForCausalLM"),
}
_HEADER = '''"""{title} of a CHIAR-Former. Made by `chiar convert` from the sources of chiar-megatron."""

from __future__ import annotations

'''


@dataclass
class _Module:
    """A source file: its definitions by name, and where its imported names come from."""

    source: str
    definitions: dict[str, ast.stmt] = field(default_factory=dict)
    own: dict[str, tuple[str, str]] = field(default_factory=dict)
    """From this package: module and name there."""
    foreign: dict[str, str] = field(default_factory=dict)
    """From elsewhere: the import statement."""


def write_remote_code(folder: Path) -> None:
    """Write `configuration_chiar.py` and `modeling_chiar.py`. Raises OSError."""
    for name, (module, definition) in _FILES.items():
        (folder / name).write_text(bundle(name, module, definition), encoding="utf-8")


@lru_cache(maxsize=4)
def bundle(file: str, module: str, definition: str) -> str:
    """The text of one such file."""
    order: list[tuple[str, str]] = []
    imports: set[str] = set()
    apart = {} if file.startswith("configuration") else {"ChiarConfig": "configuration_chiar"}
    _collect(module, definition, order, imports, apart, set())
    names = [name for _, name in order]
    assert len(names) == len(set(names)), "two definitions of one name"
    text = _HEADER.format(title="Configuration" if file.startswith("configuration") else "Model")
    text += "\n".join(sorted(imports, key=lambda line: (line.startswith("from ."), line))) + "\n"
    for module_name, name in order:
        parsed = _parse(module_name)
        text += f"\n\n{_text(parsed, parsed.definitions[name])}\n"
    return text


def _collect(
    module: str,
    name: str,
    order: list[tuple[str, str]],
    imports: set[str],
    apart: dict[str, str],
    begun: set[tuple[str, str]],
) -> None:
    """Append a definition after those it needs (functions may need each other: either may come first)."""
    parsed = _parse(module)
    if (module, name) in begun:
        return
    begun.add((module, name))
    for used in _names_used(parsed.definitions[name]):
        if used == name:
            continue
        if used in apart:
            imports.add(f"from .{apart[used]} import {used}")
        elif used in parsed.definitions:
            _collect(module, used, order, imports, apart, begun)
        elif used in parsed.own:
            _collect(*parsed.own[used], order, imports, apart, begun)
        elif used in parsed.foreign:
            imports.add(parsed.foreign[used])
    order.append((module, name))


@lru_cache(maxsize=64)
def _parse(module: str) -> _Module:
    found = importlib.util.find_spec(module)
    assert found is not None and found.origin is not None
    source = Path(found.origin).read_text(encoding="utf-8")
    parsed = _Module(source)
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            parsed.definitions[node.name] = node
        elif isinstance(node, ast.Assign):
            targets = [name for target in node.targets for name in ast.walk(target)]
            parsed.definitions |= {name.id: node for name in targets if isinstance(name, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            parsed.definitions[node.target.id] = node
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE):
            parsed.own |= {alias.name: (node.module or "", alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                parsed.foreign[alias.asname or alias.name] = f"from {node.module} import {ast.unparse(alias)}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                parsed.foreign[alias.asname or alias.name.split(".")[0]] = f"import {ast.unparse(alias)}"
    return parsed


def _names_used(node: ast.AST) -> list[str]:
    """Names a definition uses when it is made or run, first use first."""
    names: list[str] = []

    def visit(part: ast.AST) -> None:
        if isinstance(part, ast.Name):
            names.append(part.id)
        for name, child in ast.iter_fields(part):
            if name in ("annotation", "returns"):
                continue
            for item in child if isinstance(child, list) else [child]:
                if isinstance(item, ast.AST):
                    visit(item)

    visit(node)
    return list(dict.fromkeys(names))


def _text(parsed: _Module, node: ast.stmt) -> str:
    """The definition as it stands in the source, decorators included."""
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
    return "\n".join(parsed.source.splitlines()[first - 1 : node.end_lineno])
