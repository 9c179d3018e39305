"""`chiar submit` and `status`, and what jobs call: `prepare`, `place` and `attempt`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from chiar_megatron.cli.common import count
from chiar_megatron.errors import EXIT_DONE, ConfigError

if TYPE_CHECKING:
    from chiar_megatron.cli.common import Verbs
    from chiar_megatron.cluster.sweep import SweepSubmission


def add_cluster_verbs(verbs: Verbs) -> None:
    """The verbs of this file, with their options."""
    submit = verbs.add_parser("submit", help="check a recipe and send it to SLURM")
    _add_recipe(submit)
    submit.add_argument("--cluster", type=Path, metavar="FILE", help="site settings (default ./cluster.yaml)")
    submit.add_argument("--nodes", type=count, metavar="N", help="default: as few as the layout needs")
    submit.add_argument("--grid", type=Path, metavar="FILE", help="a job array, a run for each of its points")
    submit.add_argument("--throttle", type=count, metavar="N", help="of an array: tasks that run at once")
    submit.add_argument("--dry-run", action="store_true", help="print the script and submit nothing")
    submit.set_defaults(run=_submit)

    prepare = verbs.add_parser("prepare", help="tokenise and index what a recipe's data still lacks")
    _add_recipe(prepare)
    prepare.add_argument("--workers", type=count, default=1, metavar="N")
    prepare.set_defaults(run=_prepare)

    place = verbs.add_parser("place", help="for slurm/pretrain.sbatch: where ranks go on these nodes")
    _add_recipe(place)
    place.add_argument("--nodes", type=count, required=True, metavar="N")
    place.add_argument("--tasks", type=count, required=True, metavar="N", help="of a node, at most")
    place.set_defaults(run=_place)

    attempt = verbs.add_parser("attempt", help="for slurm/pretrain.sbatch: note how a job began or ended")
    attempt.add_argument("event", choices=("begin", "end"))
    attempt.add_argument("run_dir", type=Path)
    attempt.add_argument("--number", type=count, metavar="N", help="that `begin` has printed")
    attempt.add_argument("--max-tries", type=count, default=3)
    attempt.add_argument("--exit-code", type=int, default=0, help="of the job step")
    attempt.add_argument("--signal", default="", help="that the batch script got")
    attempt.add_argument("--signal-seconds", type=int, default=120)
    attempt.add_argument("--job-facts", default="", help="what `scontrol show job -o` says")
    attempt.add_argument("--node-states", default="", help="of the job's nodes, as `sinfo -o %%T` says")
    attempt.set_defaults(run=_attempt)

    status = verbs.add_parser("status", help="a table of runs: state, step, loss, speed, restarts, goodput")
    status.add_argument("folders", nargs="*", type=Path, metavar="FOLDER", help="of runs or sweeps (runs)")
    status.add_argument("--json", action="store_true", help="a JSON list instead of the table")
    status.set_defaults(run=_status)


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, help="YAML recipe")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="fields to overrule")


def _submit(parsed: argparse.Namespace) -> int:
    from chiar_megatron.cluster.submit import plan_submission, submit

    if parsed.grid is not None:
        return _submit_grid(parsed)
    if parsed.throttle is not None:
        raise ConfigError(f"--throttle {parsed.throttle}: only an array has tasks; give its --grid FILE too")
    submission = plan_submission(parsed.recipe, parsed.overrides, parsed.cluster, parsed.nodes)
    if parsed.dry_run:
        for problem in submission.problems:
            print(f"warning: {problem}", file=sys.stderr)
        for line in submission.estimates:
            print(line, file=sys.stderr)
        print(submission.script(submission.recipe, submission.overrides), end="")
        return EXIT_DONE
    print("\n".join([*submission.estimates, *submit(submission)]))
    return EXIT_DONE


def _submit_grid(parsed: argparse.Namespace) -> int:
    from chiar_megatron.cluster.site import load_cluster
    from chiar_megatron.cluster.sweep import grid_tasks, plan_arrays, submit_arrays
    from chiar_megatron.config.load import load_config

    tasks = grid_tasks(parsed.recipe, parsed.overrides, parsed.grid)
    folder = Path(load_config(parsed.recipe, parsed.overrides).run_dir)
    cluster = load_cluster(parsed.cluster)
    submission = plan_arrays(folder, tasks, cluster, parsed.nodes, parsed.throttle)
    if parsed.dry_run:
        return show_arrays(submission)
    print("\n".join(submit_arrays(submission)))
    return EXIT_DONE


def show_arrays(submission: SweepSubmission) -> int:
    """A dry run: warnings on standard error, the scripts on standard output."""
    for line in [*submission.notes, *(f"warning: {problem}" for problem in submission.problems)]:
        print(line, file=sys.stderr)
    for array in submission.arrays:
        print(array.script(), end="")
    return EXIT_DONE


def _prepare(parsed: argparse.Namespace) -> int:
    from chiar_megatron.cluster.prepare import prepare
    from chiar_megatron.config.load import load_config
    from chiar_megatron.config.validate import check_config

    config = load_config(parsed.recipe, parsed.overrides)
    check_config(config)
    prepare(config, parsed.workers, print)
    return EXIT_DONE


def _place(parsed: argparse.Namespace) -> int:
    from chiar_megatron.cluster.placement import place_on
    from chiar_megatron.config.load import load_config

    placement = place_on(load_config(parsed.recipe, parsed.overrides), parsed.nodes, parsed.tasks)
    nodes, tasks = placement.nodes, placement.tasks_per_node
    print(f"--nodes={nodes} --ntasks={nodes * tasks} --ntasks-per-node={tasks}")
    return EXIT_DONE


def _attempt(parsed: argparse.Namespace) -> int:
    from chiar_megatron.cluster.attempts import Ending, begin_attempt, end_attempt

    if parsed.event == "begin":
        print(begin_attempt(parsed.run_dir, parsed.max_tries))
        return EXIT_DONE
    if parsed.number is None:
        raise ConfigError("--number is missing: give what `chiar attempt begin` has printed")
    facts, states = parsed.job_facts, parsed.node_states
    ending = Ending(parsed.exit_code, parsed.signal, facts, states, parsed.signal_seconds)
    print(end_attempt(parsed.run_dir, parsed.number, ending, parsed.max_tries))
    return EXIT_DONE


def _status(parsed: argparse.Namespace) -> int:
    from chiar_megatron.cluster.status import as_json, find_runs, jobs_in_queue, status_of, table

    jobs = jobs_in_queue()
    rows = [status_of(folder, jobs) for folder in find_runs(parsed.folders or [Path("runs")])]
    print(as_json(rows) if parsed.json else "\n".join(table(rows)))
    return EXIT_DONE
