"""launchers/environment.sh: the virtual environment is made whole or not at all, and made again if it is half there."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# In place of the system's Python: says what it is asked to do, and makes an environment that does the same.
PYTHON = """#!/bin/bash
echo "$(basename "$0") $*" >> {log}
if [[ "$*" == *"-m venv"* ]]; then
  mkdir -p .venv/bin
  cp "$0" .venv/bin/python
  [ -n "${{VENV_FAILS:-}}" ] && exit 1
  echo 'PATH="$PWD/.venv/bin:$PATH"' > .venv/bin/activate
fi
exit 0
"""


@pytest.fixture
def ensure(tmp_path):
    """A function that runs ensure_environment in a folder with our pins: (code, stderr, what Python was asked)."""
    for name in ("constraints.txt", "setup.cfg", "pyproject.toml"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    log, python = tmp_path / "log", tmp_path / "python"
    python.write_text(PYTHON.format(log=log))
    python.chmod(0o755)

    def run(**env):
        log.write_text("")
        command = f"set -euo pipefail; source {ROOT}/launchers/environment.sh; ensure_environment dev"
        result = subprocess.run(
            ["bash", "-c", command],
            cwd=tmp_path,
            env={"PATH": os.environ["PATH"], "PYTHON": str(python), **env},
            capture_output=True,
            text=True,
        )
        return result.returncode, result.stderr, log.read_text()

    return run


def test_made_once_and_torch_before_what_needs_it(ensure, tmp_path):
    code, error, asked = ensure()
    assert (code, error) == (0, "")
    assert asked.index("torch==") < asked.index("-e .[dev]")
    code, _, asked = ensure()
    assert code == 0
    assert "pip install" not in asked
    (tmp_path / "constraints.txt").write_text("torch==9.9\n")
    assert "torch==9.9" in ensure()[2]


def test_a_half_made_one_is_made_again(ensure, tmp_path):
    """Without python3-venv, or after Ctrl-C, .venv/bin/python is there and .venv/bin/activate is not."""
    code, error, _ = ensure(VENV_FAILS="1")
    assert code == 3
    assert "python3-venv" in error
    assert not (tmp_path / ".venv").exists()
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").symlink_to("/bin/true")
    assert ensure()[0] == 0
    assert (tmp_path / ".venv" / "bin" / "activate").exists()
