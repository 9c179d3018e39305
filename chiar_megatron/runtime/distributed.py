"""Process groups, random streams and teardown: what surrounds megatron-core's parallel state.

`initialize` is the only place that starts torch.distributed and megatron-core's groups; `World` says
where in the layout this process stands.
"""

from __future__ import annotations

import datetime
import hashlib
import os
import weakref
from dataclasses import dataclass

import torch
import torch.distributed as dist

from chiar_megatron.config.schema import ParallelConfig, RuntimeConfig
from chiar_megatron.errors import ConfigError
from chiar_megatron.runtime.cpu import adapt_megatron_to_cpu, is_adapted_to_cpu
from chiar_megatron.runtime.device import select_device, set_threads
from chiar_megatron.runtime.env import ProcessEnv
from chiar_megatron.runtime.rendezvous import rendezvous

# NCCL's flight recorder; the watchdog writes it down.
FLIGHT_RECORDER = "TORCH_FR_BUFFER_SIZE"
RECORDED_COLLECTIVES = 2000
MODEL_PARALLEL_STREAM = "model-parallel-rng"  # megatron-core's name
# Graphs that this process has recorded. NCCL leaves a group only when no graph has its transfers any more.
RECORDED_GRAPHS: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()


@dataclass(frozen=True)
class World:
    """This process in the layout. Sizes and ranks are those of megatron-core's groups."""

    device: torch.device
    rank: int
    size: int
    tensor_parallel_rank: int
    tensor_parallel_size: int
    pipeline_rank: int
    pipeline_size: int
    data_parallel_rank: int
    data_parallel_size: int
    context_parallel_rank: int
    context_parallel_size: int
    env: ProcessEnv
    """Who started this process, and where the others are."""

    @property
    def is_main(self) -> bool:
        """Rank 0: the one that writes logs and shared files."""
        return self.rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this process computes the loss."""
        return self.pipeline_rank == self.pipeline_size - 1

    def context_part(self, whole_BS: torch.Tensor) -> torch.Tensor:
        """The contiguous part `[b, s / size]` of whole sequences that this context-parallel rank holds."""
        return whole_BS.chunk(self.context_parallel_size, dim=1)[self.context_parallel_rank]


def initialize(parallel: ParallelConfig, runtime: RuntimeConfig, env: ProcessEnv) -> World:
    """Join the other processes and build every process group.

    Raises LaunchError if ranks are missing or the port is taken, ConfigError if the layout does not fit
    the number of processes.
    """
    device = select_device(runtime.device, env.local_rank)
    set_threads(runtime.threads_per_process, env.local_world_size)
    model_parallel = parallel.processes_per_replica
    if env.world_size % model_parallel:
        raise ConfigError(
            f"{env.world_size} processes do not divide by the {model_parallel} of "
            "tensor × pipeline × context parallel size; start a multiple of it"
        )
    if device.type == "cuda" and is_adapted_to_cpu():
        raise ConfigError("this process has already computed on the CPU; use another process for CUDA")
    if device.type == "cpu":
        adapt_megatron_to_cpu()
    if not dist.is_initialized():
        _join(device, runtime, env)
    from megatron.core import parallel_state

    virtual = parallel.virtual_pipeline_model_parallel_size
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor_model_parallel_size,
            pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
            context_parallel_size=parallel.context_parallel_size,
            distributed_timeout_minutes=max(1, int(runtime.collective_timeout_seconds / 60)),
            # With gloo as the main backend a second gloo group for each would only cost connections.
            create_gloo_process_groups=device.type == "cuda",
        )
    return World(
        device=device,
        rank=dist.get_rank(),
        size=dist.get_world_size(),
        tensor_parallel_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pipeline_size=parallel_state.get_pipeline_model_parallel_world_size(),
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
        context_parallel_rank=parallel_state.get_context_parallel_rank(),
        context_parallel_size=parallel_state.get_context_parallel_world_size(),
        env=env,
    )


def _join(device: torch.device, runtime: RuntimeConfig, env: ProcessEnv) -> None:
    store = rendezvous(env, runtime.start_timeout_seconds)
    if device.type == "cuda":
        os.environ.setdefault(FLIGHT_RECORDER, str(RECORDED_COLLECTIVES))
    # Without `device_id`, with which every group would get an NCCL communicator at once, although most are
    # never used: each takes memory of the device, and up to half a second to end.
    dist.init_process_group(
        backend="nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=env.rank,
        world_size=env.world_size,
        timeout=datetime.timedelta(seconds=runtime.collective_timeout_seconds),
    )


def single_process_world(device: str = "auto") -> World:
    """A world of one process, for `load_model`, conversion and tests; no port is opened."""
    runtime = RuntimeConfig(device=device, threads_per_process=torch.get_num_threads())  # type: ignore[arg-type]
    return initialize(ParallelConfig(), runtime, ProcessEnv())


def shutdown() -> None:
    """Leave every process group; recorded graphs cannot be replayed any more. Safe to call twice."""
    from megatron.core import parallel_state

    for graph in list(RECORDED_GRAPHS):
        graph.reset()
    RECORDED_GRAPHS.clear()
    if dist.is_initialized():
        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def seed_random_streams(seed: int, step: int, world: World) -> None:
    """Set every random stream as a pure function of (seed, step, place in the layout).

    Dropout of step n therefore needs no saved generator state: a resumed run draws what an
    uninterrupted one would. The default stream is shared by tensor-parallel ranks (they must drop the
    same elements of replicated tensors); the model-parallel stream is not. Parts of a sequence draw as
    replicas do, each its own.
    """
    from megatron.core.tensor_parallel import random

    tokens_of = world.data_parallel_rank * world.context_parallel_size + world.context_parallel_rank
    place = (seed, step, world.pipeline_rank, tokens_of)
    torch.manual_seed(_hash_to_seed(*place))
    tracker = random.get_cuda_rng_tracker()
    own_seed = _hash_to_seed(*place, 1 + world.tensor_parallel_rank)
    state = tracker.get_states().get(MODEL_PARALLEL_STREAM)
    if isinstance(state, torch.Generator):
        state.manual_seed(own_seed)  # a CUDA graph holds it
        return
    tracker.reset()
    tracker.add(MODEL_PARALLEL_STREAM, own_seed)


def _hash_to_seed(*numbers: int) -> int:
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2  # both generators take 62 bits
