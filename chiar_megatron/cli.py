"""`chiar <verb>`: the command line, and the only place that wires everything together.

Nothing heavy is imported until a verb needs it: `chiar --help` answers at once, and the helper processes
that checkpoint writing spawns import this file again.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from chiar_megatron.errors import EXIT_BAD_INPUT, EXIT_DONE, ChiarError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code (0 done, 2 bad input, 75 stopped early and resumable)."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    parser = build_parser()
    parsed = parser.parse_args(arguments)
    try:
        return int(parsed.run(parsed))
    except ChiarError as error:
        print(f"chiar: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_DONE


def build_parser() -> argparse.ArgumentParser:
    """All verbs with their options."""
    parser = argparse.ArgumentParser(prog="chiar", description="Pretrain CHIAR-Former language models.")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    pretrain = verbs.add_parser("pretrain", help="train a recipe; continues by itself from its run folder")
    pretrain.add_argument("recipe", help="YAML recipe")
    pretrain.add_argument("overrides", nargs="*", metavar="key.sub=value", help="fields to overrule")
    pretrain.add_argument("--init-from", metavar="CHECKPOINT", help="start from these weights (only)")
    pretrain.set_defaults(run=_pretrain)

    tokenizer = verbs.add_parser("tokenizer", help="train a SentencePiece tokenizer")
    actions = tokenizer.add_subparsers(metavar="ACTION", required=True)
    train = actions.add_parser("train", help="train a SentencePiece model")
    train.add_argument(
        "--input", nargs="+", required=True, metavar="FILE", help=".txt or .jsonl, also .gz, .zst"
    )
    train.add_argument("--vocab-size", type=int, required=True, metavar="N")
    train.add_argument(
        "--output", required=True, metavar="PREFIX", help="writes PREFIX.model and PREFIX.vocab"
    )
    train.add_argument("--model-type", choices=("unigram", "bpe"), default="unigram")
    train.set_defaults(run=_train_tokenizer)

    preprocess = verbs.add_parser("preprocess", help="tokenise text to Megatron's .bin/.idx")
    preprocess.add_argument("--input", nargs="+", required=True, metavar="FILE", help="as for the tokenizer")
    preprocess.add_argument("--tokenizer", required=True, metavar="MODEL")
    preprocess.add_argument("--output", required=True, metavar="PREFIX")
    preprocess.add_argument("--workers", type=int, default=max(1, os.cpu_count() or 1), metavar="N")
    preprocess.add_argument("--json-key", default="text", metavar="KEY", help="text field of .jsonl lines")
    preprocess.set_defaults(run=_preprocess)
    _add_model_verbs(verbs)
    return parser


def _add_model_verbs(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    pass


def _pretrain(parsed: argparse.Namespace) -> int:
    from chiar_megatron.config.load import load_config
    from chiar_megatron.config.validate import check_config, check_paths
    from chiar_megatron.runtime.env import check_versions, read_process_env

    check_versions()
    overrides = list(parsed.overrides)
    if parsed.init_from is not None:
        overrides.append(f"training.init_from={parsed.init_from}")
    config = load_config(parsed.recipe, overrides)
    check_config(config)
    check_paths(config)
    env = read_process_env()
    parallel = config.parallel
    processes = (
        parallel.tensor_model_parallel_size
        * parallel.pipeline_model_parallel_size
        * parallel.context_parallel_size
        * (parallel.data_parallel_size or 1)
    )
    if env.launcher == "none" and processes > 1:
        return _relaunch(processes, Path(config.run_dir) / "logs")
    from chiar_megatron.runtime.distributed import initialize, shutdown
    from chiar_megatron.training.loop import pretrain

    world = initialize(parallel, config.runtime, env)
    try:
        return pretrain(config, world)
    finally:
        shutdown()


def _relaunch(processes: int, log_dir: Path) -> int:
    """Start this very command once for each process on this host."""
    from chiar_megatron.runtime.launch import launch_local

    command = [sys.executable, "-m", "chiar_megatron.cli", *sys.argv[1:]]
    result = launch_local(command, processes, log_dir=log_dir)
    if result.message:
        print(result.message, file=sys.stderr)
    return result.exit_code


def _train_tokenizer(parsed: argparse.Namespace) -> int:
    from chiar_megatron.data.tokenizer import train_tokenizer

    path = train_tokenizer(parsed.input, parsed.vocab_size, parsed.output, parsed.model_type)
    print(path)
    return EXIT_DONE


def _preprocess(parsed: argparse.Namespace) -> int:
    from chiar_megatron.data.preprocess import preprocess

    summary = preprocess(
        parsed.input, parsed.tokenizer, parsed.output, workers=parsed.workers, json_key=parsed.json_key
    )
    print(f"{parsed.output}.bin: {summary.documents:,} documents, {summary.tokens:,} tokens")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
