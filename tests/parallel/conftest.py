"""Fixtures that several files share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.parallel.run_server import RunServer


@pytest.fixture(scope="package", autouse=True)
def cpu_only() -> Iterator[None]:
    """These layouts are gloo's: several ranks would not find a GPU each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        yield


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunServer]:
    """Starts runs of the command line within a second."""
    running = RunServer(tmp_path_factory.mktemp("server"))
    yield running
    running.close()
