"""The options of `chiar bench`, and which question they ask. Imports torch only when one is asked."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any

EXIT_WRONG = 1
_SIZES = {"spectral": "--rows", "attention": "--tokens", "layer": "--tokens", "step": "--tokens-per-step"}
_NO_MEMORY = re.compile("out of memory|can't allocate memory|not enough memory|overflow")


def add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    """A subcommand a question; `run_bench` answers it."""
    questions = parser.add_subparsers(metavar="QUESTION", dest="question", required=True)
    _add_spectral(_common(questions.add_parser("spectral", help="entropy and spectral mixing of one layer")))
    _add_attention(_common(questions.add_parser("attention", help="full and routed-query attention")))
    _add_layer(_common(questions.add_parser("layer", help="one A, R and D layer, forward and backward")))
    _add_step(_common(questions.add_parser("step", help="whole training steps, beside a plain GPT")))
    _add_balance(_common(questions.add_parser("balance", help="ranks with easy and with hard text")))


def run_bench(parsed: argparse.Namespace) -> int:
    """Ask the question; 0, or 1 if a result is wrong (it is then not timed) or a side failed.

    Raises ConfigError for options that do not fit together or need more memory than there is.
    """
    from chiar_megatron.bench.checks import WrongResult
    from chiar_megatron.errors import ConfigError
    from chiar_megatron.metrics.progress import ProgressLine

    try:
        return _question(parsed.question)(parsed)  # type: ignore[no-any-return]
    except WrongResult as error:
        ProgressLine(1, False).say(f"WRONG, not timed: {error}")
        return EXIT_WRONG
    except (MemoryError, RuntimeError) as error:  # torch tells them apart by words only
        reason = (str(error) or "no memory left").splitlines()[0]
        option = _SIZES.get(parsed.question)
        if option is None or not isinstance(error, MemoryError) and not _NO_MEMORY.search(reason):
            raise
        value = getattr(parsed, option[2:].replace("-", "_"))
        raise ConfigError(
            f"{option}: {value or 'its default'} needs more memory than there is ({reason[:160]}); use fewer"
        ) from error


def _question(name: str) -> Any:
    if name == "spectral":
        from chiar_megatron.bench.spectral import bench_spectral

        return bench_spectral
    if name == "attention":
        from chiar_megatron.bench.attention import bench_attention

        return bench_attention
    if name == "layer":
        from chiar_megatron.bench.layer import bench_layer

        return bench_layer
    if name == "balance":
        from chiar_megatron.bench.balance import bench_balance

        return bench_balance
    from chiar_megatron.bench.step import bench_step

    return bench_step


def _common(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--output", metavar="FILE", help="JSON record (default benchmarks/results/NAME_DEVICE.json)"
    )
    parser.add_argument("--commit", metavar="TEXT", help="commit to record, where there is no git to ask")
    parser.add_argument("--seed", type=int, default=1234, metavar="N")
    parser.add_argument(
        "--time-limit", type=_seconds, metavar="SECONDS", help="leave out what has not begun by then"
    )
    return parser


def _add_spectral(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=_count, metavar="N", help="tokens (CUDA 32768, CPU 512)")
    parser.add_argument("--hidden", type=_count, metavar="H", help="hidden size (CUDA 1024, CPU 128)")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="of the tokens (CUDA bf16, CPU fp32)")
    parser.add_argument("--rounds", type=_count, metavar="N", help="measurements of each (CUDA 30, CPU 5)")


def _add_attention(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seq-length", type=_counts, metavar="T,T", help="(CUDA 2048,8192, CPU 128)")
    parser.add_argument("--tokens", type=_count, metavar="N", help="of the batch (CUDA 32768, CPU 256)")
    parser.add_argument("--rho", type=_shares, default=(0.5, 0.25), metavar="ρ,ρ", help="light shares")
    parser.add_argument("--heads", type=_count, metavar="N", help="query heads (CUDA 16, CPU 4)")
    parser.add_argument("--groups", type=_count, metavar="N", help="key-value heads (as query heads)")
    parser.add_argument("--head-size", type=_count, default=64, metavar="D")
    parser.add_argument(
        "--no-flex",
        dest="flex",
        action="store_false",
        help="leave FlexAttention out (it takes long to compile)",
    )
    parser.add_argument("--rounds", type=_count, metavar="N", help="measurements of each (CUDA 20, CPU 3)")


def _add_layer(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument("--tokens", type=_count, metavar="N", help="of the batch (CUDA 32768, CPU 256)")
    parser.add_argument("--rounds", type=_count, metavar="N", help="measurements of each (CUDA 20, CPU 3)")


def _add_step(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument("--tokens-per-step", type=_count, metavar="N", help="(CUDA 32768, CPU 256)")
    parser.add_argument(
        "--micro-batch-size", type=_count, metavar="N", help="sequences (default: the step's)"
    )
    parser.add_argument("--steps", type=_count, metavar="N", help="timed (CUDA 50, CPU 3)")
    parser.add_argument("--warmup", type=_count, metavar="N", help="steps before (CUDA 10, CPU 1)")
    parser.add_argument(
        "--routed-warmup", type=_count, metavar="N", help="of routed sides, whose controller settles (30, 2)"
    )
    parser.add_argument("--sides", type=_words, default=("nanogpt", "twin", "routed"), metavar="SIDE,SIDE")
    parser.add_argument("--vocab-size", type=_count, metavar="N", help="(the preset's)")
    parser.add_argument("--data", metavar="PREFIX", help="real text, .bin/.idx (default: random token ids)")
    parser.add_argument("--profile", metavar="FILE", help="append each side's kernels and host waits to it")
    parser.add_argument(
        "--no-repeat-twin", dest="repeat_twin", action="store_false", help="time the twin only once"
    )
    parser.add_argument(
        "--no-check", dest="check", action="store_false", help="time unchecked; the record says so"
    )
    parser.add_argument(
        "--check-compiled", action="store_true", help="check compiled code too (compiles once more a side)"
    )


def _add_balance(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--processes", type=_count, default=4, metavar="N", help="data-parallel (4)")
    parser.add_argument("--steps", type=_count, default=200, metavar="N", help="of each compared run (200)")
    parser.add_argument(
        "--warmup", type=_count, default=150, metavar="N", help="steps before, balanced (150)"
    )
    parser.add_argument("--router", default="learned", metavar="KIND", help="(learned)")
    parser.add_argument("--rho", type=float, default=0.5, metavar="ρ", help="router target (0.5)")
    parser.add_argument("--seq-length", type=_count, default=1024, metavar="T", help="(1024)")
    parser.add_argument("--micro-batch-size", type=_count, default=2, metavar="N", help="sequences (2)")
    parser.add_argument("--hidden-size", type=_count, default=96, metavar="H", help="(96)")
    parser.add_argument("--schedule", default="D R*3 A", help="layers (D R*3 A)")
    parser.add_argument(
        "--ranks", type=_counts, default=(8, 64, 512, 4096), metavar="N,N", help="to simulate (8,64,512,4096)"
    )
    parser.add_argument(
        "--folder", default="runs/bench_balance", metavar="DIR", help="of text and runs (runs/bench_balance)"
    )


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", metavar="NAME", help="of the model (CUDA 400m, CPU tiny)")
    parser.add_argument("--seq-length", type=_count, metavar="T", help="(CUDA 256, CPU 64)")
    parser.add_argument("--rho", type=_shares, default=(0.5, 0.25), metavar="ρ,ρ", help="router targets")
    parser.add_argument("--router", type=_words, default=("entropy", "learned"), metavar="KIND,KIND")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="(CUDA bf16, CPU fp32)")
    parser.add_argument(
        "--compile", choices=("auto", "yes", "no"), default="auto", help="as the product decides, or not"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="key.sub=value", help="a field of the product's recipe"
    )


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not value >= 0.0:
        raise argparse.ArgumentTypeError(f"{text} must be at least 0 seconds")
    return value


def _counts(text: str) -> tuple[int, ...]:
    return tuple(_count(part) for part in _words(text))


def _shares(text: str) -> tuple[float, ...]:
    values = tuple(float(part) for part in _words(text))
    for value in values:
        if not 0.0 < value < 1.0:
            raise argparse.ArgumentTypeError(f"{value} must lie between 0 and 1")
    return values


def _words(text: str) -> Sequence[str]:
    words = tuple(part.strip() for part in text.split(",") if part.strip())
    if not words:
        raise argparse.ArgumentTypeError("is empty")
    return words
