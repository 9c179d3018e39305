"""A destination in the making: a hidden folder beside it, file by file, that a second run takes up again.

`.NAME.converting/` holds what is finished and `journal.json`, which says of what conversion and lists the
files with their digests. It gets its final name only when everything is there and verified.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from chiar_megatron.checkpoint.files import file_digest, sync_folder, write_durably
from chiar_megatron.errors import CheckpointError

JOURNAL, LOCK, REPORT = "journal.json", "lock", "conversion.json"


class Journal:
    """The folder and its list of finished files."""

    def __init__(self, destination: Path, conversion: dict[str, Any], is_single_file: bool = False) -> None:
        """conversion: what is converted and how; one begun otherwise is thrown away. is_single_file: the
        destination is the one file of its name, not a folder.

        Raises OSError, and CheckpointError while another process is at the same destination.
        """
        self.destination, self.is_single_file = destination, is_single_file
        self.folder = destination.absolute().parent / f".{destination.name}.converting"
        self.content = self.folder / "content"
        self.advance: Callable[[int], None] = lambda _: None
        self.resumed = 0
        self._conversion = json.loads(json.dumps(conversion))
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = self._locked()
        self._done: dict[str, Any] = self._continue()
        if not self._done:
            shutil.rmtree(self.content, ignore_errors=True)
            self.content.mkdir()
            self._write()

    def _locked(self) -> IO[str]:
        """The kernel lets go of it when this process ends, however it ends."""
        file = (self.folder / LOCK).open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise CheckpointError(
                f"{self.destination} is being written by another conversion; wait, or give another name"
            ) from None
        except OSError:  # a file system without locks
            pass
        return file

    def _continue(self) -> dict[str, Any]:
        try:
            found = json.loads((self.folder / JOURNAL).read_text())
            is_same = found["conversion"] == self._conversion
            return dict(found["done"]) if is_same and self.content.is_dir() else {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def file(self, name: str, write: Callable[[Path], Any], size: int) -> Any:
        """Have `write` make one file of the destination, unless a run before has finished it.

        write: called with the path to write to; what it returns (plain JSON) is kept and returned. size: of
        the tensors in it, in bytes, to be told of where it is not written again. Raises OSError.
        """
        path = self.content / name
        known = self._done.get(name)
        if known is not None and path.is_file() and file_digest(path) == known["digest"]:
            self.resumed += 1
            self.advance(size)
            return known["answer"]
        path.parent.mkdir(parents=True, exist_ok=True)
        answer = write(path)
        with path.open("rb") as file:
            os.fsync(file.fileno())
        self._done[name] = {"digest": file_digest(path), "answer": answer}
        self._write()
        return answer

    def commit(self, report: Callable[[Path], None]) -> None:
        """Give the destination its name. report: writes the last file, to the path given. Raises OSError."""
        last = report_path(self.destination, self.is_single_file)
        report(self.content / last.name)
        for path in self.content.rglob("*"):
            if path.is_dir():
                sync_folder(path)
            elif str(path.relative_to(self.content)) not in self._done:
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        if self.is_single_file:
            for name in (self.destination.name, last.name):
                (self.content / name).rename(self.destination.with_name(name))
        else:
            self.content.rename(self.destination)
        sync_folder(self.destination.absolute().parent)
        self.discard()

    def discard(self) -> None:
        """Throw away what was made."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()

    def _write(self) -> None:
        write_durably(self.folder / JOURNAL, json.dumps({"conversion": self._conversion, "done": self._done}))


def report_path(destination: Path, is_single_file: bool) -> Path:
    """Where the report of a conversion lies: in the folder, or beside the single file."""
    beside = destination.with_name(f"{destination.name}.{REPORT}")
    return beside if is_single_file else destination / REPORT


def source_fingerprint(source: Path) -> list[list[Any]]:
    """Names, sizes and times of a source's files: whether it is still the same."""
    files = [source] if source.is_file() else sorted(path for path in source.rglob("*") if path.is_file())
    try:
        return [[str(p.relative_to(source)), p.stat().st_size, p.stat().st_mtime_ns] for p in files]
    except OSError as error:
        raise CheckpointError(f"{source} cannot be read: {error}") from None
