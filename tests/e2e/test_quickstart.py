"""launchers/quickstart.sh as a new user runs it, on a corpus of this project's own source; and again."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.test_readme import clone, environment

ROOT = Path(__file__).parents[2]
__all__ = ["clone"]


@pytest.mark.slow
@pytest.mark.timeout(1900)
def test_quickstart_and_again(clone):
    """Ends with a best checkpoint, a table and text; the second run finds everything complete and says so."""
    venv = Path(sys.prefix)
    (clone / ".venv").symlink_to(venv)  # the installation itself is what tests/run.sh just did
    stamp = subprocess.run(
        "cat constraints.txt setup.cfg pyproject.toml | sha256sum | cut -c1-16",
        shell=True,
        cwd=clone,
        capture_output=True,
        text=True,
    ).stdout.strip()
    marker = venv / f".installed-base-{stamp}"
    made = not marker.exists()
    marker.touch()
    try:
        env = {**environment(clone), "CORPUS": str(clone), "HELD_OUT": "0.1"}
        env.pop("OMP_NUM_THREADS")
        first, second = (
            subprocess.run(
                ["bash", "launchers/quickstart.sh"], cwd=clone, env=env, capture_output=True, text=True, timeout=900
            )
            for _ in range(2)
        )
    finally:
        if made:
            marker.unlink()
    for result in (first, second):
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
        assert "perplexity" in result.stdout
        assert "def __init__(self" in result.stdout
        assert "mass of the exact heads" in result.stdout
        assert "Traceback" not in result.stderr
    assert len(list((clone / "runs").glob("quickstart-slm-*[0-9]/best/manifest.json"))) == 1
    assert len(list((clone / "runs").glob("quickstart-slm-*-distilled/best/manifest.json"))) == 1
    assert second.stdout.count("complete already, nothing to do") == 3
