"""Weights and config to and from Hugging Face folders.

Owns config.json (both spellings of the rotary settings: `rope_scaling` of transformers 4, `rope_parameters` of 5)
and the safetensors files, one or sharded with an index. Parameter names are already Hugging Face's.

    model = load_pretrained("path/to/Llama-3.2-1B", torch.bfloat16)
    save_pretrained(model, "export/")
"""

from __future__ import annotations

import json
import math
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from slm.errors import CorruptArtefact, UserError
from slm.model.config import ROPE_FIELDS, ModelConfig, RopeScaling, effective_theta
from slm.model.rope import attention_factor
from slm.model.shape import QUANTIZED_TYPE, only_read
from slm.names import file_inside
from slm.runtime import atomic_write

if TYPE_CHECKING:
    from slm.model.llama import SLMForCausalLM

SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Beside the weights: what they and the text that they read need, and what transformers' generate takes from there.
COMPANIONS = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "generation_config.json",
)  # fmt: skip
_SHAPE_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "initializer_range",
)


FLOATS = (torch.float32, torch.bfloat16, torch.float16)
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"

# transformers calls dynamic's original context max_position_embeddings; the whole one stands beside it, for us alone.
_DYNAMIC_CONTEXT = "extended_max_position_embeddings"


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """config.json's content, readable by transformers 4 and 5; `ntk` and `theta` leave as the plain rotary embedding of
    another rope_theta."""
    fields = {field: getattr(config, field) for field in _SHAPE_FIELDS}
    theta, scaling = effective_theta(config), config.rope_scaling
    rope: dict[str, Any] = {"rope_type": "default"}
    if scaling is not None and scaling.rope_type not in ("default", "ntk", "theta"):
        rope = scaling.model_dump(mode="json", exclude_none=True)
        original = rope["original_max_position_embeddings"]
        if scaling.rope_type in ("linear", "dynamic"):
            del rope["original_max_position_embeddings"]  # transformers knows none, and says so at every load
        if scaling.rope_type == "dynamic":
            fields |= {"max_position_embeddings": original, _DYNAMIC_CONTEXT: config.max_position_embeddings}
        if scaling.rope_type == "longrope":
            fields["original_max_position_embeddings"] = original  # where transformers 4 looks for it
        if scaling.rope_type in ("yarn", "longrope"):
            # Written out: transformers 4 derives longrope's from the contexts instead of `factor`.
            rope["attention_factor"] = attention_factor(config)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        **fields,
        "rope_theta": theta,
        "rope_scaling": None if rope["rope_type"] == "default" else rope,
        "rope_parameters": {**rope, "rope_theta": theta},
    }


# What transformers takes where config.json lacks a field (configuration_llama.py, configuration_mistral.py); not so sizes.
# A Mistral without a sliding window is a Llama: modular_mistral.py inherits the rest.
_MISSING = {
    "llama": {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "tie_word_embeddings": False},
    "mistral": {
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
}  # fmt: skip
_FAMILY = tuple(_MISSING)
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def config_from_hf(fields: dict[str, Any], path: object = "config.json") -> ModelConfig:
    """Reads config.json's content as transformers does. Raises UserError for what is not a plain Llama."""
    kind = fields.get("model_type")
    if kind == QUANTIZED_TYPE:
        raise only_read(f"{path} is of a quantised model")
    if kind not in _FAMILY:
        raise UserError(
            f"{path}: model_type is {kind!r}, and the architecture that runs here is {' or '.join(map(repr, _FAMILY))}",
            fix="use a Llama-family folder; as a teacher any causal model serves (transformers runs it)",
        )
    if fields.get("quantization_config"):
        raise UserError(
            f"{path}: it has a quantization_config, so the weights are codes of another format",
            fix="take the version of the model before quantisation",
        )
    fields = {**_MISSING[kind], **fields}
    for field, plain in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False)):
        if fields.get(field, plain) != plain:
            raise UserError(
                f"{path}: {field} is {fields[field]!r}; this architecture has {plain!r} there, and would compute something else",
                fix="use another model",
            )
    if absent := [name for name in _SIZES if fields.get(name) is None]:
        raise UserError(
            f"{path}: there is no {', '.join(absent)}, so the model's shape is not known",
            fix="copy the whole folder again",
        )
    window, context = fields.get("sliding_window"), fields["max_position_embeddings"]
    if kind == "mistral" and window is not None and window < context:
        raise UserError(
            f"{path}: sliding_window is {window} of a context of {context}: each token sees only the last {window}, and here all",
            fix=f"to use it up to there, where both are the same, set max_position_embeddings to {window} in config.json",
        )
    shape = {k: fields[k] for k in _SHAPE_FIELDS if fields.get(k) is not None}
    shape.setdefault("num_key_value_heads", fields["num_attention_heads"])
    rope = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
    theta = rope.get("rope_theta") or fields.get("rope_theta") or 10000.0
    try:
        scaling, context = _scaling_from_hf(rope, fields, shape["max_position_embeddings"], path)
        shape["max_position_embeddings"] = context
        return ModelConfig(**shape, rope_theta=theta, rope_scaling=scaling)
    except ValidationError as error:
        details = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise UserError(f"{path}: {details}") from None


def _scaling_from_hf(
    rope: dict[str, Any], fields: dict[str, Any], context: int, path: object
) -> tuple[RopeScaling | None, int]:
    """The scaling and the whole context, of config.json's rope_scaling or rope_parameters and its max_position_embeddings.

    What transformers 5 fills in where it is missing (modeling_rope_utils.py, standardize_rope_params and the functions of
    each type) is filled in here; fields that the type does not read are left out, as they have no effect there.
    """
    kind = rope.get("rope_type") or rope.get("type") or "default"
    partial = rope.get("partial_rotary_factor") or fields.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        raise UserError(f"{path}: partial_rotary_factor is {partial}; this model turns whole heads and would differ")
    if kind == "default":
        return None, context
    reads = ROPE_FIELDS.get(kind, ())
    known = {k: v for k, v in rope.items() if k in reads and v is not None}
    if kind == "dynamic":
        known["original_max_position_embeddings"] = context
        extended = max(context, int(context * known.get("factor", 1.0)))
        return RopeScaling(rope_type=kind, **known), fields.get(_DYNAMIC_CONTEXT) or extended
    if kind == "linear":  # what it was extended from is told nowhere and changes no angle
        known["original_max_position_embeddings"] = max(2, math.ceil(context / known.get("factor", 1.0)))
    elif "original_max_position_embeddings" in reads:
        outside = fields.get("original_max_position_embeddings")
        original = outside or known.get("original_max_position_embeddings") or context
        known["original_max_position_embeddings"] = original
        if kind in ("yarn", "longrope"):
            known.setdefault("factor", max(1.0, context / original))
    if "mscale" not in known or "mscale_all_dim" not in known:  # no effect of one alone
        known = {k: v for k, v in known.items() if not k.startswith("mscale")}
    return RopeScaling(rope_type=kind, **known), context


def refuse_quantized(model: Any, what: str) -> None:
    """Raises UserError if the weights of `model` (any object) are codes: to train, save or enlarge it would lose them."""
    if getattr(model, "quantization", None) is not None:
        raise only_read(f"{what} is a quantised model")


def read_config(folder: str | Path) -> ModelConfig:
    """The config of a Hugging Face folder. Raises UserError."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise UserError(f"{folder}: there is no config.json, so this is no model folder", fix="give a folder with one")
    return config_from_hf(read_json(path), path)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a model folder. Raises CorruptArtefact."""
    try:
        fields = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise CorruptArtefact(f"{path}: not valid JSON ({error})", fix="copy the folder again") from None
    if not isinstance(fields, dict):
        raise CorruptArtefact(f"{path}: holds a {type(fields).__name__} and no object", fix="copy the folder again")
    return fields


_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_CONVERT = (
    'python -c "import sys; from transformers import AutoModelForCausalLM as M; '
    'M.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])"'
)


def refuse_pickles(path: str | Path) -> None:
    """Raises UserError if weights of `path`, a folder or a file, are Python pickles: to read one is to run a program."""
    path = Path(path)
    if path.suffix == ".safetensors" and path.is_file():
        raise UserError(f"{path} is weights alone", fix=f"give its folder, {path.parent}, which has a config.json")
    if any((path / ours).exists() for ours in ("manifest.json", "checkpoints")) or any(path.glob("*.safetensors")):
        return
    folder = path if path.is_dir() else path.parent
    found = sorted(p.name for p in (path.iterdir() if path.is_dir() else [path]) if p.suffix in _PICKLES)
    found = [name for name in found if name.split(".")[0] not in ("training_args", "optimizer", "scheduler")]
    deepspeed = [p for pattern in ("*", "*/*") for p in folder.glob(f"{pattern}_model_states.pt")]
    if not (found or (deepspeed and path.is_dir())):
        return
    what = f"{path} has its weights in {(found or [deepspeed[0].name])[0]}" if path.is_dir() else f"{path} is"
    target = shlex.quote(f"{str(folder).rstrip('/')}-safetensors")
    if deepspeed:  # the script that lies in such a folder is as foreign as the pickles
        how = f"python -m deepspeed.utils.zero_to_fp32 {shlex.quote(str(folder))} {target} --safe_serialization"
    else:
        how = f"{_CONVERT} {shlex.quote(str(folder))} {target}"
    raise UserError(
        f"{what}{',' * path.is_dir()} a pickle: to read it is to run what its author put in, so only safetensors are read",
        fix=f"take a version of the model in safetensors; or, if you trust its author, convert it: {how}"
        + ("" if deepspeed else ", and copy the tokenizer's files beside"),
    )


def weight_files(folder: str | Path) -> dict[str, Path]:
    """{tensor name: the safetensors file that holds it}. Raises UserError, CorruptArtefact."""
    folder = Path(folder)
    refuse_pickles(folder)
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"{folder} has an adapter_config.json: its weights are what an adapter adds to those of another model",
            fix="merge them first, with peft's merge_and_unload() and save_pretrained()",
        )
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict):
            raise CorruptArtefact(f"{index}: has no weight_map, which says where the weights are", fix="copy it again")
        files = [file_inside(folder, name, index) for name in sorted(set(map(_text, names.values())))]
    elif (folder / "model.safetensors").exists():  # beside it may lie the same in its maker's own format
        files = [file_inside(folder, "model.safetensors", folder)]
    else:
        files = [file_inside(folder, path.name, folder) for path in sorted(folder.glob("*.safetensors"))]
    if not files:
        raise UserError(
            f"{folder}: there are no .safetensors files, so there are no weights", fix="copy the whole folder"
        )
    where: dict[str, Path] = {}
    for file in files:
        try:
            with safe_open(file, "pt") as tensors:
                where.update({name: file for name in tensors.keys()})
        except (SafetensorError, OSError) as error:
            raise CorruptArtefact(
                f"{file}: not a whole safetensors file ({error})", fix="copy the file again"
            ) from None
    return where


def _text(name: Any) -> Any:
    return name if isinstance(name, str) else repr(name)


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """{name: shape} of the model's tensors; a tied head is none of its own."""
    from slm.model.llama import SLMForCausalLM

    with torch.device("meta"):
        model = SLMForCausalLM(config, seed=None)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def checked_files(folder: str | Path, config: ModelConfig) -> tuple[dict[str, Path], tuple[str, ...]]:
    """({tensor name: its file} of exactly the model's tensors, the stored ones that are left out as they hold nothing of their
    own: a tied head, and rotary buffers of old transformers). Raises UserError, CorruptArtefact."""
    folder = Path(folder)
    where = weight_files(folder)
    wanted = expected_shapes(config)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        told = read_json(index)["weight_map"]
        if wrong := [name for name, file in told.items() if name not in where or where[name].name != file]:
            raise CorruptArtefact(
                f"{index} and the files disagree about {some_names(wrong)}: a file is missing, or of another version",
                fix="copy the whole folder again",
            )
    dropped = {name for name in where if name.endswith("rotary_emb.inv_freq")}
    if config.tie_word_embeddings and HEAD in where and EMBEDDING in where:
        if not torch.equal(read_tensor(where, HEAD), read_tensor(where, EMBEDDING)):
            raise UserError(
                f"{folder}: {HEAD} differs from {EMBEDDING}, though tie_word_embeddings is true in its config.json: the model "
                "would have another head than its weights say",
                fix="set tie_word_embeddings to false there, if the head is meant",
            )
        dropped.add(HEAD)
    missing, extra = sorted(set(wanted) - set(where)), sorted(set(where) - set(wanted) - dropped)
    if not (missing or extra):
        return {name: where[name] for name in wanted}, tuple(sorted(dropped))
    parts = [f"lacks {len(missing)} tensors ({some_names(missing)})"] * bool(missing)
    parts += [f"has {len(extra)} that the model of its config.json does not ({some_names(extra)})"] * bool(extra)
    fix = "copy the whole folder again; every file that the index names belongs to it"
    if any(name.endswith(".bias") for name in extra):
        fix = "biases are no part of this architecture, and leaving them out would change what it computes: use another model"
    elif {f"model.{name}" for name in extra} & set(missing):
        fix = "its names lack the head 'model.': load it with transformers' AutoModelForCausalLM, and save_pretrained() it"
    elif missing == [HEAD] and not extra:
        fix = "if the head is the embedding, set tie_word_embeddings to true in its config.json"
    elif any("lora_" in name for name in extra):
        fix = "merge the adapter first, with peft's merge_and_unload() and save_pretrained()"
    raise UserError(f"{folder} {' and '.join(parts)}", fix=fix)


def read_tensor(where: dict[str, Path], name: str) -> torch.Tensor:
    """As it is stored."""
    with safe_open(where[name], "pt") as file:
        return file.get_tensor(name)


def weight_reader(folder: str | Path) -> Callable[[str, tuple[int, ...]], torch.Tensor]:
    """A function (parameter name, shape) -> that tensor, read from the folder when called, in its stored dtype.

    Raises UserError if the folder's tensors are not those of the model that its config.json describes.
    """
    where, _ = checked_files(folder, read_config(folder))

    def read(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if name not in where and name == HEAD:
            name = EMBEDDING
        tensor = read_tensor(where, name)
        if tuple(tensor.shape) != shape:
            raise UserError(
                f"{folder}: {name} has shape {tuple(tensor.shape)}, but the config says {shape}",
                fix="config.json and weights are of different models: copy both from the same place",
            )
        if tensor.dtype not in FLOATS:
            raise UserError(
                f"{folder}: {name} is {str(tensor.dtype).removeprefix('torch.')}, and weights are float32, bfloat16 or float16",
                fix="take the version of the model before quantisation",
            )
        return tensor

    return read


def load_pretrained(folder: str | Path, dtype: torch.dtype) -> SLMForCausalLM:
    """The model of a Hugging Face folder, or of one that slm quantize has written, on the CPU, in `dtype`."""
    from slm.model.llama import SLMForCausalLM

    config_file = Path(folder) / "config.json"
    if config_file.is_file() and read_json(config_file).get("model_type") == QUANTIZED_TYPE:
        from slm.model.quantized_files import load_quantized

        return load_quantized(folder, dtype)
    model = SLMForCausalLM(read_config(folder), seed=None).to(dtype)
    read = weight_reader(folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(read(name, tuple(parameter.shape)))
    return model.eval()


def save_pretrained(model: SLMForCausalLM, folder: str | Path, tokenizer: Any = None) -> None:
    """Writes a whole (not partitioned) model: temporary file, rename, config.json last.

    tokenizer: any object; its files too, if it has save_pretrained, and its bos_, eos_ and pad_token_id, so that
    transformers' generate knows where a text ends.
    """
    refuse_quantized(model, "what is to be saved")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "model.safetensors"
    temporary = folder / ".model.safetensors.tmp"
    tensors = {name: p.detach().contiguous().cpu() for name, p in model.named_parameters()}
    save_file(tensors, temporary, metadata={"format": "pt"})
    os.chmod(temporary, 0o644)  # safetensors makes it readable by the owner alone
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    temporary.replace(target)
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    if hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(folder)
    write_configs(folder, config_to_hf(model.config) | {"dtype": dtype, "torch_dtype": dtype}, special_ids(tokenizer))


def special_ids(tokenizer: Any) -> dict[str, Any]:
    """Null where there is none: transformers would otherwise take Llama 1's, which are ordinary tokens here."""
    return {name: getattr(tokenizer, name, None) for name in SPECIAL_IDS}


def write_configs(folder: Path, fields: dict[str, Any], special: dict[str, Any]) -> None:
    """generation_config.json, and config.json last."""
    atomic_write(folder / "generation_config.json", json.dumps(special, indent=2) + "\n")
    atomic_write(folder / "config.json", json.dumps(fields | special, indent=2) + "\n")


def some_names(names: Any) -> str:
    """Up to six of them."""
    listed = sorted(names)
    return ", ".join(listed[:6]) + (f" and {len(listed) - 6} more" if len(listed) > 6 else "")
