"""Tokenise text into Megatron's `.bin/.idx`; the same as `chiar preprocess`.

python tools/preprocess_data.py --input corpus.jsonl --tokenizer chiar.model --output data/corpus --workers 8
"""

from __future__ import annotations

import sys

from chiar_megatron.cli import main

if __name__ == "__main__":
    sys.exit(main(["preprocess", *sys.argv[1:]]))
