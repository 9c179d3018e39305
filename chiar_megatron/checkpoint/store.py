"""Save and load on megatron-core's `dist_checkpointing`, by all ranks together.

A save goes into a hidden folder beside its final name; every rank hashes the files it wrote, rank 0
writes the manifest, renames, and moves the `latest` pointer last. Killed anywhere, it leaves the
checkpoints before it as they were.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

from chiar_megatron.checkpoint.files import (
    INFO,
    LATEST,
    MANIFEST,
    CheckpointInfo,
    file_digest,
    find_damage,
    list_steps,
    payload_files,
    read_manifest,
    step_folder,
    sync_folder,
    write_durably,
)
from chiar_megatron.checkpoint.retention import steps_to_delete
from chiar_megatron.config.schema import CheckpointConfig
from chiar_megatron.errors import CheckpointError

_log = logging.getLogger(__name__)


class CheckpointStore:
    """The checkpoints of one run folder. Every method is called by all ranks alike."""

    def __init__(self, folder: Path, config: CheckpointConfig) -> None:
        self.folder = folder
        self.config = config
        # A forked writer sees the tensors as they were at the fork, so training may go on.
        self._queue = AsyncCallsQueue(persistent=False)

    def save(self, state: dict[str, Any], info: CheckpointInfo) -> None:
        """Write a checkpoint; with `async_save` return once its writers are forked.

        state: sharded state (see `MegatronEngine.sharded_state`). Raises CheckpointError on every rank,
        the half-written folder removed, if any rank cannot write (disk full, say).
        """
        self.finish_pending()
        temporary = self._temporary(info.step)
        self._on_main(lambda: self._prepare(temporary))
        request, error = None, None
        try:
            request = dist_checkpointing.save(
                state,
                str(temporary),
                async_sharded_save=self.config.async_save,
                content_metadata={"non_homogeneous_layers": True},
            )
        except (OSError, CheckpointingException, RuntimeError) as failure:
            error = str(failure).strip().splitlines()[0] if str(failure).strip() else type(failure).__name__
        self._agree(error, temporary)
        if request is None:
            self._commit(temporary, info)
            return
        request.add_finalize_fn(lambda: self._commit(temporary, info))
        self._queue.schedule_async_request(request)

    def poll(self) -> None:
        """Commit an asynchronous save whose writers are done; cheap when none is under way."""
        if self._queue.get_num_unfinalized_calls() > 0:
            self._finalize(blocking=False)

    def finish_pending(self) -> None:
        """Wait for an asynchronous save and commit it."""
        if self._queue.get_num_unfinalized_calls() > 0:
            self._finalize(blocking=True)

    def _finalize(self, blocking: bool) -> None:
        try:
            self._queue.maybe_finalize_async_calls(blocking=blocking)
        except (OSError, CheckpointingException, RuntimeError) as failure:
            raise CheckpointError(f"checkpoint not written: {failure}") from None

    def _temporary(self, step: int) -> Path:
        return self.folder / f".step_{step:08d}.tmp"

    def _prepare(self, temporary: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(".step_*.tmp"):  # of saves that were killed
            shutil.rmtree(leftover)
        temporary.mkdir()

    def _commit(self, temporary: Path, info: CheckpointInfo) -> None:
        digests, error = {}, None
        try:
            digests = {
                name: file_digest(temporary / name) for name in self._own_share(payload_files(temporary))
            }
        except OSError as failure:
            error = str(failure)
        self._agree(error, temporary)
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, digests)
        manifest = {name: digest for part in gathered for name, digest in part.items()}
        self._on_main(lambda: self._publish(temporary, info, manifest))

    def _publish(self, temporary: Path, info: CheckpointInfo, manifest: dict[str, Any]) -> None:
        info.write(temporary)
        manifest[INFO] = file_digest(temporary / INFO)
        write_durably(temporary / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True))
        final = step_folder(self.folder, info.step)
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        sync_folder(self.folder)
        write_durably(self.folder / LATEST, final.name + "\n")
        for old in steps_to_delete(self.folder, list_steps(self.folder), self.config):
            shutil.rmtree(step_folder(self.folder, old), ignore_errors=True)

    def find(self, wanted: int | None = None) -> Path | None:
        """Newest checkpoint whose files all agree with its manifest, or that of step `wanted`; None if none.

        A damaged one is set aside as `damaged_step_…` and the one before it taken, saying so.
        Raises CheckpointError if there is no whole one of step `wanted`.
        """
        steps = self._broadcast(list_steps(self.folder))
        if wanted is not None:
            if wanted not in steps:
                raise CheckpointError(
                    f"checkpoint.load_step {wanted} is not in {self.folder}: there are {steps}"
                )
            steps = [step for step in steps if step <= wanted]
        for step in reversed(steps):
            folder = step_folder(self.folder, step)
            damage = self.verify(folder)
            if damage is None:
                return folder
            if step == wanted:
                raise CheckpointError(f"checkpoint.load_step {wanted}: {folder} is damaged: {damage}")
            _log.warning("checkpoint %s is damaged (%s); taking the one before it", folder, damage)
            self._on_main(lambda folder=folder: _set_aside(folder, "damaged"))
        return None

    def verify(self, folder: Path) -> str | None:
        """What is wrong with a checkpoint, in words; None if nothing. Ranks share the hashing."""
        try:
            manifest = read_manifest(folder)
        except CheckpointError as error:
            return str(error)
        damage = find_damage(folder, self._own_share(sorted(manifest)), manifest)
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, damage)
        return next((text for text in found if text is not None), None)

    def has_marker(self, name: str) -> bool:
        """Whether `set_newer_aside` has left this marker in the folder."""
        return bool(self._broadcast((self.folder / name).exists()))

    def set_newer_aside(self, step: int, marker: str) -> None:
        """After going back to `step`: keep newer checkpoints under another name, and remember it."""

        def rename() -> None:
            for newer in (s for s in list_steps(self.folder) if s > step):
                _set_aside(step_folder(self.folder, newer), "aside")
            write_durably(self.folder / LATEST, step_folder(self.folder, step).name + "\n")
            write_durably(self.folder / marker, "")

        self._on_main(rename)

    def _own_share(self, names: list[str]) -> list[str]:
        return names[dist.get_rank() :: dist.get_world_size()]

    def _agree(self, error: str | None, temporary: Path) -> None:
        """Raise on every rank if any has an error; the half-written folder is removed."""
        errors: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(errors, error)
        for rank, text in enumerate(errors):
            if text is not None:
                if dist.get_rank() == 0:
                    shutil.rmtree(temporary, ignore_errors=True)
                raise CheckpointError(
                    f"checkpoint not written: rank {rank}: {text}; earlier ones are untouched"
                )

    def _on_main(self, action: Any) -> None:
        """Do something on rank 0; if it fails, every rank raises."""
        error = None
        if dist.get_rank() == 0:
            try:
                action()
            except OSError as failure:
                error = str(failure)
        error = self._broadcast(error)
        if error is not None:
            raise CheckpointError(f"checkpoint folder {self.folder}: {error}")

    @staticmethod
    def _broadcast(value: Any) -> Any:
        holder = [value]
        dist.broadcast_object_list(holder, src=0)
        return holder[0]


def load_state(folder: Path, sharded_state: dict[str, Any]) -> dict[str, Any]:
    """Read what `sharded_state` describes from a checkpoint of any layout.

    Raises CheckpointError naming a tensor that is missing or of another shape.
    """
    try:
        return dist_checkpointing.load(sharded_state, str(folder))  # type: ignore[no-any-return]
    except (CheckpointingException, KeyError, ValueError, RuntimeError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise CheckpointError(f"{folder} does not fit this model: {first_line}") from error


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


def _set_aside(folder: Path, prefix: str) -> None:
    target = folder.with_name(f"{prefix}_{folder.name}_{int(time.time())}")
    folder.rename(target)
