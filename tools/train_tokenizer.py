"""Train a SentencePiece tokenizer; the same as `chiar tokenizer train`.

python tools/train_tokenizer.py --input corpus.jsonl --vocab-size 32000 --output tokenizer/chiar
"""

from __future__ import annotations

import argparse
import sys

from chiar_megatron.data.tokenizer import train_tokenizer
from chiar_megatron.errors import EXIT_BAD_INPUT, EXIT_DONE, ChiarError


def main() -> int:
    """Parse the command line and train; returns the exit code."""
    parser = argparse.ArgumentParser(description="Train a SentencePiece tokenizer.")
    parser.add_argument("--input", nargs="+", required=True, help="text or JSON lines, also .gz and .zst")
    parser.add_argument("--vocab-size", type=int, required=True, help="pieces, bytes and </s> included")
    parser.add_argument("--output", required=True, help="prefix of the .model and .vocab written")
    parser.add_argument("--model-type", choices=("unigram", "bpe"), default="unigram")
    parser.add_argument("--json-key", default="text", help="key of the text in JSON lines")
    arguments = parser.parse_args()
    try:
        model = train_tokenizer(
            arguments.input,
            arguments.vocab_size,
            arguments.output,
            model_type=arguments.model_type,
            json_key=arguments.json_key,
        )
    except ChiarError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    print(model)
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
