"""`chiar tokenizer` and `chiar preprocess`."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from chiar_megatron.cli.common import count
from chiar_megatron.errors import EXIT_DONE

if TYPE_CHECKING:
    from chiar_megatron.cli.common import Verbs


def add_text_verbs(verbs: Verbs) -> None:
    """The verbs of this file, with their options."""
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
    preprocess.add_argument(
        "--workers", type=count, metavar="N", help="processes of each rank (the cores of its share of a host)"
    )
    preprocess.add_argument(
        "--silence-seconds",
        type=float,
        default=600.0,
        metavar="S",
        help="under mpirun, srun or torchrun: all fail when a rank does nothing for so long (%(default)g)",
    )
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
    from chiar_megatron.data.preprocess import Request
    from chiar_megatron.data.spread import preprocess_over_ranks
    from chiar_megatron.runtime.env import read_process_env

    env = read_process_env()
    request = Request(
        parsed.input,
        parsed.tokenizer,
        parsed.output,
        workers=parsed.workers or max(1, (os.cpu_count() or 1) // env.local_world_size),
        json_key=parsed.json_key,
        append_eod=not parsed.no_append_eod,
        document_separator=parsed.document_separator,
        dtype=parsed.dtype,
    )
    summary = preprocess_over_ranks(request, env, parsed.silence_seconds)
    if summary is not None:
        print(f"{parsed.output}.bin: {summary.documents:,} documents, {summary.tokens:,} tokens")
    return EXIT_DONE
