"""Kernels as a Hopper GPU gets them: Triton's interpreter, which the other tests use, compiles nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

REPOSITORY = Path(__file__).resolve().parents[2]
KERNELS = {
    "_forward_kernel",
    "_query_gradient_kernel",
    "_key_gradient_kernel",
    "_rotary_kernel",
    "_select_kernel",
    "_backward_kernel",
    "norm_forward_kernel",
    "norm_backward_kernel",
    "forward_kernel",
    "backward_kernel",
}


@pytest.mark.timeout(300)
def test_every_kernel_compiles(tmp_path: Path) -> None:
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.unit.machine_code"],
        cwd=REPOSITORY,
        env=inherited | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    compiled = dict(line.split() for line in done.stdout.splitlines()[1:])
    assert compiled.keys() >= KERNELS and all(int(size) > 0 for size in compiled.values())
