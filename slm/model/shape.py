"""What a folder of weights says of its model's shape, read without torch.

shape_fields(Path("models/Llama-3.1-8B"))["hidden_size"]
shape_of(Path("models/Llama-3.1-8B"))                     # ModelConfig
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from slm import strict_yaml
from slm.errors import UserError
from slm.model.config import ModelConfig

QUANTIZED_TYPE = "slm_quantized_llama"  # the model_type of a folder that slm quantize has written
_SHAPE = [name for name in ModelConfig.model_fields if name.endswith("_size") or name.startswith("num_")]


def shape_fields(path: Path) -> dict[str, Any]:
    """As its config.json (Hugging Face), state.json (checkpoint) or recipe.yaml (run) has them; {} if none can be read."""
    try:
        if (path / "config.json").is_file():
            found = json.loads((path / "config.json").read_text())
        elif (path / "state.json").is_file():
            found = json.loads((path / "state.json").read_text())["model"]
        elif (path / "recipe.yaml").is_file():
            found = strict_yaml.read(path / "recipe.yaml")[0]["model"]
        else:
            return {}
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return {}  # who loads it says what is wrong with it
    return found if isinstance(found, dict) else {}


def only_read(problem: str) -> UserError:
    """Of a quantised model, where one that can be trained, copied or learned from is wanted."""
    return UserError(
        f"{problem}: its weights are rounded; it generates and is evaluated, but is no start, no teacher, and not exported or "
        "imported",
        fix="give the model that it was made from",
    )


def shape_of(path: Path) -> ModelConfig | None:
    """A Llama-family model's, with sizes only: rotary settings are left out. None if it is none, or does not say."""
    fields = shape_fields(path)
    if fields.get("model_type", "llama") != "llama" or not {"vocab_size", "hidden_size"} <= fields.keys():
        return None
    given = {k: fields[k] for k in (*_SHAPE, "head_dim") if fields.get(k) is not None}
    given.setdefault("num_key_value_heads", given.get("num_attention_heads"))
    tied = bool(fields.get("tie_word_embeddings", False))  # transformers' default
    try:
        return ModelConfig(**given, tie_word_embeddings=tied, rope_scaling=None)
    except ValidationError:
        return None
