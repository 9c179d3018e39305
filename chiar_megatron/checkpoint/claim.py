"""Who may change a run folder: the newest attempt alone, also when an older copy of it is still alive.

A network partition makes two copies of a run: the job starts again elsewhere while the old ranks write on.
Neither can ask the other, and a copy may be paused for minutes between a check and its write. So nothing
rests on checks:

- An attempt claims the next number N by making `RUN/attempts/N`, which only one can make. N is larger than
  all before; if a larger one appears meanwhile, it tries again.
- All that an attempt writes comes to be in that folder of its own. It changes what all share
  (`checkpoints/step_…`, `checkpoints/latest`, `metrics.jsonl`, `exit.json`, …) by one `rename` only, out of
  its folder (`publish`) or into it (`take`), which the file system does entirely or not at all.
- Before it reads where to continue from, a new attempt renames the folders of older ones and deletes them. An
  older copy's rename then has no source or no target and fails: it was either done before the new attempt
  looked, or is never done. That needs no locks and no clocks, only `mkdir` and `rename` that are atomic on
  the file server (POSIX; NFS too: a deleted folder takes nothing, whatever a client has cached).
- Files of lines (`metrics.jsonl`, `events.jsonl`, …) are taken over as a copy under the same name: what an
  older copy still appends goes into a file that has no name any more.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from chiar_megatron.checkpoint.files import sync_folder, write_durably
from chiar_megatron.errors import ChiarError, FencedError

FOLDER = "attempts"
KEPT = ("damaged_", "aside_")  # checkpoints that are kept under another name, on their way there
_NUMBER = re.compile(r"\d{6,}")
_FENCED = "fenced_"
_FENCE_TRIES = 300  # a tenth of a second apart: what an older copy puts there meanwhile ends soon
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Claim:
    """One attempt's right to change a run folder, good until a newer one is made."""

    run_dir: Path
    number: int

    @property
    def folder(self) -> Path:
        """What this attempt alone writes into."""
        return self.run_dir / FOLDER / f"{self.number:06d}"

    def is_lost(self) -> bool:
        """Whether a newer attempt has begun. For early notice only: the answer may be old at once."""
        return not self.folder.is_dir()

    def check(self) -> None:
        """Raises FencedError if a newer attempt has begun."""
        if self.is_lost():
            raise FencedError(
                f"{self.run_dir}: attempt {self.number} gives way to attempt {_newest(self.run_dir)}, which "
                "has taken the run over and goes on with it; nothing needs to be done"
            )

    def publish(self, name: str, target: Path) -> None:
        """Give `name` of the own folder its place for all; replaces a file, or an empty folder.

        Raises FencedError if a newer attempt has begun; OSError.
        """
        self._rename(self.folder / name, target)
        sync_folder(target.parent)

    def take(self, source: Path, name: str) -> Path:
        """Move what all share into the own folder, as `name`. Raises as `publish` does."""
        shutil.rmtree(self.folder / name, ignore_errors=True)
        self._rename(source, self.folder / name)
        return self.folder / name

    def discard(self, path: Path) -> None:
        """Delete a shared file or folder, if it is there. Raises as `publish` does."""
        try:
            taken = self.take(path, f"discarded_{path.name}")
        except FileNotFoundError:
            return
        if taken.is_dir():
            shutil.rmtree(taken, ignore_errors=True)
        else:
            taken.unlink(missing_ok=True)

    def write(self, target: Path, text: str) -> None:
        """Write a small shared file whole, on the disk when this returns. Raises as `publish` does."""
        try:
            write_durably(self.folder / target.name, text)
        except OSError:
            self.check()
            raise
        self.publish(target.name, target)

    def take_over(self, target: Path, keep: int) -> int:
        """Put a copy of a file's first `keep` bytes in its place, open for appending.

        An older copy that has the file open appends to the one replaced. Returns the descriptor. Raises as
        `publish` does.
        """
        own = self.folder / target.name
        try:
            descriptor = os.open(own, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
        except OSError:
            self.check()
            raise
        try:
            if keep > 0:
                _copy(target, descriptor, keep)
            os.fsync(descriptor)
            self.publish(own.name, target)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _rename(self, source: Path, target: Path) -> None:
        try:
            source.rename(target)
        except OSError:
            self.check()
            raise


def claim_run(run_dir: Path) -> Claim:
    """Begin an attempt: from its return on, no older one changes the folder any more.

    Raises ChiarError if the folder cannot be written, or an older attempt's folder cannot be removed.
    """
    root = run_dir / FOLDER
    try:
        root.mkdir(parents=True, exist_ok=True)
        while True:
            claim = Claim(run_dir, _newest(run_dir) + 1)
            try:
                claim.folder.mkdir()
            except FileExistsError:
                continue
            if _newest(run_dir) == claim.number:
                break
            shutil.rmtree(claim.folder, ignore_errors=True)  # a larger number was claimed meanwhile
        for number in _numbers(root):
            if number < claim.number:
                _fence(Claim(run_dir, number).folder)
        for leftover in root.glob(f"{_FENCED}*"):
            _remove(leftover)
        sync_folder(root)
    except OSError as error:
        raise ChiarError(f"run_dir {run_dir} cannot be written: {error}; choose another") from None
    return claim


def join_claim(run_dir: Path, number: int | None) -> Claim:
    """The claim that a job's script has made for its ranks, or a new one for None.

    Raises FencedError if a newer attempt has begun, ChiarError if this one began in another folder, and as
    `claim_run` does.
    """
    if number is None:
        return claim_run(run_dir)
    claim = Claim(run_dir, number)
    if claim.is_lost() and (not (run_dir / FOLDER).is_dir() or _newest(run_dir) < number):
        raise ChiarError(
            f"--attempt {number}: begun in another folder than run_dir {run_dir}; set RUN_DIR in the script "
            "to the recipe's run_dir"
        )
    claim.check()
    return claim


def _fence(folder: Path) -> None:
    """Take an older attempt's folder from it: by its name at once, and for good when it is deleted."""
    fenced = folder.with_name(f"{_FENCED}{folder.name}")
    try:
        folder.rename(fenced)
    except FileNotFoundError:  # another attempt did
        return
    _remove(fenced)


def _remove(fenced: Path) -> None:
    """Delete a fenced folder; what an older copy may still put there goes too, until it cannot."""
    for _ in range(_FENCE_TRIES):
        with suppress(FileNotFoundError):  # another attempt did
            for kept in (name for name in os.listdir(fenced) if name.startswith(KEPT)):
                (fenced / kept).rename(fenced.parent.parent / "checkpoints" / kept)
        shutil.rmtree(fenced, ignore_errors=True)
        # NFS keeps what a process of this host has open, as .nfs…; such a process sees the rename at once.
        left = [name for _, _, names in os.walk(fenced) for name in names]
        if not fenced.exists() or (left and all(name.startswith(".nfs") for name in left)):
            return
        time.sleep(0.1)
    raise ChiarError(
        f"{fenced} cannot be removed: an older attempt still writes there, or it is not yours; end that one, "
        "or remove the folder"
    )


def _numbers(root: Path) -> list[int]:
    return [int(path.name) for path in root.iterdir() if _NUMBER.fullmatch(path.name)]


def _newest(run_dir: Path) -> int:
    return max(_numbers(run_dir / FOLDER), default=0)


def _copy(source: Path, descriptor: int, size: int) -> None:
    with source.open("rb") as file:
        while size > 0 and (chunk := file.read(min(size, _CHUNK_BYTES))):
            size -= len(chunk)
            while chunk:
                chunk = chunk[os.write(descriptor, chunk) :]
