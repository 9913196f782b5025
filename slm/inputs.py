"""What a run starts from: its data, opened and checked; its position; its weights.

Owns the step from a recipe's names to open datasets and a filled engine, and the refusals on the way. The loop itself
is in train.py.

    data = open_phase_data(recipe, recipe.phases[0])
    load_initial_state(engine, recipe)
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from slm import checkpoint
from slm.contradictions import is_made_for_another_context
from slm.data.batches import EvaluationBatches, PhaseData
from slm.data.selection import selected_documents
from slm.data.tokens import TokenDataset
from slm.distill.student import check_online, open_caches
from slm.engine import Engine
from slm.errors import UserError
from slm.evaluate import HeldOut
from slm.model.config import ModelConfig
from slm.model.hf import config_to_hf, read_config, refuse_pickles
from slm.model.llama import initial_value
from slm.parallel import Share
from slm.plan import missing_origin
from slm.recall.samples import Filler, Form, Grid
from slm.recall.score import RecallBatches
from slm.recipe import Phase, Recipe
from slm.runtime import Ranks

log = logging.getLogger("slm")


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
        raise missing_origin(start.path)
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


def origin(recipe: Recipe) -> str:
    return recipe.init_from.path if recipe.init_from else f"random weights, seed {recipe.seed}"
