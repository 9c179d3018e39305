"""Save and load on megatron-core's distributed checkpoint format, by all ranks together.

A save goes into the attempt's own folder (see `claim.py`); every rank writes and hashes its own files, rank 0
adds the manifest, renames, and moves the `latest` pointer last. Killed anywhere, or overtaken by a newer
attempt, it leaves the other checkpoints as they were.
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint import CheckpointException

from chiar_megatron.checkpoint.agree import first_failure, gather, on_main
from chiar_megatron.checkpoint.claim import Claim, claim_run
from chiar_megatron.checkpoint.files import (
    INFO,
    LATEST,
    MANIFEST,
    CheckpointInfo,
    complete_steps,
    file_digest,
    find_damage,
    pointed_step,
    read_manifest,
    step_folder,
    step_folders,
    write_durably,
)
from chiar_megatron.checkpoint.retention import steps_to_delete
from chiar_megatron.checkpoint.sharded import ShardedWrite, disk_remedy
from chiar_megatron.checkpoint.torch_dist import nothing_executed
from chiar_megatron.config.schema import CheckpointConfig
from chiar_megatron.errors import CheckpointError
from chiar_megatron.runtime.device import current_device

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Commit:
    """A checkpoint that is on the disk under its final name."""

    step: int
    seconds: float
    """From the start of the save."""


@dataclass(frozen=True)
class Found:
    """Where to continue from, and what was wrong with what is newer."""

    folder: Path | None
    problems: list[str]


class CheckpointStore:
    """The checkpoints of one run folder. Every method is called by all ranks alike.

    One save is under way at a time: `save` waits for it; `start` lets a thread write while training goes on,
    and `poll` or `finish` commits it.
    """

    def __init__(self, folder: Path, config: CheckpointConfig, claim: Claim | None = None) -> None:
        """claim: of the run folder that `folder` lies in; None makes one of `folder` itself, when needed."""
        self.folder = folder
        self.config = config
        self._claim = claim
        self._pending: _Save | None = None
        self._validated = False

    def claim(self) -> Claim:
        """What lets this attempt write."""
        if self._claim is None:
            self._claim = on_main(lambda: claim_run(self.folder))
        return self._claim

    def save(self, state: dict[str, Any], info: CheckpointInfo, delete_old: bool = True) -> Commit:
        """Write and commit a checkpoint.

        state: sharded state (see `MegatronEngine.sharded_state`); consumed. delete_old: let it replace
        older ones. Raises CheckpointError on every rank, the half-written folder removed and earlier
        checkpoints untouched, if any rank cannot write (disk full, say); FencedError if a newer attempt of
        the run has begun.
        """
        return self._commit(self._plan(state, info, delete_old, copy=False))

    def start(self, state: dict[str, Any], info: CheckpointInfo, delete_old: bool = True) -> None:
        """Begin a save whose tensors, copied now, a thread writes while training goes on.

        Raises CheckpointError on every rank if the folder cannot be made.
        """
        self._pending = self._plan(state, info, delete_old, copy=True)
        self._pending.start_thread()

    def poll(self) -> Commit | None:
        """Commit an asynchronous save if all ranks have written; cheap when none is under way.

        Raises as `save` does.
        """
        if self._pending is None:
            return None
        unwritten = torch.tensor(float(self._pending.is_writing()), device=current_device())
        dist.all_reduce(unwritten)
        return None if float(unwritten) > 0.0 else self.finish()

    def finish(self) -> Commit | None:
        """Wait for the save under way and commit it; None if there is none. Raises as `save` does."""
        if self._pending is None:
            return None
        save, self._pending = self._pending, None
        return self._commit(save)

    def _plan(self, state: dict[str, Any], info: CheckpointInfo, delete_old: bool, copy: bool) -> _Save:
        assert self._pending is None, "finish the save before"
        temporary = self.claim().folder / step_folder(self.folder, info.step).name
        on_main(lambda: self._prepare(temporary))
        sharded = ShardedWrite(state, temporary, copy, validate=not self._validated)
        self._validated = True
        return _Save(sharded, info, temporary, delete_old)

    def _commit(self, save: _Save) -> Commit:
        claim = self.claim()
        problem = first_failure(save.write())
        if problem is None:
            parts = gather((save.results, save.digests))
            try:
                on_main(lambda: self._publish(claim, save, parts))
            except CheckpointError as error:
                problem = str(error)
        if problem is not None:
            on_main(lambda: shutil.rmtree(save.temporary, ignore_errors=True))
            on_main(claim.check)
            raise CheckpointError(
                f"checkpoint of step {save.info.step} not written: {problem}; earlier ones are untouched"
            )
        return Commit(save.info.step, time.monotonic() - save.started)

    def _prepare(self, temporary: Path) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary.mkdir()
        except OSError as error:
            self.claim().check()
            raise CheckpointError(
                f"checkpoint folder {self.folder} cannot be written: {error}{disk_remedy(error)}"
            ) from None

    def _publish(self, claim: Claim, save: _Save, parts: list[tuple[list[Any], dict[str, Any]]]) -> None:
        temporary = save.temporary
        try:
            manifest = {name: digest for _, digests in parts for name, digest in digests.items()}
            for name in save.sharded.finish([results for results, _ in parts]):
                manifest[name] = file_digest(temporary / name)
            save.info.write(temporary)
            manifest[INFO] = file_digest(temporary / INFO)
            write_durably(temporary / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True))
            final = step_folder(self.folder, save.info.step)
            claim.discard(final)  # a damaged one
            claim.publish(temporary.name, final)
        except OSError as error:
            raise CheckpointError(f"{error}{disk_remedy(error)}") from None
        # The checkpoint stands now, whatever happens to the rest.
        try:
            claim.write(self.folder / LATEST, final.name + "\n")
            if save.delete_old:
                for old in steps_to_delete(self.folder, self.config):
                    claim.discard(step_folder(self.folder, old))
        except OSError as error:
            _log.warning("%s: %s", self.folder, error)

    def find(self, wanted: int | None = None) -> Found:
        """Newest checkpoint whose files all agree with its manifest, or that of step `wanted`.

        A damaged one is set aside as `damaged_step_…` and one before it taken, saying so. Raises
        CheckpointError, with nothing moved, if none is whole, or not that of step `wanted`.
        """
        claim = self.claim()
        steps, problems = on_main(self._survey)
        if wanted is not None:
            if wanted not in steps:
                raise CheckpointError(
                    f"checkpoint.load_step {wanted} is not in {self.folder}: there are {steps}"
                )
            steps = [step for step in steps if step <= wanted]
        damaged: dict[Path, str] = {}
        for step in reversed(steps):
            folder = step_folder(self.folder, step)
            damage = self.verify(folder)
            if damage is None:
                problems += on_main(partial(_set_damaged_aside, claim, damaged, f"{folder.name} is taken"))
                on_main(partial(self._point_to, folder))
                return Found(folder, problems)
            if step == wanted:
                raise CheckpointError(f"checkpoint.load_step {wanted}: {folder} is damaged: {damage}")
            damaged[folder] = damage
        committed = on_main(self._has_committed)
        if damaged and committed:
            newest, damage = next(iter(damaged.items()))
            more = f"; and {len(damaged) - 1} more" if len(damaged) > 1 else ""
            raise CheckpointError(
                f"every checkpoint in {self.folder} is damaged ({newest.name}: {damage}{more}); restore one, "
                "or start in another run_dir"
            )
        problems += on_main(partial(_set_damaged_aside, claim, damaged, "the run starts anew"))
        return Found(None, problems)

    def _has_committed(self) -> bool:
        """Whether a save ever came to its end here: it leaves a manifest, then the pointer."""
        return (self.folder / LATEST).exists() or bool(complete_steps(self.folder))

    def _survey(self) -> tuple[list[int], list[str]]:
        """Steps of all checkpoint folders, oldest first, and what is wrong with the pointer."""
        if not self.folder.is_dir():
            return [], []
        if self.folder.stat().st_dev != self.claim().folder.stat().st_dev:
            raise CheckpointError(
                f"{self.folder} lies on another file system than its run folder, and a checkpoint gets its "
                "place by a rename; put run_dir itself there"
            )
        steps = sorted(step_folders(self.folder))
        pointer = self.folder / LATEST
        if steps and pointer.exists() and pointed_step(self.folder) not in steps:
            return steps, [f"{pointer} is torn or names a checkpoint that is gone; the newest whole is taken"]
        return steps, []

    def _point_to(self, folder: Path) -> None:
        """A kill between the rename and the pointer leaves it one behind."""
        if f"step_{pointed_step(self.folder) or 0:08d}" != folder.name:
            self.claim().write(self.folder / LATEST, folder.name + "\n")

    def verify(self, folder: Path) -> str | None:
        """What is wrong with a checkpoint, in words; None if nothing. Ranks share the hashing."""
        try:
            manifest = on_main(lambda: read_manifest(folder))
        except CheckpointError as error:
            return str(error).removeprefix(f"{folder}: ")
        share = sorted(manifest)[dist.get_rank() :: dist.get_world_size()]
        found = gather(find_damage(folder, share, manifest))
        return next((text for text in found if text is not None), None)

    def has_marker(self, name: str) -> bool:
        """Whether `set_newer_aside` has left this marker in the folder."""
        return on_main(lambda: (self.folder / name).exists())

    def set_newer_aside(self, step: int, marker: str) -> None:
        """After going back to `step`: keep newer checkpoints under another name, and remember it."""

        claim = self.claim()

        def rename() -> None:
            for newer in (s for s in step_folders(self.folder) if s > step):
                _set_aside(claim, step_folder(self.folder, newer), "aside")
            self._point_to(step_folder(self.folder, step))
            claim.write(self.folder / marker, "")

        on_main(rename)


class _Save:
    """This rank's part of one save."""

    def __init__(
        self, sharded: ShardedWrite, info: CheckpointInfo, temporary: Path, delete_old: bool
    ) -> None:
        self.sharded = sharded
        self.info = info
        self.temporary = temporary
        self.delete_old = delete_old
        self.started = time.monotonic()
        self.results: list[Any] = []
        self.digests: dict[str, dict[str, Any]] = {}
        self._problem: str | None = None
        self._thread: threading.Thread | None = None

    def start_thread(self) -> None:
        """Write in the background; the process may end without waiting for it."""
        self._thread = threading.Thread(target=self._write, name="checkpoint", daemon=True)
        self._thread.start()

    def is_writing(self) -> bool:
        """Whether the thread is still at it."""
        return self._thread is not None and self._thread.is_alive()

    def write(self) -> str | None:
        """Write, or wait for the thread; what went wrong, if anything."""
        if self._thread is None:
            self._write()
        else:
            self._thread.join()
        return self._problem

    def _write(self) -> None:
        try:
            names, self.results = self.sharded.write()
            self.digests = {name: file_digest(self.temporary / name) for name in names}
        except OSError as error:
            self._problem = f"{error}{disk_remedy(error)}"
        except Exception as error:  # a thread's exception would be lost, and the save believed written
            _log.exception("checkpoint of step %d", self.info.step)
            self._problem = f"{type(error).__name__}: {error}"


def load_state(folder: Path, sharded_state: dict[str, Any]) -> dict[str, Any]:
    """Read what `sharded_state` describes from a checkpoint of any layout; nothing in it is executed.

    Raises CheckpointError naming a tensor that is missing or of another shape, or what a file would call.
    """
    try:
        with warnings.catch_warnings(), nothing_executed():
            # megatron-core calls torch's loader by its old name.
            warnings.filterwarnings("ignore", message=".*load_state_dict. is deprecated.*")
            return dist_checkpointing.load(sharded_state, str(folder))  # type: ignore[no-any-return]
    except CheckpointException as error:  # no subclass of Exception
        cause = next(iter(error.failures.values()))[0]
        if isinstance(cause, CheckpointError):
            raise CheckpointError(f"{folder}: {cause}") from None
        raise CheckpointError(f"{folder} does not fit this model: {_first_line(cause)}") from error
    except (CheckpointingException, OSError, KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{folder} does not fit this model: {_first_line(error)}") from error


def make_info(
    step: int, tokens_seen: int, has_optimizer: bool, layout: dict[str, int], config: dict[str, Any]
) -> CheckpointInfo:
    """CheckpointInfo of now and of this version."""
    from chiar_megatron import __version__

    return CheckpointInfo(
        step,
        tokens_seen,
        has_optimizer,
        layout,
        config,
        time.time(),
        f"{__version__}/torch-{torch.__version__}",
    )


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]


def _set_damaged_aside(claim: Claim, damaged: dict[Path, str], instead: str) -> list[str]:
    """Rename them; what to tell of each, with what is done in its place."""
    asides = {folder: _set_aside(claim, folder, "damaged").name for folder in damaged}
    return [f"{f} is damaged ({damaged[f]}); kept as {aside}, {instead}" for f, aside in asides.items()]


def _set_aside(claim: Claim, folder: Path, prefix: str) -> Path:
    name = f"{prefix}_{folder.name}_{int(time.time())}"
    claim.take(folder, name)
    claim.publish(name, folder.with_name(name))
    return folder.with_name(name)
