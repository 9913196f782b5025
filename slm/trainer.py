"""The notebook front door: a list of strings, a config, train(), best_model/. The same loop and engine as `slm train`.

Owns SLMConfig, TextDataset and SLMTrainer; the loop is train.py's, the loss with a teacher distill/loss.py's.

    tokenizer = SLMTokenizer(vocab_size=4096).train(texts)
    config = SLMConfig(vocab_size=len(tokenizer), hidden_size=256, num_hidden_layers=4, num_attention_heads=8,
                       num_key_value_heads=2, intermediate_size=688, batch_size=8, sequence_length=256, warmup_steps=10)
    dataset = TextDataset(texts, tokenizer, max_length=config.sequence_length)
    SLMTrainer(config=config, model=SLMForCausalLM(config), tokenizer=tokenizer, train_dataset=dataset).train(num_epochs=3)
"""

from __future__ import annotations

import atexit
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ConfigDict, Field

from slm import checkpoint, parallel
from slm.data.batches import Batch, Piece, assemble
from slm.data.order import derive_key, permute
from slm.data.packing import best_fit
from slm.distill.loss import DistillationLoss
from slm.engine import Engine
from slm.errors import UserError
from slm.evaluate import HeldOut
from slm.ledger import Ledger
from slm.losses import IGNORE
from slm.model.config import ModelConfig
from slm.model.hf import refuse_quantized
from slm.model.llama import Objective, SLMForCausalLM
from slm.parallel import Share
from slm.recipe import Phase, recipe_from_tree
from slm.resume import Position, position_of, recipe_changes, remaining_phases
from slm.runtime import RunLock, StopRequest, atomic_write, discover_ranks, setup_logging
from slm.train import open_run, run_phases

log = logging.getLogger("slm")

_MICRO_BATCH_TOKENS = 8192  # of one forward pass; the rest of a batch is accumulated


class SLMConfig(ModelConfig):
    """The model's shape and how it is trained. Defaults: Llama 3.2 1B."""

    model_config = ConfigDict(extra="forbid", frozen=False)

    learning_rate: float = Field(1e-3, gt=0, description="peak of a cosine schedule with warm-up")
    batch_size: int = Field(64, gt=0, description="sequences per optimiser step")
    sequence_length: int = Field(8192, gt=1, description="tokens of a sequence")
    gradient_clip_norm: float = Field(1.0, ge=0, description="largest norm of the gradient; 0 turns clipping off")
    warmup_steps: int = Field(2000, ge=0, description="steps of linear rise; at most the steps that there are")
    weight_decay: float = Field(0.1, ge=0, description="of matrices, times the learning rate")
    seed: int = Field(1234, ge=0, description="of the order of the data")
    use_distillation: bool = Field(False, description="learn from teacher_model too")
    distillation_alpha: float = Field(0.5, ge=0, le=1, description="alpha * CE + (1 - alpha) * T^2 * KL")
    distillation_temperature: float = Field(3.0, gt=0, description="T")


class TextDataset:
    """Strings as packed training sequences of max_length tokens.

    Each text becomes BOS … EOS. A longer one is cut into windows that start every `stride` tokens (default: no
    overlap); in an overlap the tokens are context, counted in the loss once, by the window before. Shorter texts and
    last windows are packed together; attention never crosses from one to another. Nothing is lost: every token but
    the first of a text is predicted exactly once.
    """

    def __init__(
        self, texts: Sequence[str], tokenizer: Any, *, max_length: int = 8192, stride: int | None = None
    ) -> None:
        stride = max_length if stride is None else stride
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise UserError("TextDataset: texts is not a list of strings", fix="pass a list, one string per document")
        if not isinstance(max_length, int) or max_length < 2:
            raise UserError(
                f"TextDataset: max_length is {max_length!r}", fix="give a whole number of tokens, 2 or more"
            )
        if not hasattr(tokenizer, "encode"):
            raise UserError(
                f"TextDataset: tokenizer is a {type(tokenizer).__name__} without encode()", fix="see SLMTokenizer"
            )
        if not 0 < stride <= max_length:
            raise UserError(
                f"TextDataset: stride is {stride} with max_length {max_length}: windows further apart than they are long "
                "would leave text out, and 0 would never end",
                fix=f"give 1 to {max_length}, or nothing for windows without overlap",
            )
        self.max_length, self.stride = max_length, stride
        self._documents = [_encode(tokenizer, text) for text in texts]
        largest = max((int(ids.max()) for ids in self._documents if len(ids)), default=0)
        if hasattr(tokenizer, "__len__") and largest >= len(tokenizer):
            raise UserError(
                f"TextDataset: the tokenizer gave the id {largest}, but its len() is {len(tokenizer)}: a model of that "
                "vocabulary has no row for it",
                fix="let len(tokenizer) be its largest id + 1",
            )
        # (document, start, end, first token whose successor counts)
        windows = [w for d, ids in enumerate(self._documents) for w in self._windows(d, len(ids))]
        self.num_tokens = sum(len(ids) for ids in self._documents)
        lengths = np.array([end - start for _, start, end, _ in windows], dtype=np.int64)
        order, sizes = best_fit(lengths, max_length) if len(windows) else (lengths, lengths)
        ends = np.cumsum(sizes)
        self._rows = [[windows[i] for i in order[e - n : e]] for e, n in zip(ends, sizes, strict=True)]
        self.max_pieces = int(sizes.max(initial=1))

    def _windows(self, document: int, length: int) -> Iterator[tuple[int, int, int, int]]:
        start = counted = 0
        while counted < length - 1:  # tokens 1 … length - 1 are to be predicted; the last has no successor
            end = min(start + self.max_length, length)
            yield document, start, end, counted
            counted = min(end, length - 1)
            start += self.stride

    def __len__(self) -> int:
        """Sequences of max_length."""
        return len(self._rows)

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(f"{self.max_length}/{self.stride}".encode())
        for ids in self._documents:
            digest.update(ids.tobytes() + b"|")
        return digest.hexdigest()

    def batch(self, indices: Iterable[int]) -> Batch:
        """Sequences by index as one batch; a number past the end gives an empty row."""
        rows: list[list[Piece]] = []
        uncounted: list[tuple[int, int, int]] = []  # (row, first, last) positions whose labels count elsewhere
        for b, index in enumerate(indices):
            at, row = 0, []
            for document, start, end, counted_from in self._rows[index] if index < len(self._rows) else []:
                ids = self._documents[document]
                row.append((ids[start:end], int(ids[end]) if end < len(ids) else None))
                uncounted.append((b, at, at + counted_from - start))
                at += end - start
            rows.append(row)
        batch = assemble(rows, self.max_length, 0, self.max_pieces)
        for b, first, last in uncounted:
            batch.labels_BT[b, first:last] = IGNORE
        overlap = sum(last - first for _, first, last in uncounted)
        return replace(batch, num_targets=batch.num_targets - overlap)


def _encode(tokenizer: Any, text: str) -> np.ndarray:
    """BOS … EOS where the tokenizer has them; any object with encode() serves."""
    ids = list(tokenizer.encode(text))
    bos, eos = getattr(tokenizer, "bos_token_id", None), getattr(tokenizer, "eos_token_id", None)
    ids = [bos] * (bos is not None and ids[:1] != [bos]) + ids + [eos] * (eos is not None and ids[-1:] != [eos])
    return np.array(ids, dtype=np.int32)


class _EpochData:
    """train.py's view of a TextDataset: step -> batches, each epoch in a permutation of its own."""

    def __init__(self, dataset: TextDataset, seed: int) -> None:
        self.dataset, self.key = dataset, derive_key("notebook", seed, dataset.fingerprint)

    def step_batches(self, step: int, *, global_batch: int, micro_batch: int, share: Share) -> list[Batch]:
        size, per_rank = len(self.dataset), global_batch // share.data_world
        first = step * global_batch + share.data_rank * per_rank
        places = [divmod(k, size) for k in range(first, first + per_rank)]
        indices = [permute(at, size, derive_key(self.key, epoch)) for epoch, at in places]
        return [self.dataset.batch(indices[at : at + micro_batch]) for at in range(0, per_rank, micro_batch)]


class SLMTrainer:
    """Trains `model` on `train_dataset` and keeps OUTPUT_DIR/best_model, a Hugging Face folder with the tokenizer.

    `distillation_loss`: a DistillationLoss, or a subclass with a forward(student_logits, teacher_logits, labels) of its
    own, used when config.use_distillation is true and a teacher_model is given. The teacher is called without
    gradients: one of ours (packed documents and all), or any model that returns logits (one document at a time).
    """

    def __init__(
        self,
        *,
        config: SLMConfig,
        model: SLMForCausalLM,
        tokenizer: Any,
        train_dataset: TextDataset,
        eval_dataset: TextDataset | None = None,
        teacher_model: Any = None,
        output_dir: str | Path = "output",
        distillation_loss: DistillationLoss | None = None,
    ) -> None:
        for name, value, wanted in (
            ("config", config, SLMConfig),
            ("model", model, SLMForCausalLM),
            ("train_dataset", train_dataset, TextDataset),
            ("output_dir", output_dir, (str, Path)),
        ):
            if not isinstance(value, wanted):
                kind = getattr(wanted, "__name__", "str or Path")
                raise UserError(f"SLMTrainer: {name} is a {type(value).__name__}, not a {kind}", fix=f"give a {kind}")
        if not hasattr(tokenizer, "__len__"):
            raise UserError(
                f"SLMTrainer: tokenizer is a {type(tokenizer).__name__} without len()", fix="see SLMTokenizer"
            )
        refuse_quantized(model, "SLMTrainer: model")
        refuse_quantized(teacher_model, "SLMTrainer: teacher_model")
        self.config, self.model, self.tokenizer = config, model, tokenizer
        self.train_dataset, self.eval_dataset, self.teacher_model = train_dataset, eval_dataset, teacher_model
        self.output_dir = Path(output_dir)
        self.distillation_loss = distillation_loss or DistillationLoss(
            config.distillation_alpha, config.distillation_temperature
        )
        self._check()

    def _check(self) -> None:
        config, rows = self.config, len(self.train_dataset)
        problems = []
        if len(self.tokenizer) > self.model.config.vocab_size:
            problems.append(
                f"the tokenizer has {len(self.tokenizer)} tokens, the model a vocabulary of {self.model.config.vocab_size}: "
                f"use SLMConfig(vocab_size={len(self.tokenizer)}) or model.resize_token_embeddings({len(self.tokenizer)})"
            )
        if config.use_distillation and self.teacher_model is None:
            problems.append(
                "config.use_distillation is true, but there is no teacher_model: give one, or set it to False"
            )
        if self.teacher_model is not None and not config.use_distillation:
            problems.append("a teacher_model is given, but config.use_distillation is false, so it would not be used")
        if rows < config.batch_size:
            problems.append(
                f"the texts make {rows} sequences of {self.train_dataset.max_length} tokens, fewer than batch_size "
                f"{config.batch_size}: give more text, a smaller batch_size or a smaller max_length"
            )
        if self.train_dataset.max_length > self.model.config.max_position_embeddings:
            problems.append(
                f"max_length {self.train_dataset.max_length} is beyond the model's max_position_embeddings "
                f"{self.model.config.max_position_embeddings}"
            )
        if config.sequence_length != self.train_dataset.max_length:
            problems.append(
                f"config.sequence_length is {config.sequence_length}, but the dataset was cut to max_length "
                f"{self.train_dataset.max_length}, which is what would be trained: make them equal"
            )
        if problems:
            raise UserError("SLMTrainer: " + "; ".join(problems))

    def train(self, num_epochs: float = 1, resume_from_checkpoint: bool | str | Path | None = None) -> dict[str, Any]:
        """Trains for num_epochs over the data; afterwards `model` holds the final weights. Returns the last metrics.

        resume_from_checkpoint: True goes on from the newest checkpoint in output_dir (from the start if there is
        none); a path goes on from that run or checkpoint. Without it, an output_dir that already holds checkpoints is
        refused, so that nothing is lost. Raises UserError.
        """
        if isinstance(num_epochs, bool) or not isinstance(num_epochs, (int, float)) or not num_epochs > 0:
            raise UserError(f"SLMTrainer: num_epochs is {num_epochs}: nothing would be trained", fix="give more than 0")
        environment = dict(os.environ)
        try:
            return self._train(num_epochs, resume_from_checkpoint)
        finally:  # what discover_ranks set is of this call: a command started from the notebook must not inherit it
            os.environ.clear()
            os.environ.update(environment)

    def _train(self, num_epochs: float, resume_from_checkpoint: bool | str | Path | None) -> dict[str, Any]:
        ledger = Ledger()
        ranks = discover_ranks()
        device = parallel.local_device(ranks.local_rank)
        if parallel.start(device):
            # A notebook trains again and again, and DeepSpeed cannot join a second process group: leave at exit.
            atexit.register(parallel.stop)
        lock = RunLock(self.output_dir) if ranks.rank == 0 else None
        stop = StopRequest()
        try:
            setup_logging(ranks.rank, self.output_dir)
            recipe = recipe_from_tree(self._recipe_tree(num_epochs), "SLMTrainer")
            data = _EpochData(self.train_dataset, self.config.seed)
            shape = self.model.config.model_dump(mode="json")
            identities = {"train": {"data": self.train_dataset.fingerprint, "seed": self.config.seed, "model": shape}}
            if self.config.use_distillation:
                self.teacher_model.to(device)
            folder = parallel.first_rank_decides(self._checkpoint_to_resume, resume_from_checkpoint)
            reader = parallel.together(checkpoint.Reader, folder) if folder else None
            position = position_of(reader, recipe, identities, allow_change=True) if reader else Position()
            if reader is not None:
                recipe_changes(reader, recipe)  # said, and gone on with: a notebook's settings change
            run = open_run(recipe, ranks, device, self.output_dir, stop, position, ledger)
            try:
                position = run_phases(
                    run,
                    remaining_phases(recipe, position),
                    {"train": data},
                    lambda phase: self._held_out(phase, ranks.rank, ranks.world_size),
                    position,
                    reader,
                    identities=identities,
                    start=self._start,
                    objective=self._objective(),
                )
            finally:
                run.saver.finish(timeout_seconds=120)
                run.metrics.close()
            # Another run that has all the steps already leaves none to do here: its state is the result.
            last = self.output_dir / "latest" if (self.output_dir / "latest").exists() else folder
            assert last is not None
            if ranks.rank == 0:
                self._keep_best(self.output_dir / "best" if (self.output_dir / "best").exists() else last)
            checkpoint.Reader(last).fill(self.model)
            return _last_metrics(self.output_dir)
        finally:
            if lock is not None:
                lock.close()
            stop.close()

    def _recipe_tree(self, num_epochs: float) -> dict[str, Any]:
        config, length = self.config, self.train_dataset.max_length
        num_steps = max(1, -(-int(len(self.train_dataset) * num_epochs) // config.batch_size))
        steps_per_epoch = max(1, len(self.train_dataset) // config.batch_size)
        # float32 needs no ZeRO in one process; half precision needs float32 masters, and stage 2 to accumulate in float32.
        stage = 2 if torch.cuda.is_available() else 0
        strategy = self.output_dir / "deepspeed.json"
        atomic_write(strategy, json.dumps({"zero_optimization": {"stage": stage}}))
        return {
            "name": self.output_dir.resolve().name,
            "output": str(self.output_dir),
            "seed": config.seed,
            "model": self.model.config.model_dump(),
            "tokenizer": str(self.output_dir / "tokenizer") if hasattr(self.tokenizer, "save_pretrained") else "",
            "data": {"sources": {"texts": "in memory"}},
            "optim": {
                "lr": config.learning_rate,
                "grad_clip": config.gradient_clip_norm,
                "weight_decay": config.weight_decay,
            },
            "phases": [
                {
                    "name": "train",
                    "tokens": num_steps * config.batch_size * length,
                    "seq_len": length,
                    "batch_tokens": config.batch_size * length,
                    "micro_batch": _micro_batch(config.batch_size, length),
                    "schedule": {"type": "cosine", "warmup_steps": min(config.warmup_steps, num_steps)},
                    "deepspeed": str(strategy),
                }
            ],
            "checkpoint": {"every_steps": max(steps_per_epoch, 1)},
            "eval": {"every_steps": steps_per_epoch},
        }

    def _checkpoint_to_resume(self, asked: bool | str | Path | None) -> Path | None:
        if asked is True:
            return checkpoint.choose(self.output_dir, own=True)
        if asked:
            return checkpoint.locate(asked)
        if (self.output_dir / "latest").exists():
            raise UserError(
                f"{self.output_dir} already holds checkpoints, and training anew would replace them",
                fix="pass resume_from_checkpoint=True to go on, or another output_dir",
            )
        return None

    def _start(self, engine: Engine) -> None:
        weights = dict(self.model.named_parameters())
        engine.write_weights(lambda name, shape: weights[name].detach().cpu())

    def _held_out(self, phase: Phase, rank: int, world: int) -> HeldOut:
        if self.eval_dataset is None:
            return HeldOut(phase.seq_len, {})
        size = phase.micro_batch * world
        firsts = range(0, len(self.eval_dataset), size)
        mine = (first + rank * phase.micro_batch for first in firsts)
        dataset = self.eval_dataset
        batches = (dataset.batch(range(at, at + phase.micro_batch)) for at in mine)
        return HeldOut(phase.seq_len, {"eval": batches})

    def _objective(self) -> Objective | None:
        if not self.config.use_distillation:
            return None
        teacher, loss = self.teacher_model, self.distillation_loss
        teacher.eval()

        def objective(
            tokens_BT: torch.Tensor,
            positions_BT: torch.Tensor,
            piece_bounds: torch.Tensor,
            labels_BT: torch.Tensor,
            logits_BTV: torch.Tensor,
        ) -> tuple[torch.Tensor, torch.Tensor]:
            with torch.no_grad():
                teacher_BTV = _teacher_logits(teacher, tokens_BT, positions_BT, piece_bounds)
            count = (labels_BT != IGNORE).sum()
            return loss(logits_BTV, teacher_BTV, labels_BT).float() * count, count

        return objective

    def _keep_best(self, folder: Path) -> None:
        """Writes the model of a checkpoint to OUTPUT_DIR/best_model: beside the old one first, then in its place."""
        new, old = (self.output_dir / f".best_model.{which}" for which in ("new", "old"))
        for leftover in (new, old):
            shutil.rmtree(leftover, ignore_errors=True)
        model = SLMForCausalLM(self.model.config, seed=None)
        checkpoint.Reader(folder).fill(model)
        model.save_pretrained(new, self.tokenizer)
        if hasattr(self.tokenizer, "save_pretrained"):
            self.tokenizer.save_pretrained(self.output_dir / "tokenizer")
        final = self.output_dir / "best_model"
        if final.exists():
            final.rename(old)
        new.rename(final)
        shutil.rmtree(old, ignore_errors=True)
        log.info("the best model is in %s", final)


def _micro_batch(batch_size: int, length: int) -> int:
    """The largest divisor of batch_size whose sequences are at most _MICRO_BATCH_TOKENS together, at least 1."""
    return max(
        (d for d in range(1, batch_size + 1) if batch_size % d == 0 and d * length <= _MICRO_BATCH_TOKENS), default=1
    )


def _teacher_logits(
    teacher: Any, tokens_BT: torch.Tensor, positions_BT: torch.Tensor, piece_bounds: torch.Tensor
) -> torch.Tensor:
    """[B, T, V] with each packed document seen alone."""
    if isinstance(teacher, SLMForCausalLM):
        return teacher(tokens_BT, positions_BT, piece_bounds)
    flat, bounds = tokens_BT.flatten(), torch.unique(piece_bounds).tolist()
    pieces = [teacher(flat[None, a:b]) for a, b in zip(bounds, bounds[1:], strict=False)]
    logits = [getattr(piece, "logits", piece)[0] for piece in pieces]
    return torch.cat(logits).view(*tokens_BT.shape, -1)


def _last_metrics(run_dir: Path) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        merged.update(json.loads(line))
    return merged
