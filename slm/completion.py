"""Text in, its continuation out: prompts become token ids, and ids become text as they come.

Owns what lies between text and `generate`, which owns the tokens.

    [text] = generate_text(model, tokenizer, ["def main("], max_new_tokens=64, stream=True)
    [told] = continuations(model, tokenizer, encode_prompts(tokenizer, ["def main("]), max_new_tokens=64)
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from slm.errors import UserError
from slm.generate import generate
from slm.model.llama import SLMForCausalLM

# (row, a piece of its text), as soon as the piece is final.
OnText = Callable[[int, str], None]


@dataclass(frozen=True)
class Continuation:
    """num_tokens: new ones, a stop token among them. finished: a stop token ended it, not the length."""

    text: str
    num_tokens: int
    finished: bool


class TextStream:
    """Token ids in, text out as soon as it is final: a character spread over several tokens comes whole.

    Decodes from a few tokens back, because some tokenizers drop the space of the first token that they see.
    """

    def __init__(self, decode: Callable[[list[int]], str], prompt: Sequence[int]) -> None:
        self._decode = decode
        self._ids = list(prompt)
        self._from, self._complete = 0, len(self._ids)  # decode from here; up to there all is shown
        self._before = decode(self._ids)  # text of [_from, _complete)
        self._num_shown = 0  # characters behind _before

    def add(self, token: int) -> str:
        """The text that this token completes; often empty inside a character."""
        self._ids.append(token)
        text = self._text()
        final = text.rstrip("\ufffd")  # what ends in replacement characters may yet become a character
        shown = final[self._num_shown :]
        self._num_shown = max(self._num_shown, len(final))
        if text == final and text:
            self._from, self._complete, self._num_shown = self._complete, len(self._ids), 0
            self._before = self._decode(self._ids[self._from :])
        return shown

    def finish(self) -> str:
        """What is left: bytes that no character came of."""
        return self._text()[self._num_shown :]

    def _text(self) -> str:
        return self._decode(self._ids[self._from :])[len(self._before) :]


def encode_prompts(tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of each, behind the tokenizer's BOS if it has one. Raises UserError."""
    return [with_bos(tokenizer, list(tokenizer.encode(prompt))) for prompt in prompts]


def with_bos(tokenizer: Any, ids: list[int]) -> list[int]:
    """The ids behind the tokenizer's BOS, if it has one and they do not begin with it."""
    bos = getattr(tokenizer, "bos_token_id", None)
    return ids if bos is None or ids[:1] == [bos] else [bos, *ids]


def continuations(
    model: SLMForCausalLM,
    tokenizer: Any,
    rows: Sequence[Sequence[int]],
    *,
    stop_ids: Sequence[int] = (),
    on_text: OnText | None = None,
    **options: Any,
) -> list[Continuation]:
    """What follows each row of token ids, up to the tokenizer's EOS or one of stop_ids.

    options: those of `generate`. What on_text raises ends it. Raises UserError.
    """
    eos = getattr(tokenizer, "eos_token_id", None)
    stops = {*stop_ids, *([] if eos is None else [eos])}
    streams = [TextStream(tokenizer.decode, row) for row in rows]
    pieces: list[list[str]] = [[] for _ in rows]
    num_tokens = [0] * len(rows)
    finished = [False] * len(rows)

    def show(row: int, text: str) -> None:
        pieces[row].append(text)
        if on_text is not None:
            on_text(row, text)

    def take(new: list[int | None]) -> None:
        for row, token in enumerate(new):
            if token is None:
                continue
            num_tokens[row] += 1
            finished[row] = token in stops
            if not finished[row]:
                show(row, streams[row].add(token))

    input_ids = torch.zeros(len(rows), max(map(len, rows), default=0), dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(rows):
        input_ids[row, : len(ids)] = torch.tensor(ids, dtype=torch.long)
        mask[row, : len(ids)] = 1
    generate(
        model,
        input_ids,
        attention_mask=mask,
        eos_token_id=sorted(stops),
        num_tokens=len(tokenizer),
        on_tokens=take,
        **options,
    )
    for row, stream in enumerate(streams):
        show(row, stream.finish())
    return [Continuation("".join(parts), n, end) for parts, n, end in zip(pieces, num_tokens, finished, strict=True)]


def generate_text(
    model: SLMForCausalLM,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    stream: bool = False,
    on_text: OnText | None = None,
    **options: Any,
) -> list[str]:
    """The continuation of each prompt, without the prompt; tokenizer: encode and decode.

    stream: also writes the text of a single prompt to standard output as it comes.
    options: those of `continuations` and `generate`. Raises UserError.
    """
    if stream and len(prompts) != 1:
        raise UserError(f"stream is on for {len(prompts)} prompts: texts would mix", fix="stream one prompt")

    def write(row: int, text: str) -> None:
        if on_text is not None:
            on_text(row, text)
        if stream:
            sys.stdout.write(text)
            sys.stdout.flush()

    found = continuations(model, tokenizer, encode_prompts(tokenizer, prompts), on_text=write, **options)
    if stream:
        sys.stdout.write("\n")
    return [one.text for one in found]
