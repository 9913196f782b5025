"""Where a run stands: the checkpoint that it goes on from, whether the recipe still fits it, and the phases that are left.

Owns the refusals of a recipe that has changed under a run. Opening data and filling an engine are in inputs.py.

    reader = open_checkpoint(run_dir, Resume(must=True))
    position = position_of(reader, recipe, identities)
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from slm import checkpoint, parallel
from slm.errors import CorruptArtefact, UserError
from slm.gate import is_at_an_end, parts, verdicts
from slm.model.config import ModelConfig
from slm.optim import learning_rate
from slm.plan import check_until
from slm.recipe import Phase, Recipe, recipe_from_tree

log = logging.getLogger("slm")


@dataclass(frozen=True)
class Position:
    """Where training stands: what a resume needs beside weights and moments. `step` counts within `phase`."""

    phase: str = ""
    step: int = 0
    global_step: int = 0
    tokens: int = 0  # of documents, over all phases, padding not counted
    skipped_in_a_row: int = 0
    best_loss: float | None = None  # lowest held-out loss of this phase
    rollbacks: int = 0  # within this phase
    steps_left_out: int = 0  # of this phase: whose data a rollback passed over

    @classmethod
    def of(cls, state: dict[str, Any]) -> Position:
        """Of a checkpoint's state."""
        return cls(**state["position"])

    def at_start_of(self, phase: str) -> Position:
        return replace(self, phase=phase, step=0, best_loss=None, rollbacks=0, steps_left_out=0)


@dataclass(frozen=True)
class Resume:
    """What a user says about going on. must: not from step 0. allow_change: though fields that steer the steps have changed.
    fresh_optimizer: from the weights alone."""

    must: bool = False
    allow_change: bool = False
    fresh_optimizer: bool = False


def open_checkpoint(run_dir: Path, resume: Resume) -> checkpoint.Reader | None:
    """What the run goes on from, the same on all ranks; None if it is to begin. Raises UserError if it must not begin."""
    folder = checkpoint.choose_together(run_dir)
    parallel.first_rank_decides(_tell_of_remains, run_dir, folder)
    if folder is None:
        if resume.must:
            raise UserError(
                f"--must-resume, and {run_dir}/checkpoints holds no checkpoint: the run would begin at step 0",
                fix="check the recipe's name and output, or leave --must-resume out to begin",
            )
        return None
    return parallel.together(partial(checkpoint.Reader, folder, weights_only=resume.fresh_optimizer))


def _tell_of_remains(run_dir: Path, chosen: Path | None) -> None:
    """Says which folders are no checkpoints any more. Raises CorruptArtefact where nothing is left of a run that had saved."""
    root = run_dir / "checkpoints"
    remains = [
        p.parent.name for p in sorted(root.glob("[!.]*/state.json")) if not (p.parent / "manifest.json").exists()
    ]
    for name in remains:
        log.warning("passing over %s/%s, which has no manifest.json: it is not whole", root, name)
    saved = run_dir / "events.jsonl"
    if chosen is None and (remains or (saved.is_file() and '"kind": "saved"' in saved.read_text(errors="replace"))):
        raise CorruptArtefact(
            f"{run_dir} has saved checkpoints ({saved.name}), and {root} holds none that is whole: the run would begin at step 0 "
            "and write over what is there",
            fix="put checkpoints/ back, or give the run another name; to begin anew, remove the folder",
        )


def position_of(
    reader: checkpoint.Reader, recipe: Recipe, identities: dict[str, dict[str, Any]], allow_change: bool = False
) -> Position:
    """Where a checkpoint of this very run stands. Raises UserError if the recipe no longer fits it."""
    reader.check_optimizer()
    position = Position.of(reader.state)
    phase = next((p for p in recipe.phases if p.name == position.phase), None)
    # Beyond the end stands what a gate's repetition trained, which the recipe may no longer ask for.
    repeated = reader.state["permanent"] and _gate_then(reader, position.phase)
    if phase is not None and position.step > parts(phase)[-1].stop and not repeated:
        raise UserError(
            f"phases.{phase.name}.tokens comes to {phase.num_steps} steps, but the run has already done {position.step} of "
            "them, and steps cannot be taken back",
            fix=f"give at least {position.step * phase.batch_tokens} tokens, or start a new run (another `name`)",
        )
    if phase is not None and recipe.model_of(phase) != ModelConfig(**reader.state["model"]):
        was, now = reader.state["model"], recipe.model_of(phase).model_dump(mode="json")
        changed = [f"model.{key} was {was[key]}, is {now[key]}" for key in now if was.get(key) != now[key]]
        raise UserError(
            f"the run's checkpoints are of another model: {'; '.join(changed)}",
            fix="put it back, or start a new run (another `name`)",
        )
    other_length = _other_length(reader, recipe)
    # One that was over is made longer on purpose: what it is from here on is said, as of a new phase.
    was_over = reader.state["permanent"]
    shortened = [other_length.text] if other_length is not None and other_length.is_shorter and not was_over else []
    if phase is not None and phase.name in identities and 0 < position.step < parts(phase)[-1].stop:
        at = f"phases.{phase.name} is at step {position.step} of {phase.num_steps}"
        fields = _changed_fields(reader, recipe)
        other_run = _of_another_run(reader.state["identity"], identities[phase.name], fields, phase.name)
        if other_run:
            raise UserError(
                f"{at}, but what it trains on has changed: " + "; ".join(other_run),
                fix="put it back, or start a new run (another `name`) with init_from",
            )
        steering = shortened + [change for field, change in fields.items() if _steers(field, phase.name)]
        if steering and not allow_change and not was_over:
            raise UserError(
                f"{at}, and its other steps would be taken otherwise than those before: " + "; ".join(steering),
                fix="put it back, or say --allow-change to go on so",
            )
    elif shortened and not allow_change:  # to where it stands
        raise UserError(shortened[0], fix="put it back, or say --allow-change to end the phase here")
    return position


def _of_another_run(was: dict[str, Any], now: dict[str, Any], fields: dict[str, str], phase: str) -> list[str]:
    """What cannot be gone on with: the place in the order of the data would mean other documents. By the recipe's names."""
    found = [
        fields[name] for name in ("seed", f"phases.{phase}.seq_len", f"phases.{phase}.batch_tokens") if name in fields
    ]
    if was["data"] != now["data"]:
        words = ("mixture", "repeats", "filters")
        named = [
            change
            for field, change in fields.items()
            if field.startswith(("data.sources.", *(f"phases.{phase}.{word}" for word in words)))
        ]
        # Its order is drawn by the seed, and cut by seq_len: where those have changed, it need not have changed itself.
        if named or not found:
            found += named or ["data.sources: the recipe names the same folders, but their documents are others now"]
    if was.get("tokenizer") != now.get("tokenizer"):
        found.append("data.sources: the token shards were made with another tokenizer")
    if was.get("teachers") != now.get("teachers"):
        named = [change for field, change in fields.items() if field.startswith(("teacher.", f"phases.{phase}.loss."))]
        found += named or ["teacher: the recipe names the same, but its weights or its cache are others now"]
    return found


def _steers(field: str, phase: str) -> bool:
    """Whether a field of the recipe changes what a step of the phase computes, beyond the order of additions. (For its tokens see
    _other_length.)"""
    steering = ("lr", "schedule", "loss", "mixture", "repeats", "filters", "rope_scaling")
    own = field.startswith(tuple(f"phases.{phase}.{name}" for name in steering))
    return own or field.startswith("optim.") or field == "precision"


@dataclass(frozen=True)
class _OtherLength:
    text: str
    is_shorter: bool


def _other_length(reader: checkpoint.Reader, recipe: Recipe) -> _OtherLength | None:
    """What another number of tokens does to the schedule of the phase that the checkpoint is of; None if nothing."""
    position = Position.of(reader.state)
    then = next((p for p in reader.state["recipe"]["phases"] if p["name"] == position.phase), None)
    now = next((p for p in recipe.phases if p.name == position.phase), None)
    if then is None or now is None or not position.step:
        return None
    steps_then = -(-then["tokens"] // then["batch_tokens"])
    # A constant rate does not know where the phase ends, nor does a loss with one value for all of it.
    follows = now.schedule.type != "constant" or any(
        isinstance(v, dict) for v in (now.loss.alpha, now.loss.temperature)
    )
    if steps_then == now.num_steps or not follows or then["batch_tokens"] != now.batch_tokens:
        return None
    peak = now.lr or recipe.optim.lr
    was, is_now = (learning_rate(now.schedule, peak, position.step, steps) for steps in (steps_then, now.num_steps))
    shorter = now.num_steps < steps_then
    return _OtherLength(
        f"phases.{now.name}.tokens was {then['tokens']}, is {now.tokens}: at step {position.step} its schedule "
        f"({now.schedule.type}) is {'pressed' if shorter else 'stretched'} from {steps_then} steps to {now.num_steps}"
        + (
            f", and the next learning rate is {is_now:.3g} in place of {was:.3g}"
            if position.step < now.num_steps
            else ""
        ),
        shorter,
    )


def _gate_then(reader: checkpoint.Reader, name: str) -> bool:
    """Whether the recipe that the checkpoint was made by had a gate at this phase."""
    return any(phase["name"] == name and phase.get("gate") for phase in reader.state["recipe"]["phases"])


def recipe_changes(reader: checkpoint.Reader, recipe: Recipe) -> list[str]:
    """What the recipe says otherwise than when the checkpoint was made, one change an entry, also written to the log."""
    found = _changed_fields(reader, recipe)
    if other_length := _other_length(reader, recipe):
        found[f"phases.{reader.state['position']['phase']}.tokens"] = other_length.text
    changes = [*found.values()]
    for change in changes:
        log.info("from here on %s", change)
    return changes


def _changed_fields(reader: checkpoint.Reader, recipe: Recipe) -> dict[str, str]:
    """{field by its name in the recipe: what it was and is}."""
    then = reader.state["recipe"]
    try:
        then = Recipe.model_validate(then).model_dump(mode="json")  # fields that are newer than it have their defaults
    except ValidationError:
        pass  # of a version whose recipes this one refuses; compared as it is
    was, now = _flat(then), _flat(recipe.model_dump(mode="json"))
    return {
        field: f"{field} was {was.get(field)}, is {now.get(field)}"
        for field in {**was, **now}
        if was.get(field) != now.get(field)
    }


def _flat(tree: Any, at: str = "") -> dict[str, Any]:
    if isinstance(tree, dict) and tree and all(re.fullmatch(r"[0-9.e+-]+", str(key)) for key in tree):
        return {at: tree}  # a value over the phase (OverPhase)
    if isinstance(tree, dict):
        return {k: v for key, value in tree.items() for k, v in _flat(value, f"{at}.{key}" if at else key).items()}
    if isinstance(tree, list) and tree and isinstance(tree[0], dict):  # phases, by their names
        return {k: v for item in tree for k, v in _flat(item, f"{at}.{item.get('name')}").items()}
    return {at: tree}


def as_far_as_run(reader: checkpoint.Reader, recipe: Recipe) -> Recipe:
    """The recipe with the phases that are over as they were: they stay so whatever it says of them now. So that is told, and
    what is written down of the run (recipe.yaml, checkpoints) does not say otherwise."""
    names, at = [phase.name for phase in recipe.phases], reader.state["position"]["phase"]
    over = names[: names.index(at)] if at in names else []
    theirs = tuple(f"phases.{name}." for name in over)
    if told := [change for field, change in _changed_fields(reader, recipe).items() if field.startswith(theirs)]:
        log.warning("phases that are over stay as they were, so this has no effect: %s", "; ".join(told))
    was = {phase["name"]: phase for phase in reader.state["recipe"]["phases"] if phase["name"] in over}
    tree = recipe.model_dump(mode="json")
    tree["phases"] = [was.get(phase["name"], phase) for phase in tree["phases"]]
    try:
        return recipe_from_tree(tree, "the recipe with its first phases as they were run")
    except UserError:  # they name a source, or have a field, that is no more
        return recipe


def phases_to_run(recipe: Recipe, reader: checkpoint.Reader | None, until: str = "") -> list[Phase]:
    """remaining_phases without one that is over because its gate holds: nothing of what it needed need be here any more."""
    position = Position.of(reader.state) if reader else Position()
    phases = remaining_phases(recipe, position, until)
    if reader is None or not phases or phases[0].name != position.phase or not is_at_an_end(phases[0], position.step):
        return phases
    earlier = recipe.phases[: recipe.phases.index(phases[0])]
    told = verdicts(phases[0], earlier, reader.state.get("findings") or {}, reader.state.get("before"))
    return phases[1:] if all(holds for holds, _ in told) else phases


def remaining_phases(recipe: Recipe, position: Position, until: str = "") -> list[Phase]:
    """The phases that are not complete, or whose gate is still to be looked at, in order, up to that named `until`.

    Raises UserError if the checkpoint's phase, or `until`, is not in the recipe.
    """
    names = [phase.name for phase in recipe.phases]
    check_until(until, names)
    end = names.index(until) + 1 if until else len(names)
    if not position.phase:
        return recipe.phases[:end]
    if position.phase not in names:
        raise UserError(
            f"the run's last checkpoint is of phase {position.phase!r}, which the recipe no longer has ({', '.join(names)})",
            fix="put it back, or start a new run with init_from",
        )
    at = names.index(position.phase)
    over = position.step >= recipe.phases[at].num_steps and recipe.phases[at].gate is None
    return recipe.phases[at + over : end]
