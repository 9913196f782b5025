"""Saves under faults, with real runs: killed in the middle, stopped again and again, on a full disk. docs/reliability.md has
the table of these rows."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import slm.loop
import slm.train
from slm import checkpoint
from slm.data.batches import PhaseData
from slm.engine import Engine
from slm.recipe import load_recipe
from slm.train import train
from tests.faults.digest import digest, fed, record_what_is_fed, state, steps
from tests.faults.runs import environment
from tests.shards import make_dataset

ROOT = Path(__file__).parents[2]
BIG = {
    "preset": "cpu-tiny",
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "intermediate_size": 1024,
}  # 4 million parameters


def write_recipe(folder, num_steps, *, model="cpu-tiny", every_steps=1, **changes):
    """A recipe for RUN = folder/run: num_steps steps of 128 tokens."""
    if not (folder / "tokens").exists():
        make_dataset(folder / "tokens")
    tree = {
        "name": "t",
        "output": str(folder / "run"),
        "model": model,
        "data": {"sources": {"a": str(folder / "tokens")}},
        "optim": {"lr": 1e-3},
        "phases": [{"name": "main", "tokens": num_steps * 128, "seq_len": 64, "batch_tokens": 128,
                    "schedule": {"warmup_steps": 2}}],
        "checkpoint": {"every_steps": every_steps},
        **changes,
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def torment(arguments, timeout_seconds):
    """Runs torment.py in a session of its own, of which nothing is left afterwards; its findings."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.faults.torment", *map(str, arguments)], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env=environment(), cwd=ROOT, start_new_session=True,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=timeout_seconds)
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    assert process.returncode == 0, err[-4000:]
    return [json.loads(line) for line in out.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """A few of each, one after the other in one process that imports DeepSpeed once: {mode: (folder, findings)}."""
    folders = {mode: tmp_path_factory.mktemp(mode) for mode in ("kill", "stop", "limit")}
    recipes = {
        "kill": write_recipe(folders["kill"], 10, model=BIG),
        "stop": write_recipe(folders["stop"], 8, every_steps=1000),
        "limit": write_recipe(folders["limit"], 8, every_steps=2),
    }
    found = torment([word for mode, path in recipes.items() for word in (mode, path, 3)], 280)
    return {mode: (folders[mode], findings) for mode, findings in zip(folders, found, strict=True)}


@pytest.fixture
def recorded(monkeypatch):
    """Runs of this process leave word of what they were fed."""
    monkeypatch.setattr(slm.train, "run_phase", slm.train.run_phase)
    monkeypatch.setattr(slm.loop, "train_step", slm.loop.train_step)
    monkeypatch.setattr(Engine, "forward", Engine.forward)
    record_what_is_fed()


def test_control_the_same_run_twice_is_equal_and_another_is_not(tmp_path, one_rank, monkeypatch, recorded):
    """What the other tests stand on: digests of two runs agree in every bit, and differ where one seed does, and where the
    tokens of one step do, whatever the recipe says of them."""
    monkeypatch.chdir(ROOT)
    path = write_recipe(tmp_path, 6, every_steps=3)
    one, two, other = (tmp_path / name for name in ("one", "two", "other"))
    for run, changes in ((one, []), (two, []), (other, ["seed=9"])):
        assert train(load_recipe(path, [f"output={run}", *changes])) == 0
    assert digest(one) == digest(two)
    assert len(steps(one)) == 6
    assert not set(steps(one).values()) & set(steps(other).values())
    assert sum(a != b for a, b in zip(state(one).values(), state(other).values(), strict=True)) > 10
    draw = PhaseData.step_batches

    def another_fourth_step(self, step, **kwargs):
        return draw(self, 5 if step == 3 else step, **kwargs)

    monkeypatch.setattr(PhaseData, "step_batches", another_fourth_step)
    assert train(load_recipe(path, [f"output={tmp_path}/astray"])) == 0
    right, astray = fed(one), fed(tmp_path / "astray")
    assert [step for step in right if right[step] != astray[step]] == [4]
    assert digest(tmp_path / "astray") != digest(one)


def test_three_kills_in_saves(quick):
    """Row 2, quick: 2 ranks killed three times within a save go on from a verified checkpoint and end bit for bit as never
    killed; nothing half-written is left. A rank that is left alone within a save does not wait for the other for long."""
    _, found = quick["kill"]
    print(found)
    assert (found["attempts"], found["equal"]) == (3, True)
    assert found["alone_seconds"] < 30


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_hundred_kills_in_saves(tmp_path):
    """Row 2: the same a hundred times, a rank stopped or killed before the other in half of them; most tear a save."""
    (found,) = torment(["kill", write_recipe(tmp_path, 110, model=BIG), 100], 2900)
    print(found)
    assert found["equal"]
    assert found["resumed_beyond_0"] >= 95
    assert sum(count for how, count in found["how"].items() if how.endswith("torn")) >= 50


def test_stopped_and_started_three_times(quick):
    """Row 26, quick: SIGTERM in every second step, on 2 ranks; exit code 75 each time and the same run in the end."""
    _, found = quick["stop"]
    assert (found["equal"], found["how"], found["last_start"]) == (True, {"codes [75, 75]": 3}, 6)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_stopped_and_started_twenty_times(tmp_path):
    """Row 26: resumed at every second of 42 steps."""
    (found,) = torment(["stop", write_recipe(tmp_path, 42, every_steps=1000), 20], 850)
    assert (found["equal"], found["last_start"]) == (True, 40)


@pytest.fixture
def small_disk(tmp_path):
    """A folder that holds 32 MiB and no more."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(
            "a file system of 32 MiB cannot be mounted here (root only); the test below limits the size of files"
        )
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)  # the run's log is still open


def events(run_dir, kind):
    lines = map(json.loads, (run_dir / "events.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def test_a_full_disk(small_disk, tmp_path, one_rank, caplog, monkeypatch, recorded):
    """Row 7: bytes needed and free are said before the first step, and before anything is written; what was committed stays
    whole. `stop` ends the run with code 3; `continue` ends it after three, and goes on where there is room again."""
    monkeypatch.chdir(ROOT)
    model = {"preset": "cpu-tiny", "hidden_size": 96, "num_hidden_layers": 3, "intermediate_size": 384}
    path = write_recipe(tmp_path, 4, model=model, every_steps=2, output=str(small_disk / "run"))
    run, filler = small_disk / "run", small_disk / "filler"
    assert train(load_recipe(path)) == 0
    assert re.search(r"saved main-00000002 in \d+\.\d s\n", caplog.text)  # for who looks at the screen
    num_bytes = checkpoint.Reader(run / "latest").num_bytes
    assert 4e6 < num_bytes < 6.4e6  # five fit: two newest, one that is a phase's end, one more, and the next

    def free():
        return os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize

    def fill():
        filler.unlink(missing_ok=True)
        filler.write_bytes(bytes(free() - num_bytes // 2))

    def whole():
        assert not [*run.glob("checkpoints/.staging-*")]
        names = [p.name for p in checkpoint.newest_first(run / "checkpoints")]
        for name in names:
            checkpoint.verify(run / "checkpoints" / name)
        return names

    before = whole()
    assert before == ["main-00000004", "main-00000002"]
    fill()
    longer = ["phases.main.tokens=2560"]  # 20 steps
    # Not even one fits: said before the first step, with 12 bytes for each parameter.
    assert train(load_recipe(path, longer)) == 3
    message = caplog.records[-1].getMessage()
    each = int(re.search(r"have ([0-9,]+) bytes each", message)[1].replace(",", ""))
    assert 0.97 * num_bytes < each <= num_bytes
    assert "0 of the 2 that are to lie there at once" in message
    assert len(steps(run)) == 4
    # Not as many as are to lie there: said, and no more. Then somebody else fills the disk.
    filler.unlink()
    filler.write_bytes(bytes(free() - num_bytes * 3 // 2))
    caplog.clear()
    step_itself = Engine.step

    def with_another_user(self, lr):
        fill()
        return step_itself(self, lr)

    with monkeypatch.context() as patched:
        patched.setattr(Engine, "step", with_another_user)
        assert train(load_recipe(path, longer)) == 3
    assert "1 of the 2 that are to lie there at once" in caplog.text
    assert "A save will fail" in caplog.text
    message = caplog.records[-1].getMessage()
    needed = int(re.search(r"needs ([0-9,]+) bytes", message)[1].replace(",", ""))
    assert num_bytes < needed < num_bytes + 100_000
    assert re.search(r"has [0-9,]+ free", message)
    assert "the checkpoints before are whole, the newest main-00000004" in message
    assert whole() == before
    go_on = [*longer, "checkpoint.on_failure=continue"]
    assert train(load_recipe(path, go_on)) == 3
    assert "3 saves in a row failed" in caplog.records[-1].getMessage()
    assert [e["step"] for e in events(run, "save failed")] == [6, 6, 8, 10]
    assert whole() == before

    def with_room_after_two(self, lr):
        if len(events(run, "save failed")) == 6:
            filler.unlink(missing_ok=True)
        return step_itself(self, lr)

    monkeypatch.setattr(Engine, "step", with_room_after_two)
    caplog.clear()
    assert train(load_recipe(path, go_on)) == 0
    assert "main-00000008 was NOT saved (2 in a row; the run stops at 3)" in caplog.text
    assert [e["step"] for e in events(run, "save failed")][4:] == [6, 8]
    assert whole()[:2] == ["main-00000020", "main-00000018"]
    assert len(steps(run)) == 20


def test_one_rank_that_cannot_write_stops_or_holds_up_all(quick):
    """Row 7 in the middle of writing: rank 1's file grows too large. Both ranks end with code 3 and its reason; with
    `continue` both go on, nothing half-written stays, and the saves after it are whole."""
    folder, found = quick["limit"]
    assert found["codes"] == [[3, 3], [0, 0]]
    assert "Traceback" not in found["printed"]
    stopped, went_on = folder / "run", folder / "run-continue"
    said = "rank 1 could not write the checkpoint main-00000002: [Errno 27] File too large"
    for rank in (0, 1):
        assert said in (stopped / "logs" / f"rank-{rank}.log").read_text()
    record = json.loads((stopped / "exit.json").read_text())
    assert record["code"] == 3
    assert record["reason"].endswith("none was saved before")
    assert checkpoint.choose(stopped) is None
    assert [e["step"] for e in events(went_on, "save failed")] == [2, 4]
    assert [e["step"] for e in events(went_on, "saved")] == [6, 8]
    for run in (stopped, went_on):
        assert not [*run.glob("checkpoints/.staging-*")]
    assert len(steps(went_on)) == 8
