"""The run folder is the record: resolved config, code version, environment, exit reason."""

from __future__ import annotations

import json
import logging
import os
import platform
import sys
import time
from typing import Any

import torch

from chiar_megatron import __version__
from chiar_megatron.checkpoint.claim import Claim
from chiar_megatron.config.load import dump_config
from chiar_megatron.config.schema import RunConfig
from chiar_megatron.errors import ChiarError, FencedError
from chiar_megatron.metrics.goodput import GOODPUT_FILE, measure_goodput
from chiar_megatron.runtime.installed import code_version

_log = logging.getLogger(__name__)


class RunFolder:
    """Paths of one run, and what rank 0 writes there besides metrics and checkpoints."""

    def __init__(self, claim: Claim) -> None:
        self.claim = claim
        self.path = claim.run_dir
        self.checkpoints = self.path / "checkpoints"

    def write_start(self, world_size: int) -> None:
        """Write `environment.json`. Raises ChiarError if it cannot."""
        try:
            self.claim.write(self.path / "environment.json", json.dumps(_environment(world_size), indent=1))
            self.claim.discard(self.path / "exit.json")
        except OSError as error:
            raise ChiarError(f"run_dir {self.path} cannot be written: {error}; choose another") from None

    def write_config(self, config: RunConfig) -> None:
        """Write `config.yaml`, resolved; once it is known to fit what the folder holds. Raises OSError."""
        self.claim.write(self.path / "config.yaml", dump_config(config))

    def write_exit(self, reason: str, step: int, exit_code: int) -> None:
        """Write why the run ended; an attempt killed before this leaves no `exit.json`, and
        one that a newer attempt has overtaken must not."""
        record = {"attempt": self.claim.number, "reason": reason, "step": step, "exit_code": exit_code}
        record["unix_seconds"] = time.time()
        try:
            self.claim.write(self.path / "exit.json", json.dumps(record))
        except FencedError:
            return
        except OSError as error:
            _log.warning("exit reason not recorded: %s", error)

    def write_goodput(self) -> None:
        """Write `goodput.json`: where the time of all attempts so far went (see `metrics/goodput.py`)."""
        record = measure_goodput(self.path).record()
        try:
            self.claim.write(self.path / GOODPUT_FILE, json.dumps(record, indent=1))
        except FencedError:
            return
        except OSError as error:
            _log.warning("goodput not recorded: %s", error)


def _environment(world_size: int) -> dict[str, Any]:
    from importlib.metadata import version

    return {
        "chiar_megatron": __version__,
        "code": code_version(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "megatron_core": version("megatron-core"),
        "cuda": torch.version.cuda,
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else platform.processor() or "cpu",
        "host": platform.node(),
        "cores": os.cpu_count(),
        "world_size": world_size,
        "command": sys.argv,
    }
