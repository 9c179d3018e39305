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

    verify = verbs.add_parser("verify-resume", help="show that a resumed run equals an uninterrupted one")
    verify.add_argument("recipe", help="YAML recipe")
    verify.add_argument("overrides", nargs="*", metavar="key.sub=value", help="fields to overrule")
    verify.add_argument("--steps", type=_count, default=6, metavar="N", help="steps of each run (default 6)")
    verify.set_defaults(run=_verify_resume)

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
    train.add_argument("--json-key", default="text", metavar="KEY", help="text field of .jsonl lines")
    train.set_defaults(run=_train_tokenizer)

    preprocess = verbs.add_parser("preprocess", help="tokenise text to Megatron's .bin/.idx")
    preprocess.add_argument("--input", nargs="+", required=True, metavar="FILE", help="as for the tokenizer")
    preprocess.add_argument("--tokenizer", required=True, metavar="MODEL")
    preprocess.add_argument("--output", required=True, metavar="PREFIX")
    preprocess.add_argument("--workers", type=int, default=max(1, os.cpu_count() or 1), metavar="N")
    preprocess.add_argument("--json-key", default="text", metavar="KEY", help="text field of .jsonl lines")
    preprocess.add_argument(
        "--document-separator",
        default="<|endoftext|>",
        metavar="LINE",
        help="line between the documents of a .txt (%(default)s); '' for an empty line",
    )
    preprocess.add_argument("--dtype", choices=("auto", "uint16", "int32"), default="auto", help="of ids")
    preprocess.add_argument("--no-append-eod", action="store_true", help="no token at a document's end")
    preprocess.set_defaults(run=_preprocess)
    _add_evaluate(verbs)
    _add_generate(verbs)
    _add_convert(verbs)
    return parser


def _add_evaluate(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    evaluate = verbs.add_parser("evaluate", help="perplexity and bits per byte of a text; one JSON line last")
    evaluate.add_argument("--checkpoint", required=True, metavar="DIR", help="run folder or step_… folder")
    what = evaluate.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", nargs="+", metavar="FILE", help=".txt or .jsonl, also .gz, .zst")
    what.add_argument("--data", metavar="PREFIX", help="prefix of .bin/.idx files of `chiar preprocess`")
    evaluate.add_argument("--tokenizer", metavar="PATH", help="default: the one the checkpoint names")
    evaluate.add_argument("--seq-length", type=int, metavar="N", help="tokens of a window (the model's)")
    evaluate.add_argument("--stride", type=int, metavar="N", help="tokens between windows (half a window)")
    evaluate.add_argument("--batch-size", type=int, default=8, metavar="N", help="windows at once (8)")
    evaluate.add_argument("--tensor-parallel", type=_count, default=1, metavar="N")
    evaluate.add_argument("--pipeline-parallel", type=_count, default=1, metavar="N")
    evaluate.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    evaluate.add_argument("--json", action="store_true", help="print the JSON line only")
    evaluate.set_defaults(run=_evaluate)


def _add_generate(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    generate = verbs.add_parser("generate", help="continue a prompt")
    generate.add_argument("--checkpoint", required=True, metavar="DIR", help="run folder or step_… folder")
    generate.add_argument("--prompt", required=True, metavar="TEXT", help="begins a document; may be empty")
    generate.add_argument("--max-new-tokens", type=int, default=64, metavar="N")
    generate.add_argument("--temperature", type=float, default=1.0, metavar="T")
    generate.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens")
    generate.add_argument("--top-p", type=float, metavar="P", help="draw from the likeliest share P")
    generate.add_argument("--seed", type=int, metavar="S", help="of the draws; default: another each time")
    generate.add_argument("--greedy", action="store_true", help="always the likeliest token")
    generate.add_argument("--num-samples", type=_count, default=1, metavar="N")
    generate.add_argument("--no-cache", action="store_true", help="compute the whole prefix for each token")
    generate.add_argument("--tokenizer", metavar="PATH", help="default: the one the checkpoint names")
    generate.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    generate.set_defaults(run=_generate)


def _add_convert(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    convert = verbs.add_parser("convert", help="turn a checkpoint into another format, verified, on the CPU")
    convert.add_argument("--from", dest="source_format", required=True, metavar="F", help="reference")
    convert.add_argument("--to", dest="target_format", required=True, metavar="G", help="native")
    convert.add_argument("source", metavar="SRC", help="reference: one of the authors' .pt files")
    convert.add_argument("destination", metavar="DST", help="folder to make; `load_model(DST)` reads it")
    convert.add_argument("--num-heads", type=_count, metavar="N", help="default: from rope.inv_freq")
    convert.add_argument("--tau-low", type=float, metavar="X", help="33rd percentile of entropies (0.8935)")
    convert.add_argument("--tau-high", type=float, metavar="Y", help="67th percentile of entropies (0.8973)")
    convert.add_argument(
        "--routing-mode", choices=("threshold", "soft", "hard"), help="default: what the file tells"
    )
    convert.add_argument("--tokenizer", metavar="PATH", help="that the model was trained with")
    convert.add_argument("--no-verify", action="store_true", help="do not compare the result with the source")
    convert.set_defaults(run=_convert)


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be at least 1")
    return value


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
    from chiar_megatron.training.signals import StopSignals

    signals = StopSignals()  # before the imports, which take seconds
    from chiar_megatron.runtime.distributed import initialize, shutdown
    from chiar_megatron.training.loop import pretrain

    world = initialize(parallel, config.runtime, env)
    try:
        return pretrain(config, world, signals)
    finally:
        shutdown()


def _evaluate(parsed: argparse.Namespace) -> int:
    from chiar_megatron.runtime.env import check_versions, read_process_env

    check_versions()
    env = read_process_env()
    processes = parsed.tensor_parallel * parsed.pipeline_parallel
    if env.launcher == "none" and processes > 1:
        return _relaunch(processes, None)
    from chiar_megatron.config.schema import ParallelConfig, RuntimeConfig
    from chiar_megatron.runtime.distributed import initialize, shutdown
    from chiar_megatron.training.evaluate import EvaluationSettings, evaluate

    settings = EvaluationSettings(
        checkpoint=parsed.checkpoint,
        text=tuple(parsed.text or ()),
        data=parsed.data,
        tokenizer=parsed.tokenizer,
        window=parsed.seq_length,
        stride=parsed.stride,
        batch_size=parsed.batch_size,
    )
    parallel = ParallelConfig(
        tensor_model_parallel_size=parsed.tensor_parallel,
        pipeline_model_parallel_size=parsed.pipeline_parallel,
    )
    world = initialize(parallel, RuntimeConfig(device=parsed.device), env)
    try:
        evaluation = evaluate(settings, parallel, world)
    finally:
        shutdown()
    if world.is_main:
        for line in () if parsed.json else evaluation.lines():
            print(line)
        print(evaluation.json_line(), flush=True)
    return EXIT_DONE


def _generate(parsed: argparse.Namespace) -> int:
    from chiar_megatron.inference.generate import generate_texts
    from chiar_megatron.inference.load import checkpoint_tokenizer, load_model
    from chiar_megatron.runtime.distributed import shutdown

    try:
        model = load_model(parsed.checkpoint, device=parsed.device)
        texts = generate_texts(
            model,
            checkpoint_tokenizer(model.config, parsed.tokenizer),
            parsed.prompt,
            parsed.num_samples,
            max_new_tokens=parsed.max_new_tokens,
            temperature=0.0 if parsed.greedy else parsed.temperature,
            top_k=parsed.top_k,
            top_p=parsed.top_p,
            seed=parsed.seed,
            use_cache=not parsed.no_cache,
        )
    finally:
        shutdown()
    for number, text in enumerate(texts, start=1):
        if len(texts) > 1:
            print(f"--- sample {number} of {len(texts)}")
        print(text)
    return EXIT_DONE


def _convert(parsed: argparse.Namespace) -> int:
    from chiar_megatron.conversion.convert import ConvertOptions, convert, summary
    from chiar_megatron.conversion.reference import ReferenceOptions
    from chiar_megatron.runtime.distributed import shutdown
    from chiar_megatron.runtime.env import check_versions

    check_versions()
    reference = ReferenceOptions(parsed.num_heads, parsed.tau_low, parsed.tau_high, parsed.routing_mode)
    options = ConvertOptions(reference, parsed.tokenizer, verify=not parsed.no_verify)
    source, destination = Path(parsed.source), Path(parsed.destination)
    try:
        report = convert(parsed.source_format, parsed.target_format, source, destination, options)
    finally:
        shutdown()
    print("\n".join([*summary(report), f"written to {destination}"]))
    return EXIT_DONE


def _verify_resume(parsed: argparse.Namespace) -> int:
    from chiar_megatron.config.load import load_config
    from chiar_megatron.config.validate import check_config, check_paths
    from chiar_megatron.runtime.env import check_versions, read_process_env
    from chiar_megatron.training.verify_resume import verify_resume

    check_versions()
    config = load_config(parsed.recipe, parsed.overrides)
    check_config(config)
    check_paths(config)
    verdict = verify_resume(parsed.recipe, parsed.overrides, config, read_process_env(), parsed.steps)
    if verdict is None:
        return EXIT_DONE
    print("\n".join(verdict.lines()))
    return EXIT_DONE if verdict.equal else 1


def _relaunch(processes: int, log_dir: Path | None) -> int:
    """Start this very command once for each process on this host."""
    from chiar_megatron.runtime.launch import launch_local

    command = [sys.executable, "-m", "chiar_megatron.cli", *sys.argv[1:]]
    try:
        result = launch_local(command, processes, log_dir=log_dir)
    except OSError as error:
        raise ChiarError(f"{log_dir} cannot be written: {error}; choose another run_dir") from None
    if result.message:
        print(result.message, file=sys.stderr)
    return result.exit_code


def _train_tokenizer(parsed: argparse.Namespace) -> int:
    from chiar_megatron.data.tokenizer import train_tokenizer

    path = train_tokenizer(
        parsed.input,
        parsed.vocab_size,
        parsed.output,
        model_type=parsed.model_type,
        json_key=parsed.json_key,
    )
    print(path)
    return EXIT_DONE


def _preprocess(parsed: argparse.Namespace) -> int:
    from chiar_megatron.data.preprocess import preprocess

    summary = preprocess(
        parsed.input,
        parsed.tokenizer,
        parsed.output,
        workers=parsed.workers,
        json_key=parsed.json_key,
        append_eod=not parsed.no_append_eod,
        document_separator=parsed.document_separator,
        dtype=parsed.dtype,
    )
    print(f"{parsed.output}.bin: {summary.documents:,} documents, {summary.tokens:,} tokens")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
