"""Worker of test_agree.py."""

from __future__ import annotations

from collections.abc import Callable

from chiar_megatron.checkpoint.agree import on_main
from chiar_megatron.config.schema import ParallelConfig, RuntimeConfig
from chiar_megatron.errors import ChiarError, ConfigError
from chiar_megatron.runtime.distributed import initialize, shutdown
from chiar_megatron.runtime.env import read_process_env


def outcomes() -> list[str]:
    """Of an action that gives a number, and of three that fail in different ways."""
    runtime = RuntimeConfig(device="cpu", collective_timeout_seconds=30.0)
    initialize(ParallelConfig(), runtime, read_process_env())
    actions = [
        lambda: 7,
        fails(ConfigError("a field")),
        fails(OSError(28, "full")),
        fails(ValueError("a fault")),
    ]
    told = [outcome(action) for action in actions]
    shutdown()
    return told


def fails(error: Exception) -> Callable[[], int]:
    """An action that raises it."""

    def action() -> int:
        raise error

    return action


def outcome(action: Callable[[], int]) -> str:
    """The action's result or failure, in words."""
    try:
        return str(on_main(action))
    except ChiarError as error:
        return f"{type(error).__name__} ({error.exit_code}): {error}"
    except ValueError as error:
        return f"ValueError: {error}"
