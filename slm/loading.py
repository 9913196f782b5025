"""From a path that a user names to a model that computes: for `slm eval`, `slm generate` and `slm export`.

Owns finding the weights (a run, its best or latest, a checkpoint, a Hugging Face folder) and the tokenizer that goes
with them; and `slm eval` on token shards. Each rank of a launcher holds the whole model and takes a share of the data.

    model, tokenizer = load_for_text("runs/quickstart/best")
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from rich.console import Console
from rich.progress import Progress
from safetensors import SafetensorError

from slm import checkpoint, parallel
from slm.data.batches import Batch, EvaluationBatches
from slm.data.tokens import TokenDataset
from slm.errors import CorruptArtefact, EnvironmentProblem, UserError
from slm.evaluate import Findings, HeldOut, examine
from slm.model.config import ModelConfig
from slm.model.decode import join_projections
from slm.model.hf import COMPANIONS, SPECIAL_IDS, read_json, refuse_pickles, special_ids, write_configs
from slm.model.llama import SLMForCausalLM, Visit
from slm.model_card import write_card
from slm.names import file_inside
from slm.problems import readable
from slm.recall.samples import Filler, Form, Grid
from slm.recall.score import RecallBatches
from slm.recall.settings import Recall


def load_model(
    path: str | Path, device: torch.device | None = None, *, exact: bool = False
) -> tuple[SLMForCausalLM, dict[str, Any]]:
    """(model in eval mode, the checkpoint's state or {} for a Hugging Face folder), on the GPU in bfloat16 if there is
    one that has it, or on the device given; with `exact` on the CPU in float32, whatever is there.

    A run directory means its best checkpoint, else its newest. Raises UserError, CorruptArtefact.
    """
    path = Path(path)
    device = torch.device("cpu") if exact else device or parallel.local_device(0)
    half = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = torch.bfloat16 if half else torch.float32
    if (path / "config.json").is_file():
        return SLMForCausalLM.from_pretrained(path, dtype=dtype).to(device), {}
    reader = open_checkpoint(path)
    model = SLMForCausalLM(ModelConfig(**reader.state["model"]), seed=None).to(dtype)
    reader.fill(model)
    return model.to(device).eval(), reader.state


def open_checkpoint(path: Path) -> checkpoint.Reader:
    """The checkpoint, or the best or newest of the run. Raises UserError, CorruptArtefact."""
    if not path.exists():
        raise UserError(
            f"the model {path} does not exist", fix="give a run directory, a checkpoint or a Hugging Face folder"
        )
    refuse_pickles(path)
    return checkpoint.Reader(checkpoint.locate_best(path))


@dataclass(frozen=True)
class RunPlace:
    """The run that a path is of, and which checkpoint of it. step: of the whole run."""

    folder: Path
    checkpoint: str
    step: int


def run_of(path: str | Path) -> RunPlace | None:
    """None for a Hugging Face folder, and for a checkpoint that has been copied out of its run. Raises CorruptArtefact."""
    path = Path(path)
    if (path / "config.json").is_file() or not path.exists():
        return None
    folder = checkpoint.locate_best(path).resolve()
    run = folder.parent.parent
    if folder.parent.name != "checkpoints" or not (run / "recipe.yaml").is_file():
        return None
    return RunPlace(run, folder.name, checkpoint.read_manifest(folder)["global_step"])


def load_for_text(path: str, tokenizer: str = "", device: torch.device | None = None) -> tuple[SLMForCausalLM, Any]:
    """(model, tokenizer). The tokenizer is the one given, else that of the recipe, else that of the folder."""
    from slm.tokenizer import load_tokenizer

    model, state = load_model(path, device)
    spec = tokenizer or (state["recipe"]["tokenizer"] if state else path)
    if not spec:
        raise UserError(f"{path}: its recipe names no tokenizer, so text cannot be encoded", fix="give --tokenizer")
    loaded = load_tokenizer(spec, said_by=None if tokenizer else path)
    if len(loaded) > model.config.vocab_size:
        raise UserError(
            f"the tokenizer {spec} has {len(loaded)} tokens, more than the model's vocabulary of "
            f"{model.config.vocab_size}: it is not the one the model was trained with",
            fix="give the right one with --tokenizer",
        )
    if not tokenizer:  # another one that is given on purpose may be the same in another format
        _check_tokenizer(path, state, spec, loaded.fingerprint)
    return join_projections(model), loaded


def stop_ids(path: str | Path) -> list[int]:
    """What ends a text besides the tokenizer's EOS: the ids that the folder's generation config names. Raises CorruptArtefact."""
    for name in ("generation_config.json", "config.json"):
        file = Path(path) / name
        if file.is_file() and (ids := read_json(file).get("eos_token_id")) is not None:
            ids = ids if isinstance(ids, list) else [ids]
            if any(not isinstance(id_, int) for id_ in ids):
                raise CorruptArtefact(f"{file}: eos_token_id is {ids}, no ids", fix="mend the file, or copy it again")
            return ids
    return []


def _check_tokenizer(path: str, state: dict[str, Any], what: str, fingerprint: str) -> None:
    """Raises UserError if `what` is not of the tokenizer that the checkpoint was trained with, where it is known."""
    trained_with = state.get("identity", {}).get("tokenizer", fingerprint)
    if fingerprint != trained_with:
        raise UserError(
            f"{what} is of another tokenizer (fingerprint {fingerprint[:12]}) than the one {path} was trained with "
            f"({trained_with[:12]}): the same ids mean different text",
            fix="use the files that the model was trained with (a tokenizer that has been moved: --tokenizer PATH), or make them "
            "again as they were",
        )


class ModelScorer:
    """A whole model on one device, as evaluations see it."""

    def __init__(self, model: SLMForCausalLM) -> None:
        self._model = model

    @torch.no_grad()
    def token_losses(self, batch: Batch) -> torch.Tensor:
        return self._model(batch.tokens_BT, batch.positions_BT, batch.piece_bounds, batch.labels_BT, each=True)

    @torch.no_grad()
    def visit_logits(self, batch: Batch, visit: Visit) -> None:
        self._model(batch.tokens_BT, batch.positions_BT, batch.piece_bounds, visit=visit)


def evaluate_model(
    path: str,
    folders: list[str],
    seq_len: int,
    micro_batch: int,
    max_sequences: int,
    *,
    recall: dict[str, Any] | None = None,
    tokenizer: str = "",
) -> tuple[Findings, dict[str, float]] | None:
    """(what was found, bytes per token by source); None on ranks other than 0. Under any launcher the ranks share the sequences.

    recall: fields over those of the recipe's eval.recall; None for none.
    """
    with parallel.launched() as device:
        model, state = parallel.together(load_model, path, device)
        what = (path, state, model.config, folders, seq_len, micro_batch, max_sequences, recall, tokenizer)
        held_out, per_byte = parallel.together(_held_out, *what)
        total = sum(map(len, held_out.sources.values())) + (len(held_out.recall) if held_out.recall else 0)
        quiet = parallel.rank() > 0
        console = Console(stderr=True)
        with Progress(transient=True, console=console, disable=quiet or not console.is_terminal) as progress:
            task = progress.add_task("evaluating", total=total)
            place = next(model.parameters()).device
            found = examine(ModelScorer(model), held_out, place, lambda done: progress.update(task, completed=done))
        return None if quiet else (found, per_byte)


def _held_out(
    path: str,
    state: dict[str, Any],
    config: ModelConfig,
    folders: list[str],
    seq_len: int,
    micro_batch: int,
    max_sequences: int,
    recall: dict[str, Any] | None,
    tokenizer: str,
) -> tuple[HeldOut, dict[str, float]]:
    """This rank's share of what is looked at, and bytes per token by source. Raises UserError, CorruptArtefact."""
    recipe = state.get("recipe", {})
    sources = {Path(folder).as_posix(): folder for folder in folders} or recipe.get("data", {}).get("validation", {})
    if not sources:
        raise UserError(f"{path}: its recipe names no validation data", fix="name folders of token shards after MODEL")
    context = config.max_position_embeddings
    seq_len = seq_len or (phase_of(state)["seq_len"] if recipe else min(4096, context))
    if seq_len > context:
        raise UserError(
            f"--seq-len is {seq_len}, beyond the model's context of {context}", fix=f"give at most {context}"
        )
    datasets = {name: TokenDataset(folder) for name, folder in sources.items()}
    for name, dataset in datasets.items():
        if dataset.vocab_size > config.vocab_size:
            raise UserError(
                f"{name} was made with a tokenizer of {dataset.vocab_size} tokens, more than the model's vocabulary of "
                f"{config.vocab_size}",
                fix="evaluate on shards of the model's own tokenizer",
            )
        _check_tokenizer(path, state, name, dataset.tokenizer_fingerprint)
    share = parallel.Share.of(parallel.rank(), parallel.world_size())
    batches = {
        name: EvaluationBatches(dataset, seq_len, micro_batch, share, max_sequences or None)
        for name, dataset in datasets.items()
    }
    samples = None
    if recall is not None:
        known = dict((recipe.get("eval") or {}).get("recall") or {})
        if folders:  # the sources have other names then
            known.pop("filler", None)
        # The recipe's later phases may look further than this checkpoint does.
        known["lengths"] = [length for length in known.get("lengths", []) if length <= context]
        spec = tokenizer or recipe.get("tokenizer") or ("" if recipe else path)
        said_by = None if tokenizer else path
        grid = _recall_grid({**known, **recall}, datasets, seq_len, context, spec, said_by)
        rows = max(1, micro_batch * seq_len // max(grid.lengths))
        samples = RecallBatches(grid, rows, share)
    per_byte = {name: bytes_per_token(dataset) for name, dataset in datasets.items()}
    return HeldOut(seq_len, batches, recall=samples), per_byte


def phase_of(state: dict[str, Any]) -> dict[str, Any]:
    """The phase that a checkpoint is of, as its recipe has it."""
    return next(phase for phase in state["recipe"]["phases"] if phase["name"] == state["position"]["phase"])


def _recall_grid(
    fields: dict[str, Any],
    datasets: dict[str, TokenDataset],
    seq_len: int,
    context: int,
    tokenizer: str,
    said_by: str | None,
) -> Grid:
    """The samples of recall; lengths up to the model's context. Raises UserError."""
    from slm.tokenizer import load_tokenizer

    try:
        settings = Recall.model_validate(fields)
    except ValidationError as error:
        raise UserError("; ".join(f"recall: {line}" for line in readable(error, fields, Recall))) from None
    if too_long := [length for length in settings.lengths if length > context]:
        raise UserError(
            f"--lengths has {', '.join(map(str, too_long))}, beyond the model's context of {context} "
            "(max_position_embeddings): it was never trained to look back so far",
            fix=f"give at most {context}",
        )
    if settings.filler not in ("", *datasets):
        raise UserError(f"recall.filler is {settings.filler!r}, none of {', '.join(datasets)}", fix="name one of them")
    if not tokenizer:
        raise UserError(
            "recall writes needle and query as text, and the model's recipe names no tokenizer", fix="give --tokenizer"
        )
    loaded = load_tokenizer(tokenizer, said_by)
    filler = Filler([dataset for name, dataset in datasets.items() if settings.filler in ("", name)])
    made_with = filler.datasets[0].tokenizer_fingerprint
    if loaded.fingerprint != made_with:
        raise UserError(
            f"the tokenizer {tokenizer} (fingerprint {loaded.fingerprint[:12]}) is not the one that the held-out shards were "
            f"made with ({made_with[:12]}): the question would be other tokens than the text's",
            fix="give the right one with --tokenizer",
        )
    return Grid(Form(settings, loaded.encode), filler, max([seq_len, *settings.lengths]), "--lengths")


def bytes_per_token(dataset: TokenDataset) -> float:
    """UTF-8 bytes of text per predicted token (each token but the first of a document); 0 if not recorded."""
    num_bytes = dataset.manifest.get("text_bytes", 0)
    return num_bytes / max(1, dataset.num_tokens - dataset.num_docs)


@contextmanager
def fresh_folder(output: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `output` at the end: a kill leaves nothing that looks like one.

    Raises UserError if `output` holds something or cannot be written, EnvironmentProblem if the disk is full.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} is not empty; nothing was written, so that nothing is lost", fix="give a new folder")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror}", fix="give another path") from None
    if not os.access(output.parent, os.W_OK):
        raise UserError(
            f"{output} cannot be written: {output.parent} is no folder to write in", fix="give another path"
        )
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    would_end_us = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if catches := would_end_us and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # by way of what cleans up below
    try:
        partial.mkdir()
        yield partial
        if output.exists():
            output.rmdir()
        partial.rename(output)
    except (OSError, SafetensorError) as error:
        told = getattr(error, "strerror", None) or error
        raise EnvironmentProblem(f"{output} cannot be written: {told}", fix="give another path, or make room") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if catches:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def tokenizer_of(path: str, state: dict[str, Any], tokenizer: str = "") -> Any:
    """The one given, else that of the recipe of a checkpoint's `state`; None if there is neither. Raises UserError."""
    from slm.tokenizer import load_tokenizer

    spec = tokenizer or (state["recipe"]["tokenizer"] if state else "")
    if not spec:
        return None
    loaded = load_tokenizer(spec, said_by=None if tokenizer else path)
    _check_tokenizer(path, state, spec, loaded.fingerprint)
    return loaded


def write_beside(partial: Path, path: str, fields: dict[str, Any], state: dict[str, Any], tokenizer: str) -> bool:
    """The tokenizer, generation_config.json and config.json (`fields`); whether there is a tokenizer. Of a Hugging Face folder
    its own files, as they are; with another tokenizer those that are the model's: what ends a text, and how turns are told.

    Raises UserError, CorruptArtefact.
    """
    loaded = tokenizer_of(path, state, tokenizer)
    if hasattr(loaded, "save_pretrained"):
        loaded.save_pretrained(partial)
    if state:
        write_configs(partial, fields, special_ids(loaded))
        return loaded is not None
    source = Path(path)
    theirs = read_json(source / "config.json")
    own = {} if loaded is None else special_ids(loaded)
    write_configs(partial, fields, own | {name: theirs[name] for name in SPECIAL_IDS if name in theirs})
    for name in COMPANIONS if loaded is None else ("chat_template.jinja", "generation_config.json"):
        if (source / name).exists():
            shutil.copyfile(file_inside(source, name, source), partial / name)
    return loaded is not None or any((source / name).exists() for name in ("tokenizer.json", "tokenizer.model"))


def export_model(path: str, output: Path, tokenizer: str = "") -> None:
    """Writes config.json, model.safetensors, the tokenizer's files and a model card. Raises UserError if `output` holds
    something."""
    with fresh_folder(output) as partial:
        model, state = load_model(path, exact=True)
        model.save_pretrained(partial)
        has_tokenizer = write_beside(partial, path, read_json(partial / "config.json"), state, tokenizer)
        place = run_of(path)
        write_card(partial, path, place.folder if place is not None else None, state, model.config, has_tokenizer)
