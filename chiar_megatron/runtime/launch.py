"""Start N ranks of a command on this host, and end them together.

`chiar pretrain` outside any launcher starts itself N times through `launch_local`. Everything a cluster's
launcher would do is done here: one failing rank ends the others and is named, signals reach all ranks, a
time limit shows where each rank stands, and no rank outlives the launcher, even one ended by `kill -9`.
"""

from __future__ import annotations

import ctypes
import os
import queue
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Optional

from chiar_megatron.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_RESUMABLE, LaunchError
from chiar_megatron.runtime.env import JOB_PORTS

EXIT_TIMEOUT = 124  # what `timeout` of coreutils answers
GRACE_SECONDS = 10.0  # between SIGTERM and SIGKILL, and for stack dumps after SIGABRT
SETTLE_SECONDS = 2.0  # ranks that meet the same bad input may end by themselves
TAIL_BYTES = 32768  # of each rank's stderr that is kept
MESSAGE_LINES = 40  # of it that a message shows
FORWARDED_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
TRACEBACK = b"Traceback (most recent call last)"
STACK_DUMP = b"Fatal Python error"  # faulthandler's first line
TRACEBACK_SECONDS = 30.0  # an older traceback is not what ended a rank
PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class LaunchResult:
    """How a launch ended."""

    exit_code: int
    """0 done, 2 bad input, 75 stopped and resumable, 124 time limit; otherwise the first failing rank's
    (128 + the signal's number if a signal ended it)."""

    message: str
    """What to print to stderr; empty if there is nothing that the user has not seen yet."""

    failed_rank: Optional[int]
    """The rank that failed first; None if none did."""

    stderr_tails: tuple[str, ...]
    """The end of each rank's stderr."""


def launch_local(
    command: Sequence[str],
    num_processes: int,
    *,
    timeout_seconds: Optional[float] = None,
    env: Optional[Mapping[str, str]] = None,
    log_dir: Optional[Path] = None,
    grace_seconds: float = GRACE_SECONDS,
) -> LaunchResult:
    """Run `command` num_processes times on this host with torchrun's variables, and wait for the end.

    Rank 0's stdout and stderr are passed through. The other ranks' output goes to
    `log_dir/rank_<n>.{out,err}` if that is given; of every stderr the end is kept. SIGTERM, SIGUSR1 and
    SIGINT are passed on to all ranks, which may then save and exit; a second SIGINT kills them.

    Args:
        command: program and arguments, the same for every rank.
        num_processes: ranks.
        timeout_seconds: hard limit; None for none.
        env: variables added to this process's.
        log_dir: folder for the output of ranks other than 0.
        grace_seconds: between asking a rank to end and killing it.

    Raises:
        LaunchError: the command cannot be started.
    """
    launch = _Launch(num_processes, grace_seconds)
    variables = _rank_variables(num_processes, env or {})
    with launch.forward_signals():
        try:
            for rank in range(num_processes):
                own = {**variables, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                launch.start(rank, command, own, log_dir)
            return launch.wait(timeout_seconds)
        finally:
            launch.kill_all()


def free_port() -> int:
    """A TCP port of this host that nothing listens at now.

    Rank 0 listens seconds later: one of the system's own choice could by then be an outgoing connection's.

    Raises LaunchError if none is free.
    """
    for port in random.SystemRandom().sample(JOB_PORTS, len(JOB_PORTS)):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise LaunchError(
        f"All ports of this host from {JOB_PORTS.start} to {JOB_PORTS.stop - 1} are in use: end what listens "
        f"there (`ss -ltnp` shows it)."
    )


def _rank_variables(num_processes: int, extra: Mapping[str, str]) -> dict[str, str]:
    variables = {**os.environ, **extra}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    variables.setdefault("OMP_NUM_THREADS", str(max(1, cores // num_processes)))
    variables.setdefault("PYTHONFAULTHANDLER", "1")  # a time limit or a crash then shows each stack
    variables.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    variables.update(
        WORLD_SIZE=str(num_processes),
        LOCAL_WORLD_SIZE=str(num_processes),
        GROUP_RANK="0",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(free_port()),
    )
    return variables


class _Rank:
    """One process, its stderr, and how it ended."""

    def __init__(self, index: int, process: subprocess.Popen[bytes], sinks: Sequence[IO[bytes]]) -> None:
        self.index = index
        self.exit_code: Optional[int] = None
        self.failed_at = 0.0
        self.tail = b""
        self._process = process
        self._traceback_at: Optional[float] = None
        # Held while the process number is used: once reaped it may be another's. A signal handler may
        # interrupt its holder, so it must be re-entrant.
        self._reaping = threading.RLock()
        self._reader = threading.Thread(target=self._read, args=(sinks,), daemon=True)
        self._reader.start()

    def watch(self, ended: queue.SimpleQueue[_Rank]) -> None:
        """Report to `ended` when the process has ended (runs in a thread of its own)."""
        pid = self._process.pid
        end = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        ended_at = time.monotonic()
        clean = end and end.si_code == os.CLD_EXITED and end.si_status in (EXIT_DONE, EXIT_RESUMABLE)
        with self._reaping:
            if not clean:
                os.killpg(pid, signal.SIGKILL)  # what it started and left behind
            exit_code = self._process.wait()
        self._reader.join(timeout=2.0)
        # A rank that loses a failing peer may end before it does, but its traceback comes later.
        traceback_at = self._traceback_at or 0.0
        self.failed_at = traceback_at if ended_at - traceback_at < TRACEBACK_SECONDS else ended_at
        self.exit_code = exit_code
        ended.put(self)

    def signal(self, number: int, group: bool = False) -> None:
        """Signal the process, or also what it started, unless it has ended."""
        with self._reaping:
            if self._process.returncode is None:
                (os.killpg if group else os.kill)(self._process.pid, number)

    def how_it_ended(self) -> str:
        """`exited with code 1`, `was ended by SIGKILL`, or `was still running`."""
        if self.exit_code is None:
            return "was still running"
        if self.exit_code >= 0:
            return f"exited with code {self.exit_code}"
        name = signal.Signals(-self.exit_code).name
        hint = " (often: the host ran out of memory)" if name == "SIGKILL" else ""
        return f"was ended by {name}{hint}"

    def last_words(self) -> str:
        """The last traceback or stack dump of stderr, or else its last lines."""
        start = max(self.tail.rfind(TRACEBACK), self.tail.rfind(STACK_DUMP), 0)
        lines = self.tail[start:].decode(errors="replace").strip().splitlines()
        lines = [line for line in lines if not line.startswith("Extension modules:")]
        return "\n".join(lines[-MESSAGE_LINES:])

    def _read(self, sinks: Sequence[IO[bytes]]) -> None:
        stream = self._process.stderr
        if stream is None:
            raise RuntimeError("stderr is always a pipe")
        while chunk := os.read(stream.fileno(), 65536):
            if TRACEBACK in self.tail[1 - len(TRACEBACK) :] + chunk:
                self._traceback_at = time.monotonic()
            self.tail = (self.tail + chunk)[-TAIL_BYTES:]
            for sink in sinks:
                with suppress(OSError):  # a closed terminal or a full disk must not block the rank
                    sink.write(chunk)
                    sink.flush()
        for sink in sinks:
            with suppress(OSError):
                sink.close()


class _Launch:
    """The ranks of one launch, from start to end."""

    def __init__(self, num_processes: int, grace_seconds: float) -> None:
        self._num_processes = num_processes
        self._grace_seconds = grace_seconds
        self._ranks: list[_Rank] = []
        self._ended: queue.SimpleQueue[_Rank] = queue.SimpleQueue()
        self._forwarded: Optional[int] = None
        self._asked_to_end: set[int] = set()

    def start(
        self, rank: int, command: Sequence[str], variables: Mapping[str, str], log_dir: Optional[Path]
    ) -> None:
        """Start one rank in a session of its own, so that Ctrl-C reaches it once, through us."""
        stdout: int | IO[bytes] | None = subprocess.DEVNULL
        sinks: list[IO[bytes]] = []
        if rank == 0:
            stdout = None
            sinks.append(open(2, "wb", closefd=False))
        elif log_dir is not None:
            log_dir.mkdir(parents=True, exist_ok=True)
            stdout = open(log_dir / f"rank_{rank}.out", "wb")
            sinks.append(open(log_dir / f"rank_{rank}.err", "wb"))
        try:
            process = subprocess.Popen(
                command,
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=subprocess.PIPE,
                start_new_session=True,
                preexec_fn=_die_with_this_process(),
            )
        except OSError as error:
            raise LaunchError(f"Cannot start {command[0]!r}: {error.strerror}.") from error
        if not isinstance(stdout, int) and stdout is not None:
            stdout.close()  # the rank has its own
        started = _Rank(rank, process, sinks)
        self._ranks.append(started)
        threading.Thread(target=started.watch, args=(self._ended,), daemon=True).start()
        if self._forwarded is not None:
            started.signal(self._forwarded)

    def wait(self, timeout_seconds: Optional[float]) -> LaunchResult:
        """Wait for all ranks; after a failure or at the time limit, end those that still run."""
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        while self._running():
            rank = self._next_end(deadline)
            if rank is None:
                return self._time_limit(timeout_seconds or 0.0)
            if self._failed(rank):
                self._wait_all(SETTLE_SECONDS)
                self._end_running()
        return self._result()

    @contextmanager
    def forward_signals(self) -> Iterator[None]:
        """Pass signals on to all ranks while the context lasts (only the main thread can)."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._forward) for number in FORWARDED_SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def kill_all(self) -> None:
        """Leave nothing behind."""
        for rank in self._running():
            rank.signal(signal.SIGKILL, group=True)
        self._wait_all(self._grace_seconds)

    def _forward(self, number: int, frame: Optional[FrameType]) -> None:
        if number == signal.SIGINT and self._forwarded == signal.SIGINT:
            for rank in self._running():
                rank.signal(signal.SIGKILL, group=True)
        self._forwarded = number
        for rank in self._running():
            rank.signal(number)

    def _running(self) -> list[_Rank]:
        return [rank for rank in self._ranks if rank.exit_code is None]

    def _failed(self, rank: _Rank) -> bool:
        stopped = self._forwarded is not None and rank.exit_code == -self._forwarded
        return rank.exit_code not in (None, EXIT_DONE, EXIT_RESUMABLE) and not stopped

    def _next_end(self, deadline: Optional[float]) -> Optional[_Rank]:
        seconds = None if deadline is None else max(0.0, deadline - time.monotonic())
        try:
            return self._ended.get(timeout=seconds)
        except queue.Empty:
            return None

    def _wait_all(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self._running() and self._next_end(deadline) is not None:
            pass

    def _end_running(self) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            for rank in self._running():
                self._asked_to_end.add(rank.index)
                rank.signal(number, group=number == signal.SIGKILL)
            self._wait_all(self._grace_seconds)

    def _time_limit(self, timeout_seconds: float) -> LaunchResult:
        states = {rank.index: rank.how_it_ended() for rank in self._ranks}
        running = self._running()
        for rank in running:
            rank.signal(signal.SIGABRT)  # faulthandler answers with every thread's stack
        self._wait_all(self._grace_seconds)
        self.kill_all()
        lines = [f"Time limit of {timeout_seconds:g} s reached; all {self._num_processes} ranks were ended."]
        for rank in self._ranks:
            lines.append(f"rank {rank.index} {states[rank.index]}")
            if rank in running:
                lines += ["    " + line for line in rank.last_words().splitlines()]
        return LaunchResult(EXIT_TIMEOUT, "\n".join(lines), running[0].index, self._tails())

    def _result(self) -> LaunchResult:
        bad_input = next((rank for rank in self._ranks if rank.exit_code == EXIT_BAD_INPUT), None)
        if bad_input is not None:
            # Rank 0's own message has been passed through already.
            message = bad_input.last_words() if bad_input.index > 0 else ""
            return LaunchResult(EXIT_BAD_INPUT, message, bad_input.index, self._tails())
        failures = [rank for rank in self._ranks if self._failed(rank)]
        failures = [rank for rank in failures if rank.index not in self._asked_to_end]
        if failures:
            return self._failure(sorted(failures, key=lambda rank: rank.failed_at))
        stopped = [rank for rank in self._ranks if rank.exit_code not in (EXIT_DONE, EXIT_RESUMABLE)]
        lines = [f"rank {rank.index} {rank.how_it_ended()} before it could save" for rank in stopped]
        done = all(rank.exit_code == EXIT_DONE for rank in self._ranks)
        return LaunchResult(EXIT_DONE if done else EXIT_RESUMABLE, "\n".join(lines), None, self._tails())

    def _failure(self, failures: Sequence[_Rank]) -> LaunchResult:
        first = failures[0]
        lines = [f"rank {first.index} of {self._num_processes} {first.how_it_ended()}"]
        if first.index > 0:  # rank 0's stderr has been passed through already
            lines += [f"    {line}" for line in first.last_words().splitlines()]
        lines += [f"then rank {rank.index} {rank.how_it_ended()}" for rank in failures[1:]]
        code = first.exit_code or 0
        return LaunchResult(code if code > 0 else 128 - code, "\n".join(lines), first.index, self._tails())

    def _tails(self) -> tuple[str, ...]:
        return tuple(rank.tail.decode(errors="replace") for rank in self._ranks)


def _die_with_this_process() -> Optional[Callable[[], None]]:
    """What a new rank runs before its command: the kernel shall kill it when this process ends."""
    if not sys.platform.startswith("linux"):
        return None
    libc, parent = ctypes.CDLL(None), os.getpid()

    def prepare() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before the line above
            os._exit(1)

    return prepare
