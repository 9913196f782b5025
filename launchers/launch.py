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

With --node it starts the ranks of one of several machines, as launchers/hosts.py says on its stdin.
"""

from __future__ import annotations

import argparse
import json
import os
import select
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
from typing import Any

import psutil

ROOT = str(Path(__file__).resolve().parents[1])
sys.path[:0] = [ROOT]  # the scripts beside this one import slm, of this clone, after it

from slm.runtime import free_port  # noqa: E402 - of this clone

GRACE_SECONDS = 15.0  # for ranks whose run has failed, and for helpers (W&B's uploader) after the run's end
STOPPED_CODE = 75  # of a rank that stopped on a signal after saving, which is no failure
SAVE_SECONDS = 120.0  # for healthy ranks that were told to save because DeepSpeed's launcher was killed
POLL_SECONDS = 0.1
BEAT_SECONDS = 2.0  # between two words of launchers/hosts.py to each of its machines
LOST_SECONDS = 30.0  # without a word from it, it has gone, or the network has
MARK = "SLM_LAUNCH_ID"  # in the environment of whatever belongs to this launch, also of what left the group


def main() -> int:
    if sys.argv[1:] == ["--node"]:
        return run_node()
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
        fix = f"ask for {f'1 to {num_gpus}' if num_gpus else '1 or more'}, or name no number"
        print(f"Error: {num_ranks} ranks were asked for, but {what}\n  Fix: {fix}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="slm-launch-") as scratch:
        exit_file = Path(scratch) / "exit.json"
        env = rank_environment(num_ranks, num_gpus, exit_file)
        if code := check_recipe([options.target, *options.arguments], num_ranks, env):
            pass_on_record(exit_file)
            return code
        command = deepspeed_command(num_ranks, num_gpus) + ["--module"] * options.module
        command += [options.target, *options.arguments]
        return Launch(command, env, num_ranks, exit_file, Path(scratch)).wait()


def check_recipe(words: list[str], num_ranks: int, env: dict[str, str]) -> int:
    """What is wrong with a recipe is said once and at once, not by each rank after all of them have started: the code."""
    checks = {("slm.cli", "train"): ["--check", str(num_ranks)], ("slm.cli", "doctor"): ["--check"]}
    check = checks.get(tuple(words[:2]))
    return subprocess.run([sys.executable, "-m", *words, *check], env=env).returncode if check else 0


def run_node() -> int:
    """The part of one machine in the run of launchers/hosts.py."""
    head = Head()
    order = head.order()
    os.environ.update(order["env"])
    node, slots = order["node"], list(order["hosts"].values())
    with tempfile.TemporaryDirectory(prefix="slm-launch-") as scratch:
        hostfile = Path(scratch) / "hostfile"
        hostfile.write_text("".join(f"{host} slots={number}\n" for host, number in order["hosts"].items()))
        exit_file = Path(order["exit_file"])
        env = rank_environment(slots[node], count_gpus(), exit_file)
        # Each machine's launcher is started there (--no_ssh). Its own way, over pdsh, puts the environment and the arguments
        # into a shell's line, unquoted (deepspeed/launcher/multinode_runner.py, PDSHRunner.get_cmd), forwards no signal that
        # a run could save on, and may not end when a rank does (github.com/deepspeedai/DeepSpeed/issues/1995).
        command = [*deepspeed_runner(order["port"]), "--hostfile", str(hostfile), "--no_ssh", "--node_rank", str(node)]
        command += ["--master_addr", order["address"], *["--module"] * order["module"], order["target"]]
        launch = Launch(
            [*command, *order["arguments"]], env, slots[node], exit_file, Path(scratch), sum(slots[:node]), head
        )
        code = launch.wait()
        if head.is_gone and node == 0:  # which would have tidied up
            shutil.rmtree(exit_file.parent, ignore_errors=True)
        return code


class Head:
    """launchers/hosts.py at the other end of our stdin: first a line with what to start, then a line for each signal, and an
    empty one at least every BEAT_SECONDS. A machine that is lost, the network, or a killed ssh are all silence to us."""

    def __init__(self) -> None:
        self.is_gone = False
        self._unread, self._silent_seconds, self._looked_at = b"", 0.0, time.monotonic()

    def order(self) -> dict[str, Any]:
        while not (lines := self.lines()):
            if self.is_gone:
                raise SystemExit(1)
            time.sleep(POLL_SECONDS)
        self._unread = "".join(f"{line}\n" for line in lines[1:]).encode() + self._unread
        return json.loads(lines[0])

    def lines(self) -> list[str]:
        """What has been said since the last call."""
        now = time.monotonic()
        # While this process did not run itself (stopped, or the machine asleep), nobody was silent.
        self._silent_seconds += min(now - self._looked_at, 1.0)
        self._looked_at = now
        said = b""
        # No O_NONBLOCK: where sshd makes a socket of stdin and stdout, what the ranks print would be cut short.
        if select.select([0], [], [], 0)[0]:
            said = os.read(0, 1 << 20)
            self.is_gone = self.is_gone or not said
            self._silent_seconds = 0.0
        self.is_gone = self.is_gone or self._silent_seconds > LOST_SECONDS
        *lines, self._unread = (self._unread + said).split(b"\n")
        return [line.decode() for line in lines if line]


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
    env["PYTHONPATH"] = ROOT + (os.pathsep + env["PYTHONPATH"] if env.get("PYTHONPATH") else "")
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    env.setdefault("OMP_NUM_THREADS", str(max(1, num_cores // num_ranks)))
    if num_gpus == 0:
        env.setdefault("DS_ACCELERATOR", "cpu")
    elif visible := env.get("CUDA_VISIBLE_DEVICES"):
        env["CUDA_VISIBLE_DEVICES"] = ",".join(visible.split(",")[:num_ranks])
    return env


def deepspeed_command(num_ranks: int, num_gpus: int) -> list[str]:
    command = deepspeed_runner(free_port())  # two runs on one machine must not meet
    command += ["--hostfile", os.devnull]  # else /job/hostfile, where it exists, makes this a multi-node run
    if num_gpus == 0 or not os.environ.get("CUDA_VISIBLE_DEVICES"):  # which the number would override
        command += ["--num_accelerators", str(num_ranks)]
    return command


def deepspeed_runner(port: int) -> list[str]:
    # Its log calls a run that was stopped in order an error, and a hostfile that nobody gave a warning. What it cannot start for
    # it raises, and how ranks end is said here.
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--no_local_rank", "--log_level", "critical"]
    return [*command, "--master_port", str(port)]


# ------------------------------------------------------------------------------------ its whole life
class Launch:
    """One attempt: DeepSpeed's runner, its helper `launch`, the ranks, and whatever those started."""

    def __init__(
        self,
        command: list[str],
        env: dict[str, str],
        num_ranks: int,
        exit_file: Path,
        scratch: Path,
        first_rank: int = 0,
        head: Head | None = None,  # where other machines have a part in the run
    ) -> None:
        self.num_ranks, self.exit_file, self.mark = num_ranks, exit_file, env[MARK]
        self.first_rank, self.head, self.ends_at = first_rank, head, float("inf")
        self.ranks: list[psutil.Process] = []
        self.arrived: list[int] = []  # signals, in order
        self.num_forwarded = 0
        self.failed_at: float | None = None
        self.has_told = False  # of a rank here that failed
        self.ended: set[int] = set()  # ranks whose status was seen
        wanted = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # ignored under nohup: let it be so
            wanted.append(signal.SIGHUP)
        for number in wanted:
            signal.signal(number, self.on_signal)
        # A session of its own: Ctrl-C in a terminal then reaches each rank once, and DeepSpeed not at all.
        stdin = subprocess.DEVNULL if head else None
        self.runner = subprocess.Popen(command, env=env, start_new_session=True, stdin=stdin)
        self.reaper, self.lifeline = start_reaper(self.runner.pid, self.mark, scratch)

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        self.arrived.append(number)  # wait() passes it on: a handler may interrupt anything
        if self.arrived.count(signal.SIGINT) > 2:
            kill_all(self.runner.pid, self.mark)

    def wait(self) -> int:
        try:
            while self.runner.poll() is None:
                self.find_ranks()
                self.listen()
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

    def listen(self) -> None:
        """What the head says: the numbers of signals, or that a rank elsewhere has failed. Without it, the ranks save and stop:
        those of other machines hear of no signal any more, either."""
        if self.head is None:
            return
        for line in self.head.lines():
            if line == "failed":
                self.failed_at = self.failed_at or time.monotonic()
            elif line.isdigit():
                self.on_signal(int(line), None)
        if self.head.is_gone and self.ends_at == float("inf"):
            say(f"{socket.gethostname()} has lost the launcher's machine: its ranks are told to save and stop")
            self.ends_at = time.monotonic() + SAVE_SECONDS
            self.on_signal(signal.SIGTERM, None)
        if time.monotonic() > self.ends_at:
            kill_all(self.runner.pid, self.mark)

    def forward_signals(self) -> None:
        while self.num_forwarded < len(self.arrived):
            number = self.arrived[self.num_forwarded]
            self.num_forwarded += 1
            if not self.ranks:  # still starting: there is nothing to save
                kill_all(self.runner.pid, self.mark)
            send(self.ranks, signal.SIGTERM if number == signal.SIGHUP else number)

    def watch_ranks(self) -> None:
        """See a rank's failure before DeepSpeed collects its status (it looks once a second), or that a rank has gone without
        a word where this program came too late for the status. Where another machine's rank has left first, because one here was
        killed, that one is named all the same."""
        heard = self.failed_at is not None
        if not heard or (not self.has_told and time.monotonic() - self.failed_at < GRACE_SECONDS):
            for number, process in enumerate(self.ranks, self.first_rank):
                status = exit_status_of_zombie(process.pid)
                if status is not None:
                    self.ended.add(process.pid)
                elif heard:
                    continue
                elif process.pid not in self.ended and not process.is_running() and not self.exit_file.exists():
                    self.failed_at, self.has_told = time.monotonic(), True
                    say(f"rank {number} (process {process.pid}) has gone")
                if status in (None, 0, STOPPED_CODE << 8):
                    continue
                if heard and status & 127 in (0, signal.SIGTERM):  # it left because another failed
                    continue
                self.failed_at, self.has_told = self.failed_at or time.monotonic(), True
                if status & 127:
                    name = signal.Signals(status & 127).name
                    if status & 127 == signal.SIGKILL and not self.exit_file.exists():  # no rank has said why
                        name += " (out of memory?)"
                    say(f"rank {number} (process {process.pid}) was ended by {name}")
                elif not self.exit_file.exists():
                    say(f"rank {number} (process {process.pid}) ended with code {status >> 8}")
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
            if self.head is not None:  # who says it once, for all machines
                return record["code"]
            pass_on_record(self.exit_file)
            if record["code"]:
                say(f"the run ended with code {record['code']}: {record['reason'].partition(chr(10))[0]}")
            return record["code"]
        if self.arrived:
            return 128 + self.arrived[-1]
        if self.head is None:
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
