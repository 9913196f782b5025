"""A run without a fault, once for each number of ranks: what the others must come to."""

import pytest

from tests.faults.runs import digest, run, write_recipe


@pytest.fixture
def recipe(tmp_path):
    return write_recipe(tmp_path)


@pytest.fixture(scope="session")
def straight(tmp_path_factory):
    """A function: number of ranks -> digest of the uninterrupted run."""
    known = {}

    def of(ranks):
        if ranks not in known:
            folder = tmp_path_factory.mktemp(f"straight-{ranks}")
            assert run(write_recipe(folder), "", ranks)[0] == 0
            known[ranks] = digest(folder / "run")
        return known[ranks]

    return of
