"""slm doctor over real hosts: each has its own address, name, mounts and network (lab.py)."""

import json
import subprocess
from pathlib import Path

import psutil
import pytest

from tests.distributed.test_launcher import wait_until
from tests.faults.runs import environment
from tests.hosts.lab import IP
from tests.hosts.lab import run as command

ROOT = Path(__file__).parents[2]
SITE = Path(psutil.__file__).parents[1]
pytestmark = pytest.mark.timeout(400)


def examine(lab, names, folder, *options) -> tuple[int, dict]:
    words = [
        "bash",
        ROOT / "launchers" / "multinode.sh",
        lab.hostfile(*names),
        "doctor",
        "--json",
        "--folder",
        folder,
        *options,
    ]
    env = environment(SLM_SSH=lab.ssh)
    done = subprocess.run(list(map(str, words)), env=env, cwd=ROOT, capture_output=True, text=True, timeout=350)
    print(done.stdout, done.stderr)
    wait_until(lambda: not any(lab.pids(name) for name in lab.names), seconds=20)
    return done.returncode, json.loads(done.stdout[done.stdout.index("{\n") : done.stdout.rindex("}") + 1])


def named(found: dict, name: str) -> list[dict]:
    return [check for check in found["checks"] if check["name"] == name]


def test_two_hosts_are_measured(lab, tmp_path):
    """Each host's own, what both must have alike, clocks (this machine has one: the skew lies within the error), files and
    collectives."""
    code, found = examine(lab, ["a", "b"], tmp_path)
    assert code == 0
    assert sorted(check["node"] for check in named(found, "memory")) == ["a", "b"]
    (clock,) = named(found, "clock")
    assert clock["values"]["node"] == "b"
    assert abs(clock["values"]["ahead_seconds"]) <= clock["values"]["error_seconds"] < 0.5
    assert "b" in named(found, "shared files")[0]["values"]["seconds_until_seen"]
    for name in ("shared files", "shared rename", "shared flock", "collectives"):
        assert [check["state"] for check in named(found, name)] == ["ok"]
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_cut_pair_a_lonely_folder_and_an_odd_version_are_named(lab, tmp_path):
    """Of three hosts, packets between b and c vanish (a wrong hardware address): nothing answers and nothing refuses. c has
    another numpy and a folder of its own."""
    other, lonely = tmp_path / "other", tmp_path / "lonely"
    other.mkdir()
    lonely.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: sentencepiece\nVersion: 0.1.9\n")
    info = next(SITE.glob("sentencepiece-*.dist-info"))
    address = lab.add("c", f"mount --bind {other} {info} && mount -t tmpfs none {lonely}")
    command(IP, "-n", f"{lab.tag}b", "neigh", "replace", address, "lladdr", "02:00:00:00:00:99", "dev", "eth0")
    code, found = examine(lab, ["a", "b", "c"], lonely, "--limit", "20")
    assert code == 3
    states = {tuple(check["values"]["pair"]): check["state"] for check in named(found, "pair")}
    assert states == {("a", "b"): "ok", ("a", "c"): "ok", ("b", "c"): "wrong"}
    assert named(found, "collectives")[0]["state"] == "wrong"
    (files,) = named(found, "shared files")
    assert files["state"] == "wrong"
    assert files["measured"].startswith("c did not see")
    old = [check for check in named(found, "versions") if check["node"] == "c"]
    assert "sentencepiece 0.1.9" in old[0]["measured"]
    assert old[0]["state"] == "wrong"
