"""Perplexity of any text: `slm eval MODEL --text FILE…`, per token, word, character and byte.

Owns the sliding window, the usual detokenisation of WikiText, and the counts that make models with different tokenizers
comparable. Under any launcher the ranks share the windows.

    [measured] = evaluate_text("runs/demo", ["wiki.test.raw"], stride=512)
    measured.bits_per_byte

The window is that of transformers' guide to perplexity: `seq_len` tokens, moved by `stride`; of each, the tokens that no
window before has predicted are counted, so that each has at least seq_len - stride tokens before it, but for the first of a
document.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from slm import parallel
from slm.errors import UserError
from slm.loading import load_for_text
from slm.losses import IGNORE
from slm.model.llama import SLMForCausalLM


@dataclass(frozen=True)
class Measured:
    """Sum of -log p in nats over num_tokens of a file. Words, characters and bytes are those of the file as it is, also where
    it was detokenised: as WikiText's perplexity per word has always been told."""

    name: str
    loss_sum: float
    num_tokens: int
    num_words: int
    num_characters: int
    num_bytes: int
    seq_len: int
    stride: int

    @property
    def loss(self) -> float:
        return self.loss_sum / max(1, self.num_tokens)

    @property
    def perplexity(self) -> float:
        return math.exp(min(700.0, self.loss))

    @property
    def word_perplexity(self) -> float:
        return math.exp(min(700.0, self.loss_sum / max(1, self.num_words)))

    @property
    def bits_per_byte(self) -> float:
        return self.loss_sum / math.log(2) / max(1, self.num_bytes)

    @property
    def bits_per_character(self) -> float:
        return self.loss_sum / math.log(2) / max(1, self.num_characters)

    def as_dict(self) -> dict[str, Any]:
        ratios = ("loss", "perplexity", "word_perplexity", "bits_per_byte", "bits_per_character")
        return {**vars(self), **{name: getattr(self, name) for name in ratios}}


# --- text ---------------------------------------------------------------------------------------------------------


def read_documents(path: str | Path) -> list[str]:
    """The documents of a file: the `text` of each line of .jsonl, as of The Pile; anything else is one. Raises UserError."""
    path = Path(path)
    try:
        content = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}", fix="give a text file") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is no UTF-8 text (byte {error.start}): a compressed file?", fix="unpack it, or convert it to UTF-8"
        ) from None
    if path.suffix != ".jsonl":
        documents = [content]
    else:
        documents = []
        for number, line in enumerate(content.split("\n"), 1):
            if not line.strip():
                continue
            try:
                documents.append(json.loads(line)["text"])
                if not isinstance(documents[-1], str):
                    raise TypeError("text is no string")
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise UserError(
                    f'{path}, line {number} is no {{"text": "…"}}: {type(error).__name__}: {error}',
                    fix="give a .jsonl file whose lines have a text, or a .txt file",
                ) from None
    documents = [text for text in documents if text]
    if not documents:
        raise UserError(f"{path} holds no text", fix="give a file with some")
    return documents


def detokenised_wikitext(text: str) -> str:
    """WikiText's tokens (" @-@ ", spaces around punctuation) as the text that they were made of, by the rules that the published
    perplexities use (Megatron-LM, tasks/zeroshot_gpt/detokenizer.py; lm-evaluation-harness, tasks/wikitext)."""
    text = text.replace("s '", "s'")
    text = re.sub(r"/' [0-9]/", r"/'[0-9]/", text)
    for joined in ("-", ",", "."):  # number separators
        text = text.replace(f" @{joined}@ ", joined)
    for mark in ":;.!?,":
        text = text.replace(f" {mark} ", f"{mark} ")
    for left, right, inner in (("(", ")", r"\)"), ("[", "]", r"\]"), ("{", "}", "}"), ('"', '"', '"'), ("'", "'", "'")):
        pattern = rf"{re.escape(left)}\s*([^{inner}]*?)\s*{re.escape(right)}"
        text = re.sub(pattern, lambda found, left=left, right=right: f"{left}{found[1]}{right}", text)  # type: ignore[misc]
    for equals in ("= = = =", "= = =", "= ="):
        text = text.replace(equals, equals.replace(" ", ""))
    text = text.replace(" \N{DEGREE SIGN} ", "\N{DEGREE SIGN}")
    text = text.replace(" \n", "\n").replace("\n ", "\n")
    return text.replace(" N ", " 1 ").replace(" 's", "'s")


# --- windows ------------------------------------------------------------------------------------------------------


def windows(num_tokens: int, seq_len: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(first token, end, first token that is counted) of each window over a document."""
    counted = 1  # the first token has nothing before it
    for begin in range(0, num_tokens, stride):
        end = min(begin + seq_len, num_tokens)
        if end > counted:
            yield begin, end, counted
        counted = max(counted, end)
        if end == num_tokens:
            return


@torch.no_grad()
def loss_of(
    model: SLMForCausalLM, documents: Sequence[Sequence[int]], seq_len: int, stride: int, rows: int
) -> tuple[float, int]:
    """(sum of -log p in nats, number of tokens) over documents of token ids; this rank's share of the windows.

    Windows are packed, at most rows * seq_len tokens a forward pass, as pieces that attention does not cross.
    """
    device = next(model.parameters()).device
    every = [(i, *window) for i, ids in enumerate(documents) for window in windows(len(ids), seq_len, stride)]
    mine = every[parallel.rank() :: parallel.world_size()]
    total, count = 0.0, 0
    while mine:
        tokens: list[int] = []
        labels: list[int] = []
        lengths: list[int] = []
        while mine and (not tokens or len(tokens) + mine[0][2] - mine[0][1] <= rows * seq_len):
            i, begin, end, counted = mine.pop(0)
            ids = documents[i]
            tokens += ids[begin : end - 1]
            labels += [ids[at] if at >= counted else IGNORE for at in range(begin + 1, end)]
            lengths.append(end - 1 - begin)
        positions = torch.cat([torch.arange(length) for length in lengths])
        bounds = torch.tensor([0, *lengths]).cumsum(0).int()
        batch = [x.to(device) for x in (torch.tensor([tokens]), positions[None], bounds, torch.tensor([labels]))]
        total += float(model(*batch, each=True).double().sum())
        count += sum(label != IGNORE for label in labels)
    return total, count


def evaluate_text(
    path: str,
    files: Sequence[str | Path],
    *,
    seq_len: int = 0,
    stride: int = 0,
    rows: int = 4,
    detokenise: str = "",
    tokenizer: str = "",
) -> list[Measured] | None:
    """A row for each file; None on ranks other than 0. seq_len 0: the model's context, at most 4096. Raises UserError."""
    if not files:
        raise UserError("--text has no file", fix="slm eval MODEL --text FILE…")
    if detokenise not in ("", "wikitext"):
        raise UserError(f"--detokenise is {detokenise!r}", fix="wikitext is the one that there is")
    with parallel.launched() as device:
        documents = parallel.together(lambda: {str(file): read_documents(file) for file in files})
        model, text = parallel.together(load_for_text, path, tokenizer, device)
        context = model.config.max_position_embeddings
        seq_len = seq_len or min(4096, context)
        if not 2 <= seq_len <= context:
            raise UserError(f"--seq-len is {seq_len}, and the model's context {context}", fix=f"give 2 to {context}")
        stride = stride or max(1, seq_len // 2)
        if stride >= seq_len:
            raise UserError(
                f"--stride is {stride}, and a window has {seq_len} tokens: the first of each would have nothing before it",
                fix=f"give at most {seq_len - 1}",
            )
        measured = []
        for name, texts in documents.items():
            ids = [text.encode(_prepared(t, detokenise), add_bos=text.bos_token_id is not None) for t in texts]
            total, count = parallel.reduce_sum(parallel.together(loss_of, model, ids, seq_len, stride, rows))
            if not count:
                raise UserError(
                    f"{name} is one token, and the tokenizer has no BOS to predict it from", fix="give a longer text"
                )
            words = sum(len(re.split(r"\s+", t)) for t in texts)
            sizes = words, sum(map(len, texts)), sum(len(t.encode()) for t in texts)
            measured.append(Measured(name, total, int(count), *sizes, seq_len, stride))
        return None if parallel.rank() else measured


def _prepared(text: str, detokenise: str) -> str:
    return detokenised_wikitext(text) if detokenise else text


def values_of(measured: list[Measured]) -> dict[str, float]:
    """FILE/RATIO: value, for the log of a run; FILE without its folders, where that tells them apart."""
    short = [Path(m.name).name for m in measured]
    names = short if len(set(short)) == len(short) else [m.name for m in measured]
    ratios = ("perplexity", "word_perplexity", "bits_per_byte", "bits_per_character")
    return {f"{name}/{ratio}": getattr(m, ratio) for name, m in zip(names, measured, strict=True) for ratio in ratios}


def draw(measured: list[Measured]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table()
    table.add_column("text", overflow="fold")
    for name in ("tokens", "loss", "perplexity", "per word", "bits/byte", "bits/char"):
        table.add_column(name, justify="right", no_wrap=True)
    for m in measured:
        ratios = (f"{m.loss:.4f}", f"{m.perplexity:.2f}", f"{m.word_perplexity:.5g}")
        table.add_row(
            Text(m.name), f"{m.num_tokens:,}", *ratios, f"{m.bits_per_byte:.4f}", f"{m.bits_per_character:.4f}"
        )
    console = Console()
    console.print(table)
    console.print(f"windows of {measured[0].seq_len:,} tokens, moved by {measured[0].stride:,}", highlight=False)
