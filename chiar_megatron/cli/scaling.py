"""`chiar scaling plan|submit|collect|fit|predict`: sweeps and laws."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from chiar_megatron.cli.common import count, positive
from chiar_megatron.errors import EXIT_DONE, ConfigError

if TYPE_CHECKING:
    from chiar_megatron.cli.common import Verbs


def add_scaling_verbs(verbs: Verbs) -> None:
    """The verbs of this file, with their options."""
    scaling = verbs.add_parser("scaling", help="scaling laws: plan, run, collect, fit, predict")
    steps = scaling.add_subparsers(metavar="STEP", required=True)
    _add_plan(steps)
    _add_submit(steps)
    _add_collect(steps)
    _add_fit(steps)
    _add_predict(steps)


def _add_plan(steps: Verbs) -> None:
    plan = steps.add_parser(
        "plan", help="budgets, sizes and schedules into a folder of recipes with their cost"
    )
    plan.add_argument("recipe", help="YAML recipe that every run starts from: text, router, layout")
    plan.add_argument(
        "overrides", nargs="*", metavar="key.sub=value", help="fields to overrule, right after the recipe"
    )
    plan.add_argument("--output", required=True, metavar="DIR", help="the sweep's folder")
    plan.add_argument("--kind", choices=("isoflop", "ratio", "lr"), default="isoflop")
    plan.add_argument("--ladder", required=True, type=_list, metavar="HxL,...", help="hidden size × layers")
    plan.add_argument(
        "--schedules",
        type=_list,
        default=["twin", "chiar"],
        metavar="V,...",
        help="twin, chiar, chiar:RHO, interleave:K (twin,chiar)",
    )
    plan.add_argument("--budgets", type=_numbers, default=[], metavar="C,...", help="FLOPs of a run")
    plan.add_argument("--ratios", type=_numbers, default=[20.0], metavar="R,...", help="tokens a parameter")
    plan.add_argument(
        "--lr-factors",
        type=_numbers,
        default=[0.25, 0.5, 1.0, 2.0, 4.0],
        metavar="F,...",
        help="of --kind lr",
    )
    plan.add_argument("--lr", type=float, help="peak learning rate (by the rule)")
    plan.add_argument("--batch-tokens", type=int, metavar="N", help="tokens a step (by the rule)")
    plan.add_argument(
        "--mup", type=int, metavar="WIDTH", help="µP with this base width: one learning rate for all widths"
    )
    plan.add_argument("--min-ratio", type=float, default=0.0, metavar="R", help="leave out runs of fewer D/N")
    plan.add_argument(
        "--measured",
        metavar="RUN",
        help="run folder whose routed fraction stands in for that of routers without a target (0.5)",
    )
    plan.add_argument("--held-out", action="store_true", help="for trying a law on: not part of the fit")
    plan.add_argument("--add", action="store_true", help="to the runs already planned in DIR")
    plan.add_argument("--flops-per-second", type=float, default=0.4 * 989e12, metavar="F", help="of a device")
    plan.add_argument("--price", type=positive, metavar="P", help="of a device hour")
    plan.set_defaults(run=_plan)


def _add_submit(steps: Verbs) -> None:
    submit = steps.add_parser("submit", help="run what a sweep has not finished, here or on SLURM")
    submit.add_argument("sweep", metavar="DIR", help="folder of `chiar scaling plan`")
    submit.add_argument("--held-out", action="store_true", help="the held-out runs instead of the others")
    submit.add_argument("--fit", metavar="FIT", help="print what this fit predicts before a run starts")
    submit.add_argument(
        "--slurm", action="store_true", help="as job arrays instead of one after another here"
    )
    submit.add_argument("--cluster", type=Path, metavar="FILE", help="site settings (default ./cluster.yaml)")
    submit.add_argument("--nodes", type=count, metavar="N", help="of one run; default: as few as it needs")
    submit.add_argument("--throttle", type=count, metavar="N", help="runs at once")
    submit.add_argument("--dry-run", action="store_true", help="print the scripts and submit nothing")
    submit.set_defaults(run=_submit)


def _add_collect(steps: Verbs) -> None:
    collect = steps.add_parser("collect", help="run folders into one table")
    collect.add_argument("sweep", metavar="DIR", help="folder of `chiar scaling plan`")
    collect.add_argument("--held-out", action="store_true", help="the held-out runs instead of the others")
    collect.add_argument("--output", metavar="FILE", help=".csv or .parquet (DIR/runs.csv, or held_out.csv)")
    collect.set_defaults(run=_collect)


def _add_fit(steps: Verbs) -> None:
    fit = steps.add_parser("fit", help="fit a law to a table of runs; one JSON line last")
    fit.add_argument("table", metavar="FILE", help=".csv, .tsv or .parquet, one row a run")
    fit.add_argument("--n", metavar="COLUMN", help="parameters N (parameters)")
    fit.add_argument("--d", metavar="COLUMN", help="training tokens D (tokens; without one, C/6N)")
    fit.add_argument("--flops", metavar="COLUMN", help="training FLOPs C (training_flops; without one, 6ND)")
    fit.add_argument("--loss", metavar="COLUMN", help="final loss, nats a token (loss)")
    fit.add_argument(
        "--rho", metavar="COLUMN", help="share of attention, for the law of routed models (attention_share)"
    )
    fit.add_argument("--no-rho", action="store_true", help="leave the share of attention out of the law")
    fit.add_argument("--rho-on", choices=("n", "d", "both"), help="what ρ acts on (what fits best)")
    fit.add_argument("--seconds", metavar="COLUMN", help="device seconds of training (device_seconds)")
    fit.add_argument(
        "--where", action="append", default=[], metavar="COLUMN=VALUE", help="rows to use; may be repeated"
    )
    fit.add_argument("--drop-highest-loss", type=int, default=0, metavar="K", help="leave out K rows")
    fit.add_argument("--method", choices=("lbfgs", "varpro"), default="lbfgs")
    fit.add_argument("--delta", type=float, default=1e-3, help="Huber's δ of ln loss (%(default)s)")
    fit.add_argument("--bootstrap", type=int, default=1000, metavar="R", help="resamples; 0: no intervals")
    fit.add_argument("--level", type=float, default=0.95, help="of intervals (%(default)s)")
    fit.add_argument("--seed", type=int, default=0, help="of the resamples")
    fit.add_argument("--output", metavar="DIR", help="write fit.json, figures and report.html there")
    fit.add_argument("--json", action="store_true", help="print the JSON line only")
    fit.set_defaults(run=_fit)


def _add_predict(steps: Verbs) -> None:
    predict = steps.add_parser(
        "predict",
        help="losses, best sizes and the efficiency multiplier of a fit; one JSON line last",
        description="Two of --n, --d and --flops: a loss. One of --n and --d alone: its limit. --optimum: "
        "the best N and D for a budget.",
    )
    predict.add_argument("fit", metavar="FIT", help="fit.json, or the folder of `chiar scaling fit --output`")
    predict.add_argument("--n", type=float, metavar="N", help="parameters")
    predict.add_argument("--d", type=float, metavar="D", help="tokens")
    predict.add_argument("--flops", type=float, metavar="C", help="training FLOPs")
    predict.add_argument("--optimum", type=float, metavar="C", help="best N and D for so many FLOPs")
    predict.add_argument("--optimum-seconds", type=float, metavar="S", help="the same for device seconds")
    predict.add_argument("--rho", type=float, default=1.0, help="share of attention (1: full attention)")
    predict.add_argument("--multiplier", action="store_true", help="of --rho against full attention")
    predict.add_argument("--json", action="store_true", help="print the JSON line only")
    predict.set_defaults(run=_predict)


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in _list(text)]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} must be numbers with commas between, such as 1e18,3e18"
        ) from None


def _plan(parsed: argparse.Namespace) -> int:
    from chiar_megatron.config.load import load_config
    from chiar_megatron.config.validate import check_paths
    from chiar_megatron.scaling.collect import routed_fractions
    from chiar_megatron.scaling.ladder import parse_size, parse_variant
    from chiar_megatron.scaling.manifest import write_sweep
    from chiar_megatron.scaling.plan import PlanRequest, plan_lines, plan_sweep

    base = load_config(parsed.recipe, parsed.overrides)
    check_paths(base)  # what spans fields is checked in each run's recipe
    request = PlanRequest(
        base=base,
        folder=Path(parsed.output),
        sizes=tuple(map(parse_size, parsed.ladder)),
        variants=tuple(map(parse_variant, parsed.schedules)),
        kind=parsed.kind,
        budgets=tuple(parsed.budgets),
        ratios=tuple(parsed.ratios),
        lr_factors=tuple(parsed.lr_factors),
        lr=parsed.lr,
        batch_tokens=parsed.batch_tokens,
        flops_per_second=parsed.flops_per_second,
        held_out=parsed.held_out,
        min_ratio=parsed.min_ratio,
        mup_base=parsed.mup,
        routed_fraction=None if parsed.measured is None else fmean(routed_fractions(Path(parsed.measured))),
    )
    plan = plan_sweep(request)
    write_sweep(plan.sweep, plan.configs, parsed.add)
    print("\n".join([*plan_lines(plan, parsed.price), f"written: {parsed.output}"]))
    return EXIT_DONE


def _submit(parsed: argparse.Namespace) -> int:
    from chiar_megatron.scaling.manifest import read_sweep
    from chiar_megatron.scaling.submit import Local, submit

    sweep = read_sweep(Path(parsed.sweep))
    analysis = None
    if parsed.fit is not None:
        from chiar_megatron.scaling.analysis import load

        analysis = load(Path(parsed.fit))

    def say(line: str) -> None:
        print(line, flush=True)

    if not parsed.slurm:
        for name in ("cluster", "nodes", "throttle", "dry_run"):
            if getattr(parsed, name):
                raise ConfigError(f"--{name.replace('_', '-')} is for jobs; give --slurm too")
        return submit(sweep, Local(analysis), say, held_out=parsed.held_out)
    from chiar_megatron.cli.cluster import show_arrays
    from chiar_megatron.cluster.site import load_cluster
    from chiar_megatron.cluster.sweep import SlurmArrays

    arrays = SlurmArrays(load_cluster(parsed.cluster), parsed.nodes, parsed.throttle, analysis)
    if parsed.dry_run:
        return show_arrays(arrays.plan(sweep, sweep.wanted(parsed.held_out)))
    return submit(sweep, arrays, say, held_out=parsed.held_out)


def _collect(parsed: argparse.Namespace) -> int:
    from chiar_megatron.scaling.collect import as_rows, collect, collect_lines
    from chiar_megatron.scaling.manifest import read_sweep
    from chiar_megatron.scaling.table import write_table

    sweep = read_sweep(Path(parsed.sweep))
    runs = collect(sweep.wanted(parsed.held_out))
    default = "held_out.csv" if parsed.held_out else "runs.csv"
    output = Path(parsed.output) if parsed.output else sweep.folder / default
    write_table(output, as_rows(runs))
    print("\n".join([*collect_lines(runs), f"written: {output}"]))
    return EXIT_DONE


def _fit(parsed: argparse.Namespace) -> int:
    from chiar_megatron.scaling.analysis import FitSettings, analyse, save
    from chiar_megatron.scaling.input import FitInput, read_runs

    request = FitInput(
        path=Path(parsed.table),
        named={name: getattr(parsed, name) for name in ("n", "d", "flops", "loss", "rho", "seconds")},
        no_rho=parsed.no_rho,
        where=tuple(parsed.where),
        drop_highest_loss=parsed.drop_highest_loss,
    )
    settings = FitSettings(
        parsed.method, parsed.delta, parsed.bootstrap, parsed.seed, parsed.rho_on, parsed.level
    )
    settings.check()
    runs, n_column, notes = read_runs(request)
    settings.check_form(runs)
    analysis = analyse(runs, parsed.table, settings, n_column)
    written = []
    if parsed.output is not None:
        from chiar_megatron.scaling.plot import draw_fit
        from chiar_megatron.scaling.report import write_report

        folder = Path(parsed.output)
        save(analysis, folder / "fit.json")
        figures = draw_fit(analysis, folder)
        pictures = [path for path in figures if path.suffix == ".png"]
        write_report(analysis, pictures, folder / "report.html", notes)
        written = [folder / "fit.json", *figures, folder / "report.html"]
    if not parsed.json:
        print("\n".join([*notes, *analysis.lines(), *(f"written: {path}" for path in written)]))
    print(json.dumps(analysis.summary()), flush=True)
    return EXIT_DONE


def _predict(parsed: argparse.Namespace) -> int:
    from chiar_megatron.scaling.analysis import load
    from chiar_megatron.scaling.predict import Question, answer

    analysis = load(Path(parsed.fit))
    question = Question(
        n=parsed.n,
        d=parsed.d,
        flops=parsed.flops,
        optimum=parsed.optimum,
        optimum_seconds=parsed.optimum_seconds,
        rho=parsed.rho,
        multiplier=parsed.multiplier,
    )
    lines, figures = answer(analysis, question)
    if not parsed.json:
        print("\n".join(lines))
    print(json.dumps(figures), flush=True)
    return EXIT_DONE
