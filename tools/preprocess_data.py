"""Tokenise text into Megatron's `.bin/.idx`; the same as `chiar preprocess`.

python tools/preprocess_data.py --input corpus.jsonl --tokenizer chiar.model --output data/corpus --workers 8
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict

from chiar_megatron.data.preprocess import preprocess
from chiar_megatron.data.text import DOCUMENT_SEPARATOR
from chiar_megatron.errors import EXIT_BAD_INPUT, EXIT_DONE, ChiarError


def main() -> int:
    """Parse the command line and preprocess; returns the exit code."""
    parser = argparse.ArgumentParser(description="Tokenise text into Megatron's .bin/.idx format.")
    parser.add_argument("--input", nargs="+", required=True, help="text or JSON lines, also .gz and .zst")
    parser.add_argument("--tokenizer", required=True, help=".model, tokenizer.json, or GPT-2 folder")
    parser.add_argument("--output", required=True, help="prefix of the .bin, .idx and .json written")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--json-key", default="text", help="key of the text in JSON lines")
    parser.add_argument("--no-append-eod", action="store_true", help="put nothing between documents")
    parser.add_argument(
        "--document-separator",
        default=DOCUMENT_SEPARATOR,
        help="line that ends a document of a text file; '' for an empty line (default: %(default)s)",
    )
    parser.add_argument("--dtype", choices=("auto", "uint16", "int32"), default="auto", help="of one token")
    arguments = parser.parse_args()
    try:
        summary = preprocess(
            arguments.input,
            arguments.tokenizer,
            arguments.output,
            workers=arguments.workers,
            json_key=arguments.json_key,
            append_eod=not arguments.no_append_eod,
            document_separator=arguments.document_separator,
            dtype=arguments.dtype,
        )
    except ChiarError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    print(json.dumps(asdict(summary)))
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
