"""What several verbs share."""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from chiar_megatron.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_FAILED, EXIT_RESUMABLE, ChiarError

if TYPE_CHECKING:
    Verbs = argparse._SubParsersAction[argparse.ArgumentParser]


_log = logging.getLogger(__name__)


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, like all bad input; argparse prints the usage before it."""

    def error(self, message: str) -> NoReturn:
        """Ends the process with exit code 2."""
        # argparse names the function that took no such text.
        message = re.sub(r"invalid \w+ value: (.*)", r"\1 is no number", message)
        self.exit(EXIT_BAD_INPUT, f"{self.prog}: {message}; see `{self.prog} --help`\n")


def count(text: str) -> int:
    """An option's whole number, at least 1."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, at least 1") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be at least 1")
    return value


def positive(text: str) -> float:
    """An option's number, above 0 and finite."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number above 0") from None
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{value} must be above 0 and finite")
    return value


def relaunch(processes: int, log_dir: Path | None) -> int:
    """Start this very command once for each process on this host; returns its exit code, 1 where a signal
    ended a rank."""
    from chiar_megatron.runtime.launch import launch_local

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if processes > cores:
        _log.warning("%d processes (the recipe's layout) share %d core(s) of this host", processes, cores)
    command = [sys.executable, "-m", "chiar_megatron.cli", *sys.argv[1:]]
    try:
        result = launch_local(command, processes, log_dir=log_dir)
    except OSError as error:
        raise ChiarError(f"{log_dir} cannot be written: {error}; choose another run_dir") from None
    if result.message:
        print(result.message, file=sys.stderr)
    known = result.exit_code in (EXIT_DONE, EXIT_BAD_INPUT, EXIT_RESUMABLE)
    return result.exit_code if known else EXIT_FAILED
