"""`chiar verify-resume`: a run that was interrupted and resumed against one that was not, bit for bit.

Both are short runs of the user's own recipe through `chiar pretrain`, in folders of their own.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME

from chiar_megatron.checkpoint.files import read_manifest, step_folder
from chiar_megatron.checkpoint.torch_dist import stored_tensors
from chiar_megatron.config.schema import RunConfig
from chiar_megatron.errors import EXIT_DONE, EXIT_RESUMABLE, ChiarError, ConfigError
from chiar_megatron.metrics.jsonl import read_metrics
from chiar_megatron.model.tensors import LazyTensor
from chiar_megatron.runtime.env import ProcessEnv

TIME_LIMIT_SECONDS = 3600.0  # of one short run, its start included
_MESSAGE_LINES = 8
_FIGURES = ("loss", "grad_norm", "learning_rate", "tokens_seen")
# Every step logged, nothing validated, no other end than ours, no other writer, every checkpoint kept.
_OVERRIDES = (
    "training.eval_steps=0", "training.exit_after_minutes=null", "logging.log_interval_steps=1",
    "logging.tensorboard=false", "logging.wandb_project=null", "checkpoint.save_interval_steps=0",
    "checkpoint.save_interval_minutes=0", "checkpoint.keep_last=0", "checkpoint.load_step=null",
    "runtime.record_decisions=null",
)  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """What differs between the two runs."""

    steps: int
    interrupted_after: int
    tensors: int
    differences: list[str]
    hint: str

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        return not self.differences

    def lines(self) -> list[str]:
        """For the user."""
        what = f"{self.steps} steps against {self.interrupted_after} + {self.steps - self.interrupted_after}"
        if self.equal:
            return [
                f"resume is exact: {what}, in this layout",
                f"equal bit for bit: loss, gradient norm and learning rate of every step, all {self.tensors} "
                "saved tensors (weights, moments, averages)",
            ]
        shown = self.differences[:_MESSAGE_LINES]
        more = (
            [f"and {len(self.differences) - len(shown)} more"] if len(self.differences) > len(shown) else []
        )
        return [f"resume is NOT exact: {what}", *shown, *more, self.hint]


def verify_resume(
    recipe: str, overrides: Sequence[str], config: RunConfig, env: ProcessEnv, steps: int
) -> Verdict | None:
    """Run, interrupt, resume, compare; called by every rank of a launch, or once outside any.

    config: what recipe and overrides give. steps: optimizer steps to run, at most the recipe's. Returns
    None on ranks other than 0. Raises ConfigError if there are too few steps, ChiarError if a run fails.
    """
    steps = min(steps, config.training.steps)
    if steps < 2:
        raise ConfigError(f"--steps {steps} must be at least 2 (training.steps is {config.training.steps})")
    half = steps // 2
    folder = Path(config.run_dir) / "verify_resume"
    is_main = env.rank == 0
    if is_main:
        shutil.rmtree(folder, ignore_errors=True)
    whole, parts = folder / "uninterrupted", folder / "resumed"
    arguments = [
        recipe,
        *overrides,
        *_OVERRIDES,
        f"data.cache_dir={config.data.cache_dir or folder / 'index'}",
    ]
    for run_dir, last in ((whole, steps), (parts, half), (parts, steps)):
        _train([*arguments, f"run_dir={run_dir}", f"training.exit_after_steps={last}"], is_main)
    if not is_main:
        return None
    hint = f"both runs are kept in {folder}"
    if not config.training.deterministic:
        hint += "; on a GPU only training.deterministic=true repeats the same bits"
    differences, tensors = compare_runs(whole, parts, steps)
    if not differences:
        shutil.rmtree(folder, ignore_errors=True)
    return Verdict(steps, half, tensors, differences, hint)


def _train(arguments: Sequence[str], is_main: bool) -> None:
    """One short run by the very command a user would give."""
    command = [sys.executable, "-m", "chiar_megatron.cli", "pretrain", *arguments]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        raise ChiarError(f"a run took longer than {TIME_LIMIT_SECONDS:g} s: {' '.join(command)}") from None
    if result.returncode not in (EXIT_DONE, EXIT_RESUMABLE):
        last_words = "\n".join(result.stderr.strip().splitlines()[-_MESSAGE_LINES:])
        raise ChiarError(f"a run ended with exit code {result.returncode}:\n{last_words}")


def compare_runs(whole: Path, parts: Path, steps: int) -> tuple[list[str], int]:
    """What differs, in words, between the records and the checkpoints at `steps` of two run folders; and how
    many saved tensors were compared, bit for bit."""
    differing, tensors = _differing_tensors(
        *(step_folder(run_dir / "checkpoints", steps) for run_dir in (whole, parts))
    )
    return _differing_figures(whole, parts) + differing, tensors


def _differing_figures(whole: Path, parts: Path) -> list[str]:
    expected, found = (
        {record["step"]: record for record in read_metrics(run_dir)} for run_dir in (whole, parts)
    )
    if expected.keys() != found.keys():
        return [f"steps logged: {sorted(found)}, not {sorted(expected)}"]
    return [
        f"step {step}: {name} {found[step][name]!r}, uninterrupted {record[name]!r}"
        for step, record in sorted(expected.items())
        for name in _FIGURES
        if record[name] != found[step][name]
    ]


def _differing_tensors(whole: Path, parts: Path) -> tuple[list[str], int]:
    """Names of what is saved and differs, and how many tensors there are."""
    tensors, others = stored_tensors(whole), stored_tensors(parts)
    digests = [
        {name: digest for name, digest in read_manifest(folder).items() if _holds_state(name)}
        for folder in (whole, parts)
    ]
    if digests[0] == digests[1]:
        return [], len(tensors)
    differing = [
        name
        for name, tensor in tensors.items()
        if name not in others or not torch.equal(_bits(tensor), _bits(others[name]))
    ]
    if digests[0][COMMON_STATE_FNAME] != digests[1][COMMON_STATE_FNAME]:
        differing.append(f"{COMMON_STATE_FNAME} (counters of the optimizer)")
    return [f"saved after the last step: {name} differs" for name in differing], len(tensors)


def _holds_state(name: str) -> bool:
    return name.endswith(".distcp") or name == COMMON_STATE_FNAME


def _bits(tensor: LazyTensor) -> torch.Tensor:
    """As bytes, so that a NaN equals itself."""
    return tensor.load().reshape(-1).view(torch.uint8)
