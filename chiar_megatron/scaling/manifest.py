"""The sweep folder: `sweep.json` names every planned run, `recipes/` holds one complete recipe each."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from chiar_megatron.checkpoint.files import write_durably
from chiar_megatron.config.fields import nearest_name
from chiar_megatron.config.load import dump_config
from chiar_megatron.config.schema import RunConfig
from chiar_megatron.errors import ConfigError

MANIFEST = "sweep.json"
FORMAT = 1


@dataclass(frozen=True)
class PlannedRun:
    """One run of a sweep, as planned."""

    name: str
    recipe: str
    """Path of its YAML, relative to the sweep folder."""
    run_dir: str
    variant: str
    size: str
    schedule: str
    parameters: int
    """N with embeddings and head (no padding of the vocabulary)."""
    parameters_non_embedding: int
    """N without them."""
    budget: float
    """FLOPs asked for; 0 where the sweep has no budgets."""
    tokens: int
    """D: steps × sequences × sequence length."""
    steps: int
    global_batch_size: int
    """Sequences a step."""
    lr: float
    training_flops: float
    """C, executed, with the routed fraction that is planned."""
    attention_share: float
    """ρ, planned."""
    device_hours: float
    """Estimate."""
    held_out: bool = False
    """Left out by `submit` and `fit` unless asked for: the run a law is tried on."""


@dataclass(frozen=True)
class Sweep:
    """A manifest and where it lies."""

    folder: Path
    kind: str
    rules: tuple[str, ...]
    """How batch, learning rate and lengths were chosen, one sentence each."""
    runs: tuple[PlannedRun, ...]

    def recipe(self, run: PlannedRun) -> Path:
        """Path of a run's recipe."""
        return self.folder / run.recipe

    def wanted(self, held_out: bool) -> tuple[PlannedRun, ...]:
        """The held-out runs, or the others. Raises ConfigError if there is none."""
        runs = tuple(run for run in self.runs if run.held_out == held_out)
        if not runs:
            remedy = "plan them with --held-out" if held_out else "give --held-out"
            raise ConfigError(f"{self.folder} has {'no' if held_out else 'only'} held-out runs; {remedy}")
        return runs


def write_sweep(sweep: Sweep, configs: dict[str, RunConfig], add: bool = False) -> None:
    """Write recipes, then the manifest. add: keep the runs that the folder's manifest already names.

    Raises ConfigError if the folder holds other runs and they are not to be kept, or cannot be written.
    """
    path = sweep.folder / MANIFEST
    kept: tuple[PlannedRun, ...] = ()
    rules = sweep.rules
    if path.exists():
        before = read_sweep(sweep.folder)
        kept = tuple(run for run in before.runs if run.name not in configs)
        rules = tuple(dict.fromkeys((*before.rules, *rules))) if kept else rules
        if kept and not add:
            raise ConfigError(
                f"{sweep.folder} holds a sweep with other runs ({kept[0].name}, ...); add to it with --add, "
                "or choose another --output"
            )
    record = {
        "format": FORMAT,
        "kind": sweep.kind,
        "rules": rules,
        "runs": [asdict(run) for run in cheap_first((*kept, *sweep.runs))],
    }
    try:
        (sweep.folder / "recipes").mkdir(parents=True, exist_ok=True)
        for run in sweep.runs:
            write_durably(sweep.recipe(run), dump_config(configs[run.name]))
        write_durably(path, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        raise ConfigError(
            f"{sweep.folder} cannot be written ({error.strerror}); choose another --output"
        ) from error


def planned_size(run: PlannedRun, n_column: str) -> int:
    """N of a run as a fit with this column of N counts it. Raises ConfigError for a foreign column."""
    sizes = {"parameters": run.parameters, "parameters_non_embedding": run.parameters_non_embedding}
    if n_column not in sizes:
        raise ConfigError(
            f"--fit: its N is the column {n_column!r}, of which a plan knows nothing; fit a table of "
            f"`chiar scaling collect` by --n {' or --n '.join(sizes)}"
        )
    return sizes[n_column]


def cheap_first(runs: Iterable[PlannedRun]) -> tuple[PlannedRun, ...]:
    """In the order of their budgets, or of their FLOPs without: what is wrong with a recipe shows early, and
    small budgets are complete early."""
    return tuple(sorted(runs, key=lambda run: run.budget or run.training_flops))


def read_sweep(folder: Path) -> Sweep:
    """The sweep of a folder. Raises ConfigError if it holds none."""
    path = folder / MANIFEST
    if not path.is_file():
        around = folder.parent
        names = sorted(entry.name for entry in around.iterdir()) if around.is_dir() else []
        near = "" if folder.is_dir() else nearest_name(folder.name, names)
        raise ConfigError(f"{path} does not exist{near}; `chiar scaling plan ... --output {folder}` makes it")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["format"] != FORMAT:
            raise ConfigError(f"{path} has format {record['format']}, not {FORMAT}; plan again")
        runs = tuple(PlannedRun(**run) for run in record["runs"])
        return Sweep(folder, record["kind"], tuple(record["rules"]), runs)
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is not a sweep's manifest ({error}); plan again") from error
