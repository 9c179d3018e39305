"""Starting ranks, ending them together, and finding each other: with real processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from chiar_megatron.errors import LaunchError
from chiar_megatron.runtime.env import ProcessEnv, read_process_env
from chiar_megatron.runtime.launch import LaunchResult, free_port, launch_local
from tests.parallel.harness import REPOSITORY, run_ranks
from tests.parallel.tiny_run import recipe, write_data, write_recipe


def launch(body: str, num_processes: int = 2, **options: object) -> LaunchResult:
    """Launch Python code in which `rank` is known."""
    code = "import os, signal, sys, time\nrank = int(os.environ['RANK'])\n" + textwrap.dedent(body)
    options.setdefault("timeout_seconds", 30.0)
    options.setdefault("grace_seconds", 2.0)
    return launch_local([sys.executable, "-c", code], num_processes, **options)  # type: ignore[arg-type]


def test_ranks_get_torchruns_variables_and_rank_0_is_shown(capfd, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    names = "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR OMP_NUM_THREADS EXTRA"
    body = f"print(*[os.environ[name] for name in '{names}'.split()]); print('warned', rank, file=sys.stderr)"
    result = launch(body, 2, env={"EXTRA": "more"}, log_dir=tmp_path)
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert (result.exit_code, result.message, result.failed_rank) == (0, "", None)
    shown = capfd.readouterr()
    assert shown.out == f"0 2 0 2 127.0.0.1 {threads} more\n"
    assert shown.err == "warned 0\n"
    assert (tmp_path / "rank_1.out").read_text() == f"1 2 1 2 127.0.0.1 {threads} more\n"
    assert (tmp_path / "rank_1.err").read_text() == "warned 1\n"
    assert result.stderr_tails == ("warned 0\n", "warned 1\n")


def test_the_rank_that_failed_first_is_named_with_its_traceback():
    # Rank 0 notices the failure of rank 1 and ends before it, as with a broken connection.
    result = launch(
        """
        if rank == 2:
            time.sleep(60)
        if rank == 1:
            try:
                raise ValueError("the cause")
            except ValueError:
                import traceback
                traceback.print_exc()
                sys.stderr.flush()
                time.sleep(0.8)
                sys.exit(3)
        time.sleep(0.4)
        raise RuntimeError("connection closed by peer")
        """,
        num_processes=3,
    )
    assert result.exit_code == 3
    assert result.failed_rank == 1
    lines = result.message.splitlines()
    assert lines[0] == "rank 1 of 3 exited with code 3"
    assert lines[1] == "    Traceback (most recent call last):"
    assert "    ValueError: the cause" in lines
    assert lines[-1] == "then rank 0 exited with code 1"


def test_a_rank_ended_by_a_signal_is_named_and_the_others_are_ended():
    began = time.monotonic()
    result = launch(
        """
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # must be killed
        time.sleep(60)
        """
    )
    assert result.exit_code == 128 + 9
    assert result.message.startswith("rank 1 of 2 was ended by SIGKILL")
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("print('data.train: no such file', file=sys.stderr); sys.exit(2)", ""),
        (
            "if rank == 1:\n    print('rank 1 only', file=sys.stderr); sys.exit(2)\ntime.sleep(60)",
            "rank 1 only",
        ),
    ],
)
def test_bad_input_is_told_once(body, message, capfd):
    result = launch(body)
    assert result.exit_code == 2
    assert result.message == message
    assert (capfd.readouterr().err + result.message).count(message or "data.train") == 1


def test_stopped_and_resumable_passes_through():
    assert launch("sys.exit(75)").exit_code == 75
    assert launch("sys.exit(75 if rank else 0)").exit_code == 75


def test_the_time_limit_ends_all_ranks_and_shows_their_stacks():
    began = time.monotonic()
    result = launch(
        """
        def waits_for_the_others():
            time.sleep(60)
        if rank == 1:
            waits_for_the_others()
        """,
        timeout_seconds=2.0,
    )
    assert time.monotonic() - began < 15
    assert result.exit_code == 124
    assert result.failed_rank == 1
    assert "Time limit of 2 s" in result.message
    assert "rank 0 exited with code 0" in result.message
    assert "rank 1 was still running\n    Fatal Python error: Aborted" in result.message
    assert "in waits_for_the_others" in result.message


SIGNAL_SCRIPT = """
import os, signal, sys, time
from chiar_megatron.runtime.launch import launch_local
rank_code = '''
import os, signal, sys, time
from pathlib import Path
stopped = []
for name in ("SIGTERM", "SIGUSR1", "SIGINT"):
    signal.signal(getattr(signal, name), lambda number, frame: stopped.append(number))
Path(sys.argv[1], "ready" + os.environ["RANK"]).write_text(str(os.getpid()))
while not stopped:
    time.sleep(0.05)
time.sleep(0.5)
Path(sys.argv[1], "saved" + os.environ["RANK"]).write_text(str(stopped))
sys.exit(75)
'''
sys.exit(launch_local([sys.executable, "-c", rank_code, sys.argv[1]], 2, timeout_seconds=60).exit_code)
"""


def is_alive(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    try:
        return "(zombie)" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def start_launcher(folder: Path) -> tuple[subprocess.Popen[bytes], list[int]]:
    """A launcher process with two ranks that are up and wait for a signal."""
    launcher = subprocess.Popen([sys.executable, "-c", SIGNAL_SCRIPT, str(folder)], cwd=REPOSITORY)
    deadline = time.monotonic() + 30
    ready = [folder / "ready0", folder / "ready1"]
    while not all(path.exists() and path.read_text() for path in ready):
        assert time.monotonic() < deadline and launcher.poll() is None
        time.sleep(0.05)
    return launcher, [int(path.read_text()) for path in ready]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signals_reach_every_rank_and_the_launcher_waits_for_their_saves(number, tmp_path):
    launcher, _ = start_launcher(tmp_path)
    launcher.send_signal(number)
    assert launcher.wait(timeout=30) == 75
    assert [(tmp_path / f"saved{rank}").read_text() for rank in (0, 1)] == [f"[{int(number)}]"] * 2


def test_a_signal_before_ranks_can_save_is_resumable(tmp_path):
    result = launch("os.kill(os.getppid(), signal.SIGTERM) if rank == 0 else None\ntime.sleep(60)")
    assert result.exit_code == 75
    assert "rank 1 was ended by SIGTERM before it could save" in result.message


def test_no_rank_outlives_a_killed_launcher(tmp_path):
    launcher, pids = start_launcher(tmp_path)
    launcher.kill()
    launcher.wait()
    deadline = time.monotonic() + 10
    while any(is_alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "orphans"
        time.sleep(0.05)


def test_a_failing_rank_leaves_none_of_its_own_processes(tmp_path):
    result = launch(
        f"""
        import subprocess
        child = subprocess.Popen(["sleep", "60"])
        own = r"{tmp_path}/child"
        open(own + str(rank), "w").write(str(child.pid))
        if rank == 1:
            while not (os.path.exists(own + "0") and open(own + "0").read()):
                time.sleep(0.05)
            os._exit(1)
        time.sleep(60)
        """
    )
    assert result.failed_rank == 1
    children = [int((tmp_path / f"child{rank}").read_text()) for rank in (0, 1)]
    deadline = time.monotonic() + 10  # what is killed takes a moment to die on a busy machine
    while any(is_alive(child) for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(is_alive(child) for child in children)


def test_a_command_that_does_not_exist():
    with pytest.raises(LaunchError, match="Cannot start '/no/such/program'"):
        launch_local(["/no/such/program"], 1)


# Rendezvous: real processes with real stores.


def rendezvous_and_report(store_timeout_seconds: float, absent: list[int]) -> str:
    """Worker: what this rank is told when `absent` never come."""
    from chiar_megatron.runtime.rendezvous import rendezvous

    env = read_process_env()
    if env.rank in absent:
        return "absent"
    try:
        store = rendezvous(env, store_timeout_seconds)
    except LaunchError as error:
        return str(error)
    store.set(f"hello/{env.rank}", str(env.rank))
    heard = store.get(f"hello/{(env.rank + 1) % env.world_size}").decode()
    store.set(f"done/{env.rank}", "")
    if env.rank == 0:  # hosts the store
        store.wait([f"done/{rank}" for rank in range(env.world_size)])
    return heard


def test_all_ranks_find_each_other_and_missing_ones_are_named():
    worker = "tests.unit.test_launch:rendezvous_and_report"
    found = run_ranks(worker, 3, {"store_timeout_seconds": 30.0, "absent": []}, timeout=60)
    assert found == ["1", "2", "0"]
    told = run_ranks(worker, 4, {"store_timeout_seconds": 8.0, "absent": [1, 2]}, timeout=60)
    for rank in (0, 3):
        assert told[rank].startswith("ranks 1-2 of 4 did not appear within 8 s")
        assert f"this is rank {rank} on {socket.gethostname()}" in told[rank]
    told = run_ranks(worker, 2, {"store_timeout_seconds": 2.0, "absent": [0]}, timeout=60)
    assert "rank 1 on" in told[1] and "could not reach rank 0 at 127.0.0.1:" in told[1]


def test_hosts_that_did_not_come_in_full_are_named():
    from chiar_megatron.runtime.rendezvous import rendezvous

    hosts = (("n0", 1), ("n1", 2), ("n2", 4))
    env = ProcessEnv(rank=0, world_size=7, host="n0", hosts=hosts, master_port=free_port())
    with pytest.raises(
        LaunchError, match=r"ranks 1-6 of 7 \(came from n1 0 of 2, n2 0 of 4\) did not appear"
    ):
        rendezvous(env, 0.2)


def test_a_rank_alone_fails_in_one_line_and_is_not_bad_input(tmp_path):
    waits = {"runtime": {"device": "cpu", "start_timeout_seconds": 1.0}}
    path = write_recipe(tmp_path / "r.yaml", recipe(write_data(tmp_path), tmp_path / "run", waits))
    place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-m", "chiar_megatron.cli", "pretrain", path]
    done = subprocess.run(
        command, env={**os.environ, **place}, cwd=REPOSITORY, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr.splitlines()[-1].startswith("chiar: rank 1 of 2") and "Traceback" not in done.stderr


@pytest.mark.parametrize("listen_at", ["127.0.0.1", "0.0.0.0"])
def test_a_port_in_use_is_named(listen_at):
    from chiar_megatron.runtime.rendezvous import rendezvous

    with socket.socket() as other:
        other.bind((listen_at, 0))
        other.listen()
        port = other.getsockname()[1]
        env = ProcessEnv(rank=0, world_size=2, master_port=port)
        with pytest.raises(LaunchError, match=f"MASTER_PORT={port} is in use on .*Set MASTER_PORT"):
            rendezvous(env, 2.0)


def test_two_ranks_of_one_number():
    from chiar_megatron.runtime.rendezvous import rendezvous

    port = free_port()
    code = (
        "import time; from chiar_megatron.runtime.env import ProcessEnv;"
        "from chiar_megatron.runtime.rendezvous import rendezvous;"
        f"s = rendezvous(ProcessEnv(rank=0, world_size=2, master_port={port}), 15.0); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY) as rank_0:
        env_1 = ProcessEnv(rank=1, world_size=2, master_port=port)
        rendezvous(env_1, 15.0)
        with pytest.raises(LaunchError, match="rank 1 started twice"):
            rendezvous(env_1, 15.0)
        rank_0.kill()


def test_one_process_needs_no_port():
    from chiar_megatron.runtime.rendezvous import rendezvous

    store = rendezvous(read_process_env({}), 1.0)
    store.set("key", "value")
    assert store.get("key") == b"value"


def test_torchruns_own_store_is_shared(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(
        "from chiar_megatron.runtime.env import read_process_env\n"
        "from chiar_megatron.runtime.rendezvous import rendezvous\n"
        "env = read_process_env()\n"
        "store = rendezvous(env, 30.0)\n"
        "store.set(str(env.rank), env.launcher)\n"
        "store.wait([str(1 - env.rank)])\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([*torchrun, str(script)], env=environment, timeout=90, stderr=subprocess.PIPE)
    assert done.returncode == 0, done.stderr.decode()
    assert "failed to bind" not in done.stderr.decode()  # its agent listens there already


# The harness itself.


def answer_or_fail(failing: int) -> int:
    """Worker: its rank, or an error on one rank."""
    rank = read_process_env().rank
    if rank == failing:
        raise KeyError("on purpose")
    return rank


def test_the_harness_returns_answers_by_rank_and_names_a_failing_one():
    worker = "tests.unit.test_launch:answer_or_fail"
    assert run_ranks(worker, 2, {"failing": -1}, timeout=60) == [0, 1]
    for failing in (0, 1):
        with pytest.raises(AssertionError) as failed:
            run_ranks(worker, 2, {"failing": failing}, timeout=60)
        assert f"rank {failing} of 2 exited with code 1" in str(failed.value)
        assert "KeyError: 'on purpose'" in str(failed.value)
