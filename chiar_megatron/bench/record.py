"""Results as JSON with the machine they were measured on, progress lines, and the table printed last."""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from chiar_megatron.bench.checks import Checks
from chiar_megatron.errors import ConfigError
from chiar_megatron.metrics.progress import ProgressLine

RESULTS = Path("benchmarks") / "results"


class Report:
    """One benchmark's record, written anew after every result."""

    def __init__(self, name: str, settings: Any, device: torch.device, options: Any) -> None:
        """settings: a dataclass or dict of sizes. options: parsed arguments `output`, `commit`,
        `time_limit`. Raises ConfigError if the record cannot be written."""
        self.device = device
        self.checks = Checks()
        self.results: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.failed = False
        self._started = time.monotonic()
        self._limit: float | None = options.time_limit
        self._line = ProgressLine(1, sys.stdout.isatty())
        self._head = {
            "benchmark": name,
            "settings": asdict(settings) if is_dataclass(settings) else dict(settings),  # type: ignore[arg-type]
            "machine": machine(device, options.commit),
            "command": " ".join(sys.argv),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        default = RESULTS / f"{name}_{device_slug(device)}.json"
        self.path = Path(options.output) if options.output else default
        check_output(self.path)

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    @property
    def out_of_time(self) -> bool:
        """Whether `--time-limit` has passed."""
        return self._limit is not None and self.elapsed > self._limit

    def say(self, text: str) -> None:
        """A line of progress, with the seconds since the start."""
        self._line.say(f"[{self.elapsed:7.1f} s] {text}")

    def note(self, text: str) -> None:
        """A remark that belongs to the record."""
        self.notes.append(text)
        self.say(text)

    def add(self, result: dict[str, Any]) -> None:
        """Keep a result and write the file."""
        self.results.append(result)
        self.write()

    def write(self) -> None:
        """Write the file as it stands; through a second one, so that it is never half a record."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        record = {
            **self._head,
            "seconds": round(self.elapsed, 1),
            "checks": self.checks.measured,
            "notes": self.notes,
            "results": self.results,
        }
        partial = _partial(self.path)
        partial.write_text(json.dumps(plain(record), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        partial.replace(self.path)

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Write the record and print a table, the path of the record beneath it."""
        self.write()
        for line in format_table(header, rows):
            self._line.say(line)
        self._line.say(f"written to {self.path}")


def check_output(path: Path) -> None:
    """Try a record's path before anything is measured. Raises ConfigError if it cannot be written."""
    if path.is_dir():
        raise ConfigError(f"--output: {path} is a folder; give a file, such as {path / 'record.json'}")
    partial = _partial(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
        partial.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--output: {path} cannot be written ({error.strerror}); choose another file"
        ) from None


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: numbers that are not finite become null."""
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table as Markdown has it, columns aligned."""
    cells = [list(header), *(list(row) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def machine(device: torch.device, commit: str | None = None) -> dict[str, Any]:
    """Where a figure was measured, and with which versions; commit: where there is no git to ask."""
    return {
        "device": device_name(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None,
        "triton": _version("triton"),
        "megatron_core": _version("megatron-core"),
        "transformer_engine": _version("transformer-engine"),
        "threads": torch.get_num_threads(),
        "git_commit": commit or _git_commit(),
    }


def device_name(device: torch.device) -> str:
    """As the vendor names it; a CPU by its architecture."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU {platform.machine()}"


def device_slug(device: torch.device) -> str:
    """Fit for a file's name."""
    name = device_name(device) if device.type == "cuda" else "cpu"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit of this code, with `+changes` where files differ from it; None without git."""
    folder = Path(__file__).resolve().parent
    found = []
    for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]):
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *command], capture_output=True, text=True, timeout=20
            )
        except (OSError, subprocess.SubprocessError):
            return None
        if done.returncode != 0:
            return None
        found.append(done.stdout.strip())
    return found[0] + ("+changes" if found[1] else "")
