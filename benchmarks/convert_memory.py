"""Peak memory of converting a synthetic checkpoint of a few GB, native to Hugging Face and back.

python benchmarks/convert_memory.py --gigabytes 3 --shard-bytes 500000000 --folder /tmp/convert_memory

The issue's bound: 1.3 times the largest shard + 1 GiB. Each conversion is a process of its own, verified.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from chiar_megatron.config.load import resolve_config
from chiar_megatron.config.schema import ModelConfig, RouterConfig, RunConfig
from chiar_megatron.conversion.canonical import Canonical
from chiar_megatron.conversion.formats import ConvertOptions
from chiar_megatron.conversion.journal import Journal
from chiar_megatron.conversion.native import Native
from chiar_megatron.model.tensors import LazyTensor, TensorSpec, tensor_specs
from chiar_megatron.runtime.distributed import single_process_world

HIDDEN, VOCAB = 2048, 32000
LAYER_BYTES = 12 * HIDDEN * HIDDEN * 4


def main() -> None:
    """Make the checkpoint, convert it both ways, print one JSON line each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--shard-bytes", type=int, default=500_000_000)
    parser.add_argument("--folder", type=Path, required=True)
    parsed = parser.parse_args()
    shutil.rmtree(parsed.folder, ignore_errors=True)
    parsed.folder.mkdir(parents=True)
    layers = max(3, round(parsed.gigabytes * 1e9 / LAYER_BYTES))
    _synthesize(parsed.folder / "native", layers, parsed.shard_bytes)
    for source, target in (("native", "huggingface"), ("huggingface", "native")):
        destination = parsed.folder / ("hf" if target == "huggingface" else "back")
        path = parsed.folder / ("native" if source == "native" else "hf")
        began = time.monotonic()
        command = [sys.executable, "-m", "chiar_megatron.cli", "convert", "--from", source, "--to", target]
        command += [str(path), str(destination), "--shard-bytes", str(parsed.shard_bytes)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        files = [*path.rglob("*"), *destination.rglob("*")]
        shard = max(file.stat().st_size for file in files if file.is_file())
        report = json.loads((destination / "conversion.json").read_text())
        line = {
            "from": source, "to": target, "bytes": report["bytes"], "largest_shard_bytes": shard,
            "peak_rss_bytes_so_far": peak, "bound_bytes": int(1.3 * shard + 2**30),
            "seconds": round(time.monotonic() - began, 1), "logits": report["verification"]["logits"],
        }  # fmt: skip
        print(json.dumps(line), flush=True)


def _synthesize(folder: Path, layers: int, shard_bytes: int) -> None:
    """Random weights, tensor by tensor."""
    single_process_world("cpu")
    model = ModelConfig(
        schedule=f"D R*{layers - 2} A", hidden_size=HIDDEN, num_attention_heads=16, vocab_size=VOCAB,
        norm="pre", router=RouterConfig(kind="learned"),
    )  # fmt: skip
    config = resolve_config(RunConfig(run_dir=str(folder), model=model), vocab_size=None, eod_token=None)
    tensors = {name: _random(spec) for name, spec in tensor_specs(config.model).items()}
    journal = Journal(folder, {"synthetic": layers})
    Native().write(
        Canonical(config, tensors, step=1), journal, replace(ConvertOptions(), shard_bytes=shard_bytes)
    )
    journal.commit(lambda _: None)


def _random(spec: TensorSpec) -> LazyTensor:
    return LazyTensor(spec.shape, torch.float32, lambda: torch.randn(spec.shape) * 0.02)


if __name__ == "__main__":
    main()
