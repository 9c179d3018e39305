"""`chiar pretrain` and `chiar verify-resume`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from chiar_megatron.cli.common import count, relaunch
from chiar_megatron.errors import EXIT_DONE

if TYPE_CHECKING:
    from chiar_megatron.cli.common import Verbs


def add_training_verbs(verbs: Verbs) -> None:
    """The verbs of this file, with their options."""
    pretrain = verbs.add_parser("pretrain", help="train a recipe; continues by itself from its run folder")
    pretrain.add_argument("recipe", help="YAML recipe")
    pretrain.add_argument("overrides", nargs="*", metavar="key.sub=value", help="fields to overrule")
    pretrain.add_argument("--init-from", metavar="CHECKPOINT", help="start from these weights (only)")
    pretrain.add_argument("--attempt", type=count, metavar="N", help="begun by slurm/pretrain.sbatch")
    pretrain.set_defaults(run=_pretrain)

    verify = verbs.add_parser("verify-resume", help="show that a resumed run equals an uninterrupted one")
    verify.add_argument("recipe", help="YAML recipe")
    verify.add_argument("overrides", nargs="*", metavar="key.sub=value", help="fields to overrule")
    verify.add_argument("--steps", type=count, default=6, metavar="N", help="steps of each run (default 6)")
    verify.set_defaults(run=_verify_resume)


def _pretrain(parsed: argparse.Namespace) -> int:
    from chiar_megatron.config.load import load_config
    from chiar_megatron.config.validate import check_config, check_paths
    from chiar_megatron.runtime.env import check_versions, read_process_env

    check_versions()
    overrides = list(parsed.overrides)
    if parsed.init_from is not None:
        overrides.append(f"training.init_from={parsed.init_from}")
    config = load_config(parsed.recipe, overrides)
    check_config(config)
    check_paths(config)
    env = read_process_env()
    processes = config.parallel.processes_per_replica * (config.parallel.data_parallel_size or 1)
    if env.launcher == "none" and processes > 1:
        return relaunch(processes, Path(config.run_dir) / "logs")
    from chiar_megatron.training.signals import StopSignals

    signals = StopSignals()  # before the imports, which take seconds
    from chiar_megatron.runtime.distributed import initialize, shutdown
    from chiar_megatron.training.loop import pretrain

    world = initialize(config.parallel, config.runtime, env)
    try:
        return pretrain(config, world, signals, attempt=parsed.attempt)
    finally:
        shutdown()


def _verify_resume(parsed: argparse.Namespace) -> int:
    from chiar_megatron.config.load import load_config
    from chiar_megatron.config.validate import check_config, check_paths
    from chiar_megatron.runtime.env import check_versions, read_process_env
    from chiar_megatron.training.verify_resume import verify_resume

    check_versions()
    config = load_config(parsed.recipe, parsed.overrides)
    check_config(config)
    check_paths(config)
    verdict = verify_resume(parsed.recipe, parsed.overrides, config, read_process_env(), parsed.steps)
    if verdict is None:
        return EXIT_DONE
    print("\n".join(verdict.lines()))
    return EXIT_DONE if verdict.equal else 1
