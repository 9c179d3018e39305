"""A shell on the mini cluster, for trying things by hand: it goes with its command.

    python -m tests.slurm.shell bash -c 'chiar submit recipe.yaml; sleep 20; squeue'

Jobs that are left when the command ends are ended too: wait for them (`squeue -h` prints none).
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from tests.slurm.mini_cluster import MiniCluster, missing_for_slurm


def main(command: list[str]) -> int:
    """Returns the command's exit code."""
    if reason := missing_for_slurm():
        print(reason, file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="mini_cluster_") as folder:
        cluster = MiniCluster(Path(folder))
        try:
            cluster.start()
            return subprocess.run(command or ["bash"], env=cluster.environment, check=False).returncode
        finally:
            cluster.stop()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
