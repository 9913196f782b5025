"""Kills or stops a run of 2 ranks again and again, and compares what it became with an undisturbed one.

Owns the forking: torch and DeepSpeed are imported once, and each attempt is `train` itself in two forked processes, which die
with this one. Run by test_saves.py, in a session of its own.

    python tests/faults/torment.py kill RECIPE 100       # SIGKILL at random moments of saves
    python tests/faults/torment.py stop RECIPE 20        # SIGTERM as each attempt begins its first step: it takes two
    python tests/faults/torment.py limit RECIPE 1        # rank 1 may write no large file; first for a whole run

Several of these may be given at once. The recipe's run directory must not exist; the undisturbed run is beside it. Prints one
line of JSON for each; exit code 1 says that something did not hold.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import resource
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

import slm.loop
import slm.train
from slm import checkpoint
from slm.recipe import Recipe, load_recipe
from slm.runtime import free_port
from tests.faults.digest import digest, record_what_is_fed, state, steps

WORLD = 2
ATTEMPT_SECONDS, WHOLE_RUN_SECONDS = 120.0, 900.0


def start(recipe: Recipe, log: Path, prepare: Callable[[int], None] = lambda rank: None) -> list[int]:
    """Forks the ranks; their pids. Each calls prepare(rank) first."""
    port, pids = free_port(), []
    for rank in range(WORLD):
        pid = os.fork()
        if pid == 0:
            try:
                ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
                ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "LOCAL_WORLD_SIZE": WORLD}
                os.environ.update({name: str(value) for name, value in ranks.items()})
                os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
                output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(output, 1)
                os.dup2(output, 2)
                record_what_is_fed()
                prepare(rank)
                os._exit(slm.train.train(recipe))
            finally:
                os._exit(99)
        pids.append(pid)
    return pids


def before_step(step: int, act: Callable[[], None]) -> None:
    """In this rank: act() as the so-manieth step that it takes begins."""
    step_itself, calls = slm.loop.train_step, []

    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) == step:
            act()
        return step_itself(*args, **kwargs)

    slm.loop.train_step = counted


def stop_soon(rank: int) -> None:
    """SIGTERM to rank 0 as its first step begins: all stop after the second."""
    if rank == 0:
        before_step(1, lambda: os.kill(os.getpid(), signal.SIGTERM))


def limit_rank_1(rank: int) -> None:
    """It may write no file above 200 kB until its fifth step begins (a run that stops does not come so far)."""
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))

        def lift() -> None:
            for thread in threading.enumerate():  # the save of step 4 is still under way, and is to fail
                if thread.name.startswith("save "):
                    thread.join()
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

        before_step(5, lift)


def ended(pids: list[int]) -> list[int] | None:
    """Exit codes (negative: signals), once all have ended, else None. Leaves them to be asked for again."""
    found = [os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) for pid in pids]
    if not all(found):
        return None
    return [r.si_status if r.si_code == os.CLD_EXITED else -r.si_status for r in found]


def wait(pids: list[int], seconds: float = ATTEMPT_SECONDS) -> list[int]:
    deadline = time.monotonic() + seconds
    while (codes := ended(pids)) is None and time.monotonic() < deadline:
        time.sleep(0.02)
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        os.waitpid(pid, 0)
    assert codes is not None, f"the ranks were still there after {seconds} s"
    return codes


def newest_committed(run_dir: Path) -> int:
    folders = checkpoint.newest_first(run_dir / "checkpoints")
    return checkpoint.read_manifest(folders[0])["global_step"] if folders else 0


def await_save(recipe: Recipe, pids: list[int], nth: int) -> set[str]:
    """Returns as the nth save of this attempt begins; the names of its saves' staging folders."""
    run_dir, seen = recipe.run_dir, set[str]()
    deadline = time.monotonic() + ATTEMPT_SECONDS
    old = {p.name for p in run_dir.glob("checkpoints/.staging-*")}  # of killed attempts; swept by this one
    while len(seen) < nth:
        seen |= {p.name for p in run_dir.glob("checkpoints/.staging-*")} - old
        assert ended(pids) is None, f"ended by itself: {ended(pids)}"
        assert time.monotonic() < deadline, "no save was begun"
        time.sleep(0.001)
    return seen


def lose_one_in_a_save(recipe: Recipe, log: Path) -> float:
    """One attempt, of which rank 1 is killed as a save begins: rank 0, alone, leaves by itself. In how many seconds."""
    pids = start(recipe, log)
    await_save(recipe, pids, 2)
    os.kill(pids[1], signal.SIGKILL)
    begun = time.monotonic()
    codes = wait(pids)
    assert codes == [5, -signal.SIGKILL], codes
    reason = json.loads((recipe.run_dir / "exit.json").read_text())["reason"]
    assert reason.startswith("rank 1 has gone"), reason
    return time.monotonic() - begun


def kill_in_a_save(recipe: Recipe, log: Path, chance: random.Random, save_seconds: float) -> str:
    """One attempt, killed within one of its first saves: how."""
    run_dir = recipe.run_dir
    pids = start(recipe, log)
    seen = await_save(recipe, pids, chance.choice([1, 1, 1, 2]))
    time.sleep(chance.uniform(0, 1.2 * save_seconds))
    how = chance.choice(["together", "together", "one stopped first", "one killed first"])
    first = chance.randrange(WORLD)
    before = newest_committed(run_dir)
    if how != "together":
        os.kill(pids[first], signal.SIGSTOP if how == "one stopped first" else signal.SIGKILL)
        time.sleep(chance.uniform(0, save_seconds))
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    torn = any(p.name in seen for p in run_dir.glob("checkpoints/.staging-*"))
    wait(pids)
    chosen = checkpoint.choose(run_dir)
    step = checkpoint.read_manifest(chosen)["global_step"] if chosen else 0
    assert step >= before, f"step {before} was committed before the kill, and {step} would be gone on from"
    return f"{how}, {'torn' if torn else 'between'}"


def starts(run_dir: Path) -> list[int]:
    events = map(json.loads, (run_dir / "events.jsonl").read_text().splitlines())
    return [event["step"] for event in events if event["kind"] == "start"]


def limit(path: str) -> None:
    recipe = load_recipe(path)
    on = load_recipe(path, [f"output={recipe.run_dir}-continue", "checkpoint.on_failure=continue"])
    log = Path(f"{recipe.run_dir}.log")
    codes = [wait(start(each, log, limit_rank_1)) for each in (recipe, on)]
    print(json.dumps({"codes": codes, "printed": log.read_text()}))


def repeat(mode: str, path: str, times: int) -> None:
    recipe = load_recipe(path)
    every = 10 if mode == "kill" else 1000
    straight = load_recipe(path, [f"output={recipe.run_dir}-straight", f"checkpoint.every_steps={every}"])
    log = Path(f"{recipe.run_dir}.log")
    assert not recipe.run_dir.exists()
    assert wait(start(straight, log), WHOLE_RUN_SECONDS) == [0, 0], log.read_text()[-3000:]
    chance, how, expected = random.Random(int(os.environ.get("SEED", 0))), Counter(), [0]
    events = map(json.loads, (straight.run_dir / "events.jsonl").read_text().splitlines())
    seconds = [event["seconds"] for event in events if event["kind"] == "saved"]
    alone_seconds = lose_one_in_a_save(recipe, log) if mode == "kill" else 0.0
    if mode == "kill":
        expected.append(newest_committed(recipe.run_dir))
    for _ in range(times):
        if mode == "kill":
            how[kill_in_a_save(recipe, log, chance, sum(seconds) / len(seconds))] += 1
        else:
            codes = wait(start(recipe, log, stop_soon))
            how[f"codes {codes}"] += 1
            assert codes == [75, 75], log.read_text()[-3000:]
        chosen = checkpoint.choose_together(recipe.run_dir)  # puts in place what was just about to be committed
        expected.append(checkpoint.read_manifest(chosen)["global_step"] if chosen else 0)
    assert wait(start(recipe, log), WHOLE_RUN_SECONDS) == [0, 0], log.read_text()[-3000:]
    assert starts(recipe.run_dir) == expected, (starts(recipe.run_dir), expected)
    assert not [*recipe.run_dir.glob("checkpoints/.staging-*")]
    assert steps(recipe.run_dir) == steps(straight.run_dir)
    assert state(recipe.run_dir) == state(straight.run_dir)
    same = digest(recipe.run_dir) == digest(straight.run_dir)
    resumed = sum(step > 0 for step in expected[-times:])
    print(json.dumps({"attempts": times, "resumed_beyond_0": resumed, "how": how, "last_start": expected[-1],
                      "save_seconds": round(sum(seconds) / len(seconds), 3), "alone_seconds": round(alone_seconds, 1),
                      "equal": same}))  # fmt: skip
    assert same


if __name__ == "__main__":
    torch.set_num_threads(1)
    for mode, path, times in zip(*[iter(sys.argv[1:])] * 3, strict=True):
        limit(path) if mode == "limit" else repeat(mode, path, int(times))
