"""The ZeRO strategy: a DeepSpeed JSON file, which holds what DeepSpeed owns and nothing that the recipe does.

Owns finding, reading and checking the file; imports neither torch nor deepspeed.

    problems = deepspeed_problems("ds_configs/zero2.json")
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# What the recipe decides; a second home for it in the JSON would contradict the first.
_OWNED_BY_RECIPE = {
    "train_batch_size": "phases[].batch_tokens",
    "train_micro_batch_size_per_gpu": "phases[].micro_batch",
    "gradient_accumulation_steps": "phases[].batch_tokens and micro_batch",
    "gradient_clipping": "optim.grad_clip",
    "optimizer": "optim",
    "scheduler": "phases[].schedule",
    "fp16": "precision",
    "bf16": "precision",
    "amp": "precision",
    "torch_autocast": "precision",
    "data_types": "precision",
    "activation_checkpointing": "phases[].activation_checkpointing",
    "tensorboard": "log.tensorboard",
    "wandb": "log.wandb",
    "csv_monitor": "log",
    "steps_per_print": "log.every_steps",
    "sequence_parallel_size": "phases[].sequence_parallel",
    "data_parallel_size": "the number of ranks",
    "checkpoint": "checkpoint",
    "zero_allow_untested_optimizer": "optim",
}


def resolve_deepspeed(name: str, recipe_path: Path) -> str:
    """The JSON's path: as given from the current directory, else beside the folder of the recipe (the clone)."""
    clone = Path(__file__).parents[1]
    beside = recipe_path.resolve().parent
    for candidate in (Path(name), beside.parent / name, beside / name, clone / name):
        if candidate.is_file():
            return str(candidate.resolve())
    return name


def deepspeed_problems(path: str) -> list[str]:
    """What is wrong with a DeepSpeed JSON file, in words; empty if nothing."""
    try:
        content = json.loads(Path(path).read_text(), object_pairs_hook=_unique)
    except OSError:
        return [f"deepspeed: {path} does not exist; the files that come with this project are in ds_configs/"]
    except (ValueError, RecursionError) as error:
        return [f"deepspeed: {path} is not valid JSON ({error})"]
    if not isinstance(content, dict) or not isinstance(content.get("zero_optimization"), dict):
        return [f"deepspeed: {path} has no zero_optimization section, so there is no ZeRO stage to use"]
    problems = [
        f"deepspeed: {path} has zero_optimization.{part} {content['zero_optimization'][part]!r}, which is no section: "
        'write {"device": "cpu"}, or leave it out'
        for part in ("offload_optimizer", "offload_param")
        if not isinstance(content["zero_optimization"].get(part, {}), dict)
    ]
    stage = content["zero_optimization"].get("stage", 0)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        problems.append(f"deepspeed: {path} has stage {stage!r}, and ZeRO has 0, 1, 2 and 3: give one of them")
    return problems + [
        f"deepspeed: {path} sets {key}, but the recipe owns that: remove it there and use {owner}"
        for key, owner in _OWNED_BY_RECIPE.items()
        if key in content
    ]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{name!r} stands there twice; only one could count")
    return dict(pairs)


def read_deepspeed(path: str) -> dict[str, Any]:
    return json.loads(Path(path).read_text())


def zero_stage(path: str) -> int:
    return int(read_deepspeed(path)["zero_optimization"].get("stage", 0))
