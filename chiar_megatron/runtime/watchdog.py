"""Finds a rank that makes no progress, says which and where it stands, and ends the run for a restart.

A thread of each rank looks at a counter that training moves, and publishes what it sees in the rendezvous
store: no collectives, nothing in the way of a step. Once its own rank has stood still for too long, it writes
every thread's stack into the run folder, compares the ranks, and ends the process.
"""

from __future__ import annotations

import faulthandler
import json
import linecache
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Optional

from chiar_megatron.runtime.bounded_store import BoundedStore, StoreGoneError
from chiar_megatron.runtime.env import ProcessEnv
from chiar_megatron.runtime.rendezvous import open_client

EXIT_HUNG = 1
_MAX_PERIOD_SECONDS = 5.0
_ANSWER_SECONDS = 10.0  # for the store
_LAST_RESORT_SECONDS = 30.0  # the process ends then, even if the file system hangs too
_NAMED = 4  # ranks that a message describes
# Where the main thread waits for other ranks or the device rather than doing something itself.
_WAITING = re.compile(r"\.(wait|synchronize|item|tolist|cpu|barrier)\(")


class Progress:
    """Where this rank stands; the training thread writes it, the watchdog's reads it."""

    def __init__(self) -> None:
        self.now = ("starting", 0, time.monotonic())
        self.hung = False
        """The watchdog is ending this process: what fails in it now follows from that."""

    def mark(self, phase: str, step: int) -> None:
        """Something was finished; phase and step: what comes next."""
        self.now = (phase, step, time.monotonic())

    def wait_if_hung(self) -> None:
        """Leave the end to the watchdog, if it is ending this process."""
        while self.hung:
            time.sleep(1.0)

    def beat(self) -> None:
        """A part of the phase was finished."""
        phase, step, _ = self.now
        self.now = (phase, step, time.monotonic())


@dataclass(frozen=True)
class Status:
    """What a rank's watchdog last told."""

    rank: int
    host: str
    pid: int = 0
    step: int = 0
    phase: str = "starting"
    still_seconds: float = 0.0
    """Since its last progress."""
    where: str = ""
    """The innermost Python frame of its main thread."""
    waiting: bool = False
    """Whether that frame waits for other ranks or the device."""
    beats: int = 0
    answers: bool = True
    """Whether its watchdog still publishes."""

    def __str__(self) -> str:
        place = f"step {self.step}, {self.phase}"
        if self.pid == 0:
            return f"rank {self.rank} never told where it is"
        if not self.answers:
            return (
                f"rank {self.rank} on {self.host} (process {self.pid}) does not answer (stopped, ended, or "
                f"its host is gone); last seen at {place}, {self.where}"
            )
        return (
            f"rank {self.rank} on {self.host} (process {self.pid}) has stood still for "
            f"{self.still_seconds:.0f} s at {place}, {self.where}"
        )


def find_stuck(statuses: Sequence[Status]) -> list[Status]:
    """The ranks that hold up the others: those that do not answer; else those that are not waiting for
    others; else those at the lowest step; all, if they cannot be told apart."""
    for suspects in (
        [status for status in statuses if not status.answers],
        [status for status in statuses if not status.waiting],
        [status for status in statuses if status.step == min(other.step for other in statuses)],
    ):
        if 0 < len(suspects) < len(statuses):
            return suspects
    return list(statuses)


class Watchdog:
    """Watches this rank from `__enter__` to `__exit__`.

    When it finds a hang, it calls `report` with the verdict and the step (on one rank alone), and ends the
    process with EXIT_HUNG.
    """

    def __init__(
        self, env: ProcessEnv, seconds: float, start_seconds: float, folder: Path,
        report: Callable[[str, int], None],
    ) -> None:  # fmt: skip
        """seconds: without progress that make a hang, 0 for never; start_seconds: more of them before the
        first step is done, for compilation and loading; folder: of this attempt, for what is known of a
        hang."""
        self.progress = Progress()
        self._env, self._seconds, self._start_seconds = env, seconds, start_seconds
        self._folder = folder
        self._report = report
        self._period = min(max(seconds / 8, 0.25), _MAX_PERIOD_SECONDS)
        self._beats = 0
        self._store: Optional[BoundedStore] = None
        self._gone = ""
        self._over = threading.Event()
        self._main = threading.main_thread().ident

    def __enter__(self) -> Progress:
        if self._seconds > 0:
            if self._env.world_size > 1:
                client = open_client(self._env, _ANSWER_SECONDS)
                self._store = BoundedStore(client, self._env, _ANSWER_SECONDS)
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self.progress

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()

    def _watch(self) -> None:
        self._publish()  # at once: where a rank is should be known before it can stand still
        while not self._over.wait(self._period):
            status = self._publish()
            started = status.step > 1 and status.phase != "starting"
            limit = self._seconds + (0.0 if started else self._start_seconds)
            if status.still_seconds > limit:
                self._end(status)

    def _publish(self) -> Status:
        phase, step, at = self.progress.now
        where, waiting = _describe(sys._current_frames().get(self._main or 0))
        self._beats += 1
        status = Status(
            rank=self._env.rank,
            host=self._env.host,
            pid=os.getpid(),
            step=step,
            phase=phase,
            still_seconds=round(time.monotonic() - at, 1),
            where=where,
            waiting=waiting,
            beats=self._beats,
        )
        if self._store is not None and not self._gone:
            try:
                self._store.set(f"status/{self._env.rank}", json.dumps(asdict(status)))
            except StoreGoneError as error:  # rank 0 may be done, and this rank soon: no hang yet
                self._gone = str(error)
        return status

    def _end(self, own: Status) -> None:
        """This rank stands still: leave what is known, and end."""
        last_resort = threading.Timer(_LAST_RESORT_SECONDS + 4 * self._period, os._exit, [EXIT_HUNG])
        last_resort.daemon = True
        last_resort.start()
        with suppress(OSError):
            self._dump()
        verdict = self._verdict(own)
        if self._over.is_set():
            return  # it moved again while the ranks were compared
        self.progress.hung = True
        words = f"{verdict}. Stacks: {self._folder}"
        print_error(f"hang: {words}")
        with suppress(OSError):
            # One rank alone leaves the reason; which one does not matter.
            (self._folder / "verdict.txt").touch(exist_ok=False)
            (self._folder / "verdict.txt").write_text(words + "\n", encoding="utf-8")
            self._report(words, own.step)
        if self._store is not None:
            # The others read the verdict in rank 0's store.
            time.sleep(2 * self._period + 1.0)
        os._exit(EXIT_HUNG)

    def _dump(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / f"rank_{self._env.rank}.txt").open("w") as file:
            faulthandler.dump_traceback(file)
        trace = _flight_recorder()
        if trace is not None:
            (self._folder / f"nccl_trace_rank_{self._env.rank}").write_bytes(trace)

    def _verdict(self, own: Status) -> str:
        if self._store is None:
            return str(own)
        try:
            if self._env.rank != 0:
                for _ in range(8):
                    if self._store.has("verdict"):
                        return self._store.get("verdict")
                    time.sleep(self._period)
                    self._publish()
            verdict = self._compare(own, self._store)
            self._store.set("verdict", verdict)
            return verdict
        except StoreGoneError as error:
            return f"{self._gone or error}; {own}"

    def _compare(self, own: Status, store: BoundedStore) -> str:
        before = self._read(store)
        for _ in range(3):
            time.sleep(self._period)
            self._publish()
        statuses = [
            replace(status, answers=status.rank == own.rank or status.beats > old.beats)
            for old, status in zip(before, self._read(store), strict=True)
        ]
        stuck = find_stuck(statuses)
        if len(stuck) == len(statuses) > 1:
            return f"all {len(stuck)} ranks wait for each other, such as {stuck[0]}"
        more = f"; and {len(stuck) - _NAMED} more ranks" if len(stuck) > _NAMED else ""
        return "; ".join(map(str, stuck[:_NAMED])) + more

    def _read(self, store: BoundedStore) -> list[Status]:
        found = []
        for rank in range(self._env.world_size):
            key = f"status/{rank}"
            found.append(Status(**json.loads(store.get(key))) if store.has(key) else Status(rank, "?"))
        return found


def print_error(text: str) -> None:
    """A line on standard error, as far as there is one."""
    with suppress(OSError):
        sys.stderr.write(f"chiar: {text}\n")
        sys.stderr.flush()


def _describe(frame: Optional[FrameType]) -> tuple[str, bool]:
    """The innermost frame in words, and whether it waits for others."""
    if frame is None:
        return "nowhere", False
    file, line = frame.f_code.co_filename, frame.f_lineno
    where = f"{'/'.join(Path(file).parts[-3:])}:{line} in {frame.f_code.co_name}"
    waiting = "torch/distributed/" in file or _WAITING.search(linecache.getline(file, line)) is not None
    return where, waiting


def _flight_recorder() -> Optional[bytes]:
    """NCCL's last collectives, a pickle that `torchfrtrace` reads; None where nothing is recorded."""
    import torch

    if not torch.cuda.is_available():
        return None
    c10d: Any = torch._C._distributed_c10d
    dump = getattr(c10d, "_dump_nccl_trace", None) or getattr(c10d, "_dump_fr_trace", None)
    return None if dump is None else bytes(dump())
