"""launchers/hosts.py and host_probe.py: what needs no second host."""

import json
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("num_gpus", "slots", "said"),
    [
        ({"a": 0, "b": 0}, 4, []),  # all on the CPU
        ({"a": 4, "b": 8}, 4, []),
        (
            {"a": 4, "b": 0},
            4,
            ["b: has no GPUs, and slots=4 (others have some; DS_ACCELERATOR=cpu uses none anywhere)"],
        ),
        ({"a": 1, "b": 3, "c": 4}, 4, ["a: has 1 GPU, and slots=4", "b: has 3 GPUs, and slots=4"]),
    ],
)
def test_a_machine_that_has_lost_gpus_is_named(monkeypatch, num_gpus, slots, said):
    """All of them, too: its ranks would take gloo, and the others would wait for them with NCCL."""
    monkeypatch.syspath_prepend(ROOT / "launchers")
    from hosts import gpu_problems

    assert gpu_problems(num_gpus, dict.fromkeys(num_gpus, slots)) == said


@pytest.fixture
def probe():
    command = [sys.executable, "-u", ROOT / "launchers" / "host_probe.py", "cpu"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def ask(**question) -> dict:
            if question:
                process.stdin.write(json.dumps(question) + "\n")
                process.stdin.flush()
            return json.loads(process.stdout.readline().removeprefix("slm-probe "))

        try:
            yield ask
        finally:
            process.kill()


def test_strangers_at_the_probes_port_keep_nobody_waiting(probe):
    """Two that connect and say nothing, and twenty that break off by a reset, before: the token is heard all the same."""
    assert probe()["num_gpus"] == 0
    port = probe(listen=0, token="t" * 32)["port"]
    held = [socket.create_connection(("127.0.0.1", port)) for _ in range(2)]
    try:
        for _ in range(20):
            with socket.create_connection(("127.0.0.1", port)) as stranger:
                stranger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        reached = probe(connect=["127.0.0.1"], port=port, token="t" * 32)["reached"]
        assert reached == {"127.0.0.1": "lo"}
    finally:
        for stranger in held:
            stranger.close()
