"""Plan, run, collect, fit and predict scaling laws; the same as `chiar scaling`.

python tools/scaling_laws.py fit runs.csv --n parameters --d tokens --loss loss --output law
"""

from __future__ import annotations

import sys

from chiar_megatron.cli import main

if __name__ == "__main__":
    sys.exit(main(["scaling", *sys.argv[1:]]))
