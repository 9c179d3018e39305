"""The cluster of the whole session; every test of this folder starts with all its nodes free."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.parallel.tiny_run import write_data
from tests.slurm.cluster_run import ClusterRun, cluster_run, end_job
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


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenised text, and the index cache that the first run's preparation job leaves."""
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return folder


@pytest.fixture(scope="session")
def calm(cluster: MiniCluster, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterRun]:
    """A run that nothing happens to, ended."""
    run = cluster_run(cluster, tmp_path_factory.mktemp("calm"), data)
    try:
        run.submit("--nodes", "2")
        run.finish()
        yield run
    finally:
        end_job(cluster, run.job)
