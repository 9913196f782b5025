"""Start a program on N ranks of this machine through the `deepspeed` launcher, and see it through to its end.

Owns what that launcher leaves open: it ignores the visible GPUs when told how many to use, forwards no
signal to the ranks, leaves them running when it is stopped itself, waits half a minute for each rank of a
run that one rank has left, and exits with 0 when its own helper is killed. Here

- SIGTERM, SIGUSR1 and SIGINT go to every rank, so that the run can save and stop (SIGHUP as SIGTERM; the
  third SIGINT ends it at once);
- when a rank dies, the others get GRACE_SECONDS, then the whole run is ended; the same if this program dies;
- what is wrong with a recipe is found before any rank is started, and said once;
- the exit code is the one that the run wrote (see EXIT_CODES in slm/runtime.py), not DeepSpeed's.

    python launchers/launch.py --ranks 2 --module slm.cli train recipes/quickstart.yaml
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from types import FrameType

import psutil

GRACE_SECONDS = 15.0  # for ranks whose run has failed, and for helpers (W&B's uploader) after the run's end
STOPPED_CODE = 75  # of a rank that stopped on a signal after saving, which is no failure
SAVE_SECONDS = 120.0  # for healthy ranks that were told to save because DeepSpeed's launcher was killed
POLL_SECONDS = 0.1
MARK = "SLM_LAUNCH_ID"  # in the environment of whatever belongs to this launch, also of what left the group


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, help="how many processes (default: one for each GPU, else 1)")
    parser.add_argument("--module", action="store_true", help="TARGET is a module, as in python -m")
    parser.add_argument("target", help="script or module to run on each rank")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="what follows goes to the target")
    options = parser.parse_args()

    num_gpus = count_gpus()
    num_ranks = options.ranks if options.ranks is not None else max(1, num_gpus)
    if num_ranks < 1 or 0 < num_gpus < num_ranks:
        what = f"this machine has {num_gpus} visible GPUs" if num_gpus else "at least 1 is needed"
        print(f"Error: --ranks is {num_ranks} but {what}\n  Fix: ask for fewer or none", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="slm-launch-") as scratch:
        exit_file = Path(scratch) / "exit.json"
        env = rank_environment(num_ranks, num_gpus, exit_file)
        if options.module and [options.target, *options.arguments][:2] == ["slm.cli", "train"]:
            # What is wrong with a recipe is said once and at once, not by each rank after all of them have started.
            check = [sys.executable, "-m", "slm.cli", *options.arguments, "--check", str(num_ranks)]
            if code := subprocess.run(check, env=env).returncode:
                pass_on_record(exit_file)
                return code
        command = deepspeed_command(num_ranks, num_gpus) + ["--module"] * options.module
        return Launch([*command, options.target, *options.arguments], env, num_ranks, exit_file).wait()


# --------------------------------------------------------------------------------- what is started
def count_gpus() -> int:
    """GPUs that torch sees. It is asked only where there may be one: on a laptop the answer is free."""
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return 0
    if not any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")):
        return 0
    question = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    return int(subprocess.run(question, check=True, stdout=subprocess.PIPE, text=True).stdout)


def rank_environment(num_ranks: int, num_gpus: int, exit_file: Path) -> dict[str, str]:
    # A launcher around this one, or a parent that trained alone, must not lend its ranks to ours.
    foreign = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE")
    env = {name: value for name, value in os.environ.items() if name not in foreign}
    env["SLM_EXIT_FILE"] = str(exit_file)
    env[MARK] = uuid.uuid4().hex
    # The interpreter's own ninja first: another version on PATH makes torch rebuild every cached extension.
    env["PATH"] = str(Path(sys.executable).parent) + os.pathsep + env.get("PATH", os.defpath)
    root = str(Path(__file__).resolve().parents[1])
    env["PYTHONPATH"] = root + (os.pathsep + env["PYTHONPATH"] if env.get("PYTHONPATH") else "")
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    env.setdefault("OMP_NUM_THREADS", str(max(1, num_cores // num_ranks)))
    if num_gpus == 0:
        env.setdefault("DS_ACCELERATOR", "cpu")
    elif visible := env.get("CUDA_VISIBLE_DEVICES"):
        env["CUDA_VISIBLE_DEVICES"] = ",".join(visible.split(",")[:num_ranks])
    return env


def deepspeed_command(num_ranks: int, num_gpus: int) -> list[str]:
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--no_local_rank", "--log_level", "warning"]
    command += ["--hostfile", os.devnull]  # else /job/hostfile, where it exists, makes this a multi-node run
    command += ["--master_port", str(free_port())]  # two runs on one machine must not meet
    if num_gpus == 0 or not os.environ.get("CUDA_VISIBLE_DEVICES"):  # which the number would override
        command += ["--num_accelerators", str(num_ranks)]
    return command


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


# ------------------------------------------------------------------------------------ its whole life
class Launch:
    """One attempt: DeepSpeed's runner, its helper `launch`, the ranks, and whatever those started."""

    def __init__(self, command: list[str], env: dict[str, str], num_ranks: int, exit_file: Path) -> None:
        self.num_ranks, self.exit_file, self.mark = num_ranks, exit_file, env[MARK]
        self.ranks: list[psutil.Process] = []
        self.arrived: list[int] = []  # signals, in order
        self.num_forwarded = 0
        self.failed_at: float | None = None
        self.ended: set[int] = set()  # ranks whose status was seen
        wanted = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # ignored under nohup: let it be so
            wanted.append(signal.SIGHUP)
        for number in wanted:
            signal.signal(number, self.on_signal)
        # A session of its own: Ctrl-C in a terminal then reaches each rank once, and DeepSpeed not at all.
        self.runner = subprocess.Popen(command, env=env, start_new_session=True)
        self.reaper, self.lifeline = start_reaper(self.runner.pid, self.mark, exit_file.parent)

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        self.arrived.append(number)  # wait() passes it on: a handler may interrupt anything
        if self.arrived.count(signal.SIGINT) > 2:
            kill_all(self.runner.pid, self.mark)

    def wait(self) -> int:
        try:
            while self.runner.poll() is None:
                self.find_ranks()
                self.forward_signals()
                self.watch_ranks()
                time.sleep(POLL_SECONDS)
            self.end_what_is_left()
        finally:
            kill_all(self.runner.pid, self.mark)
            os.write(self.lifeline, b"x")
            os.waitpid(self.reaper, 0)
        return self.exit_code()

    def find_ranks(self) -> None:
        """The ranks are the children of the runner's only child, `deepspeed.launcher.launch`."""
        if len(self.ranks) < self.num_ranks:
            try:
                helpers = psutil.Process(self.runner.pid).children()
                self.ranks = [rank for helper in helpers for rank in helper.children()]
            except psutil.NoSuchProcess:
                pass

    def forward_signals(self) -> None:
        while self.num_forwarded < len(self.arrived):
            number = self.arrived[self.num_forwarded]
            self.num_forwarded += 1
            if not self.ranks:  # still starting: there is nothing to save
                kill_all(self.runner.pid, self.mark)
            send(self.ranks, signal.SIGTERM if number == signal.SIGHUP else number)

    def watch_ranks(self) -> None:
        """See a rank's failure before DeepSpeed collects its status (it looks once a second), or that a rank has gone without
        a word where this program came too late for the status."""
        if self.failed_at is None:
            for number, process in enumerate(self.ranks):
                status = exit_status_of_zombie(process.pid)
                if status is not None:
                    self.ended.add(process.pid)
                elif process.pid not in self.ended and not process.is_running() and not self.exit_file.exists():
                    self.failed_at = time.monotonic()
                    say(f"rank {number} (process {process.pid}) has gone")
                if status in (None, 0, STOPPED_CODE << 8):
                    continue
                self.failed_at = time.monotonic()
                if status & 127:
                    name = signal.Signals(status & 127).name
                    if status & 127 == signal.SIGKILL and not self.exit_file.exists():  # no rank has said why
                        name += " (out of memory?)"
                    say(f"rank {number} (process {process.pid}) was ended by {name}")
        elif time.monotonic() - self.failed_at > GRACE_SECONDS:
            kill_all(self.runner.pid, self.mark)

    def end_what_is_left(self) -> None:
        """After DeepSpeed's launcher: ranks that it left behind may save, helpers may finish what they do."""
        left = marked_processes(self.mark)
        ranks = [process for process in left if process in self.ranks]
        if ranks and self.failed_at is None:
            say(f"DeepSpeed's launcher ended before its {len(ranks)} ranks: they are told to save and stop")
            send(ranks, signal.SIGTERM)
            psutil.wait_procs(ranks, timeout=SAVE_SECONDS)
        psutil.wait_procs(left, timeout=GRACE_SECONDS)

    def exit_code(self) -> int:
        if self.exit_file.exists():
            record = json.loads(self.exit_file.read_text())
            pass_on_record(self.exit_file)
            if record["code"]:
                say(f"the run ended with code {record['code']}: {record['reason'].partition(chr(10))[0]}")
            return record["code"]
        if self.arrived:
            return 128 + self.arrived[-1]
        say("the run left no word of how it ended: it crashed or was killed")
        return 1  # DeepSpeed's own code depends on which of its processes ended first


def pass_on_record(exit_file: Path) -> None:
    """`slm train --restarts` wants to know as well."""
    if (waiting := os.environ.get("SLM_EXIT_FILE")) and exit_file.exists():
        shutil.copy(exit_file, waiting)


def send(processes: list[psutil.Process], number: int) -> None:
    for process in processes:
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            pass


def exit_status_of_zombie(pid: int) -> int | None:
    """Wait status of an ended process not yet collected by its parent, else None (proc(5): stat, field 52)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # gone, or no /proc: DeepSpeed's own, slower handling is left
        return None
    return int(fields[49]) if fields[0] == "Z" else None


def marked_processes(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.Error, OSError):  # another user's, or just ended
            pass
    return found


def kill_all(group: int, mark: str) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass
    for process in marked_processes(mark):  # what left the group, as W&B's service does
        try:
            process.kill()
        except psutil.Error:
            pass


def start_reaper(group: int, mark: str, scratch: Path) -> tuple[int, int]:
    """A process that only has to outlive us: if our end of the pipe closes without a word, we were killed."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(reading)
        return pid, writing
    os.setsid()
    os.close(writing)
    if not os.read(reading, 1):
        kill_all(group, mark)
        shutil.rmtree(scratch, ignore_errors=True)
    os._exit(0)


def say(text: str) -> None:
    try:
        print(f"launch: {text}", file=sys.stderr, flush=True)
    except OSError:  # nobody listens any more, as behind `| head`: no reason to end the run
        pass


if __name__ == "__main__":
    sys.exit(main())
