"""`chiar <verb>`: the command line, and the only place that wires everything together.

Nothing heavy is imported until a verb needs it: `chiar --help` answers at once, and the helper processes
that checkpoint writing spawns import this package again.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from chiar_megatron.cli.cluster import add_cluster_verbs
from chiar_megatron.cli.common import Parser
from chiar_megatron.cli.machine import add_machine_verbs
from chiar_megatron.cli.models import add_model_verbs
from chiar_megatron.cli.planning import add_planning_verbs
from chiar_megatron.cli.scaling import add_scaling_verbs
from chiar_megatron.cli.text import add_text_verbs
from chiar_megatron.cli.training import add_training_verbs
from chiar_megatron.errors import EXIT_DONE, ChiarError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code (0 done, 1 failed, 2 bad input, 75 stopped early and resumable)."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    parser, words = build_parser(), sys.argv[1:] if arguments is None else list(arguments)
    parsed, rest = parser.parse_known_args(words)
    # argparse takes fields to overrule before options only.
    if rest and hasattr(parsed, "overrides") and all("=" in text and text[0] != "-" for text in rest):
        parsed.overrides = [*parsed.overrides, *rest]
    elif rest:
        verb = next(word for word in words if word[:1] != "-")
        parser.prog += f" {verb}"  # whose help has the options
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return int(parsed.run(parsed))
    except ChiarError as error:
        print(f"chiar: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_DONE


def build_parser() -> argparse.ArgumentParser:
    """All verbs with their options."""
    parser: argparse.ArgumentParser = Parser(
        prog="chiar", description="Pretrain CHIAR-Former language models."
    )
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    add_training_verbs(verbs)
    add_planning_verbs(verbs)
    add_text_verbs(verbs)
    add_model_verbs(verbs)
    add_cluster_verbs(verbs)
    add_machine_verbs(verbs)
    add_scaling_verbs(verbs)
    return parser
