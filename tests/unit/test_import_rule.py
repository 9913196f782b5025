"""The import rule of CONTRIBUTING.md, read off the source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def imports(path, *, top_level_only=False):
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


@pytest.mark.parametrize("path", sorted(ROOT.glob("slm/**/*.py")), ids=lambda p: p.name)
def test_slm_never_imports_data_prep_and_deepspeed_has_two_homes(path):
    """data_prep may import slm, never the other way round; only engine.py and parallel.py know deepspeed."""
    roots = {name.split(".")[0] for name in imports(path)}
    assert "data_prep" not in roots
    assert "deepspeed" not in roots or path.name in ("engine.py", "parallel.py")


@pytest.mark.parametrize(
    "name",
    [
        "slm/recipe.py",
        "slm/contradictions.py",
        "slm/problems.py",
        "slm/plan.py",
        "slm/activations.py",
        "slm/memory.py",
        "slm/hardware.py",
        "slm/forecast.py",
        "slm/choose.py",
        "slm/distill/beside.py",
        "slm/model/shape.py",
        "slm/budget.py",
        "slm/budget_text.py",
        "slm/strategy.py",
        "slm/fields.py",
        "slm/distill/settings.py",
        "slm/data/order.py",
        "slm/model/config.py",
    ],
)
def test_pure_modules_import_no_torch(name):
    """They answer on a machine without torch."""
    assert "torch" not in {n.split(".")[0] for n in imports(ROOT / name)}


def test_importing_slm_imports_nothing_heavy():
    """`import slm` costs milliseconds; the public names come on first use."""
    code = "import sys, slm; print([m for m in ('torch', 'deepspeed', 'pydantic') if m in sys.modules]); slm.SLMConfig"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout == "[]\n", result.stderr


def test_a_plan_imports_nothing_heavy():
    """`slm plan RECIPE --gpu`, the whole command, answers at once: no torch, and none of what stands on it."""
    heavy = "('torch', 'deepspeed', 'transformers', 'pyarrow', 'datasets', 'scipy', 'matplotlib', 'wandb')"
    code = (
        "import atexit, sys\n"
        f"atexit.register(lambda: print('HEAVY', [m for m in {heavy} if m in sys.modules]))\n"
        "from slm.cli import main\n"
        "sys.argv = ['slm', 'plan', 'recipes/llama3.2-1b.yaml', '--gpus', '8', '--gpu', 'h100']\n"
        "main()\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert "checkpoints: " in result.stdout
    assert result.stdout.splitlines()[-1] == "HEAVY []"


def test_no_module_is_named_like_one_of_the_standard_library():
    """A clash would break scripts that are run from inside the folder."""
    names = {p.stem for folder in ("slm", "data_prep") for p in (ROOT / folder).rglob("*.py")} - {
        "__init__",
        "__main__",
    }
    assert not names & sys.stdlib_module_names
