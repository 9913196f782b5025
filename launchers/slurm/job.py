"""What a batch job does: starts its tasks with srun, sees them through, and puts itself back into the queue when its time is up.

Owns the requeue, which must happen once: SLURM itself does it for a job that it preempts or whose node fails; a job that has
only been told to save (its time limit is near, or it is in the grace time before a preemption) does it here. scancel ends it.
The job scripts beside this file start it, inside of a job and with the environment of environment.sh.

    python launchers/slurm/job.py train recipes/demo.yaml --until main
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from slm.errors import SLMError, UserError
from slm.metrics import append_event
from slm.recipe import load_recipe
from slm.runtime import atomic_write
from slm.status import CHECKED, events, has_saved, newest_suspect, read_jobs
from slm.supervise import LEAVE_SUSPECTS, last_step

RESTARTS = os.environ.get("SLM_RESTARTS", "3")  # within one job, of a run that crashed or hung
MOST_REQUEUES = 1000  # SLURM counts them; a job that never ends by itself is a mistake
MOST_BLIND_REQUEUES = 20  # of data and teachers, whose progress between two starts is not looked at
STARTS_AT_ONE_STEP = 3  # then it is no accident
# After one task has ended, the others may take so long: rank 0 may still be uploading to W&B.
WAIT_SECONDS = 120
STOPPED = 75
TIME_IS_UP = (STOPPED, 128 + signal.SIGUSR1, 128 + signal.SIGTERM)  # what does not save leaves by the signal itself
SAVED = "slm-saved"  # the comment of a job whose run has a checkpoint
HARDWARE_CODES = (79, 80)  # a rank hung; ranks held different weights


def main(arguments: list[str]) -> int:
    stage, rest = arguments[0], arguments[1:]
    if not [word for word in rest if not word.startswith("-")]:
        raise UserError(
            f"{stage}.sbatch was given nothing to do", fix=f"sbatch ... {stage}.sbatch, and then as its head says"
        )
    check_tasks()
    environment = step_environment()
    if stage == "train":
        # What the ranks would refuse, before they are started.
        ranks = os.environ.get("SLURM_NTASKS", "1")
        asked = subprocess.run([sys.executable, "-m", "slm", "train", *rest, "--check", ranks], env=environment)
        if asked.returncode:
            return asked.returncode
        run_dir = run_of(rest)
        if int(os.environ.get("SLURM_RESTART_COUNT", "0")) and job_field(job_name(), "Comment") == SAVED:
            rest = [*rest, *(["--must-resume"] if "--must-resume" not in rest else [])]
        command = [*srun(), *slm(), "train", *rest]
        if RESTARTS != "0":
            again = ["--restarts", RESTARTS, "--launcher", shlex.join([*srun(), *slm()])]
            command = [sys.executable, "-m", "slm", "train", *rest, *again]
    elif stage == "teacher":
        run_dir, command = None, [*srun(), *slm(), "teacher", *rest]
    elif stage == "data":
        run_dir, command = None, [*srun(), python(), "-m", "data_prep.cli", "shards", *rest]
    elif stage == "check":
        run_dir, command = None, [*srun(), *slm(), "doctor", *rest[1:], "--folder", str(Path(rest[0]).parent)]
    else:
        run_dir, command = None, [*srun(), *slm(), "eval", *rest, "--json"]
    say(f"{os.environ['SLURM_JOB_ID']} on {os.environ.get('SLURM_JOB_NODELIST')}: {shlex.join(command)}")
    began = time.time()
    code = run(command, environment, Path(rest[0]) / "eval" / "final.json" if stage == "eval" else None)
    if run_dir is not None:
        code = code_of_run(code, run_dir, began)
    if stage == "check" and code == 0:
        Path(rest[0]).mkdir(parents=True, exist_ok=True)
        (Path(rest[0]) / CHECKED).touch()
    if run_dir is not None and has_saved(run_dir):  # it shall not begin anew, were its folder gone
        tell("scontrol", "update", f"JobId={job_name()}", f"Comment={SAVED}")
    if code in TIME_IS_UP and stage not in ("eval", "check"):
        return requeue(code, run_dir)
    if code in HARDWARE_CODES and run_dir is not None:
        return requeue(code, run_dir, exclude=newest_suspect(run_dir))
    return code


# ---------------------------------------------------------------------------------- what is started
def srun() -> list[str]:
    """One step with all tasks of the job. --mpi=none: ranks meet through torch, and no PMI library need be there."""
    options = ["--mpi=none", "--export=ALL", f"--wait={WAIT_SECONDS}", "--input=none"]
    if per_task := os.environ.get("SLURM_CPUS_PER_TASK"):  # which srun no longer takes from the job, since SLURM 22.05
        options.append(f"--cpus-per-task={per_task}")
    if image := os.environ.get("SLM_CONTAINER"):
        mounts = os.environ.get("SLM_CONTAINER_MOUNTS", f"{os.environ['SLM_ROOT']}:{os.environ['SLM_ROOT']}")
        options += [f"--container-image={image}", f"--container-mounts={mounts}", f"--container-workdir={os.getcwd()}"]
    return ["srun", *options]


def python() -> str:
    return os.environ.get("SLM_CONTAINER_PYTHON", "python3") if "SLM_CONTAINER" in os.environ else sys.executable


def slm() -> list[str]:
    return [python(), "-m", "slm"]


def check_tasks() -> None:
    """Raises UserError unless each GPU has a task of its own."""
    gpus = os.environ.get("SLURM_GPUS_ON_NODE", "0")
    tasks = re.match(r"\d+", os.environ.get("SLURM_TASKS_PER_NODE", "1"))
    assert tasks
    if gpus.isdigit() and int(gpus) and int(tasks[0]) != int(gpus):
        raise UserError(
            f"the job has {tasks[0]} tasks and {gpus} GPUs on a node: one task drives one GPU, and the others would be paid for "
            "and idle, or missing",
            fix=f"sbatch --ntasks-per-node {gpus} --gpus-per-node {gpus} ...",
        )


def step_environment() -> dict[str, str]:
    """Where ranks meet: SLURM knows the address of this node, which is the step's first, even where no name server does."""
    # What the shell that submitted has of another launcher, as in a notebook that has trained, must not lend its ranks to these.
    foreign = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
    env = {name: value for name, value in os.environ.items() if name not in foreign}
    found = tell("scontrol", "show", "node", "-o", env.get("SLURMD_NODENAME", ""))
    if address := re.search(r"\bNodeAddr=(\S+)", found):
        env["MASTER_ADDR"] = address[1]
    tasks = re.match(r"\d+", env.get("SLURM_TASKS_PER_NODE", "1"))
    cores = int(env.get("SLURM_CPUS_ON_NODE", "1")) // int(tasks[0] if tasks else 1)
    env[LEAVE_SUSPECTS] = "1"
    env.setdefault("OMP_NUM_THREADS", env.get("SLURM_CPUS_PER_TASK", str(max(1, cores))))
    return env


def run_of(words: list[str]) -> Path:
    """The run's folder, of the arguments of `slm train`."""
    takes_value = ("--until", "--profile")
    values = [w for before, w in zip(["", *words], words, strict=False) if before not in takes_value]
    recipe, *overrides = [w for w in values if not w.startswith("--")]
    return load_recipe(recipe, overrides).run_dir


# -------------------------------------------------------------------------------------- seen through
def run(command: list[str], env: dict[str, str], answer: Path | None = None) -> int:
    """Runs it to its end; a signal for this script goes to it. answer: a file that gets what it prints, if it succeeds."""
    child = subprocess.Popen(command, env=env, stdout=subprocess.PIPE if answer else None)

    def pass_on(number: int, frame: FrameType | None) -> None:
        if child.returncode is None:
            child.send_signal(signal.SIGTERM if number == signal.SIGINT else number)

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, pass_on)
    printed, _ = child.communicate()
    if answer and child.returncode == 0:
        answer.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(answer, printed)
        say(f"wrote {answer}")
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def requeue(code: int, run_dir: Path | None, exclude: str = "") -> int:
    """Puts this job back into the queue, unless SLURM is ending it anyway or nothing was gained in the last starts. exclude: a
    node that it, and the jobs that come after it, shall not run on again."""
    job = job_name()
    state = job_field(job, "JobState")
    if state != "RUNNING":
        say(
            f"job {job} is {state}: SLURM ends it (scancel, or a time limit that came without a warning in time), or requeues it "
            "by itself (preemption)"
        )
        return code
    if code in HARDWARE_CODES and not exclude:
        say("which node is to blame is not known, so the job is not started again by itself")
        return code
    count = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    if count >= (MOST_REQUEUES if run_dir else MOST_BLIND_REQUEUES):
        say(f"job {job} was requeued {count} times already: no further\n  Fix: if it makes progress, submit it again")
        return code
    step = last_step(run_dir) if run_dir else None
    if run_dir and last_requeues(run_dir) == [{"job": job, "step": step}] * (STARTS_AT_ONE_STEP - 1):
        say(
            f"job {job} has come no further than step {step} in {STARTS_AT_ONE_STEP} starts, so it is not requeued\n  Fix: see "
            "why in the log; if its time limit leaves no room to train, give it more, or warn it later (sbatch --signal)"
        )
        return code
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # until it is written down
    done = subprocess.run(["scontrol", "requeue", job], stderr=subprocess.PIPE, text=True)
    if done.returncode:
        say(f"scontrol requeue: {done.stderr.strip()}\n  Fix: submit the same job again; it goes on from what is saved")
        return code
    if run_dir:
        append_event(run_dir, "requeue", job=job, step=step, restart=count + 1, code=code, exclude=exclude)
    if run_dir and exclude:  # only now: of a running job it cannot be changed
        later = [entry["job"] for entry in read_jobs(run_dir).values() if entry["job"] != job]
        leave_out(exclude, [job, *(other for other in later if job_field(other, "JobState") == "PENDING")])
    say(f"job {job} goes back into the queue, to go on from what is saved")
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTERM)  # as SLURM does now, or has already
    return code


def leave_out(node: str, jobs: list[str]) -> None:
    """Adds a node to those that these jobs are kept off."""
    for job in jobs:
        before = job_field(job, "ExcNodeList")
        nodes = node if before in ("", "(null)") else f"{before},{node}"
        said = tell("scontrol", "update", f"JobId={job}", f"ExcNodeList={nodes}").strip()
        say(f"job {job}: not on {nodes}" + (f" ({said})" if said else ""))


def job_name() -> str:
    """As scontrol wants it: the number of an array's last member is also that of the whole array."""
    env = os.environ
    if "SLURM_ARRAY_TASK_ID" in env:
        return f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    return env["SLURM_JOB_ID"]


def job_field(job: str, name: str) -> str:
    found = re.search(rf"\b{name}=(\S+)", tell("scontrol", "show", "job", "-o", job))
    return found[1] if found else ""


def code_of_run(code: int, run_dir: Path, since: float) -> int:
    """What the run itself has written of how this attempt ended, else the command's code.

    srun says the largest of its tasks' codes, such as that of one which the watchdog had to kill. But where `slm train
    --restarts` was told to stop while nothing ran, the record is of the failure before.
    """
    if RESTARTS != "0" and code in (128 + signal.SIGUSR1, 128 + signal.SIGTERM):
        return code
    try:
        record = json.loads((run_dir / "exit.json").read_text())
        return record["code"] if record["time"] >= since else code
    except (OSError, ValueError, KeyError):
        return code


def last_requeues(run_dir: Path) -> list[dict[str, object]]:
    """Of the last ones, which job it was and after which step."""
    found = [event for event in events(run_dir) if event.get("kind") == "requeue"]
    return [{name: event.get(name) for name in ("job", "step")} for event in found[1 - STARTS_AT_ONE_STEP :]]


def tell(*command: str) -> str:
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout


def say(text: str) -> None:
    print(f"job: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except SLMError as error:
        print(f"{error.title}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
