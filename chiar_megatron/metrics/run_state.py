"""What state a run folder is in, from the files that it holds, whatever is torn or missing."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Literal

RunState = Literal["finished", "running", "stopped", "failed", "missing"]
SILENT_SECONDS = 600.0  # a run without an exit that wrote nothing for so long is not running any more


def run_state(folder: Path) -> tuple[RunState, str]:
    """State and reason: finished; running (no exit yet, wrote lately); stopped (resumable, or killed);
    failed; missing (no run there). The reason is empty for a finished one."""
    exit_file, metrics = folder / "exit.json", folder / "metrics.jsonl"
    if exit_file.is_file():
        try:
            record = json.loads(exit_file.read_text(encoding="utf-8"))
            reason, code = str(record["reason"]), int(record["exit_code"])
        except (OSError, ValueError, KeyError, TypeError):
            return "failed", "exit.json cannot be read"
        if code == 0:
            return "finished", ""
        return ("stopped" if code == 75 else "failed"), reason
    if not (folder / "environment.json").is_file() and not metrics.is_file():
        return "missing", "the folder holds no run"
    newest = max(path.stat().st_mtime for path in folder.iterdir())
    if time.time() - newest < SILENT_SECONDS:
        return "running", "no exit yet"
    return "stopped", "no exit and silent: killed, or it hangs; submit again"
