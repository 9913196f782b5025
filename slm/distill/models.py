"""Teachers as functions: from a packed batch to their logits, chunk by chunk, whatever the model is.

Owns loading one and running it; what is made of the logits is targets.py's.

    teacher = load_teacher("models/Llama-3.1-8B", device, vocab_size=128256)
    teacher.visit(batch, lambda first, logits_CV: ...)      # every token of the batch, in order

`B` sequences, `T` tokens, `C` tokens of a chunk, `V` vocabulary, `E` hidden.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from slm import checkpoint
from slm.data.batches import Batch
from slm.errors import EnvironmentProblem, UserError
from slm.losses import DenseTarget
from slm.model.config import ModelConfig
from slm.model.hf import read_config, weight_files, weight_reader
from slm.model.llama import SLMForCausalLM, Visit

log = logging.getLogger("slm")


@dataclass(frozen=True)
class TeacherModel:
    """A loaded teacher. identity: what its logits depend on, for a cache's header. context: its longest piece, in tokens.

    llama: our model, of one device; else `run` is a partitioned or a foreign one.
    """

    identity: dict[str, Any]
    context: int
    vocab_size: int
    run: Callable[[Batch, Visit], None]
    llama: SLMForCausalLM | None = None

    @torch.no_grad()
    def visit(self, batch: Batch, visit: Visit) -> None:
        self.run(batch, visit)

    @torch.no_grad()
    def dense(self, batch: Batch, vocab_size: int, weight: float) -> DenseTarget:
        """Its hidden states and head, for a loss over the whole vocabulary."""
        assert self.llama is not None  # loss_problems and check_online
        hidden_BTE = self.llama.hidden_states(batch.tokens_BT, batch.positions_BT, batch.piece_bounds)
        return DenseTarget(hidden_BTE.flatten(0, 1), self.llama.lm_head.weight[:vocab_size], weight)


def load_teacher(
    path: str, device: torch.device, *, vocab_size: int, tokenizer: str, zero3: bool = False
) -> TeacherModel:
    """The teacher at `path`: a Hugging Face folder of any causal model, a run, or a checkpoint; bfloat16 on a GPU.

    vocab_size, tokenizer: of the token shards. Raises UserError if it cannot read them.
    """
    folder = Path(path)
    half = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = torch.bfloat16 if half else torch.float32
    is_hugging_face = (folder / "config.json").is_file()
    if not is_hugging_face and not folder.exists():
        raise UserError(f"the teacher {path} does not exist", fix="give a Hugging Face folder, a run or a checkpoint")
    if is_hugging_face and _model_type(folder) != "llama":
        if zero3:
            raise UserError(
                f"the teacher {path} is a {_model_type(folder)!r} model and zero3 is true, which only Llama-family "
                "teachers can",
                fix="set zero3 to false, or use a Llama-family teacher",
            )
        teacher = _foreign(folder, device, dtype)
    else:
        teacher = _llama(folder, device, dtype, is_hugging_face, zero3)
    _check_tokenizer(path, teacher, vocab_size, tokenizer)
    return teacher


def _model_type(folder: Path) -> str:
    try:
        return str(json.loads((folder / "config.json").read_text()).get("model_type"))
    except ValueError as error:
        raise UserError(f"{folder}/config.json is not valid JSON ({error})", fix="copy the folder again") from None


def _llama(folder: Path, device: torch.device, dtype: torch.dtype, is_hugging_face: bool, zero3: bool) -> TeacherModel:
    weight: Callable[[str, tuple[int, ...]], torch.Tensor]
    identity: dict[str, Any]
    if is_hugging_face:
        config, weight = read_config(folder), weight_reader(folder)
        identity = {"path": str(folder), "fingerprint": weights_fingerprint(folder)}
    else:
        best = folder / "best"
        reader = checkpoint.Reader(checkpoint.locate(best if (best / "manifest.json").is_file() else folder))
        config, weight = ModelConfig(**reader.state["model"]), reader.weight
        manifest = hashlib.sha256((reader.folder / "manifest.json").read_bytes()).hexdigest()
        identity = {
            "path": str(folder),
            "fingerprint": manifest,
            "tokenizer": reader.state["identity"].get("tokenizer", ""),
        }
    identity |= {
        "model_type": "llama",
        "dtype": str(dtype).removeprefix("torch."),
        "context": config.max_position_embeddings,
    }
    if zero3:
        from slm.engine import PartitionedModel

        partitioned = PartitionedModel(config, weight, dtype)

        def run(batch: Batch, visit: Visit) -> None:
            partitioned(batch.tokens_BT, batch.positions_BT, batch.piece_bounds, visit=visit)

        return TeacherModel(identity, config.max_position_embeddings, config.vocab_size, run)
    with torch.device(device):
        model = SLMForCausalLM(config, seed=None).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weight(name, tuple(parameter.shape)))
    model.requires_grad_(False).eval()

    def run_whole(batch: Batch, visit: Visit) -> None:
        model(batch.tokens_BT, batch.positions_BT, batch.piece_bounds, visit=visit)

    return TeacherModel(identity, config.max_position_embeddings, config.vocab_size, run_whole, model)


def _foreign(folder: Path, device: torch.device, dtype: torch.dtype) -> TeacherModel:
    """Any causal model that transformers loads, one piece a row: its attention knows nothing of packed documents."""
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        raise EnvironmentProblem(
            f"the teacher {folder} is a {_model_type(folder)!r} model, which transformers has to run",
            fix='pip install -e ".[hf]"',
        ) from None
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    model.to(device).eval()
    context: int = getattr(model.config, "max_position_embeddings", 1 << 62)
    identity = {
        "path": str(folder),
        "fingerprint": weights_fingerprint(folder),
        "model_type": _model_type(folder),
        "dtype": str(dtype).removeprefix("torch."),
        "context": context,
    }

    def run(batch: Batch, visit: Visit) -> None:
        flat = batch.tokens_BT.flatten()
        bounds = torch.unique(batch.piece_bounds).tolist()
        for start, end in zip(bounds, bounds[1:], strict=False):
            visit(start, model(flat[None, start:end], use_cache=False).logits[0])

    return TeacherModel(identity, context, model.config.vocab_size, run)


def _check_tokenizer(path: str, teacher: TeacherModel, vocab_size: int, tokenizer: str) -> None:
    if teacher.vocab_size < vocab_size:
        raise UserError(
            f"the teacher {path} has a vocabulary of {teacher.vocab_size}, the token shards' tokenizer one of "
            f"{vocab_size}: it does not know all of their tokens",
            fix="make the shards with the teacher's tokenizer",
        )
    found = teacher.identity.get("tokenizer") or _tokenizer_of(path)
    if not found:
        log.warning("teacher %s: it has no tokenizer files, so that it reads the shards' tokens as they are meant is not "
                    "checked", path)  # fmt: skip
    elif found != tokenizer:
        raise UserError(
            f"the teacher {path} has another tokenizer (fingerprint {found[:12]}) than the token shards ({tokenizer[:12]}): "
            "the same ids mean different text",
            fix="make the shards with the teacher's tokenizer, or use a teacher of theirs",
        )


def _tokenizer_of(path: str) -> str:
    """The fingerprint of the tokenizer in a Hugging Face folder, "" if there is none."""
    from slm.tokenizer import load_tokenizer

    if not any((Path(path) / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer.tiktoken")):
        return ""
    return load_tokenizer(path).fingerprint


def weights_fingerprint(folder: Path) -> str:
    """SHA-256 of config.json and of 64 KiB at 64 places of each safetensors file, its header among them: reading all of a
    large teacher on every rank would take minutes."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(set(weight_files(folder).values())):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}:".encode())
        with open(file, "rb") as handle:
            for place in range(64):
                handle.seek(size * place // 64)
                digest.update(handle.read(1 << 16))
    return digest.hexdigest()
