"""launchers/: the real `deepspeed` launcher with 2 gloo ranks, its signals, failures and exit codes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from slm.runtime import RunLock
from tests.distributed.ranks import run_ranks

ROOT = Path(__file__).resolve().parents[2]
PROBE = ROOT / "tests" / "distributed" / "launch_probe.py"
FOREVER = "1000000"


def launch(run_dir: Path, *arguments: str) -> subprocess.Popen:
    run_dir.mkdir(exist_ok=True)
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    env["DS_ACCELERATOR"] = "cpu"
    command = [sys.executable, ROOT / "launchers" / "launch.py", "--ranks", "2", PROBE, run_dir, *arguments]
    with open(run_dir / "stderr", "w") as stderr:
        return subprocess.Popen(command, env=env, stdout=stderr, stderr=stderr)


def exit_code(run: subprocess.Popen, run_dir: Path) -> int:
    """Wait for the launcher; pytest shows what it said if the test fails. Nothing of it may be left."""
    code = run.wait(60)
    print((run_dir / "stderr").read_text())
    assert not processes_of(run_dir)
    return code


def processes_of(run_dir: Path) -> list[psutil.Process]:
    """Everything that names the run directory on its command line: ours, DeepSpeed's two, and the ranks."""
    found = []
    for process in psutil.process_iter():
        try:
            if str(run_dir) in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            pass
    return found


def wait_until(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def rank_pids(run_dir: Path) -> list[int]:
    """Process ids of both ranks, once they have met."""
    files = [run_dir / "rank-0", run_dir / "rank-1"]
    wait_until(lambda: all(file.exists() and file.read_text() for file in files))
    return [int(file.read_text().split()[0]) for file in files]


@pytest.fixture
def run_dir(tmp_path):
    yield tmp_path
    for process in processes_of(tmp_path):  # of a test that failed
        process.kill()


def test_two_runs_at_once_do_not_collide_and_both_finish(run_dir):
    """Each has a port of its own and cores // ranks threads; the code is 0 and nothing is left."""
    runs = [launch(run_dir / name, "20") for name in ("a", "b")]
    assert [exit_code(run, run_dir / name) for run, name in zip(runs, ("a", "b"), strict=True)] == [0, 0]
    facts = [(run_dir / name / "rank-1").read_text().split()[1:] for name in ("a", "b")]
    num_cores = len(os.sched_getaffinity(0))
    assert [fact[0] for fact in facts] == [str(max(1, num_cores // 2))] * 2
    assert facts[0][1] != facts[1][1]


def test_the_exit_code_is_the_one_the_run_wrote(run_dir):
    """DeepSpeed turns a rank's code into 1 or into the code of whichever rank it looked at first."""
    run = launch(run_dir, "3", "76")
    assert exit_code(run, run_dir) == 76
    assert "code 76: the probe ended in order" in (run_dir / "stderr").read_text()
    assert json.loads((run_dir / "exit.json").read_text())["code"] == 76


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_reaches_every_rank_and_the_run_stops_in_order(run_dir, name):
    """Both ranks note the signal themselves, agree, write 75, and leave nothing behind."""
    run = launch(run_dir, FOREVER)
    rank_pids(run_dir)
    run.send_signal(getattr(signal, name))
    assert exit_code(run, run_dir) == 75
    assert [(run_dir / f"signal-{rank}").read_text() for rank in (0, 1)] == [name, name]
    # Said by one rank, as the signal comes: before the loop has looked at it. Nothing calls it an error.
    said = (run_dir / "stderr").read_text()
    assert not re.search("ERROR|exits with|Unable to find", said)
    assert said.count(f"{name}: stopping after this step, then saving") == 1


def test_a_signal_before_the_ranks_exist_ends_the_launch(run_dir):
    """There is nothing to save, so it ends at once with 128 + the signal's number."""
    run = launch(run_dir, FOREVER)
    wait_until(lambda: len(processes_of(run_dir)) >= 2)
    run.send_signal(signal.SIGTERM)
    assert exit_code(run, run_dir) == 128 + signal.SIGTERM


def test_a_killed_rank_fails_the_run(run_dir):
    """SIGKILL, as the kernel does when memory runs out: named, not 0, and the other rank is gone too."""
    run = launch(run_dir, FOREVER)
    os.kill(rank_pids(run_dir)[1], signal.SIGKILL)
    assert exit_code(run, run_dir) == 5
    assert "was ended by SIGKILL" in (run_dir / "stderr").read_text()


def test_a_rank_that_hangs_after_another_died_is_ended(run_dir):
    """The second is stopped, so it cannot notice. DeepSpeed would wait half a minute for each such rank."""
    run = launch(run_dir, FOREVER)
    dies, hangs = rank_pids(run_dir)
    os.kill(hangs, signal.SIGSTOP)
    os.kill(dies, signal.SIGKILL)
    start = time.monotonic()
    assert exit_code(run, run_dir) == 1
    assert time.monotonic() - start < 25


def test_killing_deepspeeds_launcher_stops_the_ranks_in_order(run_dir):
    """DeepSpeed's runner then exits with 0 and leaves the ranks training; here they save, and it is not 0."""
    run = launch(run_dir, FOREVER)
    helper = psutil.Process(rank_pids(run_dir)[0]).parent()
    assert "deepspeed.launcher.launch" in helper.cmdline()
    helper.kill()
    assert exit_code(run, run_dir) == 75
    assert "ended before its 2 ranks" in (run_dir / "stderr").read_text()


def test_killing_our_launcher_leaves_nothing_behind(run_dir):
    """Ranks live in a session of their own, so somebody must see to them when their launcher is killed."""
    run = launch(run_dir, FOREVER)
    rank_pids(run_dir)
    run.kill()
    assert run.wait(10) == -signal.SIGKILL
    wait_until(lambda: not processes_of(run_dir), seconds=10)


def test_local_sh_passes_recipe_ranks_and_overrides():
    """With echo in place of the interpreter it shows what it would start."""

    def show(*arguments: str) -> str:
        command = ["bash", ROOT / "launchers" / "local.sh", *arguments]
        env = {**os.environ, "PYTHON": "echo"}
        return subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True).stdout.strip()

    start = f"{ROOT}/launchers/launch.py"
    train = "--module slm.cli train r.yaml"
    assert show("r.yaml", "4", "optim.lr=1", "a b") == f"{start} --ranks 4 {train} optim.lr=1 a b"
    assert show("r.yaml", "optim.lr=1") == f"{start} {train} optim.lr=1"
    assert "NUMBER_OF_RANKS" in show("--help")
    again = show("r.yaml", "4", "optim.lr=1", "--restarts", "3")
    assert again.startswith("-m slm train r.yaml optim.lr=1 --restarts 3 --launcher ")
    assert again.endswith(f"{start} --ranks 4 --module slm.cli")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["2", "--bogus"], "--bogus"),
        (["2", "optim.rl=1"], "optim.rl is not a field"),
        (["3"], "which 3 ranks x micro_batch 4 do not divide"),
        (["2", "data.sources.code=nowhere"], "dataset nowhere does not exist"),
        (["2", "init_from.path=nowhere"], "init_from.path nowhere does not exist"),
        (["2", "--until", "never"], "--until is 'never'"),
        (["2", "optim.rl=1", "--restarts", "3"], "optim.rl is not a field"),
    ],
)
def test_what_is_wrong_is_said_once_and_before_any_rank(tmp_path, arguments, said):
    """Options, the recipe, the number of ranks, data and weights that are not there: code 2 for the launcher and whoever waits
    for it, the message once, and DeepSpeed's launcher is not started (it would say that ranks were)."""
    record = tmp_path / "exit.json"
    command = [
        "bash",
        ROOT / "launchers" / "local.sh",
        ROOT / "recipes" / "demo.yaml",
        *arguments,
        f"output={tmp_path}/run",
    ]
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "SLM_EXIT_FILE": str(record), "PYTHON": sys.executable}
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True, env=env, cwd=ROOT)
    assert result.returncode == 2
    assert result.stderr.count(said) == 1, result.stderr
    assert "launch:" not in result.stderr
    assert not (tmp_path / "run").exists()
    assert json.loads(record.read_text())["code"] == 2


def test_a_held_folder_is_said_before_any_rank(tmp_path):
    """By the same check: no rank is started to find out that another job has the folder."""
    command = ["bash", ROOT / "launchers" / "local.sh", ROOT / "recipes" / "demo.yaml", "2", f"output={tmp_path}/run"]
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHON": sys.executable}
    with RunLock(tmp_path / "run"):
        result = subprocess.run(command, stderr=subprocess.PIPE, text=True, env=env, cwd=ROOT)
    assert result.returncode == 2
    assert f"is held by process {os.getpid()} on host" in result.stderr
    assert "launch:" not in result.stderr


def test_ranks_that_another_launcher_started_say_it_once(tmp_path):
    """torchrun: all ranks of a machine read the same recipe. Each leaves by itself with code 2, so none waits."""
    (tmp_path / "r.yaml").write_text("name: t\nmodle: cpu-tiny\n")
    result = run_ranks("-m", ["slm", "train", tmp_path / "r.yaml"], 2, check=False)
    assert result.returncode != 0
    assert result.stdout.count("modle is not a field") == 1
    assert result.stdout.count("exitcode  : 2 ") >= 1


def test_an_impossible_number_of_ranks_is_a_users_mistake():
    """Said without a traceback, with code 2."""
    command = [sys.executable, ROOT / "launchers" / "launch.py", "--ranks", "0", PROBE]
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 2
    assert "Error: 0 ranks were asked for, but at least 1 is needed\n  Fix: ask for 1 or more" in result.stderr
    assert "Traceback" not in result.stderr
