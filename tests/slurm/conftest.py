"""A cluster for the tests of this folder; where it cannot be, they skip and say why."""

import tempfile
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, missing


@pytest.fixture(scope="session")
def cluster():
    if why := missing():
        pytest.skip(why)
    with tempfile.TemporaryDirectory(prefix="slm-slurm-") as folder, Cluster(Path(folder)) as running:
        yield running
