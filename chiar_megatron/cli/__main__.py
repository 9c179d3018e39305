"""`python -m chiar_megatron.cli`, as launchers start it; spawned helper processes import this again."""

from __future__ import annotations

import sys

from chiar_megatron.cli import main

if __name__ == "__main__":
    sys.exit(main())
