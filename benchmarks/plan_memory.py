"""Does `chiar plan` know what a GPU allocates? A few small models, three steps each, planned beside measured.

    python benchmarks/plan_memory.py [--time-limit SECONDS] [--only WORD] [--json FILE]

Measured is `torch.cuda.max_memory_allocated` of three whole steps, less what was allocated before them;
planned is the plan's peak without cuBLAS's workspace, which is there before. The error must stay within 10%
(issue 7).
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from chiar_megatron.bench.step_sides import RandomStream, batches_of
from chiar_megatron.config.load import config_from_dict, resolve_config
from chiar_megatron.config.schema import RunConfig
from chiar_megatron.config.validate import check_config
from chiar_megatron.planning.memory import GIB, stage_memory
from chiar_megatron.runtime.distributed import World, single_process_world
from chiar_megatron.runtime.paths import would_compile
from chiar_megatron.training.engine import MegatronEngine

STEPS, LIMIT = 3, 0.10
TWIN: dict[str, Any] = {"model.preset": "400m-twin", "model.schedule": "A*6"}
ROUTED: dict[str, Any] = {"model.preset": "400m", "model.schedule": "D R*4 A", "model.router.target": 0.5}
MODERN: dict[str, Any] = {
    "model.norm": "pre", "model.normalization": "RMSNorm", "model.activation": "swiglu",
    "model.num_query_groups": 4, "model.add_bias": False, "model.tie_embeddings": False,
}  # fmt: skip

# name -> (sequence length, sequences in a micro-batch, fields)
CASES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "twin": (256, 128, TWIN),
    "twin, recompute": (2048, 16, TWIN | {"training.recompute": "full"}),
    "twin, eager": (256, 64, TWIN | {"runtime.compile": False}),
    "twin, dropout": (256, 128, TWIN | {"model.dropout": 0.1}),
    "twin, float32": (256, 32, TWIN | {"training.precision": "fp32"}),
    "routed ρ=½": (2048, 16, ROUTED),
    "routed ρ=½, two micro-batches, recompute": (
        256, 64, ROUTED | {"training.recompute": "full", "training.global_batch_size": 128},
    ),
    "routed ρ=¼, routed keys": (
        2048, 16, ROUTED | {"model.router.target": 0.25, "model.router.keys_values": "routed"},
    ),
    "routed, exact rows (eager)": (256, 64, ROUTED | {"model.router.target": None}),
    "routed, dense": (256, 64, ROUTED | {"model.router.dispatch": "dense"}),
    "learned ρ=½, pre, SwiGLU, GQA, untied": (
        2048, 16, ROUTED | MODERN | {"model.router.kind": "learned"},
    ),
    "soft": (256, 32, ROUTED | {"model.router.kind": "soft", "model.router.target": None}),
}  # fmt: skip


def recipe(seq_length: int, micro_batch: int, fields: dict[str, Any]) -> RunConfig:
    """A resolved recipe, of one micro-batch a step unless the fields say otherwise."""
    given = {
        "model.dropout": 0.0,
        "model.seq_length": seq_length,
        "optimizer.lr": 1e-4,
        "training.precision": "bf16",
        "training.steps": 1000,
        "training.eval_steps": 0,
        "training.micro_batch_size": micro_batch,
        "training.global_batch_size": micro_batch,
        "runtime.cuda_graph": False,
        **fields,
    }
    config = resolve_config(config_from_dict(given, "plan_memory"), vocab_size=None, eod_token=None)
    check_config(config, 1)
    return config


def measure(config: RunConfig, world: World) -> int:
    """Bytes that three steps allocate at their peak, above what was allocated before."""
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    vocab_size = config.model.vocab_size
    assert vocab_size is not None
    stream = RandomStream(vocab_size, config.model.seq_length, config.training.global_batch_size, seed=1)
    engine = MegatronEngine(config, world)
    batches = batches_of(stream, config)
    for step in range(STEPS):
        engine.train_step(next(batches), step)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def main() -> int:
    """All cases, or what the time allows; 1 if one is off by more than 10%."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--time-limit", type=float, default=140.0, help="start no case after so many seconds")
    parser.add_argument("--only", default="", help="cases whose name has this word")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parsed = parser.parse_args()
    started, on_gpu = time.monotonic(), torch.cuda.is_available()
    if not on_gpu:
        print("no CUDA device: planned figures only")
    world = single_process_world("cuda" if on_gpu else "cpu")
    if on_gpu:
        square = torch.ones(512, 512, device="cuda", dtype=torch.bfloat16)
        square @ square  # has cuBLAS take its workspace
    rows: list[dict[str, Any]] = []
    print(f"{'case':<44}{'planned':>10}{'measured':>10}  GiB{'error':>9}{'seconds':>9}", flush=True)
    for name, (seq_length, micro_batch, fields) in CASES.items():
        if parsed.only not in name:
            continue
        if time.monotonic() - started > parsed.time_limit:
            print(f"{name:<44}left out: time is up")
            continue
        config = recipe(seq_length, micro_batch, fields)
        (stage,) = stage_memory(config, 1, would_compile(config))
        planned = stage.peak - stage.workspace
        begun = time.monotonic()
        measured = measure(config, world) if on_gpu else None
        row = {"case": name, "planned_bytes": planned, "measured_bytes": measured}
        row["error"] = None if measured is None else planned / measured - 1
        rows.append(row)
        shown = f"{measured / GIB:>10.2f}     {row['error']:>+9.1%}" if measured is not None else ""
        print(f"{name:<44}{planned / GIB:>10.2f}{shown}{time.monotonic() - begun:>9.1f}", flush=True)
    if parsed.json is not None:
        record = {"device": torch.cuda.get_device_name() if on_gpu else None, "torch": torch.__version__}
        parsed.json.write_text(json.dumps({**record, "cases": rows}, indent=1))
    return int(any(row["error"] is not None and abs(row["error"]) > LIMIT for row in rows))


if __name__ == "__main__":
    sys.exit(main())
