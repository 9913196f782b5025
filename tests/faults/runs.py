"""What the fault tests share: a tiny run, how it is started with faults in it, and what it came to."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import yaml

from slm import checkpoint
from tests.distributed.test_launcher import processes_of
from tests.faults.digest import tensors
from tests.shards import make_dataset, recipe_tree

ROOT = Path(__file__).parents[2]
FAULT = str(ROOT / "tests" / "faults" / "fault.py")
NUM_STEPS = 12


def write_recipe(folder: Path, **changes) -> Path:
    """12 steps on 2 ranks or 1, saved every 4 steps, in folder/run."""
    make_dataset(folder / "a")
    make_dataset(folder / "val", lengths=[90, 40, 130, 64, 65], seed=5)
    tree = recipe_tree(
        folder,
        folder / "run",
        **{"checkpoint": {"every_steps": 4}, "watchdog": {"step_seconds": 60, "slow_seconds": 600}, **changes},
    )
    path = folder / "t.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def environment(**more: str) -> dict[str, str]:
    """This process's, without the ranks that it may play itself."""
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {k: v for k, v in os.environ.items() if k not in ranks}
    return {**kept, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT), **more}


def command(recipe: Path, faults: str = "", ranks: int = 2, *options: str) -> list[str]:
    """`slm train RECIPE` on so many ranks, with the faults of fault.py in them."""
    return [*starter(recipe, faults, ranks), "train", str(recipe), *options]


def starter(recipe: Path, faults: str = "", ranks: int = 2) -> list[str]:
    slm = [FAULT, faults, str(recipe.with_name("counts"))] if faults else ["--module", "slm.cli"]
    if ranks > 1:
        return [sys.executable, str(ROOT / "launchers" / "launch.py"), "--ranks", str(ranks), *slm]
    return [sys.executable, *(slm if faults else ["-m", "slm"])]


def run(recipe: Path, faults: str = "", ranks: int = 2, *options: str, **env: str) -> tuple[int, str]:
    """(exit code, what was printed) of a run, of which no process may be left."""
    started = [*command(recipe, faults, ranks, *options)]
    try:
        done = subprocess.run(
            started, env=environment(**env), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=240, preexec_fn=heed_hangup,
        )  # fmt: skip
        print(done.stdout)
        assert not processes_of(recipe)
    finally:
        for process in processes_of(recipe):  # of a test that failed
            process.kill()
    return done.returncode, done.stdout


def heed_hangup() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where the tests themselves run under nohup


def digest(run_dir: Path) -> str:
    """Of the loss and gradient norm of every step, and of the last weights and moments."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [(line["step"], line["loss"], line["grad_norm"]) for line in lines if "loss" in line]
    assert [step for step, *_ in steps] == list(range(1, NUM_STEPS + 1))
    newest = run_dir / "checkpoints" / f"main-{NUM_STEPS:08d}"
    checkpoint.verify(newest)
    held = sorted(tensors(checkpoint.Reader(newest)).items())
    return hashlib.sha256(repr((steps, held)).encode()).hexdigest()


def events(run_dir: Path, kind: str) -> list[dict]:
    lines = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]
