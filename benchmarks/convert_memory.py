"""Peak memory of converting a synthetic checkpoint of a few GB, native to another format and back.

python benchmarks/convert_memory.py --gigabytes 3 --shard-bytes 500000000 --folder /tmp/convert_memory

The issue's bound: 1.3 times the largest shard + 1 GiB. Each conversion is a process of its own, verified,
whose resident peak must keep it. The kernel enforces it too, by RLIMIT_DATA, which counts what torch reserves
and never touches as well: 450 MB are added for that.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from chiar_megatron.config.load import resolve_config
from chiar_megatron.config.schema import ModelConfig, RouterConfig, RunConfig
from chiar_megatron.conversion.canonical import Canonical
from chiar_megatron.conversion.formats import ConvertOptions
from chiar_megatron.conversion.journal import Journal
from chiar_megatron.conversion.native import Native
from chiar_megatron.model.tensors import LazyTensor, TensorSpec, tensor_specs
from chiar_megatron.runtime.distributed import single_process_world

RESERVED = 450_000_000
HIDDEN, VOCAB = 2048, 32000
LAYER_BYTES = 12 * HIDDEN * HIDDEN * 4


def main() -> None:
    """Make the checkpoint, convert it both ways, print one JSON line each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--shard-bytes", type=int, default=500_000_000)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--formats", nargs="+", default=["huggingface", "deepspeed"])
    parsed = parser.parse_args()
    shutil.rmtree(parsed.folder, ignore_errors=True)
    parsed.folder.mkdir(parents=True)
    layers = max(3, round(parsed.gigabytes * 1e9 / LAYER_BYTES))
    native = parsed.folder / "native"
    synthesize(native, f"D R*{layers - 2} A", parsed.shard_bytes)
    for name in parsed.formats:
        there, back = parsed.folder / name, parsed.folder / f"{name}.back"
        for source, target, path, destination in (
            ("native", name, native, there),
            (name, "native", there, back),
        ):
            print(json.dumps(_measure(source, target, path, destination, parsed.shard_bytes)), flush=True)
        shutil.rmtree(back)
        shutil.rmtree(there)


def _measure(source: str, target: str, path: Path, destination: Path, shard_bytes: int) -> dict[str, Any]:
    """Convert within the bound, and say what it took."""
    bound = int(1.3 * shard_bytes + 2**30)
    began = time.monotonic()
    process = subprocess.Popen(
        convert_command(source, target, path, destination, shard_bytes),
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # each thread reserves memory that it never touches
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (bound + RESERVED,) * 2),
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0 or usage.ru_maxrss * 1024 > bound:
        raise SystemExit(f"{source} to {target} failed within {bound} bytes")
    report = json.loads((destination / "conversion.json").read_text())
    return {
        "from": source, "to": target, "bytes": report["bytes"], "shard_bytes": shard_bytes,
        "peak_rss_bytes": usage.ru_maxrss * 1024, "bound_bytes": bound,
        "seconds": round(time.monotonic() - began, 1), "logits": report["verification"]["logits"],
    }  # fmt: skip


def convert_command(source: str, target: str, path: Path, destination: Path, shard_bytes: int) -> list[str]:
    """The command line of one conversion."""
    command = [sys.executable, "-m", "chiar_megatron.cli", "convert", "--from", source, "--to", target]
    return [*command, str(path), str(destination), "--shard-bytes", str(shard_bytes)]


def synthesize(
    folder: Path, schedule: str, shard_bytes: int, hidden: int = HIDDEN, vocab: int = VOCAB
) -> None:
    """A native checkpoint of random weights, made tensor by tensor."""
    single_process_world("cpu")
    model = ModelConfig(
        schedule=schedule, hidden_size=hidden, num_attention_heads=16, vocab_size=vocab,
        norm="pre", router=RouterConfig(kind="learned"),
    )  # fmt: skip
    config = resolve_config(RunConfig(run_dir=str(folder), model=model), vocab_size=None, eod_token=None)
    tensors = {name: _random(spec) for name, spec in tensor_specs(config.model).items()}
    journal = Journal(folder, {"synthetic": schedule})
    Native().write(
        Canonical(config, tensors, step=1), journal, replace(ConvertOptions(), shard_bytes=shard_bytes)
    )
    journal.commit(lambda _: None)


def _random(spec: TensorSpec) -> LazyTensor:
    return LazyTensor(spec.shape, torch.float32, lambda: torch.randn(spec.shape) * 0.02)


if __name__ == "__main__":
    main()
