"""`make demo`: text, tokenizer, preprocessing, training on two processes, evaluation, a picture.

Each step is the command a user would type, printed before it runs. The full-attention twin is trained
alike beside it, so that no figure stands without what it is to be compared with.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from chiar_megatron.metrics.jsonl import read_metrics
from chiar_megatron.metrics.picture import draw_run

HERE = Path(__file__).parent
RUN = Path("runs/demo")
TWIN = RUN / "twin"
DATA = RUN / "data"
RECIPE = "examples/demo_cpu/recipe.yaml"
VOCAB_SIZE = 2048
VALIDATION_SHARE = 0.05
TWIN_OVERRIDES = ["model.schedule=A*4", "model.meta_router.enabled=false", f"run_dir={TWIN}"]


def main() -> int:
    """Run the whole path; the exit code of the first command that fails, or 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, help="your own .txt or .jsonl instead of the gathered one")
    parser.add_argument("--steps", type=int, help="optimizer steps instead of the recipe's")
    arguments = parser.parse_args()
    started = time.monotonic()
    shutil.rmtree(RUN, ignore_errors=True)
    DATA.mkdir(parents=True)
    prepare(arguments.text)
    steps = [] if arguments.steps is None else [f"training.steps={arguments.steps}"]
    chiar("pretrain", RECIPE, *steps)
    chiar("pretrain", RECIPE, *TWIN_OVERRIDES, *steps)
    evaluation = evaluate(RUN)
    report(evaluation, time.monotonic() - started)
    return 0


def prepare(text: Path | None) -> None:
    """Text, tokenizer, and tokenised files in `runs/demo/data`."""
    if text is None:
        run(sys.executable, str(HERE / "gather_text.py"), "--output-dir", str(DATA))
        train, validation = DATA / "train.txt", DATA / "validation.txt"
    else:
        train, validation = split_lines(text)
    chiar(
        *("tokenizer", "train", "--input", str(train), "--vocab-size", str(VOCAB_SIZE)),
        *("--output", str(DATA / "tokenizer")),
    )
    for path in (train, validation):
        chiar(
            *("preprocess", "--input", str(path), "--tokenizer", str(DATA / "tokenizer.model")),
            *("--output", str(DATA / path.name.split(".")[0]), "--workers", "2"),
        )


def split_lines(text: Path) -> tuple[Path, Path]:
    """The last lines of a user's file for validation, the rest for training."""
    if not text.is_file():
        sys.exit(f"demo: --text {text}: no such file")
    lines = text.read_text(encoding="utf-8").splitlines(keepends=True)
    held_out = max(1, int(len(lines) * VALIDATION_SHARE))
    train, validation = (DATA / f"{name}{text.suffix}" for name in ("train", "validation"))
    train.write_text("".join(lines[:-held_out]), encoding="utf-8")
    validation.write_text("".join(lines[-held_out:]), encoding="utf-8")
    return train, validation


def unigram_entropy(prefix: Path) -> float:
    """Entropy of the tokens' own frequencies, nats: what a model that ignores context cannot beat here."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset  # seconds; chiar quiets its warnings

    counts: Counter[int] = Counter()
    dataset = IndexedDataset(str(prefix))
    for index in range(len(dataset)):
        counts.update(dataset[index].tolist())
    total = sum(counts.values())
    return -sum(n / total * math.log(n / total) for n in counts.values())


def evaluate(run_dir: Path) -> dict[str, float]:
    """The last line of `chiar evaluate`, on the validation text."""
    output = chiar("evaluate", "--checkpoint", str(run_dir), "--data", str(DATA / "validation"), capture=True)
    result: dict[str, float] = json.loads(output.strip().splitlines()[-1])
    return result


def report(evaluation: dict[str, float], seconds: float) -> None:
    """Write `runs/demo/summary.json` and the picture, and print what came out."""
    entropy = unigram_entropy(DATA / "validation")
    losses = {name: last_validation(folder) for name, folder in (("chiar", RUN), ("twin", TWIN))}
    summary = {
        "unigram_entropy_nats": entropy,
        "validation_loss_nats": losses["chiar"],
        "twin_validation_loss_nats": losses["twin"],
        "evaluation": evaluation,
        "seconds": seconds,
    }
    (RUN / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    picture = draw_run(RUN, compare={"full-attention twin": TWIN})
    print(
        f"\nunigram entropy of the validation text   {entropy:.3f} nats a token"
        f"\nvalidation loss, CHIAR                   {losses['chiar']:.3f}   "
        f"({entropy - losses['chiar']:.2f} below)"
        f"\nvalidation loss, full-attention twin     {losses['twin']:.3f}"
        f"\npicture                                  {picture}"
        f"\nall of it took {seconds:.0f} s. Next: README.md, or your own text: make demo TEXT=FILE.txt"
    )


def last_validation(run_dir: Path) -> float:
    """The final validation loss of a run."""
    records = [record for record in read_metrics(run_dir) if "validation" in record]
    return float(next(iter(records[-1]["validation"].values())))


def chiar(*arguments: str, capture: bool = False) -> str:
    """Run a `chiar` command."""
    return run(sys.executable, "-m", "chiar_megatron.cli", *arguments, capture=capture)


def run(*command: str, capture: bool = False) -> str:
    """Print a command as a user would type it, and run it; a failure ends the demo."""
    shown = ["chiar" if part == "chiar_megatron.cli" else part for part in command]
    shown = shown[2:] if "chiar" in shown[2:3] else ["python", *shown[1:]]
    print("$ " + " ".join(shown), flush=True)
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE if capture else None, check=False)
    if done.returncode != 0:
        sys.exit(done.returncode)
    if capture:
        print(done.stdout, end="")
    return done.stdout or ""


if __name__ == "__main__":
    sys.exit(main())
