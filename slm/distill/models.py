"""Teachers as functions: from a packed batch to their logits, chunk by chunk, whatever the model is.

Owns loading one and running it; what is made of the logits is targets.py's.

    teacher = load_teacher("models/Llama-3.1-8B", device, vocab_size=128256)
    teacher.visit(batch, lambda first, logits_CV: ...)      # every token of the batch, in order

`B` sequences, `T` tokens, `C` tokens of a chunk, `V` vocabulary, `E` hidden.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from slm import checkpoint
from slm.data.batches import Batch
from slm.errors import EnvironmentProblem, UserError
from slm.losses import IGNORE, DenseTarget
from slm.model.config import ModelConfig
from slm.model.hf import read_config, read_json, refuse_pickles, weight_files, weight_reader
from slm.model.llama import SLMForCausalLM, Visit
from slm.model.shape import QUANTIZED_TYPE
from slm.names import shortened

log = logging.getLogger("slm")


@dataclass(frozen=True)
class TeacherModel:
    """A loaded teacher. identity: what its logits depend on, for a cache's header.

    llama: our model, of one device; else `run` is a partitioned or a foreign one.
    """

    identity: dict[str, Any]
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


@dataclass(frozen=True)
class TeacherInfo:
    """What is known of a teacher without its weights. context: its longest piece, in tokens. config: of a Llama-family one."""

    identity: dict[str, Any]
    context: int
    vocab_size: int
    config: ModelConfig | None
    reader: checkpoint.Reader | None = None


def describe_teacher(path: str) -> TeacherInfo:
    """Raises UserError if there is none at `path`, CorruptArtefact if it is damaged."""
    folder = Path(path)
    if not folder.exists():
        raise UserError(
            f"the teacher {path} does not exist",
            fix="give the path of a Hugging Face folder, a run or a checkpoint on this machine (nothing is downloaded)",
        )
    if (folder / "config.json").is_file():
        fields = read_json(folder / "config.json")
        kind = str(fields.get("model_type"))
        identity = {"name": folder.resolve().name, "model_type": kind, "fingerprint": weights_fingerprint(folder)}
        if kind in ("llama", QUANTIZED_TYPE):  # which read_config refuses
            config = read_config(folder)
            return TeacherInfo(identity, config.max_position_embeddings, config.vocab_size, config)
        _refuse_foreign_code(folder, fields)
        fields = fields.get("text_config") or fields  # of models that also see images
        context = next(
            (fields[k] for k in ("max_position_embeddings", "n_positions", "n_ctx") if fields.get(k)), 1 << 62
        )
        return TeacherInfo(identity, context, fields.get("vocab_size", 0), None)
    if not any((folder / name).exists() for name in ("checkpoints", "manifest.json")):
        refuse_pickles(folder)
        raise UserError(
            f"the teacher {path} has neither a config.json nor checkpoints",
            fix="give a Hugging Face folder, a run or a checkpoint",
        )
    reader = checkpoint.Reader(checkpoint.locate_best(folder))
    config = ModelConfig(**reader.state["model"])
    manifest = hashlib.sha256((reader.folder / "manifest.json").read_bytes()).hexdigest()
    tokenizer = reader.state["identity"].get("tokenizer", "")
    identity = {"name": folder.resolve().name, "model_type": "llama", "fingerprint": manifest, "tokenizer": tokenizer}
    return TeacherInfo(identity, config.max_position_embeddings, config.vocab_size, config, reader)


def check_teacher(path: str, info: TeacherInfo, vocab_size: int, tokenizer: str) -> None:
    """Raises UserError if it does not read the tokens of shards with this vocabulary and tokenizer (fingerprint)."""
    if info.vocab_size < vocab_size:
        raise UserError(
            f"the teacher {path} has a vocabulary of {info.vocab_size}, the token shards' tokenizer one of "
            f"{vocab_size}: it does not know all of their tokens",
            fix="make the shards with the teacher's tokenizer",
        )
    found = info.identity.get("tokenizer") or _tokenizer_of(path)
    if not found:
        log.warning("teacher %s: it has no tokenizer files, so that it reads the shards' tokens as they are meant is not "
                    "checked", path)  # fmt: skip
    elif found != tokenizer:
        raise UserError(
            f"the teacher {path} has another tokenizer (fingerprint {found[:12]}) than the token shards ({tokenizer[:12]}): "
            "the same ids mean different text",
            fix="make the shards with the teacher's tokenizer, or use a teacher of theirs",
        )


def load_teacher(path: str, device: torch.device, *, zero3: bool = False) -> TeacherModel:
    """The teacher at `path`: a Hugging Face folder of any causal model, a run, or a checkpoint; bfloat16 on a GPU.

    Raises UserError, CorruptArtefact, EnvironmentProblem.
    """
    info = describe_teacher(path)
    half = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = torch.bfloat16 if half else torch.float32
    info = replace(info, identity={**info.identity, "dtype": str(dtype).removeprefix("torch.")})
    if info.config is not None:
        return _llama(path, info, device, dtype, zero3)
    if zero3:
        raise UserError(
            f"the teacher {path} is a {info.identity['model_type']!r} model and zero3 is true, which only Llama-family "
            "teachers can",
            fix="set zero3 to false, or use a Llama-family teacher",
        )
    return _foreign(path, info, device, dtype)


def _refuse_foreign_code(folder: Path, fields: Any, at: str = "config.json") -> None:
    """Raises UserError where a config tells transformers to fetch a kernel from the hub, or weights from elsewhere."""
    if isinstance(fields, dict):
        for key, value in fields.items():
            named = list(value.values()) if isinstance(value, dict) else [value]
            if key in ("attn_implementation", "_attn_implementation", "transformers_weights") and any(
                isinstance(name, str) and "/" in name for name in named
            ):
                raise UserError(
                    f"the teacher {folder}: its {at} has {key} {shortened(value)}, which would be fetched from elsewhere and run",
                    fix=f"remove {key} there: the model is the same without",
                )
            _refuse_foreign_code(folder, value, f"{at} ({key})")


def _llama(path: str, info: TeacherInfo, device: torch.device, dtype: torch.dtype, zero3: bool) -> TeacherModel:
    assert info.config is not None
    config = info.config
    weight = weight_reader(path) if info.reader is None else info.reader.weight
    if zero3:
        from slm.engine import PartitionedModel

        partitioned = PartitionedModel(config, weight, dtype)

        def run(batch: Batch, visit: Visit) -> None:
            partitioned(batch.tokens_BT, batch.positions_BT, batch.piece_bounds, visit=visit)

        return TeacherModel(info.identity, run)
    with torch.device(device):
        model = SLMForCausalLM(config, seed=None).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weight(name, tuple(parameter.shape)))
    model.requires_grad_(False).eval()

    def run_whole(batch: Batch, visit: Visit) -> None:
        model(batch.tokens_BT, batch.positions_BT, batch.piece_bounds, visit=visit)

    return TeacherModel(info.identity, run_whole, model)


def _foreign(path: str, info: TeacherInfo, device: torch.device, dtype: torch.dtype) -> TeacherModel:
    """Any causal model that transformers loads, one piece a row: its attention knows nothing of packed documents."""
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        raise EnvironmentProblem(
            f"the teacher {path} is a {info.identity['model_type']!r} model, which transformers has to run",
            fix='pip install -e ".[hf]"',
        ) from None
    try:
        # Nothing of the folder runs: neither code that comes with a model nor pickles.
        model: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
    except (ValueError, OSError, KeyError, ImportError) as error:
        if "auto_map" in read_json(Path(path) / "config.json"):
            raise UserError(
                f"the teacher {path} is a {info.identity['model_type']!r} model with code of its own (auto_map in its "
                "config.json), which your transformers does not know; code that comes with a model is never run",
                fix="use a model that transformers knows, or a newer transformers",
            ) from None
        raise UserError(
            f"the teacher {path} cannot be loaded by transformers: {str(error).strip().splitlines()[0]}",
            fix="use a causal language model that your transformers knows",
        ) from None
    model.to(device).eval()

    def run(batch: Batch, visit: Visit) -> None:
        flat, labels = batch.tokens_BT.flatten(), batch.labels_BT.flatten()
        bounds = torch.unique(batch.piece_bounds).tolist()
        for start, end in zip(bounds, bounds[1:], strict=False):
            if end - start == 1 or bool((labels[start:end] != IGNORE).any()):  # else it is padding
                visit(start, model(flat[None, start:end], use_cache=False).logits[0])

    return TeacherModel(info.identity, run)


def _tokenizer_of(path: str) -> str:
    """The fingerprint of the tokenizer in a Hugging Face folder, "" if there is none."""
    from slm.tokenizer import load_tokenizer

    if not any((Path(path) / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer.tiktoken")):
        return ""
    return load_tokenizer(path).fingerprint


def fingerprint_of(path: str) -> str:
    """Of the weights of a run, a checkpoint or a folder, quantised or not. Raises UserError, CorruptArtefact."""
    if (Path(path) / "config.json").is_file():
        return weights_fingerprint(Path(path))
    return describe_teacher(path).identity["fingerprint"]


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
