import pytest

from tests.hosts.lab import Lab, why_not


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    """Hosts `a` and `b`, which a test may add others to; skipped, with the reason, where there can be none."""
    if reason := why_not():
        pytest.skip(f"hosts: {reason}")
    lab = Lab(tmp_path_factory.mktemp("lab"))
    try:
        lab.add("a")
        lab.add("b")
        yield lab
    finally:
        lab.remove()
