"""Is there room on a run's disk for the checkpoints that will lie there at once? Asked before the first step, and by the doctor.

Owns the rule; how many a recipe keeps is the recipe's (most_checkpoints), and each save looks again for itself (saving.py).

    check_room(run_dir, recipe, recipe.phases)      # warns, or raises EnvironmentProblem
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from slm.checkpoint import folder_name, manifest_or_none, newest_first
from slm.errors import EnvironmentProblem
from slm.memory import STATE_BYTES
from slm.recipe import Phase, Recipe

log = logging.getLogger("slm")


@dataclass(frozen=True)
class Room:
    """On a run's disk, for the checkpoints that will lie there at once."""

    folder: Path  # that was asked: the run's, or the nearest above it that is there
    each_bytes: int
    num: int  # that are still to be made room for
    free_bytes: int

    @property
    def is_enough(self) -> bool:
        return self.free_bytes >= self.num * self.each_bytes


def room(run_dir: Path, recipe: Recipe, phases: Sequence[Phase]) -> Room:
    """Before the first of these phases, whatever the number of ranks. What lies there of what will be kept needs no more."""
    folder, settings = run_dir.absolute(), recipe.checkpoint
    here = {one: manifest for one in newest_first(folder / "checkpoints") if (manifest := manifest_or_none(one))}
    passing = sum(not manifest.get("permanent", True) for manifest in here.values())
    # Ends of phases before the last, and those of keep_every_steps. (Of a phase made longer its earlier end stays, besides.)
    counted = [folder_name(phase.name, phase.num_steps) for phase in phases[:-1]]
    steps, every = {phase.name: phase.num_steps for phase in phases}, settings.keep_every_steps
    for one in here if every else ():
        name, _, step = one.name.rpartition("-")
        if step.isdecimal() and int(step) < steps.get(name, 0) and int(step) % every == 0:
            counted.append(one.name)
    lasting = sum(one.name in counted for one in here)
    num = max(1, recipe.most_checkpoints(phases) - min(passing, settings.keep_last) - lasting)
    there = next(above for above in (folder, *folder.parents) if above.exists())
    return Room(there, STATE_BYTES * recipe.model.num_parameters(), num, shutil.disk_usage(there).free)


def check_room(run_dir: Path, recipe: Recipe, phases: Sequence[Phase]) -> None:
    """Warns if there is not enough room; raises EnvironmentProblem if not even one fits and a failed save would end the run."""
    settings, found = recipe.checkpoint, room(run_dir, recipe, phases)
    each, more, free = found.each_bytes, found.num, found.free_bytes
    if found.is_enough:
        return
    problem = (
        f"checkpoints of this model have {each:,} bytes each, and {run_dir} has {free:,} free: "
        f"{free // each} of the {more} that are to lie there at once (checkpoint.keep_last {settings.keep_last}, the next "
        "one, and what stays: ends of phases, the best, those of keep_every_steps)"
    )
    fix = f"free {more * each - free:,} bytes, give the run (output) a larger disk, or lower checkpoint.keep_last"
    if free < each and settings.on_failure == "stop":
        raise EnvironmentProblem(problem, fix=fix)
    log.warning("%s. A save will fail. Fix: %s", problem, fix)
