"""What one checkpoint folder holds, and how it is checked: plain files, no process groups.

`<run>/checkpoints/step_00000100/` holds megatron-core's distributed checkpoint, `checkpoint.json` (step,
tokens, layout, the run's config) and `manifest.json` (size and BLAKE2b of every file, written last).
`<run>/checkpoints/latest` names the newest; it moves only after the folder has its final name.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from chiar_megatron.errors import CheckpointError

MANIFEST = "manifest.json"
INFO = "checkpoint.json"
LATEST = "latest"
_STEP = re.compile(r"step_(\d{8,})$")
_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint says of itself without being loaded."""

    step: int
    tokens_seen: int
    has_optimizer: bool
    layout: dict[str, int]
    config: dict[str, Any]
    created_unix_seconds: float
    version: str

    @staticmethod
    def read(folder: Path) -> CheckpointInfo:
        """Raises CheckpointError if the folder is no checkpoint of ours."""
        try:
            info = CheckpointInfo(**json.loads((folder / INFO).read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"{folder} is no chiar checkpoint ({INFO}: {error}); give a step_… folder or its run folder"
            ) from None
        for name, kind in (("step", int), ("tokens_seen", int), ("layout", dict), ("config", dict)):
            if not isinstance(getattr(info, name), kind):
                raise CheckpointError(f"{folder}: {INFO} is torn: its {name} is no {kind.__name__}")
        return info

    def write(self, folder: Path) -> None:
        """Write `checkpoint.json`."""
        write_durably(folder / INFO, json.dumps(asdict(self), indent=1))


def step_folder(folder: Path, step: int) -> Path:
    """Final name of the checkpoint of one step."""
    return folder / f"step_{step:08d}"


def step_folders(folder: Path) -> list[int]:
    """Steps of all checkpoint folders, whole or not, oldest first."""
    if not folder.is_dir():
        return []
    matches = (_STEP.match(path.name) for path in folder.iterdir() if path.is_dir())
    return sorted(int(match.group(1)) for match in matches if match)


def complete_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints that have a manifest, oldest first."""
    return [step for step in step_folders(folder) if (step_folder(folder, step) / MANIFEST).is_file()]


def file_digest(path: Path) -> dict[str, Any]:
    """Size and BLAKE2b-128 of a file."""
    digest = hashlib.blake2b(digest_size=16)
    size = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return {"bytes": size, "blake2b": digest.hexdigest()}


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """Raises CheckpointError if there is none or it is torn."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: {MANIFEST} is missing") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: {MANIFEST} is torn: {error}") from None
    entries = list(manifest.values()) if isinstance(manifest, dict) else []
    if not all(isinstance(entry, dict) and "bytes" in entry for entry in entries) or not (
        isinstance(manifest, dict) and INFO in manifest
    ):
        raise CheckpointError(f"{folder}: {MANIFEST} is torn")
    return manifest


def find_damage(
    folder: Path, names: list[str], manifest: dict[str, dict[str, Any]], sizes_only: bool = False
) -> str | None:
    """First of these files that differs from the manifest, in words; None if all agree.

    sizes_only: do not read them.
    """
    for name in names:
        path = folder / name
        try:
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != manifest[name]["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, {manifest[name]['bytes']} were written"
            if not sizes_only and file_digest(path) != manifest[name]:
                return f"{name} has other content than was written"
        except OSError as error:
            return f"{name} cannot be read: {error}"
    return None


def write_durably(path: Path, text: str) -> None:
    """Replace a small file atomically; on the disk when this returns."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def resolve_checkpoint(path: Path) -> Path:
    """The checkpoint folder meant by a run folder, its `checkpoints/`, or a `step_…` folder itself.

    Raises CheckpointError naming what is there instead.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: no such checkpoint folder")
    if (path / MANIFEST).is_file():
        return path
    for folder in (path, path / "checkpoints"):
        steps = complete_steps(folder)
        if steps:
            pointed = pointed_step(folder)
            return step_folder(folder, pointed if pointed in steps else steps[-1])
    raise CheckpointError(f"{path}: holds no checkpoint (no step_… folder with {MANIFEST})")


def pointed_step(folder: Path) -> int | None:
    """The step that `latest` names; None if it is missing or torn."""
    try:
        match = _STEP.match((folder / LATEST).read_text().strip())
    except (OSError, ValueError):
        return None
    return int(match.group(1)) if match else None
