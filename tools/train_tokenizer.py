"""Train a SentencePiece tokenizer; the same as `chiar tokenizer train`.

python tools/train_tokenizer.py --input corpus.jsonl --vocab-size 32000 --output tokenizer/chiar
"""

from __future__ import annotations

import sys

from chiar_megatron.cli import main

if __name__ == "__main__":
    sys.exit(main(["tokenizer", "train", *sys.argv[1:]]))
