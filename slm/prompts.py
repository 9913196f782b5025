"""A file of prompts in, a file of answers out, in batches; goes on from where it was killed.

Owns both files' formats. A line of the answers is what the prompt's line held, with `completion`, `num_tokens`, `finished`
(whether it ended by itself) and `settings`, which tells answers of other settings apart.

    answer(model, tokenizer, read_prompts(Path("prompts.jsonl")), Path("answers.jsonl"), batch=16, settings=…, **options)
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from slm.completion import continuations, encode_prompts
from slm.errors import EnvironmentProblem, UserError
from slm.model.llama import SLMForCausalLM
from slm.progress import TokenProgress

_OURS = ("completion", "num_tokens", "finished", "settings")


@dataclass(frozen=True)
class Prompt:
    """fields: of its line, with `prompt` among them. place: file and line, for messages."""

    fields: dict[str, Any]
    place: str

    @property
    def text(self) -> str:
        return self.fields["prompt"]


def read_prompts(path: Path) -> list[Prompt]:
    """A prompt a line; of .jsonl files an object a line, with the text as `prompt`. Raises UserError."""
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except OSError as error:
        raise UserError(
            f"the prompts {path} cannot be read: {error.strerror}", fix="give a text or .jsonl file"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"the prompts {path} are not UTF-8 (byte {error.start})", fix="save them as UTF-8") from None
    as_json = path.suffix in (".jsonl", ".json")
    prompts = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            place = f"{path}, line {number}"
            prompts.append(Prompt(_fields(line, place) if as_json else {"prompt": line.rstrip("\r")}, place))
    if not prompts:
        raise UserError(f"the file of prompts {path} is empty", fix="write a prompt a line")
    return prompts


def _fields(line: str, place: str) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place} is no JSON: {error}", fix='write {"prompt": "…"}') from None
    if not isinstance(fields, dict) or not isinstance(fields.get("prompt"), str):
        raise UserError(f"{place} has no text as `prompt`", fix='write {"prompt": "…"}')
    if taken := [name for name in _OURS if name in fields]:
        raise UserError(f"{place} has a field {taken[0]}, which is a field of the answer", fix="rename it")
    return fields


def answer(
    model: SLMForCausalLM,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    output: Path | None,
    *,
    batch: int,
    about: dict[str, Any],
    max_new_tokens: int,
    seed: int | None = None,
    **options: Any,
) -> tuple[int, int]:
    """(prompts answered now, tokens made). One JSON object a line, in the order of the prompts, to the end of `output`, or
    to standard output.

    batch: prompts at once. about: what else decides the answers, such as the model's path. options: those of `generate`.
    Raises UserError, before anything is written, if a prompt does not fit or `output` is of something else;
    EnvironmentProblem if the disk is full.
    """
    rows = encode_prompts(tokenizer, [prompt.text for prompt in prompts])
    context = model.config.max_position_embeddings
    for prompt, ids in zip(prompts, rows, strict=True):
        if not ids:
            raise UserError(f"{prompt.place} has no token to begin from", fix="write something there")
        if len(ids) + max_new_tokens > context:
            raise UserError(
                f"{prompt.place}: {len(ids)} tokens and {max_new_tokens} new ones are more than the model's context of {context}",
                fix="shorten it, or lower --max-new-tokens",
            )
    decisive = json.dumps([about, max_new_tokens, seed, batch, options], sort_keys=True, default=str)
    settings = hashlib.sha256(decisive.encode()).hexdigest()[:12]
    # A batch draws its numbers together, so it is done whole or again.
    done = _kept(output, prompts, settings, batch) if output is not None else 0
    progress = TokenProgress("generating", len(prompts), enabled=True, unit="prompts")
    tokens = 0
    stream: TextIO = sys.stdout if output is None else open(output, "a", encoding="utf-8")  # noqa: SIM115 (closed below)
    try:
        progress.update(done)
        for start in range(done, len(prompts), batch):
            told = continuations(
                model,
                tokenizer,
                rows[start : start + batch],
                max_new_tokens=max_new_tokens,
                seed=None if seed is None else seed + start,
                **options,
            )
            for prompt, one in zip(prompts[start : start + batch], told, strict=True):
                ours = {"completion": one.text, "num_tokens": one.num_tokens, "finished": one.finished}
                line = prompt.fields | ours | {"settings": settings}
                stream.write(json.dumps(line, ensure_ascii=False) + "\n")
                tokens += one.num_tokens
            stream.flush()
            progress.update(min(len(prompts), start + batch))
    except OSError as error:
        if output is None:
            raise
        raise EnvironmentProblem(
            f"{output} cannot be written: {error.strerror}; the answers before it are whole",
            fix="make room and give the same command: it goes on behind them",
        ) from None
    finally:
        progress.close()
        if output is not None:
            with suppress(OSError):  # what could not be flushed is tried once more
                stream.close()
    return len(prompts) - done, tokens


def _kept(output: Path, prompts: Sequence[Prompt], settings: str, batch: int) -> int:
    """How many answers of whole batches `output` holds; cuts off what is behind them. Raises UserError."""
    other = f"{output} holds answers to other prompts, or of another model or other settings; nothing was written"
    fix = "give another --output, or remove it"
    if output.exists() and not output.is_file():  # a pipe or /dev/stdout cannot be read again, /dev/full has no end
        raise UserError(
            f"{output} is no file", fix="give a file as --output, or none: answers then go to standard output"
        )
    try:
        lines = output.read_bytes().split(b"\n")[:-1] if output.exists() else []
        output.parent.mkdir(parents=True, exist_ok=True)
        with open(output, "ab"):
            pass
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror}", fix="give another --output") from None
    if len(lines) > len(prompts):
        raise UserError(other, fix=fix)
    for prompt, line in zip(prompts, lines, strict=False):
        try:
            kept = json.loads(line)
            fields = {name: kept[name] for name in prompt.fields}
            same = json.dumps(fields) == json.dumps(prompt.fields) and kept["settings"] == settings  # NaN is not NaN
        except (ValueError, KeyError, TypeError):
            same = False
        if not same:
            raise UserError(other, fix=fix)
    done = len(lines) if len(lines) == len(prompts) else len(lines) // batch * batch
    with open(output, "r+b") as file:
        file.truncate(sum(len(line) + 1 for line in lines[:done]))
    return done
