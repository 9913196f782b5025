"""Where a run stands: what of each phase is done, how the last attempt ended, and what the queue says of its jobs. No torch.

Owns RUN/jobs.json, which launchers/slurm/submit.py writes: one entry for each stage of the chain that was submitted. What is
done is told by what lies on the disk, not by the queue, which forgets.

    print_status(Path("runs/llama3.2-1b"))
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slm.data.tokens import MANIFEST
from slm.errors import SLMError, UserError
from slm.recipe import Phase, Recipe, load_recipe
from slm.runtime import atomic_write

JOBS = "jobs.json"
CHECKED = "checked"  # an empty file, as old as the last check of the nodes that found nothing wrong
PHASE, DATA = "phase ", "data "  # a stage's name begins so
ANSWER_SECONDS = 60  # for SLURM's controller
CHECK_SECONDS = 24 * 3600  # a check of the nodes is good for a day
# What squeue says of jobs that are still to come or going on; anything else has ended.
LIVE = frozenset({"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "SIGNALING",
                  "STAGE_OUT", "STOPPED", "RESIZING", "SPECIAL_EXIT", "RESV_DEL_HOLD", "REQUEUE_FED"})  # fmt: skip


@dataclass(frozen=True)
class Standing:
    """Of one phase: the steps in its newest checkpoint, and whether the next phase may begin."""

    step: int
    is_over: bool


# ------------------------------------------------------------------------------------ what lies on the disk
def standings(run_dir: Path, recipe: Recipe) -> dict[str, Standing]:
    """{phase: where it stands}, by the run's newest checkpoint. (A phase is over with its last step, and if its gate holds.)"""
    phase_name, step = newest_position(run_dir)
    names = [phase.name for phase in recipe.phases]
    at = names.index(phase_name) if phase_name in names else -1
    found = {}
    for index, phase in enumerate(recipe.phases):
        done = phase.num_steps if index < at else step if index == at else 0
        over = index < at or (index == at and done >= phase.num_steps and gate_held(run_dir, phase))
        found[phase.name] = Standing(done, over)
    return found


def newest_position(run_dir: Path) -> tuple[str, int]:
    """(phase, its step) of the newest checkpoint; ("", 0) if there is none. Looks at manifests, and verifies nothing."""
    newest, position = -1, ("", 0)
    for manifest in run_dir.glob("checkpoints/[!.]*/manifest.json"):
        try:
            step = json.loads(manifest.read_text())["global_step"]
            at = json.loads((manifest.parent / "state.json").read_text())["position"]
        except (OSError, ValueError, KeyError, TypeError):  # being removed, or not whole: another one is gone on from
            continue
        if step > newest and not manifest.parent.name.endswith(".damaged"):
            newest, position = step, (at["phase"], at["step"])
    return position


def gate_held(run_dir: Path, phase: Phase) -> bool:
    """Whether a phase has no gate, or the last look at it let the run pass."""
    if phase.gate is None:
        return True
    told = [event for event in events(run_dir) if event.get("kind") == "gate" and event.get("phase") == phase.name]
    return bool(told) and bool(told[-1].get("passed"))


def suspects(run_dir: Path) -> list[str]:
    """Nodes, as SLURM calls them, on which a rank of this run hung or held other weights than most; the newest last."""
    return [str(node) for event in events(run_dir) if (node := event.get("suspect_node"))]


def newest_suspect(run_dir: Path) -> str:
    """The node that the last attempt has blamed for its end; empty if none."""
    found = ""
    for event in events(run_dir):
        found = "" if event.get("kind") == "start" else str(event.get("suspect_node") or found)
    return found


def events(run_dir: Path) -> list[dict[str, Any]]:
    """What is readable of events.jsonl: a kill leaves lines that are cut short."""
    return json_lines(run_dir / "events.jsonl")


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file that are JSON objects; none if it is not there. For any file that a run appends to."""
    found = []
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:  # cut short by a kill
            continue
        found += [row] if isinstance(row, dict) else []
    return found


def json_object(path: Path) -> dict[str, Any]:
    """Empty if it is not there, or not what we write."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def has_saved(run_dir: Path) -> bool:
    """Whether a run has a checkpoint, whole or not."""
    return any(run_dir.glob("checkpoints/[!.]*/manifest.json"))


def is_done(stage: str, words: list[str], run_dir: Path, recipe: Recipe) -> bool:
    """Whether what a stage of the chain is for lies on the disk. words: the arguments of its job script."""
    if stage.startswith(PHASE):
        return standings(run_dir, recipe)[stage.removeprefix(PHASE)].is_over
    if stage.startswith(DATA):
        output = Path(words[words.index("--output") + 1])
        return any((folder / MANIFEST).exists() for folder in (output, output / "train"))
    if stage == "teacher":
        from slm.distill.wanted import wanted_caches

        try:
            return all(w.path.exists() for w in wanted_caches(recipe))
        except SLMError:  # its token shards are still to come
            return False
    if stage == "check":
        return _age_seconds(run_dir / CHECKED) < CHECK_SECONDS
    saved = [_age_seconds(path) for path in run_dir.glob("checkpoints/[!.]*/manifest.json")]
    return _age_seconds(run_dir / "eval" / "final.json") <= min(saved, default=-1.0)


def _age_seconds(path: Path) -> float:
    """Infinite for a file that is not there."""
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return math.inf


# ------------------------------------------------------------------------------------------------ the queue
def read_jobs(run_dir: Path) -> dict[str, dict[str, Any]]:
    """{stage: {"job": its number, "submitted": time, "arguments": of its script}}"""
    found = json_object(run_dir / JOBS)
    entries = {name: entry for name, entry in found.items() if isinstance(entry, dict)}
    return {n: e for n, e in entries.items() if isinstance(e.get("job"), str) and isinstance(e.get("arguments"), list)}


def write_jobs(run_dir: Path, jobs: dict[str, dict[str, Any]]) -> None:
    atomic_write(run_dir / JOBS, json.dumps(jobs, indent=2) + "\n")


def queue() -> dict[str, list[tuple[str, str]]] | None:
    """{job: (state, reason or nodes) of it or of each member of the array}, as far as SLURM still knows; None where it cannot
    be asked: no squeue here, or no answer."""
    if shutil.which("squeue") is None:
        return None
    command = ["squeue", "--noheader", "--states=all", "--array", "--format=%F|%T|%R"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_SECONDS)
    except subprocess.TimeoutExpired:
        return None
    if done.returncode:
        return None
    found: dict[str, list[tuple[str, str]]] = {}
    for line in done.stdout.splitlines():
        job, state, reason = line.split("|", 2)
        found.setdefault(job, []).append((state, reason))
    return found


def is_live(members: list[tuple[str, str]]) -> bool:
    """Whether something of a job is still to come or going on. (What waits for a job that has failed never comes.)"""
    return any(state in LIVE and "DependencyNeverSatisfied" not in why for state, why in members)


def in_words(members: list[tuple[str, str]]) -> str:
    """running on node[1-2]; 3 running, 1 pending (Priority)"""
    if len(members) == 1:
        (state, reason), nodes = members[0], not members[0][1].startswith("(")
        return f"{state.lower()} {'on ' if nodes else ''}{reason}" if reason else state.lower()
    return ", ".join(f"{count} {state.lower()}" for state, count in Counter(state for state, _ in members).items())


# ------------------------------------------------------------------------------------------------- in words
def status(run_dir: Path) -> dict[str, Any]:
    """Everything that print_status shows. Raises UserError for a folder that is no run's."""
    recipe_path = run_dir / "recipe.yaml"
    jobs = read_jobs(run_dir)
    if not recipe_path.exists() and not jobs:
        raise UserError(
            f"{run_dir} is no run: it has neither recipe.yaml nor {JOBS}", fix="give a run's folder, as runs/demo"
        )
    recipe = load_recipe(recipe_path) if recipe_path.exists() else None
    known = queue() if jobs else None
    stages: list[dict[str, Any]] = []
    for name, entry in jobs.items():
        members = (known or {}).get(entry["job"], [])
        done = recipe is not None and is_done(name, entry["arguments"], run_dir, recipe)
        if members:
            said = in_words(members)
        else:
            said = "SLURM does not answer" if known is None else "" if done else "no longer in the queue, and not done"
        if not done and not is_live(members) and known is not None:
            logs = sorted(
                run_dir.glob(f"logs/slm-*-{name.replace(' ', '-')}-*.log"), key=lambda path: path.stat().st_mtime
            )
            said += f": see {logs[-1]}" if logs else ""
        stages.append({"stage": name, "job": entry["job"], "queue": said, "live": is_live(members), "done": done})
    found: dict[str, Any] = {"run": str(run_dir), "stages": stages, "phases": []}
    if recipe is not None:
        last = _last_row(run_dir)
        for phase in recipe.phases:
            where = standings(run_dir, recipe)[phase.name]
            row = {"phase": phase.name, "saved_step": where.step, "steps": phase.num_steps, "over": where.is_over}
            if last.get("phase") == phase.name and not where.is_over:
                row |= {"loss": last.get("loss"), "tokens_per_second": last.get("tokens_per_second")}
            found["phases"].append(row)
        found["last_step_time"] = last.get("time")
    found["exit"] = json_object(run_dir / "exit.json") or None
    return found


def _last_row(run_dir: Path) -> dict[str, Any]:
    rows = [row for row in json_lines(run_dir / "metrics.jsonl")[-50:] if "loss" in row]
    return rows[-1] if rows else {}


def print_status(run_dir: Path) -> None:
    """A table of the stages that were submitted, one of the phases, and how the last attempt ended."""
    from rich.console import Console
    from rich.table import Table

    found, console = status(run_dir), Console()
    if found["stages"]:
        table = Table(title="jobs", title_justify="left")
        for column in ("stage", "job", "", "queue"):
            table.add_column(column)
        for stage in found["stages"]:
            table.add_row(stage["stage"], stage["job"], "done" if stage["done"] else "", stage["queue"])
        console.print(table)
    if found["phases"]:
        table = Table(title=f"{run_dir}, as saved", title_justify="left")
        for column in ("phase", "step", "of", "", "loss", "tokens/s"):
            table.add_column(column, justify="left" if column in ("phase", "") else "right")
        for row in found["phases"]:
            speed, loss = row.get("tokens_per_second"), row.get("loss")
            table.add_row(
                row["phase"], f"{row['saved_step']:,}", f"{row['steps']:,}", _word(row, run_dir),
                "" if loss is None else f"{loss:.4f}", "" if speed is None else f"{speed:,.0f}",
            )  # fmt: skip
        console.print(table)
    if found.get("last_step_time"):
        console.print(f"last line of metrics.jsonl: {_ago(found['last_step_time'])}", highlight=False)
    if found["exit"]:
        ended = found["exit"]
        reason = str(ended["reason"]).partition("\n")[0]
        console.print(
            f"last attempt: code {ended['code']}, {reason} ({_ago(ended['time'])})", highlight=False, markup=False
        )
    elif found["phases"]:
        console.print("last attempt: going on, or ended without a word (killed)", highlight=False)


def _word(row: dict[str, Any], run_dir: Path) -> str:
    if row["over"]:
        return "over"
    if row["saved_step"] >= row["steps"]:
        return "gate not passed"
    return "begun" if row["saved_step"] else "to come"


def _ago(moment: float) -> str:
    seconds = max(0, time.time() - moment)
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} seconds ago"
