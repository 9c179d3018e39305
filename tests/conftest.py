"""What every test starts from: one thread, no launcher's variables, no network."""

from __future__ import annotations

import os
from pathlib import Path

# A test process started inside a SLURM or MPI job must not believe it is one of its ranks.
LAUNCHER_PREFIXES = ("SLURM_", "OMPI_", "PMI_", "PMIX_", "MPI_LOCAL", "TORCHELASTIC_")
LAUNCHER_NAMES = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK"} | {
    "MASTER_ADDR",
    "MASTER_PORT",
}
for name in list(os.environ):
    if name in LAUNCHER_NAMES or name.startswith(LAUNCHER_PREFIXES):
        del os.environ[name]

# Before torch is imported: several processes share few cores.
os.environ["OMP_NUM_THREADS"] = "1"
# Read when Triton is imported, by whomever: without a GPU its interpreter runs the kernels.
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
