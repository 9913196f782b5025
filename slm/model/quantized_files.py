"""The folder that `slm quantize` writes: its settings, its tensors, and the model that is read from it.

Owns the format (docs/formats.md, "Quantised models") and its checks. How codes are found is slm/quantize.py's, how they are
multiplied by quantized.py's.

    model = load_quantized("small/", torch.float32)      # SLMForCausalLM.from_pretrained calls it
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from slm.errors import CorruptArtefact, UserError
from slm.model.config import ModelConfig
from slm.model.hf import (
    EMBEDDING,
    HEAD,
    config_from_hf,
    config_to_hf,
    expected_shapes,
    read_json,
    some_names,
    weight_files,
)
from slm.model.llama import SLMForCausalLM
from slm.model.quantized import (
    QuantizedDown,
    QuantizedEmbedding,
    QuantizedHead,
    QuantizedLinear,
)
from slm.model.shape import QUANTIZED_TYPE

FORMAT = "slm-quantized/1"
_AGAIN = "copy the whole folder again, or make it again with slm quantize"


@dataclass(frozen=True)
class Quantization:
    """bits: 4 or 8. group_size: weights of a row that share a scale; 0: the whole row; None, for who writes: as fits
    (quantize.default_group). embeddings: they (and the head) too."""

    bits: int
    group_size: int | None
    embeddings: bool

    def covers(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether that parameter is stored as codes."""
        return len(shape) == 2 and (self.embeddings or name not in (EMBEDDING, HEAD))

    def group(self, num_columns: int) -> int:
        return self.group_size or num_columns


def stored_tensors(config: ModelConfig, q: Quantization) -> dict[str, tuple[torch.dtype | None, tuple[int, ...]]]:
    """{tensor of the file: (dtype, shape)}; dtype None: any floating-point one."""
    found: dict[str, tuple[torch.dtype | None, tuple[int, ...]]] = {}
    for name, shape in expected_shapes(config).items():
        if not q.covers(name, shape):
            found[name] = None, shape
            continue
        N, K = shape
        stem, groups = name.removesuffix(".weight"), (N, K // q.group(K))
        found[f"{stem}.codes"] = (torch.int8, (N, K)) if q.bits == 8 else (torch.uint8, (N, K // 2))
        found[f"{stem}.scales"] = torch.bfloat16, groups
        if q.bits == 4:
            found[f"{stem}.zeros"] = torch.bfloat16, groups
    return found


def pairs_of(codes_NK: torch.Tensor) -> torch.Tensor:
    """4-bit codes as they are stored, uint8 [N, K/2]: byte j of a row has weight 2j in its low bits, 2j + 1 in its high ones."""
    return codes_NK[:, ::2] | (codes_NK[:, 1::2] << 4)


def codes_of(pairs_NP: torch.Tensor) -> torch.Tensor:
    """The way back: uint8 [N, K] of values below 16."""
    return torch.stack([pairs_NP & 15, pairs_NP >> 4], -1).flatten(1)


def check_groups(config: ModelConfig, q: Quantization, where: str) -> None:
    """Raises UserError if rows cannot be cut into groups of that size."""
    for name, shape in expected_shapes(config).items():
        if q.covers(name, shape) and (shape[1] % q.group(shape[1]) or shape[1] % 2):
            sizes = [str(size) for size in (16, 32, 64, 128, 256) if shape[1] % size == 0]
            raise UserError(
                f"{where}: {q.group(shape[1])} does not divide the {shape[1]} columns of {name}, so it has no groups",
                fix=f"give one that does: {', '.join(sizes)}" if sizes else "use 8 bits, with one scale a row",
            )


# --- config.json --------------------------------------------------------------------------------------------------


def config_fields(config: ModelConfig, q: Quantization) -> dict[str, Any]:
    """config.json's content. Its model_type and architecture are no other tool's, so that they refuse what they would misread:
    transformers takes `quantization_config` of a method that it does not know for a remark, and makes up the weights."""
    return config_to_hf(config) | {
        "architectures": ["SLMQuantizedForCausalLM"],
        "model_type": QUANTIZED_TYPE,
        "quantization": {"format": FORMAT, **asdict(q)},
    }


def read_quantized_config(folder: Path) -> tuple[ModelConfig, Quantization]:
    """Raises UserError, CorruptArtefact."""
    path = folder / "config.json"
    fields = read_json(path)
    told = fields.get("quantization")
    if not isinstance(told, dict):
        raise CorruptArtefact(f"{path}: model_type is {QUANTIZED_TYPE}, and quantization is {told!r}", fix=_AGAIN)
    if told.get("format") != FORMAT:
        raise UserError(
            f"{path}: quantization.format is {told.get('format')!r}, and this version reads {FORMAT!r}: its codes could mean "
            "something else",
            fix="use the slm that wrote it, or quantise the original again",
        )
    bits, group_size, embeddings = (told.get(name) for name in ("bits", "group_size", "embeddings"))
    if bits not in (4, 8) or type(group_size) is not int or group_size < 0 or type(embeddings) is not bool:
        raise CorruptArtefact(
            f"{path}: quantization says bits {bits!r}, group_size {group_size!r}, embeddings {embeddings!r}; bits are 4 or 8, "
            "group_size is a number from 0 on, embeddings true or false",
            fix=_AGAIN,
        )
    config = config_from_hf(fields | {"model_type": "llama"}, path)
    q = Quantization(bits, group_size, embeddings)
    check_groups(config, q, f"{path}: quantization.group_size")
    return config, q


# --- the model ----------------------------------------------------------------------------------------------------


def load_quantized(folder: str | Path, dtype: torch.dtype) -> SLMForCausalLM:
    """The model of such a folder, on the CPU: codes as they are, the rest in `dtype`, nothing to train.

    Raises UserError, CorruptArtefact.
    """
    folder = Path(folder)
    config, q = read_quantized_config(folder)
    where = weight_files(folder)
    _check_tensors(folder, stored_tensors(config, q), where)

    def read(name: str) -> torch.Tensor:
        with safe_open(where[name], "pt") as tensors:
            tensor = tensors.get_tensor(name)
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CorruptArtefact(f"{folder}: {name} holds numbers that are not finite", fix=_AGAIN)
        return tensor

    def matrix(name: str, cls: type[QuantizedLinear]) -> QuantizedLinear:
        stem = name.removesuffix(".weight")
        codes = read(f"{stem}.codes")
        if q.bits == 8:
            return cls(codes, read(f"{stem}.scales"), None)
        return cls(codes_of(codes), read(f"{stem}.scales"), read(f"{stem}.zeros"))

    model = SLMForCausalLM(config, seed=None)  # memory that is never touched is never taken
    model.quantization = q
    tied = config.tie_word_embeddings
    for name, shape in expected_shapes(config).items():
        owner = model.get_submodule(name.rpartition(".")[0])
        if not q.covers(name, shape):
            owner.weight = nn.Parameter(read(name).to(dtype))
        elif name == EMBEDDING:
            head = matrix(name, QuantizedHead if tied else QuantizedLinear)
            model.model.embed_tokens = QuantizedEmbedding(head, dtype, tied=tied)  # type: ignore[assignment]
            if tied:
                model.lm_head = head  # type: ignore[assignment]
        else:
            kind = QuantizedDown if name.endswith("down_proj.weight") else QuantizedLinear
            model.set_submodule(name.removesuffix(".weight"), matrix(name, QuantizedHead if name == HEAD else kind))
    if tied and not q.embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.eval().requires_grad_(False)


def _check_tensors(
    folder: Path, wanted: dict[str, tuple[torch.dtype | None, tuple[int, ...]]], where: dict[str, Path]
) -> None:
    """Raises CorruptArtefact for what is missing, too much, or of another dtype or shape than config.json says."""
    missing, extra = sorted(wanted.keys() - where.keys()), sorted(where.keys() - wanted.keys())
    if missing or extra:
        parts = [f"lacks {len(missing)} tensors ({some_names(missing)})"] * bool(missing)
        parts += [f"has {len(extra)} that its config.json knows nothing of ({some_names(extra)})"] * bool(extra)
        raise CorruptArtefact(f"{folder} {' and '.join(parts)}", fix=_AGAIN)
    for file in sorted(set(where.values())):
        with safe_open(file, "pt") as tensors:
            for name in (name for name, home in where.items() if home == file):
                found = tensors.get_slice(name)
                dtype, shape = wanted[name]
                as_told = found.get_dtype() in (_FLOATS if dtype is None else (_NAMES[dtype],))
                if not as_told or tuple(found.get_shape()) != shape:
                    told = "floating-point numbers" if dtype is None else _NAMES[dtype]
                    raise CorruptArtefact(
                        f"{folder}: {name} is {found.get_dtype()} {found.get_shape()}, instead of {told} {list(shape)} as its "
                        "config.json says",
                        fix=_AGAIN,
                    )


# As safetensors calls them.
_NAMES = {torch.int8: "I8", torch.uint8: "U8", torch.bfloat16: "BF16"}
_FLOATS = ("F32", "F16", "BF16")
