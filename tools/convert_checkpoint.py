"""Convert a checkpoint; the same as `chiar convert`.

python tools/convert_checkpoint.py --from reference --to native step_52000.pt converted/
"""

from __future__ import annotations

import sys

from chiar_megatron.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
