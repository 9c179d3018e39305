"""Runs of the command line as forks of one process that has imported everything: a second each, not ten.

Each is a process of its own, in a session of its own, and can be killed for real. The server reads requests
as JSON lines and answers with the process numbers, then with the exit codes when all have ended.
"""

from __future__ import annotations

import json
import os
import queue
import resource
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

REPOSITORY = Path(__file__).resolve().parents[2]
TIME_LIMIT_SECONDS = 120.0


@dataclass
class Run:
    """A run under way."""

    server: RunServer
    pids: list[int]
    log: Path

    def signal(self, number: int, rank: Optional[int] = None) -> None:
        """Signal one rank, or all."""
        for pid in self.pids if rank is None else [self.pids[rank]]:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                pass

    def wait(self, seconds: float = TIME_LIMIT_SECONDS) -> list[int]:
        """Exit codes by rank, negative for signals; fails, after killing all, when the time is up."""
        try:
            return self.server.answer(seconds)
        except queue.Empty:
            self.signal(signal.SIGABRT)  # faulthandler shows where each stands
            codes = self.server.answer(20)
            raise AssertionError(f"no end after {seconds:g} s: {codes}\n{self.output()}") from None

    def output(self, rank: int = 0) -> str:
        """What a rank wrote to stdout and stderr."""
        path = Path(f"{self.log}.{rank}")
        return path.read_text() if path.exists() else ""


class RunServer:
    """The client's side."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0
        self._answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._process = subprocess.Popen(
            [sys.executable, "-X", "faulthandler", "-m", "tests.parallel.run_server"],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        threading.Thread(target=self._read, daemon=True).start()
        self.answer(TIME_LIMIT_SECONDS)

    def start(self, arguments: Sequence[object], ranks: int = 1, file_bytes: Optional[int] = None) -> Run:
        """Begin `chiar <arguments>` on so many ranks, the last of which may write files of `file_bytes`."""
        assert self._process.stdin is not None
        self._count += 1
        log = self._folder / f"run_{self._count}.log"
        request = {"arguments": [str(a) for a in arguments], "ranks": ranks, "log": str(log)}
        self._process.stdin.write(json.dumps({**request, "file_bytes": file_bytes}) + "\n")
        self._process.stdin.flush()
        return Run(self, self.answer(20), log)

    def answer(self, seconds: float) -> Any:
        """The server's next line."""
        return self._answers.get(timeout=seconds)

    def close(self) -> None:
        """End the server."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(json.loads(line))


def main() -> None:
    """The server: serve until stdin closes."""
    import chiar_megatron.cli as cli
    import chiar_megatron.training.loop  # noqa: F401
    from chiar_megatron.runtime.cpu import adapt_megatron_to_cpu
    from chiar_megatron.runtime.launch import free_port
    from tests.parallel.nccl_rules import require_contiguous_tensors

    require_contiguous_tensors()
    adapt_megatron_to_cpu()
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        port = free_port()
        ranks = [_fork(cli, request, rank, port) for rank in range(request["ranks"])]
        print(json.dumps(ranks), flush=True)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks]
        print(json.dumps(codes), flush=True)


def stand_still(*_: object) -> None:
    """A rank that got SIGUSR2 does this wherever it was: stuck in Python, its other threads running."""
    time.sleep(1000)


def _fork(cli: Any, request: dict[str, Any], rank: int, port: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        signal.signal(signal.SIGUSR2, stand_still)
        log = os.open(f"{request['log']}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        size = request["ranks"]
        if size > 1:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
            meeting = {"GROUP_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in {**place, **meeting}.items()})
        if request["file_bytes"] is not None and rank == size - 1:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_bytes"], request["file_bytes"]))
        code = cli.main(request["arguments"])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
