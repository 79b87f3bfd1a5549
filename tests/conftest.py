"""What all tests share: the real data beside the project, and one Ray for the whole session."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def pytest_configure() -> None:
    # Before torch or faiss is imported: two OpenMP threads beside any other busy process spin-wait.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of the real data: IDEM_DATA, or ../shared/data from the project's root."""
    folder = Path(os.environ.get("IDEM_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"the real data are not at {folder} (set IDEM_DATA)")
    return folder


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One Ray cluster with four logical CPUs, started by the first test that asks and kept to the end."""
    import ray

    from idem import cluster

    cluster.connect(num_cpus=4)
    yield
    ray.shutdown()
