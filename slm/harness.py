"""Our models as lm-evaluation-harness sees them: its requests answered, shared among ranks, and kept.

Owns the model's side only: what is asked, and what becomes of the answers, is the harness's (see suite.py).

    model = HarnessModel("runs/demo")       # also, once this module is imported: lm_eval --model slm --model_args pretrained=…
    lm_eval.simple_evaluate(model=model, tasks=["hellaswag"])

`B` prompts, `T` tokens of one, `N` tokens packed in one row, `C` of a chunk, `V` vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from slm import parallel
from slm.completion import TextStream
from slm.distill.models import fingerprint_of
from slm.errors import UserError
from slm.generate import generate
from slm.loading import load_for_text

log = logging.getLogger("slm")

# Tokens of one forward pass, padding-free: bounds the hidden states where a model's context is long.
FORWARD_TOKENS = 16384


@register_model("slm")
class HarnessModel(TemplateLM):
    """A run, a checkpoint or a Hugging Face folder as one of the harness's models.

    The harness sees one process: requests are shared among the ranks here. Rank 0 calls the methods below, the others `serve`.
    """

    def __init__(
        self,
        pretrained: str,
        tokenizer: str = "",
        batch_size: int | str | None = 4,
        max_length: int | str = 0,
        answers: Path | None = None,
        device: Any = None,
        max_batch_size: Any = None,
    ) -> None:
        """max_length: tokens that the model sees at once (0: its context). answers: a folder that keeps them."""
        super().__init__()
        if isinstance(batch_size, str) and not batch_size.isdigit():
            raise UserError(f"batch_size is {batch_size!r}, no number", fix="give a number of rows")
        given = torch.device(device) if device is not None else None
        self._model, self._text = parallel.together(load_for_text, pretrained, tokenizer, given)
        self._device = next(self._model.parameters()).device
        context = self._model.config.max_position_embeddings
        self.max_length = int(max_length) or context
        if self.max_length > context:
            raise UserError(
                f"--seq-len is {max_length}, beyond the model's context of {context}", fix=f"give at most {context}"
            )
        if self._text.eos_token_id is None and self._text.bos_token_id is None:
            raise UserError(
                "the tokenizer has neither BOS nor EOS, one of which a benchmark puts before a text's first token",
                fix="use a tokenizer that has one",
            )
        self._rows = int(batch_size or 4)
        self.fingerprint = fingerprint_of(pretrained)
        what = [self.fingerprint, self._text.fingerprint, str(next(self._model.parameters()).dtype), self.max_length]
        self._answers = parallel.together(Answers, answers, what)

    @property
    def eot_token_id(self) -> int:
        return self._text.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        bos = self._text.bos_token_id
        return self._text.eos_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self._text.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """With BOS in front, where there is one, as all that the model was trained on; a special token's name is text."""
        bos = self._text.bos_token_id
        return self._text.encode(string, add_bos=bos is not None and add_special_tokens is not False)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return [(float(x), bool(greedy)) for x, greedy in self._answer("loglikelihood", requests)]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        return self._answer("loglikelihood_rolling", requests)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        return self._answer("generate_until", requests)

    # --- among ranks ---

    def _answer(self, method: str, requests: list[Any]) -> list[Any]:
        """What is known already, and the rest from all ranks, in the order asked."""
        keys = [self._answers.key(method, request.args, i) for i, request in enumerate(requests)]
        todo = {
            key: request.args for key, request in zip(keys, requests, strict=True) if key not in self._answers.known
        }
        if len(todo) < len(set(keys)):
            log.info("%d of %d answers are there already", len(set(keys)) - len(todo), len(set(keys)))
        longest_first = sorted(todo.items(), key=lambda item: -len(item[1][0]))
        self._answers.known |= self._together(parallel.broadcast((method, longest_first)))
        return [self._answers.known[key] for key in keys]

    def serve(self) -> None:
        """Ranks other than 0: takes part until rank 0 has done with them."""
        while (task := parallel.broadcast(None)) is not None:
            with suppress(Exception):  # rank 0 has it too (parallel.together), says it, and dismisses
                self._together(task)

    def dismiss(self) -> None:
        parallel.broadcast(None)

    def _together(self, task: tuple[str, list[tuple[str, Any]]]) -> dict[str, Any]:
        method, todo = task
        mine = parallel.together(self._share_of, method, todo[parallel.rank() :: parallel.world_size()])
        return {key: answer for part in parallel.gather_objects(mine) for key, answer in part.items()}

    def _share_of(self, method: str, todo: list[tuple[str, Any]]) -> dict[str, Any]:
        answers: dict[str, Callable[[list[Any]], list[Any]]] = {
            "loglikelihood": self._likelihoods,
            "loglikelihood_rolling": self._rolling,
            "generate_until": self._continuations,
        }
        answer = answers[method]
        done: dict[str, Any] = {}
        slab = 8 * self._rows  # what a kill can cost
        with tqdm(total=len(todo), desc=method, disable=True if parallel.rank() else None) as bar, torch.no_grad():
            for start in range(0, len(todo), slab):
                keys, asked = zip(*todo[start : start + slab], strict=True)
                found = dict(zip(keys, answer(list(asked)), strict=True))
                self._answers.keep(found)
                done |= found
                bar.update(len(found))
        return done

    # --- the three kinds of request ---

    def _likelihoods(self, asked: list[tuple[str, str]]) -> list[tuple[float, bool]]:
        return super().loglikelihood([SimpleNamespace(args=args) for args in asked], disable_tqdm=True)

    def _rolling(self, asked: list[tuple[str]]) -> list[float]:
        """Each token once, each window with as much context as fits (get_rolling_token_windows)."""
        windows: list[tuple[Any, list[int], list[int]]] = []
        owners: list[int] = []
        for i, (text,) in enumerate(asked):
            cut = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            pairs = [make_disjoint_window(pair) for pair in cut]
            windows += [(None, context, continuation) for context, continuation in pairs]
            owners += [i] * len(pairs)
        sums = [0.0] * len(asked)
        for i, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            sums[i] += value
        return sums

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """(log p of the continuation, whether each of its tokens is the likeliest) of (_, context, continuation)."""
        for _text, _context, continuation in requests:
            if len(continuation) > self.max_length:
                raise UserError(
                    f"an answer of the benchmark has {len(continuation)} tokens, more than the {self.max_length} that the model "
                    "sees at once",
                    fix="leave this task out, or evaluate a model with a longer context",
                )
        rows = [(context + continuation)[-(self.max_length + 1) :] for _, context, continuation in requests]
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
        for batch in self._batches([len(row) - 1 for row in rows]):
            found = self._pieces([rows[i] for i in batch])
            for i, (logp_T, greedy_T) in zip(batch, found, strict=True):
                n = len(requests[i][2])
                answers[i] = float(logp_T[-n:].sum()), bool(greedy_T[-n:].all())
        return answers

    def _batches(self, lengths: list[int]) -> Iterator[list[int]]:
        """Indices, longest first: as many rows as were asked for, and no more tokens than FORWARD_TOKENS."""
        batch: list[int] = []
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            if batch and (len(batch) == self._rows or sum(lengths[j] for j in batch) + lengths[i] > FORWARD_TOKENS):
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    def _pieces(self, rows: list[list[int]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(log p, whether it is the likeliest) of each token of a row but its first. Rows are packed as pieces of one
        sequence, which attention does not cross: there is no padding, and the vocabulary is seen in chunks."""
        lengths = [len(row) - 1 for row in rows]
        tokens = torch.tensor([token for row in rows for token in row[:-1]], device=self._device)
        labels_N = torch.tensor([token for row in rows for token in row[1:]], device=self._device)
        positions = torch.cat([torch.arange(length) for length in lengths]).to(self._device)
        bounds = torch.tensor([0, *lengths]).cumsum(0).int().to(self._device)
        logp_N = torch.empty(len(labels_N), device=self._device)
        greedy_N = torch.empty(len(labels_N), dtype=torch.bool, device=self._device)

        def visit(first: int, logits_CV: torch.Tensor) -> None:
            here = slice(first, first + len(logits_CV))
            logp_N[here] = -torch.nn.functional.cross_entropy(logits_CV.float(), labels_N[here], reduction="none")
            greedy_N[here] = logits_CV.argmax(-1) == labels_N[here]

        self._model(tokens[None], positions[None], bounds, visit=visit)
        return list(zip(logp_N.cpu().split(lengths), greedy_N.cpu().split(lengths), strict=True))

    def _continuations(self, asked: list[tuple[str, dict[str, Any]]]) -> list[str]:
        answers = [""] * len(asked)
        prompts = [self.tok_encode(text) for text, _ in asked]
        for kwargs in {json.dumps(options, sort_keys=True): options for _, options in asked}.values():
            same = [i for i, (_, options) in enumerate(asked) if options == kwargs]
            for batch in self._batches([len(prompts[i]) for i in same]):
                members = [same[j] for j in batch]
                for i, text in zip(members, self._generate([prompts[i] for i in members], kwargs), strict=True):
                    answers[i] = text
        return answers

    def _generate(self, prompts: list[list[int]], kwargs: dict[str, Any]) -> list[str]:
        """What follows each prompt, up to the first of its stop texts, EOS, or max_gen_toks."""
        options = normalize_gen_kwargs(dict(kwargs), 256)
        until, new_tokens = options.pop("until") or [], options.pop("max_gen_toks")
        do_sample, temperature = options.pop("do_sample", False), options.pop("temperature", 0.0)
        sampling = {name: options.pop(name) for name in ("top_k", "top_p") if name in options}
        if options:
            raise UserError(
                f"the benchmark generates with {', '.join(sorted(options))}, which slm does not know",
                fix="leave this task out, or evaluate the exported folder with lm_eval --model hf",
            )
        if (room := self.max_length - new_tokens) < 1:
            raise UserError(
                f"the benchmark asks for up to {new_tokens} new tokens, and the model sees {self.max_length} at once: nothing is "
                "left for the prompt",
                fix="leave this task out, or evaluate a model with a longer context",
            )
        rows = [prompt[-room:] for prompt in prompts]
        width = max(map(len, rows))
        tokens_BT = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        mask_BT = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        streams = [TextStream(self._text.decode, row) for row in rows]
        eos = self._text.eos_token_id
        texts = [""] * len(rows)
        open_rows = set(range(len(rows)))

        def take(new: list[int | None]) -> None:
            for i, token in enumerate(new):
                if token is None or token == eos:
                    open_rows.discard(i)
                elif i in open_rows:
                    texts[i] += streams[i].add(token)
                    if any(stop and stop in texts[i] for stop in until):
                        open_rows.discard(i)
            if not open_rows:
                raise _AllStopped

        try:
            generate(
                self._model,
                tokens_BT,
                attention_mask=mask_BT,
                max_new_tokens=new_tokens,
                do_sample=bool(do_sample) and temperature > 0,
                temperature=temperature or 1.0,
                eos_token_id=eos,
                num_tokens=len(self._text),
                on_tokens=take,
                **sampling,
            )
        except _AllStopped:
            pass
        whole = [text + stream.finish() for text, stream in zip(texts, streams, strict=True)]
        return [postprocess_generated_text(text, until, None) for text in whole]


class _AllStopped(Exception):
    """Every row has come to one of its stop texts."""


class Answers:
    """What the model answered, by a hash of model and request; in a folder, if there is one, a file for each rank."""

    def __init__(self, folder: Path | None, what: list[Any]) -> None:
        self._what = what
        self.known: dict[str, Any] = {}
        self._path = folder / f"answers-{parallel.rank()}.jsonl" if folder is not None else None
        if folder is None:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{folder}, which keeps the answers, cannot be written: {error.strerror}", fix="give another --output"
            ) from None
        for path in sorted(folder.glob("answers-*.jsonl")):
            for line in path.read_text(errors="replace").splitlines():
                try:
                    row = json.loads(line)
                    self.known[row["key"]] = row["answer"]
                except (ValueError, KeyError, TypeError):  # cut short by a kill
                    continue

    def key(self, method: str, arguments: Sequence[Any], number: int) -> str:
        text = json.dumps([*self._what, method, list(arguments)], sort_keys=True, default=str)
        key = hashlib.sha256(text.encode()).hexdigest()[:32]
        sampled = method == "generate_until" and arguments[1].get("do_sample")
        return f"{key}-draw-{number}" if sampled else key

    def keep(self, found: dict[str, Any]) -> None:
        """Draws are not kept: asked again, they are other ones."""
        if self._path is None:
            return
        lines = [json.dumps({"key": k, "answer": x}) + "\n" for k, x in found.items() if "-draw-" not in k]
        with open(self._path, "ab+") as file:
            if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":  # cut short by a kill
                file.write(b"\n")
            file.write("".join(lines).encode())
