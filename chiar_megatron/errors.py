"""The exceptions a user can meet. Each message names the field, its value, the limit and the remedy.

`assert` is kept for programmer errors; everything a user can cause raises one of these, which the
command line turns into a short message and exit code 2, or 1 where nothing was wrong with the input.
"""

from __future__ import annotations

EXIT_DONE = 0
EXIT_FAILED = 1  # not by what was asked for: the same command may succeed later
EXIT_BAD_INPUT = 2
EXIT_RESUMABLE = 75  # EX_TEMPFAIL of sysexits.h: stopped early, run the same command again


class ChiarError(Exception):
    """Base of all errors a user can cause; `str(error)` is the whole message."""

    exit_code = EXIT_BAD_INPUT


class ConfigError(ChiarError):
    """A recipe or an override is wrong, or its fields contradict each other."""


class DataError(ChiarError):
    """Text, tokenizer or tokenised data is missing, empty, or does not fit the model."""


class LaunchError(ChiarError):
    """Processes could not be started, or what they were told about each other contradicts itself."""


class RendezvousError(LaunchError):
    """Processes did not find each other: a node that is down, a port that is taken."""

    exit_code = EXIT_FAILED


class OtherRankError(ChiarError):
    """Another rank failed, by a fault that its own output shows."""

    exit_code = EXIT_FAILED


class CheckpointError(ChiarError):
    """A checkpoint is missing, torn, or of another shape."""


class FencedError(ChiarError):
    """A newer attempt has taken this run over: this one must write nothing more."""


class NonFiniteError(ChiarError):
    """Loss or gradient stayed NaN or infinite: the run must not be tried again unchanged."""
