"""`chiar scaling plan|submit|collect|fit|predict`: sweeps and laws."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from chiar_megatron.errors import EXIT_DONE

if TYPE_CHECKING:
    from chiar_megatron.cli.common import Verbs


def add_scaling_verbs(verbs: Verbs) -> None:
    """The verbs of this file, with their options."""
    scaling = verbs.add_parser("scaling", help="scaling laws: plan, run, collect, fit, predict")
    steps = scaling.add_subparsers(metavar="STEP", required=True)
    _add_fit(steps)


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
    settings = FitSettings(parsed.method, parsed.delta, parsed.bootstrap, parsed.seed, parsed.level)
    settings.check()
    runs, notes = read_runs(request)
    analysis = analyse(runs, parsed.table, settings)
    written = []
    if parsed.output is not None:
        folder = Path(parsed.output)
        save(analysis, folder / "fit.json")
        written = [folder / "fit.json"]
    if not parsed.json:
        print("\n".join([*notes, *analysis.lines(), *(f"written: {path}" for path in written)]))
    print(json.dumps(analysis.summary()), flush=True)
    return EXIT_DONE
