"""mpi4py as an address book: `mpirun` over several hosts does not tell its processes where rank 0 runs."""

from __future__ import annotations

import importlib.util
import socket
from typing import Optional

from chiar_megatron.errors import LaunchError


def first_host_by_mpi(world_size: int) -> Optional[str]:
    """The host of rank 0, by a broadcast that every rank must join; None without mpi4py.

    MPI is left again at once: a rank that fails later must not wait in MPI's own farewell.

    Raises:
        LaunchError: mpi4py belongs to another MPI than the one that started the ranks.
    """
    if importlib.util.find_spec("mpi4py") is None:
        return None
    import mpi4py

    mpi4py.rc.initialize = mpi4py.rc.finalize = False
    from mpi4py import MPI

    started_here = not MPI.Is_initialized()
    if started_here:
        MPI.Init()
    found = MPI.COMM_WORLD.Get_size()
    host: str = MPI.COMM_WORLD.bcast(socket.gethostname(), root=0)
    if started_here:
        MPI.Finalize()
    if found != world_size:
        raise LaunchError(
            f"mpi4py sees {found} rank(s), mpirun started {world_size}: it was built against another MPI. "
            f"Build it with this one (`pip install --no-binary mpi4py mpi4py`), or set MASTER_ADDR."
        )
    return host
