"""watchdog.py: processes without torch that hang in each way, work slowly, or are stopped as a whole."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from slm import watchdog

ROOT = Path(__file__).parents[2]

# A rank of two that need no collective call: what they do is given, and they know each other by files.
RANK = """
    import ctypes, os, pathlib, signal, sys, time
    from slm import watchdog
    run_dir, rank, world = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    os.environ["RANK"] = str(rank)
    me = watchdog.myself()
    (run_dir / f"me-{rank}.tmp").write_text(repr(me))
    (run_dir / f"me-{rank}.tmp").rename(run_dir / f"me-{rank}")
    while not all((run_dir / f"me-{r}").exists() for r in range(world)):
        time.sleep(0.01)
    everyone = [eval((run_dir / f"me-{r}").read_text()) for r in range(world)]
    watchdog.start(run_dir, rank, step_seconds=1, slow_seconds=float(sys.argv[4]), everyone=everyone)
    def steps(seconds):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            watchdog.at("step", 7)
            time.sleep(0.05)
    def wait_for_others():
        time.sleep(1000)
    def guilty():
        os.kill(os.getpid(), signal.SIGSTOP)
    def hold():
        ctypes.PyDLL(None).pause()
    def report():
        (run_dir / "ready").write_text("")
"""


def start(run_dir, code, world=1, slow_seconds=30):
    """`code` on so many ranks."""
    command = [sys.executable, "-c", textwrap.dedent(RANK) + textwrap.dedent(code), str(run_dir)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return [
        subprocess.Popen(
            [*command, str(rank), str(world), str(slow_seconds)], env=env, stderr=subprocess.PIPE, text=True
        )
        for rank in range(world)
    ]


def outcome(processes, timeout=20):
    """Codes and what was said; none outlives the test."""
    try:
        said = [process.communicate(timeout=timeout)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [process.returncode for process in processes], said


def test_a_stopped_rank_is_found_by_the_other_and_shows_where_it_was(tmp_path):
    """Both stacks with the guilty line, an event with the place of each, exit.json, and the stopped one is ended too."""
    began = time.monotonic()
    processes = start(tmp_path, "steps(0.3)\nwait_for_others() if rank == 0 else (guilty(), steps(60))", world=2)
    codes, said = outcome(processes)
    assert codes == [79, -signal.SIGKILL], said
    assert time.monotonic() - began < 15
    stacks = [(tmp_path / "logs" / f"rank-{rank}.stacks").read_text() for rank in (0, 1)]
    assert "in wait_for_others" in stacks[0]
    assert "in guilty" in stacks[1]
    assert "rank 0 has been at step 7 for" in stacks[1]
    (event,) = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert (event["kind"], event["rank"], event["doing"], event["step"]) == ("hang", 0, "step", 7)
    assert 1 <= event["seconds"] < 2
    assert event["where"]["1"].startswith("stopped (SIGSTOP) in guilty (")
    assert event["hung"] == [1]
    record = json.loads((tmp_path / "exit.json").read_text())
    assert record["code"] == 79
    assert record["reason"].startswith("rank 1 hangs: stopped (SIGSTOP) in guilty (")
    assert "Rank 0 has been at step 7 for 1 s, longer than watchdog.step_seconds (1)" in record["reason"]
    assert record["hung"] == [1]


def test_two_ranks_that_wait_for_ever_speak_once(tmp_path):
    """Both see it at about the same time, both leave with 79, and there is one event."""
    codes, said = outcome(start(tmp_path, "steps(0.3)\nwait_for_others()", world=2))
    assert codes == [79, 79], said
    (event,) = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert event["hung"] == []  # neither was in a collective call: which of them it is nobody can say
    assert "in wait_for_others" in (tmp_path / "logs" / "rank-1.stacks").read_text()


def test_a_hang_that_holds_the_interpreter_is_ended_by_the_timer_in_c(tmp_path):
    """No thread of ours can run; the stack is written all the same, and the code is not 0."""
    codes, said = outcome(start(tmp_path, "steps(0.3)\nhold()"))
    assert codes == [1], said
    assert "in hold" in (tmp_path / "logs" / "rank-0.stacks").read_text()


def test_a_disk_that_hangs_does_not_keep_a_hung_run_alive(tmp_path):
    """The stacks go to a pipe that nobody reads, so opening them never returns; somebody else uses SIGALRM."""
    code = """
        watchdog._END_SECONDS = 2
        signal.signal(signal.SIGALRM, lambda *_: None)
        steps(0.3)
        os.unlink(run_dir / "logs/rank-0.stacks")
        os.mkfifo(run_dir / "logs/rank-0.stacks")
        wait_for_others()
    """
    codes, said = outcome(start(tmp_path, code))
    assert codes == [-signal.SIGALRM], said


def test_slow_work_has_its_own_limit(tmp_path):
    """Three times a step's limit in a save, also with the interpreter held, is no hang; three times in a step is."""
    code = """
        steps(0.3)
        watchdog.at("the save of step", 7)
        time.sleep(2)
        ctypes.PyDLL(None).usleep(2_000_000)
        report()
        steps(0.3)
        wait_for_others()
    """
    codes, said = outcome(start(tmp_path, code))
    assert codes == [79], said
    assert (tmp_path / "ready").exists()


@pytest.mark.parametrize("where", ["atexit.register(time.sleep, 1000)", "libc.__cxa_atexit(libc.pause, None, None)"])
def test_a_rank_that_cannot_leave_is_ended(tmp_path, where):
    """What hangs on the way out, in Python's finalizers or, after the interpreter is gone, in those of a library."""
    code = f"""
        import atexit
        watchdog.LEAVE_SECONDS = 2
        libc = ctypes.CDLL(None)
        steps(0.3)
        watchdog.stop()
        {where}
        watchdog.leave(run_dir, rank)
    """
    codes, said = outcome(start(tmp_path, code))
    stack = (tmp_path / "logs" / "rank-0.stacks").read_text()
    assert codes == ([1] if "sleep" in where else [-signal.SIGALRM]), said
    assert ("Timeout (0:00:02)!" in stack) == ("sleep" in where)


def test_a_limit_of_0_is_none(tmp_path):
    """With slow_seconds 0 a start may take for ever, a step may not."""
    codes, said = outcome(start(tmp_path, "time.sleep(2.5)\nreport()\nsteps(0.1)\nwait_for_others()", slow_seconds=0))
    assert codes == [79], said
    assert (tmp_path / "ready").exists()


@pytest.mark.parametrize("name", ["SIGSTOP", "SIGTSTP"])
def test_time_in_which_the_process_was_stopped_itself_does_not_count(tmp_path, name):
    """A job that is suspended as a whole, or Ctrl-Z, and goes on after more than its limit."""
    (process,) = start(tmp_path, "steps(0.5)\nreport()\nsteps(1)\nwatchdog.stop()")
    deadline = time.monotonic() + 20
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(getattr(signal, name))
    stopped = psutil.Process(process.pid)
    while stopped.status() != psutil.STATUS_STOPPED:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    # The timer in C cannot know of SIGSTOP, so stay below its 1.25 seconds there; of SIGTSTP it is told.
    time.sleep(1.1 if name == "SIGSTOP" else 3)
    process.send_signal(signal.SIGCONT)
    codes, said = outcome([process])
    assert codes == [0], said


def test_sigusr2_shows_the_stack_and_ends_nothing(tmp_path):
    """For whoever wants to look."""
    (process,) = start(tmp_path, "report()\nsteps(1)\nwatchdog.stop()")
    deadline = time.monotonic() + 20
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR2)
    codes, said = outcome([process])
    assert codes == [0], said
    assert "in steps" in (tmp_path / "logs" / "rank-0.stacks").read_text()


def test_a_process_of_another_time_is_nobodys_sibling():
    """An id that is used again by a stranger must get no signal."""
    _, pid, began = watchdog.myself()
    assert watchdog._process(pid, began) is not None
    assert watchdog._process(pid, "1") is None
    assert watchdog._process(2**22 + 1, began) is None


def stack(*frames):
    """As faulthandler writes the main thread's, innermost first."""
    lines = "".join(f'  File "{file}", line {line} in {name}\n' for file, line, name in frames)
    return f'Thread 0x00007f01 [python] (most recent call first):\n  File "/x.py", line 1 in other\nThread 0x00007f02:\n{lines}'


SLM = Path(watchdog.__file__).parent
LOOP = (SLM / "loop.py", 200, "run_phase")
HEALTHY_ON_NCCL = {  # where a rank is that waits for another: no c10d frame, since the call itself has returned
    "tolist of a reduced tensor": [(SLM / "parallel.py", 117, "reduce_sum"), LOOP],
    "int of a reduced tensor": [(SLM / "parallel.py", 144, "reduce_max"), LOOP],
    "the loss": [(SLM / "step.py", 90, "train_step"), LOOP],
    "a full queue of kernels": [
        ("/site/torch/nn/functional.py", 2000, "linear"),
        (SLM / "model/llama.py", 80, "forward"),
    ],
    "synchronize": [("/site/torch/cuda/__init__.py", 1108, "synchronize"), (SLM / "saving.py", 426, "fill"), LOOP],
    "pinning a batch": [(SLM / "data/batches.py", 97, "tensors_on"), (SLM / "data/batches.py", 91, "to"), LOOP],
    "a barrier": [
        ("/site/torch/distributed/distributed_c10d.py", 4800, "barrier"),
        (SLM / "saving.py", 1, "save"),
        LOOP,
    ],
}
AT_OWN_WORK = {
    "data": [(SLM / "data/tokens.py", 220, "_open"), (SLM / "data/batches.py", 384, "step_batches"), LOOP],
    "its loader's thread": [
        ("/lib/concurrent/futures/_base.py", 445, "result"),
        (SLM / "data/batches.py", 370, "step_batches"),
    ],
    "a loader of torch": [
        ("/lib/queue.py", 171, "get"),
        ("/site/torch/utils/data/dataloader.py", 1, "_get_data"),
        LOOP,
    ],
    "the disk": [("/lib/threading.py", 1090, "join"), (SLM / "saving.py", 216, "_join"), LOOP],
}


def guilty(*stacks, world_size, on_gpu):
    return watchdog._guilty({rank: watchdog._place_in(s) for rank, s in enumerate(stacks)}, world_size, on_gpu)


@pytest.mark.parametrize("at", HEALTHY_ON_NCCL)
@pytest.mark.parametrize("guilty_at", AT_OWN_WORK)
def test_on_gpus_only_a_rank_at_work_of_its_own_is_named(at, guilty_at):
    """Three healthy ranks wait for one that hangs in its data or its disk: it is named, and no other."""
    healthy, hung = stack(*HEALTHY_ON_NCCL[at]), stack(*AT_OWN_WORK[guilty_at])
    assert guilty(healthy, hung, healthy, healthy, world_size=4, on_gpu=True) == [1]
    assert guilty(healthy, healthy, world_size=4, on_gpu=True) == []


@pytest.mark.parametrize("at", HEALTHY_ON_NCCL)
def test_a_node_of_one_rank_does_not_blame_itself(at):
    """Its frame is not known as a wait, and there is no other rank beside it to compare with; at its own work it is named; and
    where it is the whole run, it is the one."""
    healthy = stack(*HEALTHY_ON_NCCL[at])
    assert guilty(healthy, world_size=2, on_gpu=True) == guilty(healthy, world_size=2, on_gpu=False) == []
    assert guilty(stack(*AT_OWN_WORK["data"]), world_size=2, on_gpu=False) == [0]
    assert guilty(stack(LOOP), world_size=1, on_gpu=False) == [0]


def test_what_reads_a_reduced_value_waits():
    """slm/parallel.py as the innermost frame, and not where it has called something that hangs by itself."""
    assert watchdog._place_in(stack(*HEALTHY_ON_NCCL["tolist of a reduced tensor"])).waits
    assert not watchdog._place_in(stack(("/my.py", 1, "read"), (SLM / "parallel.py", 190, "together"))).waits
    foreign = stack(("/my_loader.py", 85, "read"), LOOP)
    assert guilty(stack(*HEALTHY_ON_NCCL["int of a reduced tensor"]), foreign, world_size=2, on_gpu=False) == [1]
