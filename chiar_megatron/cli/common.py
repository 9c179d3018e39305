"""What several verbs share."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from chiar_megatron.errors import ChiarError

if TYPE_CHECKING:
    Verbs = argparse._SubParsersAction[argparse.ArgumentParser]


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
    """Start this very command once for each process on this host; returns its exit code."""
    from chiar_megatron.runtime.launch import launch_local

    command = [sys.executable, "-m", "chiar_megatron.cli", *sys.argv[1:]]
    try:
        result = launch_local(command, processes, log_dir=log_dir)
    except OSError as error:
        raise ChiarError(f"{log_dir} cannot be written: {error}; choose another run_dir") from None
    if result.message:
        print(result.message, file=sys.stderr)
    return result.exit_code
