"""What a recipe says about recall: lengths and depths of the grid, and how needle and question are written. No torch.

eval:
  recall: {lengths: [1Ki, 8Ki], keys: [1, 4], samples: 20}                        # a pass key in words, for a BPE tokenizer
  recall: {needle: "\\nThe key is {name}{value}\\n", query: "\\nThe key is {name}", names: [192, 255], name_length: 1,
           values: [192, 255], value_length: 4}                                   # for a toy that reads bytes
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from slm.fields import Count, Section

LETTERS, DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "0123456789"
Alphabet = Literal["letters", "digits"] | tuple[Count, Count]
_PLACES = re.compile(r"(\{\w+\})")


def _listed(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else [value]


def split_template(template: str) -> list[str]:
    """Its parts in order: text, '{name}' and '{value}'."""
    return [part for part in _PLACES.split(template) if part]


class Recall(Section):
    """Needles in held-out text, and a question about one of them at its end: keys 1 is pass-key retrieval, more is
    multi-key recall (arXiv 2305.16300, 2404.06654)."""

    lengths: list[Annotated[Count, Field(gt=1)]] = Field(
        [],
        description="tokens of a sample, question and answer included; a phase measures those up to its seq_len; "
        "empty: seq_len, its half and its quarter",
    )
    depths: Count = Field(10, ge=1, le=100, description="parts of the text, of equal length, that the needle stands in")
    samples: Count = Field(10, ge=1, description="samples for each length, depth and number of keys")
    keys: Annotated[list[Annotated[Count, Field(ge=1)]], BeforeValidator(_listed)] = Field(
        [1], min_length=1, description="needles in a sample, of which one is asked for; a number or several"
    )
    every_steps: Count = Field(
        0, ge=0, description="a multiple of eval.every_steps; 0: with every evaluation, and always at a phase's end"
    )
    filler: str = Field("", description="the source of data.validation that the text is of; empty for all")
    needle: str = Field(
        "\nThe pass key of {name} is {value}. Remember it.\n",
        description="what is hidden; {value} is to be found again",
    )
    query: str = Field(
        "\nThe pass key of {name} is ", description="the question, as the needle begins, up to where {value} follows"
    )
    names: Alphabet = Field("letters", description="letters, digits, or the first and last of a range of token ids")
    name_length: Count = Field(3, ge=1, le=64, description="letters, digits or tokens of a name")
    values: Alphabet = Field("digits", description="letters, digits, or the first and last of a range of token ids")
    value_length: Count = Field(5, ge=1, le=256, description="letters, digits or tokens of a value")
    seed: Count = Field(0, ge=0, lt=2**63, description="of all samples: the same ones at every evaluation")

    @model_validator(mode="after")
    def _check(self) -> Recall:
        problems = [
            f"{field} names the {part} of its template, and only {{name}} and {{value}} are known"
            for field in ("needle", "query")
            for part in split_template(getattr(self, field))
            if _PLACES.fullmatch(part) and part not in ("{name}", "{value}")
        ]
        for field, place, times, what in (
            ("needle", "{value}", range(1, 99), "so there is nothing to find"),
            ("query", "{value}", range(1), "so the answer stands in the question: end it before {value}"),
        ):
            count = getattr(self, field).count(place)
            if count not in times:
                problems.append(f"{field} is {getattr(self, field)!r}, which has {place} {count} times, {what}")
        if max(self.keys) > 1:
            problems += [
                f"{field} is {getattr(self, field)!r}, without {{name}}, and keys is {self.keys}: of several needles nobody "
                "could tell which one is asked for; put {name} into both templates, or use keys: 1"
                for field in ("needle", "query")
                if "{name}" not in getattr(self, field)
            ]
        for field in ("lengths", "keys"):
            values = getattr(self, field)
            if len(set(values)) < len(values):
                problems.append(f"{field} is {values}, which names one twice: remove it")
        problems += self._alphabet_problems()
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _alphabet_problems(self) -> list[str]:
        for field in ("names", "values"):
            alphabet = getattr(self, field)
            if not isinstance(alphabet, str) and not 0 <= alphabet[0] <= alphabet[1]:
                return [f"{field} is {list(alphabet)}, which is no range of token ids: give [first, last]"]
        problems, most = [], max(self.keys)
        for field, needed, possible in self._draws(most):
            if needed > possible:
                problems.append(
                    f"keys is {self.keys}: {most} needles take {needed} different {field}, and there are {possible}; use "
                    "fewer keys, shorter names and values, or a larger alphabet"
                )
        return problems

    def _draws(self, keys: int) -> list[tuple[str, int, int]]:
        """(what, how many different ones a sample needs, how many there are)."""
        draws = []
        ranges: dict[tuple[int, int], int] = {}
        for alphabet, length in ((self.names, self.name_length), (self.values, self.value_length)):
            if not isinstance(alphabet, str):
                ranges[alphabet] = ranges.get(alphabet, 0) + keys * length
        for (first, last), needed in ranges.items():
            draws.append((f"tokens of {first} to {last}", needed, last - first + 1))
        if isinstance(self.names, str):
            draws.append(("names", keys, len(symbols(self.names)) ** self.name_length))
        return draws

    def lengths_of(self, seq_len: int) -> list[int]:
        """Those that are measured where sequences have seq_len tokens, ascending."""
        given = self.lengths or [seq_len // 4, seq_len // 2, seq_len]
        return sorted({length for length in given if 1 < length <= seq_len})


def symbols(alphabet: str) -> str:
    return LETTERS if alphabet == "letters" else DIGITS


def recall_problems(
    recall: Recall, every_steps: int, seq_lens: Sequence[int], validation: Sequence[str], tokenizer: str
) -> list[str]:
    """What contradicts the rest of a recipe. seq_lens: of the phases. every_steps: eval.every_steps."""
    at, problems = "eval.recall", []
    if not validation:
        problems.append(
            f"{at} hides its needles in held-out documents, and data.validation is empty: name token shards there"
        )
    elif recall.filler and recall.filler not in validation:
        problems.append(
            f"{at}.filler is {recall.filler!r}, which is not among data.validation ({', '.join(validation)})"
        )
    if too_long := [length for length in recall.lengths if length > max(seq_lens)]:
        problems.append(
            f"{at}.lengths has {', '.join(map(str, too_long))}, longer than the longest seq_len of a phase "
            f"({max(seq_lens)}): they would never be measured; leave them out, or see `slm eval` with --lengths"
        )
    if recall.every_steps and (not every_steps or recall.every_steps % every_steps):
        problems.append(
            f"{at}.every_steps is {recall.every_steps}, no multiple of eval.every_steps ({every_steps}), and recall is "
            "measured together with the held-out loss: make it one"
        )
    if not tokenizer:
        problems.append(
            f"{at} writes needle and query as text, and the recipe names no tokenizer: set `tokenizer` (for raw bytes a "
            "folder that SLMTokenizer().save_pretrained wrote)"
        )
    return problems
