"""metrics.py: the three sinks over kills and restarts (real TensorBoard, real W&B), times, memory, speeds."""

import json
import logging
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from slm.errors import UserError
from slm.metrics import MetricsLogger, StepTimer, append_event, memory_stats, mfu, offline_rows, peak_flops

KILLED_RUN = """
import json, os, pathlib, signal, sys, time
from slm.metrics import MetricsLogger, offline_rows
def wandb_steps(run_dir):
    run_id = json.loads(pathlib.Path(run_dir, "wandb_id.json").read_text())["id"]
    return [step for step, _ in offline_rows(pathlib.Path(run_dir), run_id)]
run_dir, start, last = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
# W&B writes its file every 15 seconds; here the first attempt gets its rows there before the kill.
flush = {"x_transaction_log_flush_interval": 0.1 if start == 0 else 15}
wandb = {"project": "slm", "mode": "offline", "settings": flush}
metrics = MetricsLogger(run_dir, tensorboard=True, wandb=wandb, run_name="test", config={"seed": 1},
                        start_step=start, rank=0)
for step in range(start + 1, last + 1):
    metrics.log(step, {"loss": 1 / step, "name": "text"})
    metrics.log(step, {"learning_rate": 0.1})
    metrics.event("step", number=step)
if sys.argv[4:] == ["close"]:
    metrics.close()
else:
    deadline = time.monotonic() + 30
    while start == 0 and wandb_steps(run_dir) != [1, 2, 3, 4, 5, 6] and time.monotonic() < deadline:
        time.sleep(0.1)  # the row of step 7 stays open, because another call could add to it
    os.kill(os.getpid(), signal.SIGKILL)
"""


def open_logger(run_dir: Path, start_step: int = 0, rank: int = 0) -> MetricsLogger:
    return MetricsLogger(
        run_dir, tensorboard=False, wandb=None, run_name="test", config={}, start_step=start_step, rank=rank
    )


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def wandb_rows(run_dir: Path, num_rows: int) -> list[tuple[int, dict]]:
    """Rows in W&B's files, at least num_rows if they come: its service writes on for a moment after finish()."""
    run_id = json.loads((run_dir / "wandb_id.json").read_text())["id"]
    deadline = time.monotonic() + 10
    while len(rows := list(offline_rows(run_dir, run_id))) < num_rows and time.monotonic() < deadline:
        time.sleep(0.05)
    return rows


# ------------------------------------------------------------------------------------------- sinks
def test_a_killed_and_resumed_run_repeats_no_step_anywhere(tmp_path):
    """Killed at step 7, resumed from 4, killed at 6, resumed from 4, closed at 10: one curve of ten steps."""
    for arguments in (["0", "7"], ["4", "6"], ["4", "10", "close"]):
        # W&B tells child processes of its own background service by the environment; a requeued job has none of that.
        env = {k: v for k, v in os.environ.items() if "WANDB_SERVICE" not in k and "WANDB__SERVICE" not in k}
        env["WANDB_SILENT"] = "true"
        command = [sys.executable, "-c", KILLED_RUN, tmp_path, *arguments]
        result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=90)
        assert result.returncode == (0 if "close" in arguments else -9), result.stderr
        if arguments == ["0", "7"]:
            assert [step for step, _ in wandb_rows(tmp_path, 6)] == [1, 2, 3, 4, 5, 6]
        time.sleep(1.1)  # TensorBoard's and W&B's file names tell attempts apart by the second

    recorded = lines(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in recorded if "loss" in line] == list(range(1, 11))
    assert [line["step"] for line in recorded if "learning_rate" in line] == list(range(1, 11))

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 11))
    assert events.Scalars("loss")[7].value == pytest.approx(1 / 8)

    files = list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    run_id = json.loads((tmp_path / "wandb_id.json").read_text())["id"]
    assert [file.name for file in files] == [f"run-{run_id}.wandb"] * 3
    rows = wandb_rows(tmp_path, 10)
    assert [step for step, _ in rows] == list(range(1, 11))
    assert [values["loss"] for _, values in rows] == pytest.approx([1 / step for step in range(1, 11)])
    assert all(values["learning_rate"] == 0.1 for _, values in rows)

    happened = [event["number"] for event in lines(tmp_path / "events.jsonl")]
    assert happened == [1, 2, 3, 4, 5, 6, 7, 5, 6, 5, 6, 7, 8, 9, 10]  # a diary keeps what was undone


def test_a_torn_last_line_is_dropped_and_never_continued(tmp_path):
    """A kill in the middle of a write costs that line, not the next one."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    (tmp_path / "events.jsonl").write_text('{"kind": "start"}\n{"ki')
    metrics = open_logger(tmp_path, start_step=1)
    metrics.log(2, {"loss": 1.5})
    metrics.event("save", path="x")
    metrics.close()
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2]
    assert json.loads((tmp_path / "events.jsonl").read_text().splitlines()[-1])["kind"] == "save"


def test_the_starting_step_is_completed_but_not_repeated(tmp_path):
    """Killed between the save and the evaluation of step 5: the evaluation is added, the loss is not."""
    metrics = open_logger(tmp_path)
    metrics.log(5, {"loss": 2.0})
    metrics.close()
    metrics = open_logger(tmp_path, start_step=5)
    metrics.log(5, {"loss": 2.0, "eval/loss": 3.0})
    metrics.log(4, {"late": 1.0})
    metrics.close()
    recorded = [{key: line[key] for key in line if key != "time"} for line in lines(tmp_path / "metrics.jsonl")]
    assert recorded == [{"step": 5, "loss": 2.0}, {"step": 5, "eval/loss": 3.0}]


def test_values_of_torch_and_numpy_and_what_json_has_not(tmp_path):
    """Scalars become numbers, infinities null, None and text stay: every line is strict JSON."""
    import numpy as np
    import torch

    metrics = open_logger(tmp_path)
    values = {"t": torch.tensor(2.5), "n": np.float32(0.5), "i": np.int64(3), "bad": math.nan, "none": None}
    metrics.log(1, {**values, "text": "x"})
    metrics.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    line = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    del line["time"]
    assert line == {"step": 1, "t": 2.5, "n": 0.5, "i": 3, "bad": None, "none": None, "text": "x"}


def test_only_rank_0_writes(tmp_path):
    """Other ranks call the same methods and leave no trace."""
    metrics = open_logger(tmp_path / "run", rank=1)
    metrics.log(1, {"loss": 1.0})
    metrics.event("start")
    metrics.close()
    assert not (tmp_path / "run").exists()


def test_a_full_disk_is_reported_once_and_training_goes_on(tmp_path, caplog):
    """/dev/full refuses each write with ENOSPC, as a full disk does."""
    metrics = open_logger(tmp_path)
    metrics._metrics.close()
    metrics._metrics = open("/dev/full", "wb", buffering=0)
    with caplog.at_level(logging.WARNING):
        metrics.log(1, {"loss": 1.0})
        metrics.log(2, {"loss": 1.0})
    metrics.close()
    assert [record.getMessage() for record in caplog.records] == [
        "metrics.jsonl could not be written, training goes on without: [Errno 28] No space left on device"
    ]


def test_wandb_without_a_key_is_a_users_mistake(tmp_path, monkeypatch):
    """The real client refuses at once; the message says what to do instead."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))  # no ~/.netrc
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.raises(UserError, match="(?s)No API key.*wandb login"):
        MetricsLogger(
            tmp_path,
            tensorboard=False,
            wandb={"project": "slm", "mode": "online"},
            run_name="test",
            config={},
            start_step=0,
            rank=0,
        )


def test_offline_rows_reads_records_that_cross_blocks(tmp_path):
    """Rows of 20 KB each, so that many are split over W&B's blocks of 32 KiB; also of a file cut short."""
    metrics = MetricsLogger(
        tmp_path,
        tensorboard=False,
        wandb={"project": "slm", "mode": "offline", "settings": {"silent": True}},
        run_name="test",
        config={},
        start_step=0,
        rank=0,
    )
    for step in range(1, 31):
        metrics.log(step, {f"value {i}": step + i for i in range(500)})
    metrics.close()
    rows = wandb_rows(tmp_path, 30)
    assert [step for step, _ in rows] == list(range(1, 31))
    assert all(values[f"value {i}"] == step + i for step, values in rows for i in range(500))
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    file.write_bytes(file.read_bytes()[:100_000])
    assert 0 < len(wandb_rows(tmp_path, 1)) < 30


# ------------------------------------------------------------------------------- time, memory, speed
def test_step_timer_adds_up_parts_and_starts_again():
    """Two parts of the same name are one sum; a snapshot empties it; an exception still counts."""
    timer = StepTimer()
    for _ in range(2):
        with timer.part("forward"):
            time.sleep(0.02)
    with pytest.raises(RuntimeError), timer.part("backward"):
        raise RuntimeError
    seconds = timer.snapshot()
    assert set(seconds) == {"forward", "backward"}
    assert 0.04 <= seconds["forward"] < 1
    assert timer.snapshot() == {}


@pytest.mark.gpu
def test_step_timer_measures_the_device_and_not_the_queueing():
    """A large product is queued in microseconds and takes milliseconds."""
    import torch

    big = torch.randn(8192, 8192, device="cuda")
    timer = StepTimer("cuda")
    start = time.perf_counter()
    with timer.part("forward"):
        for _ in range(10):
            big @ big
    seconds = timer.snapshot()["forward"]
    assert 0.5 * (time.perf_counter() - start) < seconds
    assert memory_stats()["cuda_peak_allocated_bytes"] >= big.numel() * 4
    assert peak_flops("cuda:0") is None or peak_flops("cuda:0") > 1e12


def test_memory_stats_sees_a_peak_that_is_over():
    """100 MiB touched and freed: in the peak, and the peak is never below what is resident now."""
    code = (
        "from slm.metrics import memory_stats; a = memory_stats(); x = b'1' * (100 << 20); del x;"
        "b = memory_stats(); peak = 'peak_rss_bytes'; print(b[peak] - a[peak], b['rss_bytes'], b[peak])"
    )
    grown, now, peak = map(int, subprocess.check_output([sys.executable, "-c", code]).split())
    assert 90 << 20 < grown < 120 << 20
    assert peak >= now


def test_peak_flops_by_name():
    """Names as the driver gives them; unknown ones and CPUs have no peak, so no MFU."""
    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("NVIDIA H20") == 148e12
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("NVIDIA L4") == 121e12
    assert peak_flops("NVIDIA GeForce GTX 1080") is None
    assert peak_flops("cpu") is None


def test_mfu_in_both_conventions():
    """10,000 tokens a second on an H200 for the 1B shape at 8K: 10.636 and 9.025 GFLOP a token."""
    flops = {"full": 10.636e9 * 10_000, "causal": 9.025e9 * 10_000}
    speed = mfu(flops, seconds=1.0, num_devices=1, peak=989e12)
    assert speed["mfu/full"] == pytest.approx(0.10754, rel=1e-4)
    assert speed["mfu/causal"] == pytest.approx(0.09125, rel=1e-4)
    assert mfu(flops, seconds=2.0, num_devices=4, peak=None) == {
        "flops_per_second/full": 10.636e13 / 8,
        "flops_per_second/causal": 9.025e13 / 8,
    }


def test_events_are_redacted_and_begin_a_line_of_their_own(tmp_path, monkeypatch):
    """Whoever writes them: the loop, or the watchdog and the supervisor after a kill that cut a line short."""
    secret = 'hunter"2"hunter'  # which JSON writes otherwise
    monkeypatch.setenv("PGPASSWORD", secret)
    (tmp_path / "events.jsonl").write_text('{"kind": "sta')
    append_event(tmp_path, "hang", seconds=1.5, where={"0": f"read ({secret})"}, step=None)
    logger = open_logger(tmp_path)
    logger.event("save failed", reason=f"no: {secret}", changes=[f"a: {secret}"], done=True)
    logger.close()
    written = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()[1:]]
    for line in written:
        line.pop("time")
    assert written == [
        {"kind": "hang", "seconds": 1.5, "where": {"0": "read (***)"}, "step": None},
        {"kind": "save failed", "reason": "no: ***", "changes": ["a: ***"], "done": True},
    ]
