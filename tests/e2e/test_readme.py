"""The README's commands and its Python, run as they stand there, in a copy of the clone."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
# Run by the quickstart test and by CI itself.
WHOLE_COMMANDS = ("bash launchers/quickstart.sh", "bash tests/run.sh")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def environment(clone):
    """As after `source .venv/bin/activate` in the clone, without what this test process added."""
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    env = {k: v for k, v in os.environ.items() if k not in ranks}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    return {**env, "PYTHONPATH": str(clone), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clone") / "slm"
    ignored = shutil.ignore_patterns(".git", ".venv", "runs", "artifacts", "output", "wandb", "*.egg-info", ".*_cache")
    shutil.copytree(ROOT, folder, ignore=ignored)
    return folder


@pytest.mark.timeout(900)
def test_every_shell_command(clone):
    """In order, each with code 0; what they say they write is there."""
    commands = [line.split(" #")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    commands = [c for c in commands if c and c not in WHOLE_COMMANDS]
    assert len(commands) >= 11
    printed = {}
    for command in commands:
        result = subprocess.run(
            command,
            shell=True,
            cwd=clone,
            env=environment(clone),
            capture_output=True,
            text=True,
            timeout=240,
            stdin=subprocess.DEVNULL,
        )
        assert result.returncode == 0, f"{command}\n{result.stdout[-2000:]}\n{result.stderr[-3000:]}"
        assert "Traceback" not in result.stderr
        printed[command] = result.stdout
    for run in ("demo", "demo2", "demo3", "demo4"):
        assert (clone / "runs" / run / "best" / "manifest.json").exists()
    assert "1,235,814,400 parameters" in printed["slm plan recipes/llama3.2-1b.yaml --ranks 8"]
    assert "perplexity" in printed["slm eval runs/demo"]
    assert (clone / "artifacts/demo/export/tokenizer.json").exists()


def test_the_python_of_the_readme(clone):
    """The front door as printed."""
    (program,) = blocks("python")
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=clone, env=environment(clone), capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "The quick" in result.stdout


def test_files_that_the_readme_names_exist():
    """The file map points at what is there."""
    for path in re.findall(r"`((?:slm|data_prep|launchers|recipes|ds_configs|benchmarks|docs|tests)/[\w./]*)`", README):
        assert (ROOT / path).exists() or path.endswith("/X.yaml"), path
    for command in WHOLE_COMMANDS:
        assert (ROOT / command.split()[1]).exists()
