"""launchers/multinode.sh over two real hosts: own network, address, host name, mounts and sshd each (tests/hosts/lab.py)."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.distributed.test_launcher import processes_of, wait_until
from tests.faults.runs import digest, environment, events, heed_hangup, write_recipe
from tests.faults.runs import run as run_here

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "launchers" / "multinode.sh")
pytestmark = pytest.mark.timeout(400)  # the probe, two starts of torch and a run, on a busy machine
LISTEN = "import socket, time; s = socket.create_server(('', 29777)); print(1, flush=True); time.sleep(600)"
SITE = Path(psutil.__file__).parents[1]


def start(lab, *arguments, **env) -> subprocess.Popen:
    command = ["bash", SCRIPT, *map(str, arguments)]
    return subprocess.Popen(
        command, env=environment(SLM_SSH=lab.ssh, **env), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, preexec_fn=heed_hangup,
    )  # fmt: skip


def finish(launched: subprocess.Popen, lab, timeout_seconds: float = 240) -> tuple[int, str]:
    """(exit code, what was printed); nothing may be left on any host."""
    try:
        said, _ = launched.communicate(timeout=timeout_seconds)
    finally:
        launched.kill()
    print(said)
    wait_until(lambda: not any(lab.pids(name) for name in lab.names), seconds=20)
    return launched.returncode, said


def run(lab, *arguments, **env) -> tuple[int, str]:
    return finish(start(lab, *arguments, **env), lab)


def steps_of(folder: Path) -> int:
    try:
        return sum('"loss"' in line for line in (folder / "run" / "metrics.jsonl").read_text().splitlines())
    except OSError:
        return 0


def endless(folder: Path, **changes) -> Path:
    phase = {"name": "main", "tokens": 256 * 20000, "seq_len": 64, "batch_tokens": 256, "micro_batch": 2}
    return write_recipe(folder, phases=[phase], checkpoint={"every_steps": 1000}, **changes)


def test_two_hosts_train_as_two_ranks_of_one_machine_do(lab, tmp_path):
    """Bit for bit: losses, gradient norms, last weights and moments. Each rank was on a host of its own, and a secret that
    went there is in no command line and no file. What a shell would run in a path is a name."""
    (tmp_path / "here").mkdir()
    code, _ = run_here(write_recipe(tmp_path / "here"))
    assert code == 0
    odd = tmp_path / "it's $(touch pwned); touch pwned" / "run"
    (tmp_path / "run").symlink_to(odd)
    launched = start(lab, lab.hostfile("a", "b"), write_recipe(tmp_path), f"output={odd}", WANDB_API_KEY="canary-5f1e9")
    seen, command_lines = {"a": set(), "b": set()}, set()
    while launched.poll() is None and steps_of(tmp_path) == 0:
        for name, ranks in seen.items():
            for pid in lab.pids(name):
                try:
                    process = psutil.Process(pid)
                    command_lines.add(" ".join(process.cmdline()))
                    if "slm.cli" in process.cmdline() and "RANK" in (env := process.environ()):
                        ranks.add((env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"], env["WANDB_API_KEY"]))
                except psutil.Error:
                    pass
        time.sleep(0.2)
    code, said = finish(launched, lab)
    assert code == 0
    assert seen == {"a": {("0", "2", "0", "canary-5f1e9")}, "b": {("1", "2", "0", "canary-5f1e9")}}
    assert any("deepspeed.launcher.launch" in line for line in command_lines)
    assert not any("canary" in line for line in command_lines)
    assert "canary" not in said
    assert not [f for f in tmp_path.rglob("*") if f.is_file() and b"canary-5f1e9" in f.read_bytes()]
    assert not list(tmp_path.rglob(".launch-*"))
    assert not [*ROOT.glob("pwned*"), *Path.home().glob("pwned*")]
    assert digest(tmp_path / "run") == digest(tmp_path / "here" / "run")


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGINT", marks=pytest.mark.slow)])
def test_a_signal_saves_on_all_hosts(lab, tmp_path, name):
    """The run stops at a step of its own, saved, and the code says so; the same command goes on from there."""
    launched = start(lab, lab.hostfile("a", "b"), endless(tmp_path))
    wait_until(lambda: steps_of(tmp_path) > 2, seconds=120)
    launched.send_signal(getattr(signal, name))
    code, _ = finish(launched, lab)
    assert code == 75
    record = json.loads((tmp_path / "run" / "exit.json").read_text())
    assert record["code"] == 75
    assert name in record["reason"]
    assert (tmp_path / "run" / "latest").resolve().name.startswith("main-")


@pytest.mark.parametrize("restarts", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_dead_rank_ends_the_run_everywhere(lab, tmp_path, restarts):
    """SIGKILL of the rank on b: the one on a leaves too, and the code is not 0; with --restarts the run goes on to its end."""
    phase = {"name": "main", "tokens": 256 * 400, "seq_len": 64, "batch_tokens": 256, "micro_batch": 2}
    recipe = write_recipe(tmp_path, phases=[phase], checkpoint={"every_steps": 20})
    launched = start(lab, lab.hostfile("a", "b"), recipe, *["--restarts", restarts][: 2 * bool(restarts)])
    wait_until(lambda: list(tmp_path.glob("run/checkpoints/main-*")), seconds=120)
    victims = [
        pid for pid in lab.pids("b") if "--world_info" not in (line := cmdline(pid)) and "-m slm.cli train" in line
    ]
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    code, said = finish(launched, lab)
    assert victims
    # Who sees it first is chance: b's launcher, or rank 0, whose connection breaks and whose machine then ends the run.
    assert re.search(r"rank 1 \(process \d+\) (was ended by SIGKILL|has gone)|rank 1 has gone \(killed", said)
    if restarts:
        assert code == 0
        assert "Restart 1 of 2" in said
        assert "going on from" in said
        assert len(events(tmp_path / "run", "restart")) == 1
    else:
        assert code == 5
        assert json.loads((tmp_path / "run" / "exit.json").read_text())["code"] == 5


def cmdline(pid: int) -> str:
    try:
        return " ".join(psutil.Process(pid).cmdline())
    except psutil.Error:
        return ""


@pytest.mark.slow
def test_a_lost_launcher_is_a_stop(lab, tmp_path):
    """SIGKILL of multinode.sh's program: nobody can pass on a signal any more, so the hosts save and leave."""
    launched = start(lab, lab.hostfile("a", "b"), endless(tmp_path))
    wait_until(lambda: steps_of(tmp_path) > 2, seconds=120)
    launched.kill()
    launched.wait()
    wait_until(lambda: not any(lab.pids(name) for name in lab.names), seconds=90)
    assert json.loads((tmp_path / "run" / "exit.json").read_text())["code"] == 75
    assert not list(tmp_path.glob(".launch-*"))


@pytest.mark.slow
def test_a_host_without_power_ends_the_run(lab, tmp_path):
    """No word of leaving comes from it, so a collective call would wait; ssh finds it silent, the others leave, with a code
    that is not 0. What still runs on the other side of the cut leaves by itself."""
    launched = start(lab, lab.hostfile("a", "b"), endless(tmp_path))
    wait_until(lambda: steps_of(tmp_path) > 2, seconds=120)
    lab.cable("b", "down")
    try:
        said, _ = launched.communicate(timeout=120)
        print(said)
        assert launched.returncode not in (0, 75)
        assert "b is lost" in said
        assert not lab.pids("a")
        wait_until(lambda: not [pid for pid in lab.pids("b") if "sshd" not in cmdline(pid)], seconds=240)
    finally:
        launched.kill()
        lab.cable("b", "up")
        for pid in lab.pids("b"):  # sessions of an sshd that waits for what will not come
            os.kill(pid, signal.SIGKILL)


def test_everything_wrong_with_the_hosts_is_said_at_once(lab, tmp_path):
    """Real differences, by mounts of a third host: another version of torch, and no shared file system. A fourth does not
    answer. Nothing is started, nothing is left, and each is named once."""
    other = tmp_path / "other"
    info = next(SITE.glob("torch-*.dist-info"))
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.4.1\n")
    lonely = tmp_path / "lonely"
    lonely.mkdir()
    lab.add("odd", f"mount --bind {other} {info} && mount -t tmpfs none {lonely}")
    with open(lab.config, "a") as config:
        config.write(f"Host gone\n  HostName {lab.subnet}.99\n")
    settings = [f"output={lonely / 'run'}", "phases.main.batch_tokens=384"]  # which 3 ranks divide
    code, said = run(lab, lab.hostfile("a", "odd", "gone"), write_recipe(tmp_path), *settings)
    assert code == 3
    assert "torch differs: 2.13" in said
    assert "2.4.1 on odd" in said
    assert "odd: does not see the run's folder" in said
    assert "gone: ssh: connect to host" in said
    assert re.search(r"\(try: ssh .*-o BatchMode=yes gone, and in it", said)
    assert "Traceback" not in said
    assert not list(lonely.iterdir())


def test_an_occupied_port_is_said_before_anything_starts(lab, tmp_path):
    """Somebody listens on it on the first host; without --port another is found."""
    words = lab.run("a", sys.executable, "-c", LISTEN)
    with subprocess.Popen(words, stdout=subprocess.PIPE) as occupant:
        try:
            assert occupant.stdout.readline()
            command = ["bash", SCRIPT, "--port", "29777", lab.hostfile("a", "b"), write_recipe(tmp_path)]
            done = subprocess.run(command, env=environment(SLM_SSH=lab.ssh), cwd=ROOT, capture_output=True, text=True)
        finally:
            occupant.kill()
    assert done.returncode == 3
    assert "a: port 29777 cannot be used: Address already in use" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_closed_port_is_said_before_anything_starts(lab, tmp_path):
    """An address that does not lead from b to a: as behind a firewall."""
    command = ["bash", SCRIPT, "--address", "127.0.0.1", lab.hostfile("a", "b"), write_recipe(tmp_path)]
    done = subprocess.run(command, env=environment(SLM_SSH=lab.ssh), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 3
    assert "is not reached from b (tried 127.0.0.1)" in done.stderr


@pytest.mark.slow
def test_deepspeeds_own_hostfile_launcher_trains_too(lab, tmp_path):
    """`deepspeed --hostfile` over pdsh, as its users know it: ranks, address and port come from its variables."""
    if not shutil.which("pdsh"):
        pytest.skip("needs pdsh")
    recipe = write_recipe(tmp_path)
    env = environment(PDSH_SSH_ARGS=f"-F {lab.config} %h", GLOO_SOCKET_IFNAME="eth0")
    home = tmp_path / "home"
    home.mkdir()
    (home / ".deepspeed_env").write_text("GLOO_SOCKET_IFNAME=eth0\nDS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\n")
    # DeepSpeed asks the first host by plain ssh before; an alias of ours is not in the user's own configuration.
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(lab.hostfile("a", "b"))]
    command += ["--no_ssh_check", "--master_addr", f"{lab.subnet}.1", "--no_local_rank", "--module", "slm.cli", "train"]
    done = subprocess.run(
        [*command, str(recipe)], env=env | {"HOME": str(home)}, cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    print(done.stdout, done.stderr)
    assert done.returncode == 0
    assert json.loads((tmp_path / "run" / "exit.json").read_text())["code"] == 0
    for process in processes_of(recipe):
        process.kill()


# --- what needs no host ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a;touch${IFS}pwned slots=1\n", "line 1: 'a;touch${IFS}pwned' is no host"),
        ("$(touch pwned) slots=1\n", "line 1: '$(touch pwned)' is no host"),
        ("-oProxyCommand=touch pwned slots=1\n", "is no host"),
        ("a slots=1\n\na slots=2\n", "line 3: a is named a second time"),
        ("a slots=0\nb\nc slots=x\n", "line 2: b has no slots=N"),
        ("gpu01 slots=eight\n", "line 1: slots of gpu01 is 'eight'"),
        ("gpu01 slots=-1\n", "line 1: slots of gpu01 is '-1'"),
        ("gpu01 slots=0\n", "line 1: slots of gpu01 is '0'"),
        ("gpu01 slots = 4\n", "line 1: after gpu01 stands 'slots = 4', and not slots=N"),
        ("# nothing\n", "is empty"),
    ],
)
def test_a_bad_hostfile_is_refused(tmp_path, text, said):
    """With its line, code 2, before any ssh: SLM_SSH would fail otherwise."""
    hosts = tmp_path / "hosts"
    hosts.write_text(text)
    env = environment(SLM_SSH="touch pwned-by-ssh")
    command = ["bash", SCRIPT, str(hosts), str(ROOT / "recipes" / "demo.yaml")]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["hosts"]


def test_a_bad_recipe_is_refused_before_any_host_is_asked(tmp_path):
    """Its message, code 2, once: one that is not there, and one whose batch all ranks together do not divide."""
    hosts = tmp_path / "hosts"
    hosts.write_text("a slots=1\nb slots=2\n")
    command = ["bash", SCRIPT, str(hosts), str(write_recipe(tmp_path))]
    done = subprocess.run(command, env=environment(), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("which 3 ranks x micro_batch 2 do not divide") == 1
    command[-1] = str(tmp_path / "none.yaml")
    env = environment(SLM_SSH="touch pwned-by-ssh")
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("none.yaml") == 1
    assert "asking" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["hosts", "doctor", "none.yaml"], "none.yaml"),
        (["hosts", "doctor", "--bogus"], "--bogus"),
        (["--export", "NOT_SET", "hosts", "doctor"], "--export names NOT_SET, which is not set here"),
        (["--export=NOT_SET", "hosts", "doctor"], "--export names NOT_SET, which is not set here"),
        (["hosts", "r.yaml", "--port", "29500"], "multinode.sh --port … HOSTFILE RECIPE"),
        (["hosts", "doctor", "--export=A"], "multinode.sh --export … HOSTFILE RECIPE"),
        (["hosts", "r.yaml", "--restarts", "2", "--address", "a"], "multinode.sh --address … HOSTFILE RECIPE"),
    ],
)
def test_wrong_words_are_refused_before_any_host_is_asked(tmp_path, arguments, said):
    """Of the doctor, of a variable that is not set, and options of the launcher that stand where those of slm do."""
    (tmp_path / "hosts").write_text("a slots=1\n")
    env = environment(SLM_SSH="touch pwned-by-ssh")
    done = subprocess.run(["bash", SCRIPT, *arguments], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count(said) == 1, done.stderr
    assert "asking" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["hosts"]


def test_a_signal_while_hosts_are_asked_ends_it(tmp_path):
    """One that never answers: nothing has started, so the command ends at once, and leaves no folder."""
    hosts = tmp_path / "hosts"
    hosts.write_text("a slots=1\n")
    command = ["bash", SCRIPT, str(hosts), str(write_recipe(tmp_path))]
    env = environment(SLM_SSH="bash -c 'sleep 600'")
    with subprocess.Popen(command, env=env, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as launched:
        wait_until(lambda: list(tmp_path.glob(".launch-*/token")))
        launched.send_signal(signal.SIGTERM)
        _, said = launched.communicate(timeout=20)
    assert launched.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in said
    assert not list(tmp_path.glob(".launch-*"))
