"""`chiar evaluate`, `generate`, `convert` and `calibrate`: what is done with a trained model."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from chiar_megatron.cli.common import count, relaunch
from chiar_megatron.cli.conversion import add_convert
from chiar_megatron.errors import EXIT_DONE

if TYPE_CHECKING:
    from chiar_megatron.cli.common import Verbs


def add_model_verbs(verbs: Verbs) -> None:
    """The verbs of this file, with their options."""
    _add_evaluate(verbs)
    _add_generate(verbs)
    add_convert(verbs)
    _add_calibrate(verbs)


def _add_evaluate(verbs: Verbs) -> None:
    evaluate = verbs.add_parser("evaluate", help="perplexity and bits per byte of a text; one JSON line last")
    evaluate.add_argument("--checkpoint", required=True, metavar="DIR", help="run folder or step_… folder")
    what = evaluate.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", nargs="+", metavar="FILE", help=".txt or .jsonl, also .gz, .zst")
    what.add_argument("--data", metavar="PREFIX", help="prefix of .bin/.idx files of `chiar preprocess`")
    evaluate.add_argument("--tokenizer", metavar="PATH", help="default: the one the checkpoint names")
    evaluate.add_argument("--seq-length", type=int, metavar="N", help="tokens of a window (the model's)")
    evaluate.add_argument("--stride", type=int, metavar="N", help="tokens between windows (half a window)")
    evaluate.add_argument("--batch-size", type=int, default=8, metavar="N", help="windows at once (8)")
    evaluate.add_argument("--tensor-parallel", type=count, default=1, metavar="N")
    evaluate.add_argument("--pipeline-parallel", type=count, default=1, metavar="N")
    evaluate.add_argument("--context-parallel", type=count, default=1, metavar="N")
    evaluate.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    evaluate.add_argument("--json", action="store_true", help="print the JSON line only")
    evaluate.set_defaults(run=_evaluate)


def _add_generate(verbs: Verbs) -> None:
    generate = verbs.add_parser("generate", help="continue a prompt")
    generate.add_argument("--checkpoint", required=True, metavar="DIR", help="run folder or step_… folder")
    generate.add_argument("--prompt", required=True, metavar="TEXT", help="begins a document; may be empty")
    generate.add_argument("--max-new-tokens", type=int, default=64, metavar="N")
    generate.add_argument("--temperature", type=float, default=1.0, metavar="T")
    generate.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens")
    generate.add_argument("--top-p", type=float, metavar="P", help="draw from the likeliest share P")
    generate.add_argument("--seed", type=int, metavar="S", help="of the draws; default: another each time")
    generate.add_argument("--greedy", action="store_true", help="always the likeliest token")
    generate.add_argument("--num-samples", type=count, default=1, metavar="N")
    generate.add_argument("--no-cache", action="store_true", help="compute the whole prefix for each token")
    generate.add_argument("--tokenizer", metavar="PATH", help="default: the one the checkpoint names")
    generate.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    generate.set_defaults(run=_generate)


def _add_calibrate(verbs: Verbs) -> None:
    calibrate = verbs.add_parser(
        "calibrate",
        help="routers' thresholds from a trained checkpoint and text; one JSON line last",
        description="Without --target, as published: one threshold for all layers, the midpoint of the 33rd "
        "and 67th percentile of the embeddings' spectral entropies (give a full-attention checkpoint). With "
        "--target, for each routed layer the threshold that sends this share of the tokens to attention.",
    )
    calibrate.add_argument("--checkpoint", required=True, metavar="DIR", help="run folder or step_… folder")
    what = calibrate.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", nargs="+", metavar="FILE", help=".txt or .jsonl, also .gz, .zst")
    what.add_argument("--data", metavar="PREFIX", help="prefix of .bin/.idx files of `chiar preprocess`")
    calibrate.add_argument("--tokenizer", metavar="PATH", help="default: the one the checkpoint names")
    calibrate.add_argument("--target", type=float, metavar="RHO", help="share of tokens to attention")
    calibrate.add_argument(
        "--tokens",
        type=int,
        default=65536,
        metavar="N",
        help="read at most so many, in whole windows of the model's length, at least one (%(default)s)",
    )
    calibrate.add_argument("--batch-size", type=int, default=8, metavar="N", help="windows at once (8)")
    calibrate.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    calibrate.add_argument(
        "--dc-power-weight", type=float, metavar="C", help="of a twin's entropies (its config's)"
    )
    calibrate.add_argument("--output", metavar="DIR", help="write a copy with the thresholds")
    calibrate.add_argument("--json", action="store_true", help="print the JSON line only")
    calibrate.set_defaults(run=_calibrate)


def _evaluate(parsed: argparse.Namespace) -> int:
    from chiar_megatron.runtime.env import check_versions, read_process_env

    check_versions()
    env = read_process_env()
    processes = parsed.tensor_parallel * parsed.pipeline_parallel * parsed.context_parallel
    if env.launcher == "none" and processes > 1:
        return relaunch(processes, None)
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
        context_parallel_size=parsed.context_parallel,
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


def _calibrate(parsed: argparse.Namespace) -> int:
    from chiar_megatron.runtime.distributed import shutdown
    from chiar_megatron.runtime.env import check_versions
    from chiar_megatron.training.calibrate import CalibrationSettings, calibrate

    check_versions()
    settings = CalibrationSettings(
        checkpoint=parsed.checkpoint,
        text=tuple(parsed.text or ()),
        data=parsed.data,
        tokenizer=parsed.tokenizer,
        target=parsed.target,
        tokens=parsed.tokens,
        batch_size=parsed.batch_size,
        device=parsed.device,
        dc_power_weight=parsed.dc_power_weight,
        output=parsed.output,
    )
    try:
        calibration = calibrate(settings)
    finally:
        shutdown()
    for line in () if parsed.json else calibration.lines():
        print(line)
    print(calibration.json_line(), flush=True)
    return EXIT_DONE
