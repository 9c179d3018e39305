"""Gather real English that is on any machine: what people wrote about their Python code.

The documentation strings of Python's standard library (with the language reference behind `help()`) and
of the installed packages are read without importing anything, cleaned to paragraphs of prose, stripped
of repetitions, and split by module into `train.txt` and `validation.txt`; a line `<|endoftext|>` ends
each document. `counts.json` says how much there is. The same machine gives the same text every time.

    python examples/demo_cpu/gather_text.py --output-dir runs/demo/text
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import inspect
import json
import os
import re
import sysconfig
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

DOCUMENT_SEPARATOR = "<|endoftext|>"
VALIDATION_SHARE = 0.05
HELP_TOPICS = "pydoc_data/topics.py"  # the language reference
LEAST_QUOTED_SHARE = 0.15
SHORTEST_DOCUMENT_WORDS = 40
SHORTEST_PARAGRAPH_WORDS = 8
LONGEST_WORD = 60  # letters; more are a path or a key
SHINGLE_WORDS = 6  # two paragraphs are alike if they share many runs of so many words
FILES_PER_TASK = 64

SKIPPED_FOLDERS = {
    *("test", "tests", "__pycache__", "site-packages", "dist-packages", "encodings"),
    *("_vendor", "_vendored", "vendored", "third_party", "turtledemo", "lib2to3", "node_modules"),
}
# A sixth or more of the words of English prose are among these; of code, tables and other tongues, few.
COMMON_WORDS = frozenset(
    "a an and are as at be been but by can do does for from has have if in into is it its may more must no "
    "not of on one only or other should so such than that the their them then there these they this to use "
    "used was we when where which will with without you your".split()
)
TITLE = re.compile(r"[-=~^*#]{3,}$|[A-Z]\w+( \w+)?:$")
ITEM = re.compile(r"[-*+•] |\d+[.)] |:\w|\.\. |@\w|\*{0,2}\w+ ?(\([^)]*\) ?)?:( |$)")


@dataclass(frozen=True)
class Document:
    """The prose of one module."""

    name: str
    """Its path within the library, which decides the side of the split."""

    paragraphs: list[str]
    """One line each."""


def main() -> None:
    """Parse the command line, gather, write, and say how much."""
    parser = argparse.ArgumentParser(description="Gather English prose about programming from this machine.")
    parser.add_argument("--output-dir", type=Path, required=True, help="folder of train.txt, validation.txt")
    parser.add_argument("--seed", type=int, default=0, help="of the split into training and validation")
    parser.add_argument("--max-megabytes", type=float, default=5.0, help="stop after so much text")
    arguments = parser.parse_args()
    limit_bytes = int(arguments.max_megabytes * 1e6)
    documents = gather(installed_files(), limit_bytes)
    counts = write_splits(documents, arguments.output_dir, arguments.seed)
    print(json.dumps(counts))


def installed_files() -> list[tuple[str, Path]]:
    """Name and path of every module: the standard library's first, then the installed packages'."""
    paths = sysconfig.get_paths()
    roots = [Path(paths["stdlib"]), Path(paths["purelib"])]
    return [(file.relative_to(root).as_posix(), file) for root in roots for file in _python_files(root)]


def _python_files(root: Path) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if name not in SKIPPED_FOLDERS)
        for name in sorted(names):
            if name.endswith(".py") and not name.startswith("test_"):
                yield Path(folder, name)


def gather(files: list[tuple[str, Path]], limit_bytes: int, processes: int = 2) -> list[Document]:
    """The documents of `files`, in order, without repetitions, until they hold `limit_bytes`."""
    seen = Repetitions()
    documents: list[Document] = []
    size = 0
    tasks = [files[start : start + FILES_PER_TASK] for start in range(0, len(files), FILES_PER_TASK)]
    with ProcessPoolExecutor(processes) as pool:
        for extracted in pool.map(extract_documents, tasks):
            for document in extracted:
                kept = [paragraph for paragraph in document.paragraphs if seen.is_new(paragraph)]
                if sum(len(paragraph.split()) for paragraph in kept) >= SHORTEST_DOCUMENT_WORDS:
                    documents.append(Document(document.name, kept))
                    size += sum(len(paragraph.encode()) + 2 for paragraph in kept)
                if size >= limit_bytes:
                    pool.shutdown(cancel_futures=True)
                    return documents
    return documents


class Repetitions:
    """Remembers paragraphs, and recognises one most of whose word runs were seen before.

    Licence headers, inherited docstrings and generated ones return with a name or a number changed;
    comparing runs of words finds them where comparing whole texts would not.
    """

    def __init__(self) -> None:
        self._seen: set[int] = set()

    def is_new(self, paragraph: str) -> bool:
        """True the first time; remembers the paragraph."""
        words = re.findall(r"[a-z]+", paragraph.lower())
        last = max(1, len(words) - SHINGLE_WORDS + 1)
        # hash() differs from process to process, but only equality counts here
        runs = {hash(tuple(words[i : i + SHINGLE_WORDS])) for i in range(last)}
        is_new = len(runs & self._seen) <= 0.3 * len(runs)
        self._seen |= runs
        return is_new


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def extract_documents(files: list[tuple[str, Path]]) -> list[Document]:
    """The prose of each file that has any."""
    documents = []
    for name, path in files:
        paragraphs = [p for text in _texts(name, path) for p in prose_paragraphs(text)]
        if paragraphs:
            documents.append(Document(name, paragraphs))
    return documents


def _texts(name: str, path: Path) -> list[str]:
    """Documentation strings of a module in their order; of `help()`'s topics, the texts themselves."""
    try:
        source = path.read_text(encoding="utf-8")
        if name != HELP_TOPICS and _quoted_share(source) < LEAST_QUOTED_SHARE:
            return []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the way other people wrote their strings
            tree = ast.parse(source)
    except (UnicodeDecodeError, SyntaxError, ValueError, RecursionError, OSError):
        return []  # templates, and files for other versions of Python
    if name == HELP_TOPICS:
        return list(_long_texts(tree))
    return [inspect.cleandoc(text) for text in _documentation_strings(tree)]


def _quoted_share(source: str) -> float:
    """Share of a module between triple quotes; tells in no time whether parsing it is worth while."""
    return sum(map(len, source.split('"""')[1::2])) / max(1, len(source))


def _long_texts(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) > 200:
            yield node.value


def _documentation_strings(node: ast.AST) -> Iterator[str]:
    """Of a module or class and all it holds, depth first; also those of compiled code, which are
    handed to `add_docstr(…)` and `add_newdoc(…)`."""
    for position, child in enumerate(getattr(node, "body", ())):
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _documentation_strings(child)
        elif isinstance(child, ast.Expr):
            value = child.value
            if position == 0 and isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield value.value
            elif isinstance(value, ast.Call) and "doc" in ast.unparse(value.func):
                yield from _long_texts(value)


def prose_paragraphs(text: str) -> Iterator[str]:
    """The paragraphs of English prose in a documentation string, each on one line, without markup."""
    for block in re.split(r"\n\s*\n", text.expandtabs()):
        lines = [line.strip() for line in block.splitlines() if line.strip()]
        if not lines or any(line.startswith((">>>", "...", "$ ", "#!")) for line in lines):
            continue
        for group in _groups(lines):
            if sum(line.count(" ") + 1 for line in group) >= SHORTEST_PARAGRAPH_WORDS:
                paragraph = _without_markup(" ".join(group))
                if is_prose(paragraph):
                    yield paragraph


def _groups(lines: list[str]) -> list[list[str]]:
    """Lines that belong together: a new group at a list item, at a parameter, and around a title."""
    groups: list[list[str]] = [[]]
    for line in lines:
        is_title = TITLE.match(line)
        if is_title or ITEM.match(line):
            groups.append([])
        groups[-1].append(line)
        if is_title:
            groups.append([])
    return groups


def _without_markup(text: str) -> str:
    """reStructuredText and Markdown reduced to their words."""
    if "`" in text:
        text = re.sub(r":[\w:+-]+:`[~!]?([^`<]*?)\s*(<[^`>]*>)?`", r"\1", text)  # :class:`Name <target>`
        text = re.sub(r"`([^`<]+?)\s*<[^`>]*>`_*", r"\1", text)  # `text <link>`_
        text = re.sub(r"`+([^`]*)`+_*", r"\1", text)
    if "](" in text:
        text = re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", text)  # [text](link)
    if "*" in text:
        text = re.sub(r"(?<![\w*])(\*\*?)([^\s*][^*]*)\1(?![\w*])", r"\2", text)  # *text*, **text**
    text = re.sub(r"^([-*+•]|\d+[.)]) +", "", text)
    return " ".join(re.sub(r"\s*::$", ":", text).split())


def is_prose(paragraph: str) -> bool:
    """Whether it reads as English: sentences of common words, hardly any signs or numbers."""
    words = paragraph.split()
    if len(words) < SHORTEST_PARAGRAPH_WORDS or not paragraph.isascii():
        return False
    if not (paragraph[0].isupper() or paragraph[0] in "\"'(") or paragraph[-1] not in ".!?:)\"'":
        return False
    letters = sum(map(str.isalpha, paragraph)) + sum(map(paragraph.count, " ,."))
    if letters < 0.93 * len(paragraph) or max(map(len, words)) > LONGEST_WORD:
        return False
    bare = [word.strip(".,;:!?()\"'") for word in words]
    common = sum(word.lower() in COMMON_WORDS for word in bare)
    plain = sum(word.replace("-", "").replace("'", "").isalpha() for word in bare)
    return common >= len(words) / 5 and plain >= 0.75 * len(words)


def write_splits(documents: list[Document], folder: Path, seed: int) -> dict[str, dict[str, int]]:
    """Write `train.txt`, `validation.txt` and `counts.json`; a document is on one side only."""
    folder.mkdir(parents=True, exist_ok=True)
    sides: dict[str, list[str]] = {"train": [], "validation": []}
    for document in documents:
        draw = _hash(f"{seed} {document.name}") / 2**64
        text = "\n\n".join(document.paragraphs) + "\n"
        sides["validation" if draw < VALIDATION_SHARE else "train"].append(text)
    counts = {}
    for side, texts in sides.items():
        content = f"{DOCUMENT_SEPARATOR}\n".join(texts)
        (folder / f"{side}.txt").write_text(content, encoding="utf-8")
        words = sum(len(text.split()) for text in texts)
        counts[side] = {
            "documents": len(texts),
            "bytes": sum(len(text.encode()) for text in texts),
            "words": words,
        }
    (folder / "counts.json").write_text(json.dumps(counts, indent=2) + "\n", encoding="utf-8")
    return counts


if __name__ == "__main__":
    main()
