"""The house's rules (DESIGN, section 4), read off the sources: import order, sizes, docstrings, no print.

Every rule is a function from a file to its problems, so that each is also shown to find a bad one.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from chiar_megatron import __version__
from chiar_megatron.runtime import env

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = "chiar_megatron"
SIZED_FOLDERS = (PACKAGE, "tools", "examples", "benchmarks", "slurm", "tests")

# Each imports only from those before it.
ORDER = (
    "errors config runtime data operators routing model huggingface checkpoint inference conversion metrics "
    "training planning bench scaling cluster cli"
).split()
# `from chiar_megatron import load_model`: the root's __init__ may import all up to training.
ROOT = "__init__"
RANKS = {name: place for place, name in enumerate(ORDER)} | {ROOT: ORDER.index("planning")}

MAX_LINES, MAX_FUNCTION_LINES, MAX_ARGUMENTS = 400, 80, 9  # all exclusive
MAY_PRINT = ("cli/", "metrics/")

REGISTRIES = [
    "pypi" + ".org",
    "pythonhosted" + ".org",
    "download.pytorch" + ".org",
    "npmjs" + ".org",
    "deb.debian" + ".org",
    "anaconda" + ".org",
    "conda" + ".io",
]


def sources(*folders: str) -> list[Path]:
    """Python files under the repository's folders."""
    return sorted(path for folder in folders for path in (REPOSITORY / folder).rglob("*.py"))


def name_of(path: Path) -> str:
    """`routing/router.py` for a file of the package."""
    return path.relative_to(REPOSITORY / PACKAGE).as_posix()


def imported_modules(tree: ast.Module, importer: str) -> Iterator[tuple[int, str]]:
    """Line and full name of all that a file of the package imports, at the top or inside functions."""
    folder = [PACKAGE, *importer.split("/")[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = folder[: len(folder) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if called in ("import_module", "__import__"):
                yield node.lineno, str(node.args[0].value)


def import_order_problems(source: str, importer: str) -> list[str]:
    """Imports of a package that stands below the importer."""
    own = importer.split("/")[0].removesuffix(".py")
    problems = []
    if own not in RANKS:
        problems.append(f"{importer}: {own} has no place in the order")
        return problems
    for line, module in imported_modules(ast.parse(source), importer):
        parts = module.split(".")
        if parts[0] != PACKAGE or parts[1:] == ["__version__"]:
            continue
        target = parts[1] if len(parts) > 1 and parts[1] in ORDER else ROOT
        if target != own and RANKS[target] >= RANKS[own]:
            problems.append(f"{importer}:{line} imports {module}")
    return problems


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """All functions and methods, nested ones too."""
    return (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


def size_problems(source: str, name: str) -> list[str]:
    """Files, functions and argument lists that are too long."""
    problems = []
    lines = len(source.splitlines())
    if lines >= MAX_LINES:
        problems.append(f"{name}: {lines} lines")
    for node in functions(ast.parse(source)):
        length = (node.end_lineno or node.lineno) - node.lineno + 1
        if length >= MAX_FUNCTION_LINES:
            problems.append(f"{name}:{node.lineno} {node.name} has {length} lines")
        arguments = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        count = len(arguments) - (arguments[:1] in (["self"], ["cls"]))
        if count >= MAX_ARGUMENTS:
            problems.append(f"{name}:{node.lineno} {node.name} has {count} arguments")
    return problems


def methods(tree: ast.Module) -> Iterator[tuple[ast.ClassDef, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Public methods of public classes."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for child in node.body:
                if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) and child.name[0] != "_":
                    yield node, child


def documented_methods(source: str) -> set[str]:
    """Names of methods that a class of this file explains, for those that implement them elsewhere."""
    return {method.name for _, method in methods(ast.parse(source)) if ast.get_docstring(method)}


def docstring_problems(source: str, name: str, documented: set[str]) -> list[str]:
    """A module and its public functions, classes and methods without a docstring."""
    tree = ast.parse(source)
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    public = [node for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]
    # What a method of a library's class does, or one that a protocol explains, need not be said again.
    public += [m for owner, m in methods(tree) if not owner.bases and m.name not in documented]
    bare = [node for node in public if ast.get_docstring(node) is None]
    problems = [] if ast.get_docstring(tree) else [f"{name} has no docstring"]
    return problems + [f"{name}:{node.lineno} {node.name} has no docstring" for node in bare]


def print_problems(source: str, name: str) -> list[str]:
    """Calls of print where output is not the file's job."""
    if name.startswith(MAY_PRINT):
        return []
    calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    printed = (node for node in calls if isinstance(node.func, ast.Name) and node.func.id == "print")
    return [f"{name}:{node.lineno} prints" for node in printed]


def registry_problems(text: str, name: str) -> list[str]:
    """Addresses of package registries: which one is used is the machine's affair."""
    return [f"{name} names {address}" for address in REGISTRIES if address in text]


def make_targets() -> set[str]:
    """Targets of the Makefile."""
    return set(re.findall(r"^([a-z][\w-]*):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))


def readme_problems(text: str, targets: set[str], verbs: set[str]) -> list[str]:
    """Commands, scripts and linked files of a README that do not exist."""
    # Code blocks and inline code.
    parts = re.findall(r"```.*?\n(.*?)```|`([^`\n]+)`", text, re.DOTALL)
    code = "\n".join(block or inline for block, inline in parts)
    problems = [f"make {t}" for t in re.findall(r"^\s*make ([\w-]+)", code, re.M) if t not in targets]
    problems += [f"chiar {v}" for v in re.findall(r"^\s*chiar ([a-z][\w-]*)", code, re.M) if v not in verbs]
    files = re.findall(r"(?:^|\s)((?:[\w.-]+/)*[\w-]+\.py)\b", code)
    files += [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in link]
    return problems + [file for file in files if not exists(file)]


def exists(file: str) -> bool:
    """Whether a path named in a README is in the repository."""
    return (REPOSITORY / file).exists() or (REPOSITORY / PACKAGE / file).exists()


def chiar_verbs() -> set[str]:
    """Verbs that `chiar --help` lists."""
    command = [sys.executable, "-m", f"{PACKAGE}.cli", "--help"]
    shown = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert shown.returncode == 0, shown.stderr
    return set(re.findall(r"^    ([a-z][\w-]*)", shown.stdout, re.MULTILINE))


def test_packages_import_only_from_those_above_them():
    found = [p for path in sources(PACKAGE) for p in import_order_problems(path.read_text(), name_of(path))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("importer", "source", "problems"),
    [
        ("routing/router.py", "from chiar_megatron.operators.dct import dct", 0),
        ("routing/router.py", "from chiar_megatron.model.gpt import GPT", 1),
        ("routing/router.py", "from chiar_megatron import model", 1),
        ("routing/router.py", "from chiar_megatron import load_model", 1),
        ("routing/router.py", "from chiar_megatron import __version__", 0),
        ("routing/router.py", "import chiar_megatron.cli", 1),
        ("routing/router.py", "def later():\n    from chiar_megatron.training import loop", 1),
        ("routing/router.py", "import importlib\nimportlib.import_module('chiar_megatron.training')", 1),
        ("routing/router.py", "from . import entropy\nfrom .entropy import H\nfrom ..errors import E", 0),
        ("routing/router.py", "from ..model import gpt\nfrom .. import model", 2),
        ("operators/kernels/dct.py", "from ..dct import dct\nfrom ...errors import E", 0),
        ("operators/kernels/dct.py", "from ...routing import entropy", 1),
        ("cli/text.py", "from chiar_megatron.cluster import sweep\nfrom chiar_megatron import load_model", 0),
        ("__init__.py", "from chiar_megatron.inference import load", 0),
        ("__init__.py", "from chiar_megatron import cli", 1),
        ("utils/misc.py", "", 1),
    ],
)
def test_the_import_rule_finds_what_it_should(importer, source, problems):
    assert len(import_order_problems(source, importer)) == problems


def test_files_functions_and_argument_lists_are_short():
    named = {path.relative_to(REPOSITORY).as_posix(): path for path in sources(*SIZED_FOLDERS)}
    found = [problem for name, path in named.items() for problem in size_problems(path.read_text(), name)]
    assert not found, "\n".join(found)


def test_the_size_rule_finds_what_it_should():
    def body(lines: int) -> str:
        return "def f():\n" + "    x = 1\n" * (lines - 1)

    assert size_problems("\n" * 399, "f.py") == [] and size_problems(body(79), "f.py") == []
    assert len(size_problems("\n" * 400, "f.py")) == 1 and len(size_problems(body(80), "f.py")) == 1
    assert size_problems("class C:\n    def f(self, a, b, c, d, *e, f, g, h, i, **j): ...", "f.py") == []
    assert len(size_problems("def f(a, b, c, d, *e, f, g, h, i, j): ...", "f.py")) == 1


def test_what_is_public_has_a_docstring():
    texts = {name_of(path): path.read_text() for path in sources(PACKAGE)}
    documented = set().union(*map(documented_methods, texts.values()))
    found = [p for name, text in texts.items() for p in docstring_problems(text, name, documented)]
    assert not found, "\n".join(found)


def test_the_docstring_rule_finds_what_it_should():
    bad = "class A:\n    def b(self): ...\n    def _c(self): ...\nclass D(A):\n    def b(self): ...\n"
    bad += "async def e(): ...\ndef _f():\n    def g(): ...\n"
    assert len(docstring_problems(bad, "f.py", set())) == 5  # the module, A, A.b, D, e
    protocol = 'class P:\n    """P."""\n    def b(self):\n        """B."""\n'
    assert documented_methods(protocol) == {"b"}
    assert len(docstring_problems(bad, "f.py", {"b"})) == 4
    assert docstring_problems('"""M."""\ndef d():\n    """D."""', "f.py", set()) == []


def test_only_the_command_line_and_the_meters_print():
    found = [p for path in sources(PACKAGE) for p in print_problems(path.read_text(), name_of(path))]
    assert not found, "\n".join(found)
    assert len(print_problems("def f():\n    print(1)", "model/gpt.py")) == 1
    assert print_problems("print(1)", "cli/text.py") == print_problems("print(1)", "metrics/a.py") == []


def test_no_package_registry_is_named():
    command = ["git", "ls-files", "-co", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, check=True)
    paths = [REPOSITORY / name for name in listed.stdout.decode().split("\0") if name]
    texts = {path: path.read_bytes().decode(errors="ignore") for path in paths if path.is_file()}
    found = [p for path, text in texts.items() for p in registry_problems(text, path.name)]
    assert len(texts) > 20 and not found, "\n".join(found)
    assert registry_problems("--index-url https://" + REGISTRIES[0], "f") != []


def test_the_readmes_commands_and_files_exist():
    text = (REPOSITORY / "README.md").read_text()
    assert not (found := readme_problems(text, make_targets(), chiar_verbs())), "\n".join(found)
    assert "make demo" in text and "make test" in text


def test_the_readme_rule_finds_what_it_should():
    good = "`make test` [x](setup.py) `config/load.py`\n```sh\nchiar plan a.yaml\npython setup.py\n```\n"
    assert readme_problems(good, {"test"}, {"plan"}) == []
    bad = "`make tests` [x](no.md) `no/layer.py`\n```bash\nmake all\nchiar plant a.yaml\npython no.py\n```\n"
    assert set(readme_problems(bad, {"test"}, {"plan"})) == {
        "make tests", "make all", "chiar plant", "no.md", "no/layer.py", "no.py",
    }  # fmt: skip


def test_versions_in_the_code_are_those_of_setup_py():
    text = (REPOSITORY / "setup.py").read_text()
    assert f'version="{__version__}"' in text
    (low, high), core = (".".join(map(str, v)) for v in (env.TORCH_MIN, env.TORCH_END)), env.MEGATRON_CORE
    assert f'"torch>={low},<{high}"' in text and f'"megatron-core=={core}"' in text
    assert f'python_requires=">={".".join(map(str, env.PYTHON_MIN))}"' in text
