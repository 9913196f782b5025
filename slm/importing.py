"""`slm import FOLDER OUTPUT`: a Hugging Face folder of a Llama-family model, checked to its last number and written anew.

Owns the checks and the copy: one tensor at a time, in its own dtype, so that a model larger than the memory goes through. What
is written is what `slm export` writes: init_from, teachers, `slm eval` and `slm generate` take it, and so does transformers.

    found = import_folder("models/Llama-3.2-1B", "models/start")
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file

from slm.errors import CorruptArtefact, UserError
from slm.loading import fresh_folder
from slm.model.config import ModelConfig
from slm.model.hf import (
    COMPANIONS,
    FLOATS,
    checked_files,
    config_from_hf,
    config_to_hf,
    expected_shapes,
    read_json,
    read_tensor,
    some_names,
)
from slm.names import file_inside
from slm.runtime import atomic_write

SHARD_BYTES = 5 << 30


@dataclass(frozen=True)
class Imported:
    config: ModelConfig
    dtype: torch.dtype
    num_files: int
    num_bytes: int
    tokenizer_tokens: int | None  # None: there is no tokenizer
    dropped: tuple[str, ...]  # tensors that hold nothing of their own


def import_folder(folder: str | Path, output: str | Path, tokenizer: str = "") -> Imported:
    """Raises UserError, CorruptArtefact, EnvironmentProblem; then nothing is written."""
    folder, output = Path(folder), Path(output)
    if not folder.is_dir():
        raise UserError(
            f"{folder} is no folder", fix="give a Hugging Face folder on this machine: nothing is downloaded"
        )
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: there is no config.json, so this is no model folder", fix="give a folder with one")
    fields = read_json(folder / "config.json")
    config = config_from_hf(fields, folder / "config.json")
    where, dropped = checked_files(folder, config)
    dtype, sizes = _check_tensors(folder, config, where)
    source = Path(tokenizer) if tokenizer else folder
    num_tokens = _check_tokenizer(source, config, given=bool(tokenizer))
    special: dict[str, Any] = {k: fields[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id") if k in fields}
    _check_special(folder, special, config)
    groups = _groups(sizes)

    with fresh_folder(output) as partial:
        for number, names in enumerate(groups, 1):
            tensors = {name: tensor for name, tensor in _tensors(where, names)}
            path = partial / _file_name(number, len(groups))
            save_file(tensors, path, metadata={"format": "pt"})
            os.chmod(path, 0o644)  # safetensors makes it readable by the owner alone
            del tensors
        if len(groups) > 1:
            files = {name: _file_name(i, len(groups)) for i, names in enumerate(groups, 1) for name in names}
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": files}
            atomic_write(partial / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
        for name in COMPANIONS:
            home = folder if name == "generation_config.json" else source
            if home.is_dir() and (home / name).exists():
                shutil.copyfile(file_inside(home, name, home), partial / name)
        if source.is_file():
            shutil.copyfile(source, partial / source.name)
        told = str(dtype).removeprefix("torch.")
        hf = config_to_hf(config) | special | {"dtype": told, "torch_dtype": told}
        atomic_write(partial / "config.json", json.dumps(hf, indent=2) + "\n")
    return Imported(config, dtype, len(groups), sum(sizes.values()), num_tokens, dropped)


def describe(found: Imported, output: Path) -> str:
    """What it is, and the lines of a recipe that begins from it."""
    c = found.config
    rope = "plain" if c.rope_scaling is None else f"{c.rope_scaling.rope_type}, factor {c.rope_scaling.factor:g}"
    model = c.model_dump(mode="json", exclude_none=True) | ({} if c.rope_scaling else {"rope_scaling": None})
    recipe: dict[str, Any] = {"model": model, "init_from": {"path": str(output)}}
    if found.tokenizer_tokens is not None:
        recipe["tokenizer"] = str(output)
    tokens = "no tokenizer" if found.tokenizer_tokens is None else f"a tokenizer of {found.tokenizer_tokens:,} tokens"
    lines = [
        f"wrote {output}: {c.num_parameters():,} parameters in {str(found.dtype).removeprefix('torch.')} "
        f"({found.num_bytes / 2**30:.2f} GiB, {found.num_files} file{'s' * (found.num_files > 1)}), "
        f"{c.num_hidden_layers} layers of {c.hidden_size}, {c.num_attention_heads} heads over {c.num_key_value_heads}, "
        f"head {'tied' if c.tie_word_embeddings else 'of its own'}, context {c.max_position_embeddings:,} "
        f"(rotary: {rope}), {tokens}",
        *([f"left out, as they hold nothing of their own: {some_names(found.dropped)}"] if found.dropped else []),
        "as a teacher: teacher: {" + f"model: {output}" + "}; as a start, in a recipe:",
        yaml.safe_dump(recipe, sort_keys=False).rstrip(),
    ]
    return "\n".join(lines)


# --- checks -------------------------------------------------------------------------------------------------------


def _check_tensors(folder: Path, config: ModelConfig, where: dict[str, Path]) -> tuple[torch.dtype, dict[str, int]]:
    """(the dtype of most weights, {name: bytes}). Every shape is looked at, then every number. Raises UserError."""
    shapes: list[str] = []
    wanted = expected_shapes(config)
    for name, shape in wanted.items():
        with safe_open(where[name], "pt") as file:
            found = tuple(file.get_slice(name).get_shape())
        if found != shape:
            shapes.append(f"{name} is {list(found)} instead of {list(shape)}")
    if shapes:
        raise UserError(
            f"{folder}: {len(shapes)} tensors have other shapes than its config.json says: {'; '.join(shapes[:5])}"
            + f" and {len(shapes) - 5} more" * (len(shapes) > 5),
            fix="config.json and weights are of different models: copy both from the same place",
        )
    sizes: dict[str, int] = {}
    bytes_of: dict[torch.dtype, int] = {}
    broken: list[str] = []
    for name, tensor in _tensors(where, list(wanted)):
        if tensor.dtype not in FLOATS:
            raise UserError(
                f"{folder}: {name} is {str(tensor.dtype).removeprefix('torch.')}, and weights are float32, bfloat16 or float16",
                fix="take the version of the model before quantisation",
            )
        sizes[name] = tensor.numel() * tensor.element_size()
        bytes_of[tensor.dtype] = bytes_of.get(tensor.dtype, 0) + sizes[name]
        if not bool(torch.isfinite(tensor).all()):
            broken.append(name)
    if broken:
        raise CorruptArtefact(
            f"{folder}: {some_names(broken)} hold numbers that are not finite: whatever the model says would be none either",
            fix="copy them again; if they are so at their source, the model is broken",
        )
    return max(bytes_of, key=lambda dtype: bytes_of[dtype]), sizes


def _check_tokenizer(source: Path, config: ModelConfig, *, given: bool) -> int | None:
    from slm.tokenizer import load_tokenizer

    names = ("tokenizer.json", "tokenizer.model")
    if not given and not any((source / name).is_file() for name in names):
        return None
    num_tokens = len(load_tokenizer(source))
    if num_tokens > config.vocab_size:
        raise UserError(
            f"the tokenizer of {source} has {num_tokens:,} tokens, and the embedding (model.embed_tokens.weight) "
            f"{config.vocab_size:,} rows: it is not the one that the model was trained with, or tokens were added and the "
            "embedding was not enlarged",
            fix="give the model's own tokenizer with --tokenizer, or enlarge the embedding (resize_token_embeddings) and save it",
        )
    return num_tokens


def _check_special(folder: Path, special: dict[str, Any], config: ModelConfig) -> None:
    for name, value in special.items():
        for id_ in value if isinstance(value, list) else [value]:
            if id_ is not None and not (isinstance(id_, int) and -1 <= id_ < config.vocab_size):
                raise UserError(
                    f"{folder}: {name} is {id_!r} in its config.json, and the embedding's rows are 0 to {config.vocab_size - 1}",
                    fix="take config.json and weights from the same place",
                )


# --- tensors ------------------------------------------------------------------------------------------------------


def _tensors(where: dict[str, Path], names: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """One at a time."""
    for name in names:
        yield name, read_tensor(where, name)


def _groups(sizes: dict[str, int]) -> list[list[str]]:
    """The names of each file, in the model's order, up to SHARD_BYTES each."""
    groups: list[list[str]] = [[]]
    for name, size in sizes.items():
        if groups[-1] and sum(sizes[other] for other in groups[-1]) + size > SHARD_BYTES:
            groups.append([])
        groups[-1].append(name)
    return groups


def _file_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
