"""The demo's text: prose only, nothing twice, no document on both sides of the split."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from chiar_megatron.data.text import read_documents

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "demo_cpu" / "gather_text.py"

LICENCE = (
    "Permission is hereby granted to use, copy and change this file number {} as long as this notice is kept "
    "in all copies of it, and the name of its author is not used to advertise what was made with it."
)
PROSE = {
    "m0.py": "Read the folder from disk and keep the parts of it that are still in use. A folder that was "
    "closed before is opened again, and whoever waits for it is told so. This may take a while if it is "
    "large, and when it cannot be found, the caller of this function should ask for another one.",
    "m1.py": "Letters come in at the door and are put on the table by the one who lives there. She reads "
    "them after lunch, in the order of their stamps, and answers those that have a question in them. The "
    "others go to the box under the stairs, where they stay until the box is full and is carried away.",
    "m2.py": "A number is prime if it has no divisor but itself and one. To find all of them below a limit, "
    "write the numbers in a row, take the first that is left, and cross out all its multiples. What has not "
    "been crossed out in the end is prime, and this was known to the Greeks over two thousand years ago.",
}


@pytest.fixture(scope="module")
def gather_text() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gather_text", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gather_text"] = module  # worker processes look functions up by name
    spec.loader.exec_module(module)
    return module


def test_only_prose_is_kept(gather_text: ModuleType) -> None:
    text = """Return the :class:`~mail.Message` that ``name`` stands for, or *nothing* if there is none.

    >>> and this is a doctest which must not be kept in any of the text that we gather

    Parameters
    ----------
    name : str or bytes, and its description is long enough, but it is not a sentence of prose
    x, y, z = compute(a[0], b[1]) if (c == d) else {e: f(g) for h in i}  # code
    +------+------+   | a | b |   +------+------+   | c | d |   the table is not prose

    Les mots de cette phrase sont connus de tous, mais ils ne sont pas dans la bonne langue pour nous.

    The second paragraph is wrapped over two lines
    and must come out as one, see the `manual <https://example.org>`_ for more.
    """
    assert list(gather_text.prose_paragraphs(text)) == [
        "Return the mail.Message that name stands for, or nothing if there is none.",
        "The second paragraph is wrapped over two lines and must come out as one, see the manual for more.",
    ]


def test_repetitions_are_dropped_also_when_a_word_differs(gather_text: ModuleType, tmp_path: Path) -> None:
    sources = {
        name: f'"""{LICENCE.format(i)}"""\n\ndef f():\n    """{prose}"""\n'
        for i, (name, prose) in enumerate(PROSE.items())
    }
    sources["copy.py"] = sources["m0.py"].replace("large", "big")
    sources["broken.py"] = sources["m0.py"] + "def (:\n"
    for name, source in sources.items():
        (tmp_path / name).write_text(source)
    documents = gather_text.gather([(name, tmp_path / name) for name in sources], limit_bytes=10**9)
    assert [document.name for document in documents] == list(PROSE)
    assert [document.paragraphs[-1] for document in documents] == list(PROSE.values())
    text = "\n".join(paragraph for document in documents for paragraph in document.paragraphs)
    assert text.count("Permission is hereby granted") == 1


def test_this_machine_gives_enough_english(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--max-megabytes", "0.5", "--seed", "3"]
    for folder in ("a", "b"):
        subprocess.run([*command, "--output-dir", str(tmp_path / folder)], check=True, timeout=120)
    for name in ("train.txt", "validation.txt", "counts.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    counts = json.loads((tmp_path / "a" / "counts.json").read_text())
    sides = {side: list(read_documents([tmp_path / "a" / f"{side}.txt"])) for side in counts}
    for side, documents in sides.items():
        assert counts[side]["documents"] == len(documents) > 1
        assert counts[side]["bytes"] == sum(len(document.encode()) for document in documents)
    assert 400_000 < counts["train"]["bytes"] + counts["validation"]["bytes"] < 1_000_000
    assert 0.005 < counts["validation"]["bytes"] / counts["train"]["bytes"] < 0.3
    # no paragraph, not even a changed one, stands on both sides
    runs = {side: [_runs(p) for text in texts for p in text.split("\n\n")] for side, texts in sides.items()}
    trained = set().union(*runs["train"])
    assert all(len(paragraph & trained) <= 0.5 * len(paragraph) for paragraph in runs["validation"])
    # as in any English text, about one word in sixteen is "the"
    words = re.findall(r"[a-z]+", " ".join(sides["train"]).lower())
    assert 0.05 < words.count("the") / len(words) < 0.12


def _runs(paragraph: str) -> set[str]:
    words = re.findall(r"[a-z]+", paragraph.lower())
    return {" ".join(words[i : i + 6]) for i in range(max(1, len(words) - 5))}
