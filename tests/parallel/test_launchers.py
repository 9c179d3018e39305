"""The same program under torchrun and `mpirun`, and preprocessing over their ranks. SLURM's: tests/slurm."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from chiar_megatron.data.preprocess import preprocess
from chiar_megatron.data.tokenizer import train_tokenizer
from tests.parallel.harness import REPOSITORY
from tests.parallel.launch_probe import check_answers
from tests.parallel.run_server import RunServer

TIME_LIMIT_SECONDS = 90
SUFFIXES = (".bin", ".idx", ".json")
CLI = ["-m", "chiar_megatron.cli"]


def mpirun(ranks: int) -> list[str]:
    """`mpirun` of Open MPI for so many ranks; skips where there is none."""
    program = shutil.which("mpirun")
    if program is None or "Open MPI" not in subprocess.run(
        [program, "--version"], capture_output=True, text=True, timeout=30
    ).stdout:  # fmt: skip
        pytest.skip("Open MPI's mpirun is not installed")
    as_root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    return [program, *as_root, "--oversubscribe", "--bind-to", "none", "-n", str(ranks), sys.executable]


def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
    """Run within the time limit, with this repository's code."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=TIME_LIMIT_SECONDS, env=environment, **options
    )  # type: ignore[call-overload, no-any-return]


def test_torchrun(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = run([*torchrun, "-m", "tests.parallel.launch_probe", str(tmp_path)])
    assert done.returncode == 0, done.stderr
    check_answers(tmp_path, "torchrun", 2)


def test_mpirun_over_two_hosts(tmp_path: Path) -> None:
    if importlib.util.find_spec("mpi4py") is None:
        pytest.skip("mpi4py is not installed: it tells the first host")
    command = [*mpirun(2), "-m", "tests.parallel.launch_probe", str(tmp_path)]
    # Each rank is told that it is alone on its host, as it would be on two.
    alone = ["env", "OMPI_COMM_WORLD_LOCAL_RANK=0", "OMPI_COMM_WORLD_LOCAL_SIZE=1"]
    at = command.index(sys.executable)
    done = run([*command[:at], *alone, *command[at:]])
    assert done.returncode == 0, done.stderr
    answers = check_answers(tmp_path, "openmpi", 2)
    assert {answer["master_addr"] for answer in answers} == {os.uname().nodename}


# Preprocessing.


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Some 4 MB of documents, a tokenizer, and the prefix of what one process makes of them."""
    folder = tmp_path_factory.mktemp("text")
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 6))) for _ in range(300)]
    lines = [" ".join(rng.choices(words, k=60)) for _ in range(14000)]
    (folder / "some.txt").write_text("\n".join(lines[:500]))
    model = train_tokenizer([folder / "some.txt"], 400, folder / "tokenizer")
    with (folder / "text.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": line}) + "\n" for line in lines)
    preprocess([folder / "text.jsonl"], model, folder / "alone")
    return folder / "text.jsonl", model, folder / "alone"


def arguments(text: tuple[Path, Path, Path], output: Path) -> list[str]:
    source, model, _ = text
    options = ["--input", str(source), "--tokenizer", str(model), "--output", str(output), "--workers", "1"]
    return ["preprocess", *options]


def assert_same(text: tuple[Path, Path, Path], output: Path) -> None:
    for suffix in SUFFIXES:
        assert Path(f"{output}{suffix}").read_bytes() == Path(f"{text[2]}{suffix}").read_bytes(), suffix
    assert sorted(p.name for p in output.parent.iterdir()) == sorted(f"{output.name}{s}" for s in SUFFIXES)


def test_mpirun_preprocesses_the_same_bytes(text: tuple[Path, Path, Path], tmp_path: Path) -> None:
    done = run([*mpirun(3), *CLI, *arguments(text, tmp_path / "out")])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("14,000 documents") == 1
    assert_same(text, tmp_path / "out")


# Ranks without a launcher that would end them all: they must notice by themselves.


def test_a_rank_with_a_full_disk_is_an_error_of_all(
    server: RunServer, text: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    run = server.start(arguments(text, tmp_path / "out"), ranks=3, file_bytes=100_000)  # of the last rank
    assert run.wait(60) == [2, 2, 2], run.output()
    assert "out.part_2.tmp cannot be written: File too large" in run.output(2)
    for rank in (0, 1):
        assert run.output(rank).splitlines()[-1].startswith("chiar: rank 2 on"), run.output(rank)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_stops_is_named_within_the_limit(
    server: RunServer, text: tuple[Path, Path, Path], tmp_path: Path, victim: int
) -> None:
    run = server.start([*arguments(text, tmp_path / "out"), "--silence-seconds", "5"], ranks=2)
    wait_for(functools.partial(has_bytes, tmp_path / f"out.part_{victim}.tmp"))
    run.signal(signal.SIGSTOP, victim)
    wait_for(lambda: f"rank {victim}" in run.output(1 - victim), 30)
    run.signal(signal.SIGKILL, victim)
    codes = run.wait(30)
    assert (codes[1 - victim], codes[victim]) == (2, -signal.SIGKILL), run.output(1 - victim)
    assert not [path for path in tmp_path.iterdir() if path.suffix in SUFFIXES]


def has_bytes(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


def wait_for(condition: Callable[[], bool], seconds: float = TIME_LIMIT_SECONDS) -> None:
    """Look often; fail when the time is up."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)
