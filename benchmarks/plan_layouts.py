"""Does `chiar plan` know what a layout of several GPUs allocates, and how long its steps take?

    torchrun --nproc-per-node 4 benchmarks/plan_layouts.py [--time-limit SECONDS] [--eager | --compile]
        [--json FILE]

Trains the 400M models in every layout below that fits the processes, a few steps each. Prints planned and
measured memory of the stage that is furthest off (measured: `torch.cuda.max_memory_allocated` above what was
allocated before), and planned and measured time of a step. Without CUDA it tries itself at a small size: the
planned figures are then of no use.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist

from chiar_megatron.bench.step_sides import RandomStream
from chiar_megatron.config.load import config_from_dict, resolve_config
from chiar_megatron.config.schema import RunConfig
from chiar_megatron.config.validate import check_config
from chiar_megatron.data.loader import BatchLayout, read_ahead
from chiar_megatron.planning.memory import GIB, stage_memory
from chiar_megatron.planning.speed import Cluster, step_time
from chiar_megatron.runtime.distributed import World, initialize, shutdown
from chiar_megatron.runtime.env import read_process_env
from chiar_megatron.runtime.paths import would_compile
from chiar_megatron.training.engine import MegatronEngine

WARM_UP, BLOCKS, STEPS_A_BLOCK = 5, 3, 2
TP, PP, CP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"
VPP = "virtual_pipeline_model_parallel_size"
SP = {"sequence_parallel": True}
OVERLAPPED = {"distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
LAYOUTS: dict[str, dict[str, Any]] = {
    "one GPU": {},
    "TP=2 SP": {TP: 2, **SP},
    "CP=2": {CP: 2},
    "PP=2": {PP: 2},
    "TP=4 SP": {TP: 4, **SP},
    "CP=4": {CP: 4},
    "TP=2 SP CP=2": {TP: 2, CP: 2, **SP},
    "TP=2 SP PP=2": {TP: 2, PP: 2, **SP},
    "PP=4": {PP: 4},
    "PP=2 VPP=7": {PP: 2, VPP: 7},
    "data parallel": {},
    "data parallel, distributed optimizer": {"distributed_optimizer": True},
    "data parallel, overlapped": OVERLAPPED,
}
MODELS: dict[str, dict[str, Any]] = {
    "routed": {"model.preset": "400m", "model.router.target": 0.5},
    "twin": {"model.preset": "400m-twin"},
}
SMALL: dict[str, Any] = {"model.hidden_size": 64, "model.num_attention_heads": 4, "model.vocab_size": 256}


def recipe(model: str, layout: str, on_gpu: bool, runtime: dict[str, bool]) -> RunConfig:
    """A resolved recipe of 16 sequences a step, 4 in a micro-batch."""
    given: dict[str, Any] = {
        **MODELS[model],
        "model.dropout": 0.0,
        "model.seq_length": 2048 if on_gpu else 32,
        "optimizer.lr": 1e-4,
        "training.precision": "bf16",
        "training.steps": 1000,
        "training.eval_steps": 0,
        "training.micro_batch_size": 4,
        "training.global_batch_size": 16,
        **{f"runtime.{field}": value for field, value in runtime.items()},
        **{f"parallel.{field}": value for field, value in LAYOUTS[layout].items()},
        **({} if on_gpu else SMALL),
    }
    return resolve_config(config_from_dict(given, "plan_layouts"), vocab_size=None, eod_token=None)


def measure(config: RunConfig, world: World) -> tuple[int, float]:
    """(bytes that training allocates on this rank at its peak, median seconds of a step)."""
    on_gpu = world.device.type == "cuda"
    gc.collect()
    before = 0
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    vocab_size = config.model.vocab_size
    assert vocab_size is not None
    training = config.training
    stream = RandomStream(vocab_size, config.model.seq_length, training.global_batch_size, seed=1)
    spread = BatchLayout(
        training.global_batch_size,
        training.micro_batch_size,
        world.data_parallel_rank,
        world.data_parallel_size,
    )
    engine = MegatronEngine(config, world)
    steps = WARM_UP + BLOCKS * STEPS_A_BLOCK
    batches = read_ahead(stream, spread, 0, steps, config.data.num_workers)
    numbers = iter(range(steps))

    def train(count: int) -> float:
        begun = time.perf_counter()
        pending = [engine.launch_step(next(batches), next(numbers), detailed=False) for _ in range(count)]
        assert all(step.result().taken for step in pending), "a step was skipped"
        dist.barrier()
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    train(WARM_UP)
    seconds = [train(STEPS_A_BLOCK) / STEPS_A_BLOCK for _ in range(BLOCKS)]
    peak = torch.cuda.max_memory_allocated() - before if on_gpu else 0
    return peak, statistics.median(seconds)


def compare(config: RunConfig, layout: str, processes: int) -> dict[str, Any] | None:
    """Planned and measured figures of one layout; None where it needs another number of processes."""
    parallel = config.parallel
    replicas, rest = divmod(processes, parallel.processes_per_replica)
    if rest or replicas > 1 and not layout.startswith("data parallel"):
        return None
    check_config(config, processes)
    from megatron.core import parallel_state

    stages = stage_memory(config, replicas, would_compile(config))
    time_planned = step_time(config, replicas, Cluster(gpus=processes))
    world = initialize(parallel, config.runtime, read_process_env())
    peak, seconds = measure(config, world)
    peaks: list[Any] = [None] * processes
    dist.all_gather_object(peaks, (world.pipeline_rank, peak))
    parallel_state.destroy_model_parallel()
    planned = [stage.peak - stage.workspace for stage in stages]
    measured = [max(peak for stage, peak in peaks if stage == number) for number in range(len(stages))]
    return {
        "layout": layout,
        "processes": processes,
        "planned_bytes": planned,
        "measured_bytes": measured,
        "planned_seconds": time_planned.total,
        "measured_seconds": seconds,
    }


def shown(row: dict[str, Any]) -> str:
    """One line of the table; the stage whose memory is furthest off speaks for all."""
    pairs = list(zip(row["planned_bytes"], row["measured_bytes"], strict=True))
    planned, measured = max(pairs, key=lambda pair: abs(pair[0] / max(1, pair[1]) - 1))
    error = f"{planned / measured - 1:>+8.1%}" if measured else f"{'':>8}"
    times = f"{1e3 * row['planned_seconds']:>10.1f}{1e3 * row['measured_seconds']:>10.1f}"
    return f"{row['layout']:<46}{planned / GIB:>9.2f}{measured / GIB:>9.2f}{error}{times}"


def main() -> int:
    """All layouts of this many processes, or what the time allows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--time-limit", type=float, default=200.0, help="start no layout after so many seconds"
    )
    parser.add_argument("--only", default="", help="layouts whose model or name has this word")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--eager", action="store_true", help="without torch.compile and CUDA graphs")
    how.add_argument("--compile", action="store_true", help="with torch.compile in every layout")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parsed = parser.parse_args()
    runtime = {"compile": False, "cuda_graph": False} if parsed.eager else {}
    runtime |= {"compile": True} if parsed.compile else {}
    started, on_gpu = time.monotonic(), torch.cuda.is_available()
    env = read_process_env()
    rows: list[dict[str, Any]] = []
    if env.rank == 0:
        print(
            f"{'GiB and ms':<46}{'planned':>9}{'measured':>9}{'':>8}{'planned':>10}{'measured':>10}",
            flush=True,
        )
    for model in MODELS:
        for layout in LAYOUTS:
            if parsed.only not in f"{model}, {layout}":
                continue
            late = time.monotonic() - started > parsed.time_limit
            config = recipe(model, layout, on_gpu, runtime)
            row = None if late else compare(config, layout, env.world_size)
            if row is not None:
                row["layout"] = f"{model}, {layout}"
                rows.append(row)
                if env.rank == 0:
                    print(shown(row), flush=True)
    if env.rank == 0 and parsed.json is not None:
        device = torch.cuda.get_device_name() if on_gpu else "cpu"
        record = {"device": device, "torch": torch.__version__, "layouts": rows}
        parsed.json.write_text(json.dumps(record, indent=1))
    shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
