"""Samples of recall: held-out text, needles in it, a question at its end, and the answer; as tokens.

Owns what a sample is, for evaluation and, with the same form, for training data of one's own; a function of its random
numbers alone. Does not know models.

    form = Form(recipe.eval.recall, tokenizer.encode)
    filler = Filler([TokenDataset("tokens/validation")])
    sample = build_sample(form, filler, length=4096, keys=1, depth=0.5, rng=np.random.default_rng(0))
    sample.tokens[sample.answer_start :]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from slm.data.tokens import TokenDataset
from slm.errors import UserError
from slm.recall.settings import Recall, split_template, symbols

Encode = Callable[[str], Sequence[int]]
Part = str | list[int]  # text, or tokens as they are


@dataclass(frozen=True)
class Needle:
    """Tokens: what is hidden; the question; its answer."""

    needle: list[int]
    query: list[int]
    answer: list[int]


@dataclass(frozen=True)
class Sample:
    """tokens: int64 [length], the answer at its end. needle_start: of the one that is asked for."""

    tokens: np.ndarray
    answer_start: int
    needle_start: int
    needle_length: int


class Form:
    """How needles are written: the templates of a recipe with the tokenizer's encode."""

    def __init__(self, settings: Recall, encode: Encode) -> None:
        self.settings, self._encode = settings, encode

    def needles(self, keys: int, rng: np.random.Generator) -> list[Needle]:
        """`keys` needles, whose names differ. Tokens of a range are drawn without one twice: after a token that stands
        there twice, the next one would be a guess."""
        s = self.settings
        ranges = {a: self._permutation(a, rng) for a in (s.names, s.values) if not isinstance(a, str)}

        def draw(alphabet: str | tuple[int, int], length: int) -> Part:
            if isinstance(alphabet, str):
                known = symbols(alphabet)
                return "".join(known[i] for i in rng.integers(len(known), size=length))
            return [ranges[alphabet].pop() for _ in range(length)]

        names: list[Part] = []
        while len(names) < keys:
            if (name := draw(s.names, s.name_length)) not in names:
                names.append(name)
        return [self._needle(name, draw(s.values, s.value_length)) for name in names]

    def _permutation(self, alphabet: tuple[int, int], rng: np.random.Generator) -> list[int]:
        first, last = alphabet
        return (first + rng.permutation(last - first + 1)).tolist()

    def _needle(self, name: Part, value: Part) -> Needle:
        filled = {"{name}": name, "{value}": value}
        needle = self._tokens([filled.get(part, part) for part in split_template(self.settings.needle)])
        query = [filled.get(part, part) for part in split_template(self.settings.query)]
        # The question may end inside a token of question + answer (" 7" for BPE): then the answer begins with that token.
        asked, whole = self._tokens(query), self._tokens([*query, value])
        same = next(
            (i for i, (a, b) in enumerate(zip(asked, whole, strict=False)) if a != b), min(len(asked), len(whole))
        )
        return Needle(needle, whole[:same], whole[same:])

    def _tokens(self, parts: Sequence[Part]) -> list[int]:
        """Neighbouring texts are encoded as one."""
        ids: list[int] = []
        text = ""
        for part in [*parts, []]:
            if isinstance(part, str):
                text += part
                continue
            ids += [int(i) for i in self._encode(text)] if text else []
            ids, text = ids + part, ""
        return ids


class Filler:
    """Documents back to back, without BOS and EOS, from a random place on; after the last one comes the first."""

    def __init__(self, datasets: Sequence[TokenDataset]) -> None:
        self.datasets = list(datasets)
        self._docs = [  # (tokens of the shard, document bounds, special ids)
            (shard.tokens, shard.doc_offsets, [i for i in (d.bos_id, d.eos_id) if i is not None])
            for d in self.datasets
            for shard in d.shards
            if shard.num_docs
        ]
        self._first_doc = np.cumsum([0, *(len(bounds) - 1 for _, bounds, _ in self._docs)])
        self._first_token = np.cumsum([0, *(len(tokens) for tokens, _, _ in self._docs)])
        self.num_docs, num_tokens = int(self._first_doc[-1]), int(self._first_token[-1])
        self.num_tokens = num_tokens - 2 * self.num_docs  # at least so many without special ones
        self.vocab_size = max((d.vocab_size for d in self.datasets), default=0)
        self.bos_id = self.datasets[0].bos_id if self.datasets else None

    def take(self, num_tokens: int, rng: np.random.Generator) -> np.ndarray:
        """int64 [num_tokens]."""
        if num_tokens > self.num_tokens:
            raise ValueError(f"{num_tokens} tokens of text are asked for, and there are {self.num_tokens}")
        place = int(rng.integers(self._first_token[-1]))
        shard = int(np.searchsorted(self._first_token, place, "right")) - 1
        place -= int(self._first_token[shard])
        doc = int(np.searchsorted(self._docs[shard][1], place, "right")) - 1 + int(self._first_doc[shard])
        parts, missing = [], num_tokens
        while missing > 0:
            text = self._document(doc % self.num_docs, place)[:missing]
            parts.append(text)
            missing -= len(text)
            doc, place = doc + 1, 0
        return np.concatenate([np.zeros(0, np.int64), *parts])

    def _document(self, doc: int, place: int) -> np.ndarray:
        """From token `place` of its shard on, if that is inside of it."""
        shard = int(np.searchsorted(self._first_doc, doc, "right")) - 1
        tokens, bounds, special = self._docs[shard]
        start, end = bounds[doc - self._first_doc[shard] :][:2].tolist()
        ids = tokens[max(start, place) : end].astype(np.int64)
        return ids[~np.isin(ids, special)] if special else ids


def build_sample(
    form: Form, filler: Filler, *, length: int, keys: int, depth: float, rng: np.random.Generator
) -> Sample:
    """[BOS] text with needles, question, answer: `length` tokens. depth: 0 to 1, the share of the text before the needle
    that is asked for; the others stand anywhere. Raises ValueError if they do not fit."""
    needles = form.needles(keys, rng)
    asked = needles[0]
    bos = [] if filler.bos_id is None else [filler.bos_id]
    num_text = length - len(bos) - sum(len(n.needle) for n in needles) - len(asked.query) - len(asked.answer)
    if num_text < 0:
        raise ValueError(f"{keys} needles and a question take more than {length} tokens")
    text = filler.take(num_text, rng)
    places = [int(depth * num_text), *rng.integers(num_text + 1, size=keys - 1).tolist()]
    parts, at, num, needle_start = [np.array(bos, np.int64)], 0, len(bos), 0
    for i in np.argsort(places, kind="stable").tolist():
        parts += [text[at : places[i]], np.array(needles[i].needle, np.int64)]
        num += len(parts[-2])
        if i == 0:
            needle_start = num
        num += len(parts[-1])
        at = places[i]
    parts += [text[at:], np.array([*asked.query, *asked.answer], np.int64)]
    return Sample(np.concatenate(parts), length - len(asked.answer), needle_start, len(asked.needle))


@dataclass(frozen=True)
class Cell:
    """A place of the grid: num_needles in `length` tokens, the one that is asked for in part `depth` of `depths`."""

    keys: int
    length: int
    depth: int
    depths: int

    @property
    def percent(self) -> int:
        """Where its part of the text begins."""
        return round(100 * self.depth / self.depths)

    @property
    def task(self) -> str:
        return "passkey" if self.keys == 1 else f"recall{self.keys}"


class Grid:
    """All samples of a recipe's recall that have at most seq_len tokens, each a function of its cell and number alone.
    asked_by: where a user says the lengths, for messages.

    Raises UserError where the samples could not be made, or would say nothing.
    """

    def __init__(self, form: Form, filler: Filler, seq_len: int, asked_by: str = "lengths") -> None:
        s = self.settings = form.settings
        self.form, self.filler = form, filler
        self.lengths = checked_lengths(form, filler, seq_len, asked_by)
        self.cells = [
            Cell(keys, length, depth, s.depths)
            for length in self.lengths
            for keys in s.keys
            for depth in range(s.depths)
        ]

    @property
    def num_samples(self) -> int:
        return len(self.cells) * self.settings.samples

    def sample(self, number: int) -> Sample:
        """0 to num_samples; those of a cell follow one another."""
        cell, index = self.cells[number // self.settings.samples], number % self.settings.samples
        rng = np.random.default_rng([self.settings.seed, cell.keys, cell.length, cell.depth, cell.depths, index])
        depth = (cell.depth + rng.random()) / cell.depths
        return build_sample(self.form, self.filler, length=cell.length, keys=cell.keys, depth=depth, rng=rng)


def least_length(form: Form) -> int:
    """Tokens of the shortest sample of which the needles leave a quarter for the text around them."""
    s = form.settings
    needles = form.needles(max(s.keys), np.random.default_rng(s.seed))
    used = 1 + sum(len(n.needle) for n in needles) + len(needles[0].query) + len(needles[0].answer)
    return -(-used * 4 // 3)  # other samples may take a few tokens more


def fitting_lengths(form: Form, seq_len: int, asked_by: str) -> list[int]:
    """The lengths that are measured; of those that nobody asked for, only what the needles fit in. Raises UserError."""
    s, least = form.settings, least_length(form)
    lengths = s.lengths_of(seq_len)
    if not s.lengths:
        lengths = [length for length in lengths if length >= least or length == seq_len]
    if lengths and lengths[0] < least:
        most = max(s.keys)
        what = f"has {lengths[0]}" if s.lengths else f"is not given, so it is seq_len {lengths[0]}"
        raise UserError(
            f"{asked_by} {what}, too short for {most} needle{'s' * (most > 1)} and the question, which take about "
            f"{least * 3 // 4} tokens: less than a quarter would be left for the text around them",
            fix=f"give {asked_by} of {least} or more, fewer keys, or shorter templates",
        )
    return lengths


def checked_lengths(form: Form, filler: Filler, seq_len: int, asked_by: str) -> list[int]:
    """fitting_lengths, for which there also is the held-out text. Raises UserError."""
    s = form.settings
    for field, alphabet in (("names", s.names), ("values", s.values)):
        if not isinstance(alphabet, str) and alphabet[1] >= filler.vocab_size:
            raise UserError(
                f"eval.recall.{field} is {list(alphabet)}, and the tokenizer of the held-out text has {filler.vocab_size} tokens",
                fix=f"give ids up to {filler.vocab_size - 1}",
            )
    lengths = fitting_lengths(form, seq_len, asked_by)
    if lengths and lengths[-1] > filler.num_tokens:
        raise UserError(
            f"{asked_by} {'has' if s.lengths else 'is not given, so it is up to'} {lengths[-1]}, and the held-out documents have "
            f"{max(0, filler.num_tokens):,} tokens together: the needles would stand in the same text twice",
            fix=f"give more held-out text, or shorter {asked_by}",
        )
    return lengths
