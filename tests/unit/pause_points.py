"""Stops a save at its n-th dealing with the file system, lets a newer attempt go on, and wakes it again.

`python -m tests.unit.pause_points FOLDER` does so in `FOLDER/<n>` for n = 1, 2, … until a save gets through,
and prints for each the error that the older attempt ended with, and whether the folder is as the newer one
left it.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from chiar_megatron.errors import FencedError
from chiar_megatron.runtime.distributed import single_process_world
from tests.unit.kill_points import signal_at, state, store

GAVE_WAY = 7  # exit code


def contents(folder: Path) -> dict[str, str]:
    """A hash of every file, and the folders."""
    paths = {str(path.relative_to(folder)): path for path in folder.rglob("*")}
    return {
        name: hashlib.blake2b(path.read_bytes()).hexdigest() if path.is_file() else "/"
        for name, path in paths.items()
    }


def fork(action: Callable[[], None]) -> int:
    """Run something in a process of its own, with process groups of its own; its pid."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            single_process_world("cpu")
            action()
            code = 0
        except FencedError as error:
            print(error, flush=True)
            code = GAVE_WAY
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return pid


def older(number: int, folder: Path) -> None:
    """An attempt that is stopped at one point of its second save."""
    from chiar_megatron.checkpoint.store import make_info

    saves = store(folder)
    saves.save(state(1.0), make_info(1, 0, False, {}, {}))
    signal_at(number, folder, signal.SIGSTOP)
    saves.save(state(2.0), make_info(2, 0, False, {}, {}))


def newer(folder: Path) -> None:
    """Goes on where the other one stands; its numbers are larger by 10."""
    from chiar_megatron.checkpoint.store import make_info

    saves = store(folder)
    found = saves.find().folder
    assert found is not None
    step = int(found.name[-1]) + 1
    saves.save(state(10.0 + step), make_info(step, 0, False, {}, {}))


def main(root: Path) -> None:
    """See above."""
    number = 0
    while True:
        number += 1
        folder = root / str(number)
        folder.mkdir()
        pid = fork(lambda n=number, f=folder: older(n, f))  # type: ignore[misc]
        status = os.waitpid(pid, os.WUNTRACED)[1]
        if not os.WIFSTOPPED(status):
            assert status == 0, f"point {number}: status {status}"
            return
        assert os.waitpid(fork(lambda f=folder: newer(f)), 0)[1] == 0, number  # type: ignore[misc]
        before = contents(folder)
        os.kill(pid, signal.SIGCONT)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code in (GAVE_WAY, 0), f"point {number}: code {code}"
        print(
            f"point {number}: code {code}, {'same' if contents(folder) == before else 'CHANGED'}", flush=True
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
