"""Conversion under a limit that the kernel enforces, killed in the middle, and taken up again.

The model is larger than what the limit leaves: had a conversion the whole of it in memory, it would fail.
`benchmarks/convert_memory.py` does the same with 3 GB.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import time
from pathlib import Path

from benchmarks.convert_memory import RESERVED, convert_command, synthesize
from tests.unit.reference_files import REPOSITORY

SHARD = 40_000_000
BOUND = int(1.3 * SHARD + 2**30) + RESERVED
PROGRAM = 850_000_000  # what a conversion of a tiny model has by that count: 885 MB were seen


def start(*arguments: object) -> subprocess.Popen:
    command = convert_command(*arguments, SHARD)
    return subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (BOUND, BOUND)),
    )


def finish(process: subprocess.Popen, destination: Path) -> dict:
    output, _ = process.communicate(timeout=250)
    assert process.returncode == 0, output
    assert not list(destination.parent.glob(".*converting*"))
    return json.loads((destination / "conversion.json").read_text())


def test_a_large_model_within_the_limit_and_over_a_kill(tmp_path):
    native, there, back = (tmp_path / name for name in ("native", "hf", "back"))
    synthesize(native, "D R*13 A", SHARD, hidden=1024, vocab=8192)
    process = start("native", "huggingface", native, there)
    journal = tmp_path / ".hf.converting" / "journal.json"
    limit = time.monotonic() + 200
    while not journal.is_file() or len(json.loads(journal.read_text())["done"]) < 3:
        assert process.poll() is None and time.monotonic() < limit, process.stdout.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    process.stdout.close()
    assert not there.exists() and journal.is_file()
    report = finish(start("native", "huggingface", native, there), there)
    assert "files taken from a conversion that was interrupted" in " ".join(report["notes"])
    assert report["bytes"] + PROGRAM > BOUND
    sizes = [path.stat().st_size for path in there.glob("*.safetensors")]
    assert len(sizes) > 10 and max(sizes) <= SHARD + 10_000
    assert finish(start("huggingface", "native", there, back), back)["verification"]["tensors"] > 100
