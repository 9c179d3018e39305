"""What a process does before it leaves the others. A stand-in takes the place of a CUDA graph, which needs a
GPU; tests/gpu/test_layouts_cuda.py leaves NCCL with a real one."""

from __future__ import annotations

import torch.distributed as dist

from chiar_megatron.runtime import distributed


class Graph:
    """Notes whether process groups are there when it is reset."""

    def __init__(self) -> None:
        self.seen: list[bool] = []

    def reset(self) -> None:
        self.seen.append(dist.is_initialized())


def test_graphs_let_go_of_transfers_before_groups_are_left() -> None:
    distributed.single_process_world("cpu")
    graph = Graph()
    distributed.RECORDED_GRAPHS.add(graph)  # type: ignore[arg-type]
    distributed.shutdown()
    assert graph.seen == [True] and not dist.is_initialized()
    distributed.shutdown()
    assert graph.seen == [True]
