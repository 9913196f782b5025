"""What a run starts from: its data, opened and checked; its position; its weights.

Owns the step from a recipe's names to open datasets and a filled engine, and the refusals on the way. The loop itself
is in train.py.

    data = open_phase_data(recipe, recipe.phases[0])
    load_initial_state(engine, recipe)
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError

from slm import checkpoint
from slm.contradictions import is_made_for_another_context
from slm.data.batches import EvaluationBatches, PhaseData
from slm.data.selection import selected_documents
from slm.data.tokens import TokenDataset
from slm.distill.student import check_online, open_caches
from slm.engine import Engine
from slm.errors import UserError
from slm.evaluate import HeldOut
from slm.gate import is_at_an_end, parts, verdicts
from slm.model.config import ModelConfig
from slm.model.hf import config_to_hf, read_config, refuse_pickles
from slm.model.llama import initial_value
from slm.parallel import Share
from slm.recall.samples import Filler, Form, Grid
from slm.recall.score import RecallBatches
from slm.recipe import Phase, Recipe, recipe_from_tree
from slm.runtime import Ranks

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


def open_phase_data(recipe: Recipe, phase: Phase) -> PhaseData:
    """The phase's packed sequences in their order. Raises UserError for a missing or too small dataset."""
    names = phase.mixture or recipe.data.sources
    datasets = {name: TokenDataset(recipe.data.sources[name]) for name in names}
    data = PhaseData(
        datasets,
        dict(phase.mixture) or None,
        seq_len=phase.seq_len,
        seed=recipe.seed,
        phase_name=phase.name,
        pad_id=0,
        repeats=dict(phase.repeats),
        selections={name: selected_documents(recipe, phase, name, dataset) for name, dataset in datasets.items()},
        plans_folder=recipe.run_dir / "packing" / phase.name,
        teachers=open_caches(recipe, phase, datasets),
    )
    if data.num_sequences < phase.global_batch:
        raise UserError(
            f"phases.{phase.name}: its data packs into {data.num_sequences} sequences of {phase.seq_len} tokens, fewer "
            f"than the {phase.global_batch} of one step (batch_tokens {phase.batch_tokens}), so a step would hold the same "
            "text twice",
            fix="give more text, or make batch_tokens or seq_len smaller",
        )
    return data


def check_vocabulary(recipe: Recipe, data: list[PhaseData], validation: dict[str, TokenDataset]) -> None:
    datasets = {name: dataset for phase_data in data for name, dataset in phase_data.sources.items()}
    datasets |= {f"validation.{name}": dataset for name, dataset in validation.items()}
    for name, dataset in datasets.items():
        if dataset.vocab_size > recipe.model.vocab_size:
            raise UserError(
                f"model.vocab_size is {recipe.model.vocab_size}, smaller than the tokenizer's {dataset.vocab_size} that "
                f"data {name} was made with: token ids would fall outside the embedding",
                fix=f"set model.vocab_size to {dataset.vocab_size} or more (a multiple of 64 is fastest)",
            )
    fingerprints = {name: dataset.tokenizer_fingerprint for name, dataset in datasets.items()}
    if len(set(fingerprints.values())) > 1:
        listed = ", ".join(f"{name}: {fp[:12]}" for name, fp in fingerprints.items())
        raise UserError(
            f"data were made with different tokenizers ({listed}), so the same id would mean different text",
            fix="make all token shards with one tokenizer",
        )


def check_lengths(recipe: Recipe, data: dict[str, PhaseData], validation: dict[str, TokenDataset]) -> None:
    """Raises UserError if a phase that extends the context has no document to learn it from, or its gate none to judge it by."""
    longest_before = _length_of_origin(recipe)
    for phase in recipe.phases:
        if phase.name not in data:  # of another job
            longest_before = max(longest_before, phase.seq_len)
            continue
        longest = data[phase.name].longest_piece
        if longest < phase.seq_len:
            problem = (
                f"phases.{phase.name}.seq_len is {phase.seq_len}, and its longest document has {longest} tokens: attention "
                "stays within a document, so nothing in it teaches to look back so far"
            )
            if longest_before and phase.seq_len > longest_before:
                raise UserError(
                    problem,
                    fix=f"give it longer documents (mixture, filters.SOURCE.min_doc_tokens), or seq_len up to {longest}",
                )
            log.warning("%s", problem)
        if is_made_for_another_context(recipe, phase, longest_before):
            assert phase.rope_scaling is not None
            log.warning(
                "phases.%s.rope_scaling.original_max_position_embeddings is %d, and the context before it was %d: angles are "
                "stretched as for another model",
                phase.name, phase.rope_scaling.original_max_position_embeddings, longest_before,
            )  # fmt: skip
        longest_before = max(longest_before, phase.seq_len)
        if phase.gate is not None and phase.gate.position_rise is not None:
            held_out = max(int(np.diff(s.doc_offsets).max(initial=0)) for d in validation.values() for s in d.shards)
            if held_out < phase.seq_len:
                raise UserError(
                    f"phases.{phase.name}.gate.position_rise looks at held-out documents that fill its {phase.seq_len} tokens, "
                    f"and the longest of data.validation has {held_out}",
                    fix="hold out longer documents, or leave position_rise out",
                )


def _length_of_origin(recipe: Recipe) -> int:
    """The longest seq_len that the weights of init_from have seen, as far as is known; else 0."""
    if recipe.init_from is None or not Path(recipe.init_from.path).exists():  # a run that has begun no longer needs it
        return 0
    _, reader = checkpoint.weight_source(recipe.init_from.path)
    if reader is not None:
        return max(phase["seq_len"] for phase in reader.state["recipe"]["phases"])
    config = read_config(recipe.init_from.path)
    scaling = config.rope_scaling
    return (
        scaling.original_max_position_embeddings if scaling and scaling.factor > 1 else config.max_position_embeddings
    )


def check_tokenizer(recipe: Recipe, data: list[PhaseData]) -> None:
    """Text is generated and exported with recipe.tokenizer: it must be the one that made the tokens."""
    if not recipe.tokenizer or not data:
        return
    from slm.tokenizer import load_tokenizer

    made_with = next(iter(data[0].sources.values())).tokenizer_fingerprint
    found = load_tokenizer(recipe.tokenizer).fingerprint
    if found != made_with:
        raise UserError(
            f"tokenizer is {recipe.tokenizer} (fingerprint {found[:12]}), but the token shards were made with another "
            f"({made_with[:12]}): what the model writes would be decoded to nonsense",
            fix="name the tokenizer that slm-data shards was given",
        )


def open_recall(recipe: Recipe, phases: list[Phase], validation: dict[str, TokenDataset]) -> dict[str, Grid]:
    """The samples of eval.recall by phase; none where no length fits. Raises UserError where they cannot be made."""
    settings = recipe.eval.recall
    if settings is None:
        return {}
    from slm.tokenizer import load_tokenizer

    form = Form(settings, load_tokenizer(recipe.tokenizer).encode)
    filler = Filler([dataset for name, dataset in validation.items() if settings.filler in ("", name)])
    grids = {phase.name: Grid(form, filler, phase.seq_len, "eval.recall.lengths") for phase in phases}
    return {name: grid for name, grid in grids.items() if grid.cells}


def held_out(
    recipe: Recipe, validation: dict[str, TokenDataset], recall: dict[str, Grid], ranks: Ranks, phase: Phase
) -> HeldOut:
    """What an evaluation of this phase looks at. Shorter sequences go through the model more at a time; at one length every
    phase sees the same ones."""
    grid = recall.get(phase.name)
    share = Share.of(ranks.rank, ranks.world_size, phase.sequence_parallel)

    def batches(seq_len: int) -> dict[str, EvaluationBatches]:
        micro_batch = phase.micro_batch * (phase.seq_len // seq_len)
        most = recipe.eval.max_sequences or None
        return {name: EvaluationBatches(d, seq_len, micro_batch, share, most) for name, d in validation.items()}

    return HeldOut(
        phase.seq_len,
        batches(phase.seq_len),
        {n: batches(n) for n in recipe.eval.seq_lens if n < phase.seq_len},
        RecallBatches(grid, phase.micro_batch, share) if grid else None,
    )


def identity(recipe: Recipe, phase: Phase, data: PhaseData) -> dict[str, Any]:
    """What may not change under a half-done phase, because the steps before and after would not belong together."""
    dataset = next(iter(data.sources.values()))
    teachers = [teacher.fingerprint for teacher in data.teachers] + check_online(recipe, phase, dataset)
    return {
        "seed": recipe.seed,
        "model": recipe.model_of(phase).model_dump(mode="json"),
        "data": data.fingerprint,
        "tokenizer": next(iter(data.sources.values())).tokenizer_fingerprint,
        **({"teachers": teachers} if teachers else {}),
    }


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
    if folder is None:
        if resume.must:
            raise UserError(
                f"--must-resume, and {run_dir}/checkpoints holds no checkpoint: the run would begin at step 0",
                fix="check the recipe's name and output, or leave --must-resume out to begin",
            )
        return None
    return checkpoint.Reader(folder, weights_only=resume.fresh_optimizer)


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
    if phase is not None and phase.name in identities and 0 < position.step < parts(phase)[-1].stop:
        at = f"phases.{phase.name} is at step {position.step} of {phase.num_steps}"
        fields = _changed_fields(reader, recipe)
        other_run = _of_another_run(reader.state["identity"], identities[phase.name], fields, phase.name)
        if other_run:
            raise UserError(
                f"{at}, but what it trains on has changed: " + "; ".join(other_run),
                fix="put it back, or start a new run (another `name`) with init_from",
            )
        steering = [change for field, change in fields.items() if _steers(field, phase.name)]
        # One that was over is made longer on purpose: what it is from here on is said, as of a new phase.
        was_over = reader.state["permanent"]
        if steering and not allow_change and not was_over:
            raise UserError(
                f"{at}, and its other steps would be taken otherwise than those before: " + "; ".join(steering),
                fix="put it back, or say --allow-change to go on so",
            )
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
    """Whether a field of the recipe changes what a step of the phase computes, beyond the order of additions. (Its tokens do
    too, by the schedule: but a phase is made longer on purpose, and that is said in the log.)"""
    steering = ("lr", "schedule", "loss", "mixture", "repeats", "filters", "rope_scaling")
    own = field.startswith(tuple(f"phases.{phase}.{name}" for name in steering))
    return own or field.startswith("optim.") or field == "precision"


def _gate_then(reader: checkpoint.Reader, name: str) -> bool:
    """Whether the recipe that the checkpoint was made by had a gate at this phase."""
    return any(phase["name"] == name and phase.get("gate") for phase in reader.state["recipe"]["phases"])


def check_init_from(recipe: Recipe) -> None:
    """Raises UserError if init_from names nothing, or an optimiser where there is none."""
    start = recipe.init_from
    if start is None:
        return
    is_hugging_face = (Path(start.path) / "config.json").is_file()
    if is_hugging_face and start.optimizer:
        raise UserError(
            f"init_from.optimizer is true, but {start.path} is a Hugging Face folder, which holds none",
            fix="set init_from.optimizer to false",
        )
    if not is_hugging_face and not Path(start.path).exists():
        raise UserError(
            f"init_from.path {start.path} does not exist", fix="give a run, a checkpoint or a Hugging Face folder"
        )
    refuse_pickles(start.path)


def load_initial_state(engine: Engine, recipe: Recipe) -> None:
    """Fills a fresh engine from init_from, else with the initial weights."""
    if recipe.init_from is None:
        engine.write_weights(lambda name, shape: initial_value(recipe.model, name, shape, recipe.seed))
        return
    value, reader = checkpoint.weight_source(recipe.init_from.path)
    _check_same_function(engine, recipe.init_from.path, reader)
    if reader is None:
        engine.write_weights(value)
    elif recipe.init_from.optimizer:
        restore_state(engine, reader)
    else:
        engine.write_state(_weights_of(reader))


def _check_same_function(engine: Engine, path: str, reader: checkpoint.Reader | None) -> None:
    """Weights of the same shapes can be another function: other heads or another epsilon."""
    if reader is not None:
        for name, shape in engine.shapes.items():
            reader.check_shape(name, shape)
    theirs = ModelConfig(**reader.state["model"]) if reader is not None else read_config(path)
    ours = engine.module.config
    if ours.tie_word_embeddings and not theirs.tie_word_embeddings:
        raise UserError(
            f"init_from: {path} has an output head of its own, which the recipe's model, whose head is the embedding "
            "(tie_word_embeddings), would drop",
            fix="set model.tie_word_embeddings to false",
        )
    other_angles = config_to_hf(theirs)["rope_parameters"] != config_to_hf(ours)["rope_parameters"]
    for field in ("rope_theta", "rope_scaling"):  # changed on purpose when a context is extended
        if other_angles and getattr(theirs, field) != getattr(ours, field):
            log.warning(
                "init_from: %s has %s %s, this run %s: its positions turn by other angles until it is trained to",
                path,
                field,
                getattr(theirs, field),
                getattr(ours, field),
            )
    for field in ("num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps"):
        if getattr(theirs, field) != getattr(ours, field):
            raise UserError(
                f"init_from: {path} has {field} {getattr(theirs, field)}, the recipe's model {getattr(ours, field)}: the same "
                "weights would compute something else",
                fix=f"set model.{field} to {getattr(theirs, field)}",
            )


def restore_state(engine: Engine, reader: checkpoint.Reader) -> None:
    """Fills a fresh engine with a checkpoint's weights, moments and counters, whatever layout wrote it."""
    for name, shape in engine.shapes.items():
        reader.check_shape(name, shape)
    reader.check_optimizer()
    engine.write_state(_weights_of(reader) if reader.weights_only else reader.read)
    if reader.weights_only:
        log.warning("--fresh-optimizer: the moments begin at zero, and Adam counts its updates from 0")
    else:
        engine.optimizer_steps = reader.state["optimizer_steps"]
    engine.loss_scale = reader.state["loss_scale"]
    log.info("read %s of the %s bytes of %s", f"{reader.bytes_read:,}", f"{reader.num_bytes:,}", reader.folder)


def _weights_of(reader: checkpoint.Reader) -> Callable[[str, str, int, int], torch.Tensor | None]:
    """For Engine.write_state: the part of the weights that this rank holds, and no moments."""
    return lambda kind, *place: reader.read(kind, *place) if kind == "master" else None


def recipe_changes(reader: checkpoint.Reader, recipe: Recipe) -> list[str]:
    """What the recipe says otherwise than when the checkpoint was made, one change an entry, also written to the log."""
    changes = [*_changed_fields(reader, recipe).values()]
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
    if until and until not in names:
        raise UserError(
            f"--until is {until!r}, which is no phase of the recipe ({', '.join(names)})", fix="name one of them"
        )
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


def origin(recipe: Recipe) -> str:
    return recipe.init_from.path if recipe.init_from else f"random weights, seed {recipe.seed}"
