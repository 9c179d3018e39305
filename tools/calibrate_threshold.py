"""Find routers' thresholds from a trained checkpoint and text; the same as `chiar calibrate`.

python tools/calibrate_threshold.py --checkpoint runs/twin --text validation.txt
"""

from __future__ import annotations

import sys

from chiar_megatron.cli import main

if __name__ == "__main__":
    sys.exit(main(["calibrate", *sys.argv[1:]]))
