"""Kernels as a Hopper GPU gets them: Triton's interpreter, which the other tests use, compiles nothing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDER = REPOSITORY / "chiar_megatron/operators/kernels"
FOR_TESTS = {"routed_attention_tiles._kept_kernel"}


def kernels() -> set[str]:
    """All that are launched, as `module.name`; what they call has no such name."""
    return {
        f"{path.stem}.{name}"
        for path in FOLDER.glob("*.py")
        for name in re.findall(r"^@triton\.jit\ndef (\w*kernel)\(", path.read_text(), re.MULTILINE)
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
    assert len(kernels()) > 10 and compiled.keys() == kernels() - FOR_TESTS
    assert all(int(size) > 0 for size in compiled.values())
