"""`chiar plan`: what a recipe costs, before it runs."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from chiar_megatron.cli.common import count, positive
from chiar_megatron.errors import EXIT_DONE, ChiarError, ConfigError

if TYPE_CHECKING:
    from chiar_megatron.cli.common import Verbs


def add_planning_verbs(verbs: Verbs) -> None:
    """The verbs of this file, with their options."""
    plan = verbs.add_parser(
        "plan", help="parameters, FLOPs, memory a GPU, tokens/s and the layouts that fit; needs no GPU"
    )
    plan.add_argument("recipe", help="YAML recipe")
    plan.add_argument("overrides", nargs="*", metavar="key.sub=value", help="fields to overrule")
    plan.add_argument("--gpus", type=count, metavar="N", help="list the layouts of so many GPUs")
    plan.add_argument("--gpus-per-node", type=count, default=8, metavar="N", help="(%(default)s)")
    plan.add_argument("--gpu-memory-gib", type=positive, default=80.0, metavar="GIB", help="(%(default)g)")
    plan.add_argument(
        "--tflops",
        type=positive,
        metavar="X",
        help="executed by a GPU over whole steps (an H100's)",
    )
    plan.add_argument("--link-gb-s", type=positive, metavar="X", help="bandwidth of a GPU within a node")
    plan.add_argument("--network-gb-s", type=positive, metavar="X", help="bandwidth of a GPU between nodes")
    plan.add_argument(
        "--traces", type=Path, metavar="RUN", help="simulate the balance from a run's routing traces"
    )
    plan.add_argument("--ranks", type=_counts, metavar="N,N", help="of the simulation (8,64,512,4096)")
    plan.add_argument("--json", action="store_true", help="print one JSON line only")
    plan.set_defaults(run=_plan)


def _plan(parsed: argparse.Namespace) -> int:
    from chiar_megatron.config.load import load_config
    from chiar_megatron.config.validate import check_config
    from chiar_megatron.planning.report import Plan
    from chiar_megatron.planning.speed import Cluster
    from chiar_megatron.training.loop import resolve

    config = load_config(parsed.recipe, parsed.overrides)
    check_config(config, parsed.gpus)
    tokenizer = config.data.tokenizer
    if tokenizer is not None and not Path(tokenizer).exists():  # model.vocab_size is all a plan needs of it
        if config.model.vocab_size is None:
            raise ConfigError(
                f"data.tokenizer: {tokenizer} does not exist, and model.vocab_size is null; make the "
                "tokenizer first, or give model.vocab_size=N"
            )
        config = replace(config, data=replace(config.data, tokenizer=None))
    config = resolve(config)
    check_config(config, parsed.gpus)
    parallel = config.parallel
    one_replica = parallel.processes_per_replica
    replicas = parallel.data_parallel_size or (parsed.gpus or one_replica) // one_replica
    config = replace(config, parallel=replace(parallel, data_parallel_size=replicas))
    given = {"tflops": parsed.tflops, "link_gb_s": parsed.link_gb_s, "network_gb_s": parsed.network_gb_s}
    cluster = Cluster(
        gpus=one_replica * replicas,
        gpus_per_node=parsed.gpus_per_node,
        memory_gib=parsed.gpu_memory_gib,
        **{name: value for name, value in given.items() if value is not None},
    )
    if parsed.ranks is not None and parsed.traces is None:
        raise ChiarError("--ranks: there is nothing to simulate them from; give a run with --traces RUN")
    simulated = {} if parsed.ranks is None else {"ranks": parsed.ranks}
    plan = Plan(config, replicas, cluster, parsed.gpus is not None, parsed.traces, **simulated)
    print("\n".join([plan.json_line()] if parsed.json else plan.lines()), flush=True)
    plan.check_fits()
    return EXIT_DONE


def _counts(text: str) -> tuple[int, ...]:
    """An option's numbers, each at least 1."""
    return tuple(count(part) for part in text.split(","))
