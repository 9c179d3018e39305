"""The cluster of the whole session; every test of this folder starts with all its nodes free."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.slurm.mini_cluster import MiniCluster, missing_for_slurm


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MiniCluster]:
    """Four nodes, brought up once; skips, with the reason, where SLURM cannot be."""
    reason = missing_for_slurm()
    if reason is not None:
        pytest.skip(reason)
    cluster = MiniCluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
