"""On how many nodes, and how many ranks on each; light, for every elastic attempt asks anew."""

from __future__ import annotations

from dataclasses import dataclass

from chiar_megatron.cluster.site import ClusterConfig
from chiar_megatron.config.schema import RunConfig
from chiar_megatron.errors import ConfigError


@dataclass(frozen=True)
class Placement:
    """Where the ranks go."""

    nodes: int
    tasks_per_node: int
    fewest_nodes: int | None = None
    """On which it may start too (elastic); None: on no fewer."""


def place(config: RunConfig, cluster: ClusterConfig, nodes: int | None) -> Placement:
    """Nodes and tasks a node of a recipe; where `data_parallel_size` is null, as many replicas as fill the
    nodes and divide the batch.

    Raises ConfigError where the layout does not fit, or does not divide evenly.
    """
    parallel, training = config.parallel, config.training
    replica = parallel.processes_per_replica
    most = cluster.gpus_per_node
    if cluster.elastic and parallel.data_parallel_size is not None:
        raise ConfigError(
            f"parallel.data_parallel_size {parallel.data_parallel_size}: elastic (cluster.yaml) chooses it "
            "anew at each start; leave it null"
        )
    if parallel.data_parallel_size is not None:
        world = replica * parallel.data_parallel_size
        for count in [nodes] if nodes is not None else range(-(-world // most), world + 1):
            if world % count == 0 and world // count <= most:
                return Placement(count, world // count)
        raise ConfigError(
            f"--nodes {nodes}: {world} processes (the recipe's layout) do not spread evenly, at "
            f"most {most} each (gpus_per_node); change --nodes or parallel.data_parallel_size"
        )
    fewest = max(1, -(-replica // most))
    count = nodes if nodes is not None else fewest
    for tasks in range(most, 0, -1):
        if _replicas(config, count * tasks) > 0:
            return Placement(count, tasks, fewest if cluster.elastic else None)
    raise ConfigError(
        f"--nodes {count}: no number of tasks up to {most} a node (gpus_per_node) holds whole replicas of "
        f"{replica} processes that divide training.global_batch_size {training.global_batch_size}; change one"
    )


def place_on(config: RunConfig, nodes: int, tasks_per_node: int) -> Placement:
    """Where an attempt's ranks go when it got so many nodes: as many replicas as divide the batch, on as few
    of the nodes as hold them evenly. Raises ConfigError if not even one fits."""
    placements = [Placement(n, t) for n in range(1, nodes + 1) for t in range(1, tasks_per_node + 1)]
    best = max(placements, key=lambda p: (_replicas(config, p.nodes * p.tasks_per_node), -p.nodes))
    if _replicas(config, best.nodes * best.tasks_per_node) == 0:
        raise ConfigError(
            f"{nodes} node(s) x {tasks_per_node} task(s) hold no replica of "
            f"{config.parallel.processes_per_replica} processes; wait for more nodes"
        )
    return best


def spread_warnings(config: RunConfig, cluster: ClusterConfig, placement: Placement) -> list[str]:
    """What is allowed, but slow."""
    size, tasks = config.parallel.tensor_model_parallel_size, placement.tasks_per_node
    round_robin = any("cyclic" in option for option in (*cluster.srun, *cluster.sbatch))
    if placement.nodes == 1 or size == 1 or not (tasks % size or round_robin):
        return []
    return [
        f"warning: tensor-parallel ranks ({size}) lie on several nodes of {tasks} task(s): every layer waits "
        "for the network between them"
    ]


def _replicas(config: RunConfig, processes: int) -> int:
    """Replicas that so many processes make; 0 if they do not fill them, or do not divide the batch."""
    training = config.training
    replicas, rest = divmod(processes, config.parallel.processes_per_replica)
    if rest or not replicas or training.global_batch_size % (training.micro_batch_size * replicas):
        return 0
    return replicas
