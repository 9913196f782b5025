"""Start a program on the machines of a hostfile, each by ssh and the `deepspeed` launcher, and see it through to its end.

Owns what is asked of the machines before anything starts, so that what is wrong with any of them is said at once and not
an hour later, and the run's end on all of them: signals go to every rank, and when a machine, a rank or this program has gone,
the others end too. What happens on one machine is launch.py's; what a machine is asked, host_probe.py's.

    python launchers/hosts.py HOSTFILE --module slm.cli train recipes/demo.yaml

Everything a machine needs to know goes through ssh's standard input: no argument of ours meets a shell, and no secret is
in a command line or a file. SLM_SSH is the ssh command, where it needs options ("ssh -F FILE", "ssh -p 2222").
"""

from __future__ import annotations

import argparse
import json
import os
import re
import secrets
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

from host_probe import SIGN
from launch import BEAT_SECONDS, GRACE_SECONDS, LOST_SECONDS, POLL_SECONDS, ROOT, check_recipe, pass_on_record, say

from slm.errors import EnvironmentProblem, SLMError, UserError
from slm.names import shortened

ANSWER_SECONDS = 60.0  # for an interpreter to start from a slow file system
# Keys only, since nobody types here; a machine that does not answer is noticed before and during the run.
SSH_OPTIONS = "-T -o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=5 -o ServerAliveCountMax=4".split()
# What of this environment the ranks get; --export adds to it.
EXPORTED = re.compile(
    r"(NCCL|GLOO|TORCH|TORCHINDUCTOR|TRITON|CUDA|DS|DEEPSPEED|OMP|MKL|UCX|FI|SLM|HF|WANDB|TOKENIZERS|PYTHON|AWS)_\w+"
    r"|PYTHONPATH|LD_LIBRARY_PATH|(https?|all|no)_proxy|(HTTPS?|ALL|NO)_PROXY|XDG_CACHE_HOME|TMPDIR|LANG|LC_\w+"
)
# Of one machine, or of one launch.
KEPT = {"CUDA_VISIBLE_DEVICES", "SLM_EXIT_FILE", "SLM_LAUNCH_ID", "SLM_SSH", "PYTHON_VERSION", "PYTHONSTARTUP"}
# A name or an address, of a user or without; no option of ssh, and nothing that a shell reads as more than a letter.
HOST = re.compile(r"([A-Za-z0-9_][A-Za-z0-9_.-]*@)?[A-Za-z0-9][A-Za-z0-9_.:-]*")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--port", type=int, default=0, help="where rank 0 listens (default: one that is free there)")
    parser.add_argument("--address", default="", help="of the first machine, as the others reach it (default: tried)")
    parser.add_argument("--export", default="", metavar="NAME,NAME", help="more environment variables for the ranks")
    parser.add_argument("--module", action="store_true", help="TARGET is a module, as in python -m")
    parser.add_argument("hostfile", help="lines of: HOST slots=NUMBER_OF_RANKS")
    parser.add_argument("target", help="script or module to run on each rank")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="what follows goes to the target")
    options = parser.parse_args()
    for ending in (signal.SIGTERM, signal.SIGHUP):  # until there are ranks that could save
        if signal.getsignal(ending) is not signal.SIG_IGN:
            signal.signal(ending, interrupt)
    try:
        if not 0 <= options.port < 1 << 16:
            raise UserError(f"--port is {options.port}, which is no port", fix="give 1024 to 65535, or leave it out")
        hosts = read_hostfile(options.hostfile)
        given = exported(options.export)
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([ROOT, *filter(None, [os.environ.get("PYTHONPATH")])])}
        if code := check_recipe([options.target, *options.arguments], sum(hosts.values()), env):
            return code
        with SharedFolder(shared_folder(options.arguments)) as shared:
            address, port, interfaces = ask_all(hosts, shared, options.address, options.port)
            order = {"hosts": hosts, "address": address, "port": port, "exit_file": str(shared / "exit.json")}
            order |= {"module": options.module, "target": options.target, "arguments": options.arguments}
            nodes = []
            for number, interface in enumerate(interfaces):
                # gloo looks up the host's own name, often a loopback's.
                nodes.append(order | {"node": number, "env": {"GLOO_SOCKET_IFNAME": interface, **given}})
            return Run(list(hosts), nodes, shared / "exit.json").wait()
    except SLMError as error:
        print(f"{error.title}: {error}", file=sys.stderr)
        if waiting := os.environ.get("SLM_EXIT_FILE"):
            Path(waiting).write_text(json.dumps({"code": error.exit_code, "reason": str(error)}))
        return error.exit_code
    except Interrupted as end:
        return 128 + end.args[0]
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


class Interrupted(BaseException):
    """By the signal of this number, before there were ranks."""


def interrupt(number: int, frame: FrameType | None) -> None:
    raise Interrupted(number)


# --------------------------------------------------------------------------------- what is given
def read_hostfile(path: str) -> dict[str, int]:
    """Ranks by machine, in order. Raises UserError with every line that is wrong."""
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"hostfile {path} cannot be read: {error}", fix="write one, a line `HOST slots=N` each"
        ) from None
    hosts: dict[str, int] = {}
    wrong = []
    for number, line in enumerate(lines, 1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        host, slots = re.fullmatch(r"(.*?)(?:\s+slots=(.*))?", line).groups()  # type: ignore[union-attr]
        first, *rest = host.split(None, 1) or [""]
        if rest and HOST.fullmatch(first):
            wrong.append(f"line {number}: after {first} stands {shortened(rest[0])}, and not slots=N")
        elif not HOST.fullmatch(host):
            wrong.append(
                f"line {number}: {shortened(host)} is no host: letters, digits, and . _ : - within, after USER@"
            )
        elif slots is None:
            wrong.append(f"line {number}: {host} has no slots=N, the number of ranks there, at least 1")
        elif not re.fullmatch("0*[1-9][0-9]{0,5}", slots):
            wrong.append(
                f"line {number}: slots of {host} is {shortened(slots)}: it is the number of ranks there, 1 or more"
            )
        elif host in hosts:
            wrong.append(f"line {number}: {host} is named a second time")
        else:
            hosts[host] = int(slots)
    if wrong or not hosts:
        problem = "\n  ".join(
            [f"hostfile {path} is not understood:", *wrong] if wrong else [f"hostfile {path} is empty"]
        )
        raise UserError(problem, fix="write a line `HOST slots=N` for each machine, as for `deepspeed --hostfile`")
    return hosts


def shared_folder(arguments: list[str]) -> Path:
    """Where the run's folder will be made, if the target trains; else the current folder."""
    if arguments[:1] != ["train"] or len(arguments) < 2:
        return Path.cwd()
    from slm.recipe import load_recipe

    overrides = [word for word in arguments[2:] if "=" in word and not word.startswith("-")]
    return load_recipe(arguments[1], overrides).run_dir.absolute().parent


class SharedFolder:
    """A folder in it for this launch: what is in it on one machine must be there on all."""

    def __init__(self, parent: Path) -> None:
        self.folder = parent / f".launch-{secrets.token_hex(8)}"

    def __enter__(self) -> Path:
        try:
            self.folder.mkdir(parents=True, mode=0o700)
        except OSError as error:
            raise UserError(
                f"{self.folder.parent} cannot be written: {error}", fix="give the run another output"
            ) from None
        return self.folder

    def __exit__(self, *error: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def exported(more: str) -> dict[str, str]:
    names = [name for name in more.split(",") if name]
    if missing := [name for name in names if name not in os.environ]:
        raise UserError(f"--export names {', '.join(missing)}, which is not set here", fix="set it, or mend its name")
    return {k: v for k, v in os.environ.items() if k in names or (EXPORTED.fullmatch(k) and k not in KEPT)}


def ssh(host: str, script: str, *arguments: str) -> subprocess.Popen[bytes]:
    """python SCRIPT ARGUMENTS on a machine, in the same folder and by the same interpreter as here."""
    program = shlex.join([sys.executable, "-u", f"{ROOT}/launchers/{script}", *arguments])
    command = f"cd {shlex.quote(os.getcwd())} && exec {program}"
    words = [*shlex.split(os.environ.get("SLM_SSH", "ssh")), *SSH_OPTIONS, host, f"exec sh -c {shlex.quote(command)}"]
    # A session of its own: Ctrl-C in a terminal reaches the ranks through us, and ssh not at all.
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} if script == "host_probe.py" else {}
    try:
        return subprocess.Popen(words, stdin=subprocess.PIPE, start_new_session=True, **output)  # type: ignore[call-overload]
    except OSError as error:
        raise EnvironmentProblem(
            f"{words[0]} cannot be started: {error}", fix="install an ssh client, or set SLM_SSH"
        ) from None


# --------------------------------------------------------------------------------- what is asked before
class Lost(Exception):
    """A machine gave no answer."""


class Probe:
    """host_probe.py on one machine."""

    def __init__(self, host: str) -> None:
        given = ["cpu"] if os.environ.get("DS_ACCELERATOR") == "cpu" else []  # it counts the GPUs that ranks would use
        self.host, self.process, self._unread = host, ssh(host, "host_probe.py", *given), b""

    def ask(self, **question: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(question).encode() + b"\n")
            self.process.stdin.flush()
        except OSError:
            pass  # answer() says why
        return self.answer()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        deadline = time.monotonic() + ANSWER_SECONDS
        while True:
            line, newline, rest = self._unread.partition(b"\n")
            if newline:
                self._unread = rest
                if line.startswith(SIGN.encode()):
                    return json.loads(line[len(SIGN) :])
                continue
            ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise Lost(f"no answer in {ANSWER_SECONDS:.0f} s")
            read = os.read(self.process.stdout.fileno(), 1 << 16)
            if not read:
                self.process.wait()
                said = self.process.stderr.read().decode(errors="replace").strip().splitlines()
                raise Lost(said[-1] if said else f"ssh ended with code {self.process.returncode}")
            self._unread += read

    def clock(self) -> tuple[float, float]:
        """(seconds that this machine's clock is ahead of ours, and how far off that may be): the quickest of five questions."""
        measured = []
        for _ in range(5):
            began, began_at = time.monotonic(), time.time()
            there = self.ask(clock=True)["time"]
            half = (time.monotonic() - began) / 2
            measured.append((half, there - began_at - half))
        half, ahead = min(measured)
        return ahead, half

    def close(self) -> None:
        self.process.kill()  # of ssh; the program there ends with its input
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert stream is not None
            try:
                stream.close()
            except OSError:
                pass


def ask_all(hosts: dict[str, int], shared: Path, address: str, port: int) -> tuple[str, int, list[str]]:
    """Where rank 0 listens, as all reach it: (address, port, the interface of each machine that leads there).

    Raises EnvironmentProblem with every problem of every machine.
    """
    token = secrets.token_hex(16)
    (shared / "token").write_text(token)
    say(f"asking {len(hosts)} machine{'s' * (len(hosts) > 1)}: {', '.join(hosts)}")
    probes = [Probe(host) for host in hosts]
    pool = ThreadPoolExecutor(len(hosts))
    try:
        answers = dict(zip(hosts, pool.map(lambda probe: first_look(probe, shared, token), probes), strict=True))
        problems = [f"{host}: {what}" for host, answer in answers.items() for what in problems_of(host, answer)]
        problems += gpu_problems({host: a["num_gpus"] for host, a in answers.items() if "num_gpus" in a}, hosts)
        problems += differences({host: answer["versions"] for host, answer in answers.items() if "versions" in answer})
        if "lost" in answers[next(iter(hosts))]:  # nobody listens
            raise not_ready(problems)
        listening = probes[0].ask(listen=port, token=token)
        if "error" in listening:
            problems.append(
                f"{probes[0].host}: port {port} cannot be used: {listening['error']} (leave --port out, or name another)"
            )
            raise not_ready(problems)
        tried = [address] if address else [known_as(probes[0].host), *answers[probes[0].host]["addresses"]]
        question = {"connect": list(dict.fromkeys(tried)), "port": listening["port"], "token": token}
        here = [probe for probe in probes if "lost" not in answers[probe.host]]
        reached = list(pool.map(lambda probe: probe.ask(**question)["reached"], here))
    except Lost as error:
        raise EnvironmentProblem(
            f"a machine stopped answering: {error}", fix="see whether it is up, and start again"
        ) from None
    finally:
        for probe in probes:
            probe.close()
        pool.shutdown()  # its threads have ended with what they asked
    common = [candidate for candidate in question["connect"] if all(candidate in found for found in reached)]
    if not common:
        cut_off = [probe.host for probe, found in zip(here, reached, strict=True) if not found]
        told = f"reached from {', '.join(cut_off)}" if cut_off else "reached by the same address from all"
        problems.append(
            f"{probes[0].host}: port {question['port']} is not {told} (tried {', '.join(question['connect'])}); "
            "is there a firewall? --address names the address, --port a port that is open"
        )
    if problems:
        raise not_ready(problems)
    say(f"all answer; rank 0 listens on {common[0]}, port {question['port']}")
    return common[0], question["port"], [found[common[0]] for found in reached]


def not_ready(problems: list[str]) -> EnvironmentProblem:
    return EnvironmentProblem("\n  ".join(["nothing was started:", *problems]), fix="mend what is said of each machine")


def known_as(host: str) -> str:
    """The name or address that ssh itself takes for a host, which may be an alias of its configuration."""
    words = [*shlex.split(os.environ.get("SLM_SSH", "ssh")), "-G", host]
    said = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
    found = re.search(r"^hostname (.+)$", said, re.MULTILINE)
    return found[1] if found else host.rpartition("@")[2]


def first_look(probe: Probe, shared: Path, token: str) -> dict[str, Any]:
    try:
        facts = probe.answer()
        read = probe.ask(read=str(shared / "token"))
        ahead, half = probe.clock()
    except Lost as error:
        return {"lost": str(error)}
    return facts | {"shared": read.get("text") == token, "unread": read.get("error", ""), "clock": (ahead, half)}


def problems_of(host: str, answer: dict[str, Any]) -> list[str]:
    if "lost" in answer:
        by_hand = shlex.join([*shlex.split(os.environ.get("SLM_SSH", "ssh")), "-o", "BatchMode=yes", host])
        return [f"{answer['lost']} (try: {by_hand}, and in it: cd {os.getcwd()} && {sys.executable} -V)"]
    found = []
    if not answer["shared"]:
        found.append(
            f"does not see the run's folder as it is here ({answer['unread']}): all need one shared file system"
        )
    ahead, half = answer["clock"]
    if abs(ahead) - half > 5:  # nothing of ours fails by it: it is other programs (make, tokens with an end) that do
        say(
            f"the clock of {host} is {ahead:+.1f} s (±{half:.3f}) from this machine's: the lines of logs will be out of order"
        )
    return found


def gpu_problems(num_gpus: dict[str, int], slots: dict[str, int]) -> list[str]:
    """Where one machine has GPUs, all ranks need one: a machine without would choose gloo, and never meet those with NCCL."""
    if not any(num_gpus.values()):
        return []
    return [
        f"{host}: has {number or 'no'} GPU{'s' * (number != 1)}, and slots={slots[host]}"
        f"{'' if number else ' (others have some; DS_ACCELERATOR=cpu uses none anywhere)'}"
        for host, number in num_gpus.items()
        if number < slots[host]
    ]


def differences(versions: dict[str, dict[str, str]]) -> list[str]:
    """Of what all machines of a run must have alike, what is not: who has which."""
    found = []
    for name in next(iter(versions.values()), {}):
        by_version: dict[str, list[str]] = {}
        for host, installed in versions.items():
            by_version.setdefault(installed[name] or "none", []).append(host)
        if len(by_version) > 1:
            told = "; ".join(f"{version} on {', '.join(of)}" for version, of in by_version.items())
            found.append(f"{name} differs: {told}")
    return found


# ------------------------------------------------------------------------------------ its whole life
class Run:
    """launch.py --node on each machine, each at the other end of an ssh."""

    def __init__(self, hosts: list[str], orders: list[dict[str, Any]], exit_file: Path) -> None:
        self.exit_file = exit_file
        self.arrived: list[int] = []
        self.num_forwarded = 0
        self.failed_at: float | None = None
        wanted = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # ignored under nohup: let it be so
            wanted.append(signal.SIGHUP)
        for number in wanted:
            signal.signal(number, self.on_signal)
        self.nodes = {host: ssh(host, "launch.py", "--node") for host in hosts}
        for host, order in zip(hosts, orders, strict=True):
            self.say_to(host, json.dumps(order))

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        self.arrived.append(number)

    def wait(self) -> int:
        beat_at = 0.0
        ended: dict[str, int] = {}
        while len(ended) < len(self.nodes):
            for host, node in self.nodes.items():
                if host not in ended and (code := node.poll()) is not None:
                    ended[host] = code
                    if code and self.failed_at is None and not self.is_over():
                        self.fail(host, code)
            while self.num_forwarded < len(self.arrived):
                number = self.arrived[self.num_forwarded]
                self.num_forwarded += 1
                for host in self.nodes:
                    self.say_to(host, str(int(signal.SIGTERM if number == signal.SIGHUP else number)))
            if time.monotonic() - beat_at > BEAT_SECONDS:
                beat_at = time.monotonic()
                for host in self.nodes:
                    self.say_to(host, "")
            if self.failed_at is not None and time.monotonic() - self.failed_at > 2 * GRACE_SECONDS + LOST_SECONDS:
                for node in self.nodes.values():  # a machine that hangs; whatever runs there ends when it hears nothing
                    node.kill()
            time.sleep(POLL_SECONDS)
        return self.exit_code(ended)

    def is_over(self) -> bool:
        """Whether the run has said that it is done, or has saved and stopped: what ends then, ends in order."""
        return self.exit_file.exists() and json.loads(self.exit_file.read_text())["code"] in (0, 75)

    def fail(self, host: str, code: int) -> None:
        """A rank, or a machine, has gone: the ranks of the others wait for it in a collective call, some for ever."""
        self.failed_at = time.monotonic()
        if code == 255:  # ssh(1)
            say(f"{host} is lost: its ssh has ended")
        for other in self.nodes:
            self.say_to(other, "failed")

    def say_to(self, host: str, line: str) -> None:
        stdin = self.nodes[host].stdin
        assert stdin is not None
        try:
            os.write(stdin.fileno(), line.encode() + b"\n")
        except OSError:
            pass  # has ended, which wait() sees

    def exit_code(self, ended: dict[str, int]) -> int:
        if self.exit_file.exists():
            record = json.loads(self.exit_file.read_text())
            pass_on_record(self.exit_file)
            if record["code"]:
                say(f"the run ended with code {record['code']}: {record['reason'].partition(chr(10))[0]}")
            return record["code"]
        if self.arrived and 255 not in ended.values():
            return 128 + self.arrived[-1]
        say("the run left no word of how it ended: it crashed or was killed")
        return 1


if __name__ == "__main__":
    sys.exit(main())
