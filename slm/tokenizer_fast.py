"""gigatoken in place of tiktoken for encoding many texts, where it is installed and gives the very same ids.

Owns that optional library and the proof that it may be used: every character of the texts, cut by the same pattern (those that
the two libraries' versions of Unicode see differently are left to the reference), a fixed set of hard strings, and texts of the
caller's own.

    encoder = fast_encoder(engine)                  # None: not installed, or it cannot read this tokenizer
    difference = first_difference(encoder, reference_encode_batch, texts)
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence

import numpy as np
import orjson

from slm.tokenizer_engines import RanksEngine

EncodeBatch = Callable[[Sequence[str]], list[np.ndarray]]

# What encoders have been seen to disagree on: special-token text, runs, case, numbers, line ends, odd spaces, joined
# emoji, unassigned and private characters, NUL, and every byte value within UTF-8.
HARD_TEXTS = (
    "",
    " ",
    "a",
    "<|begin_of_text|><|end_of_text|> <s></s> [PAD] <|endoftext|>",
    "don't DON'T we'LL it's o'clock 's '",
    "1 12 123 1234 12345 3.14159 1,000,000 0x1F ½ ² ३४५",
    "x\r\n\r\n\ty \n \n\n  z   ",
    "tab\tvertical\x0bform\x0cnul\x00bell\x07del\x7f",
    "\u00a0\u2003\u2028\u2029\u3000\u200b\ufeff\u180e",
    "日本語のテキスト 中文字符 한국어 ไทย हिन्दी العربية עברית",
    "e\u0301 \u1e9e ﬀ İ ı ſ K Å",
    "🎉👩‍👩‍👧‍👦🏳️‍🌈🇫🇷👍🏽",
    "\U0001d4d0\U0010ffff\ue000\ufffd\ud7ff",
    "a" * 3000 + " " * 3000 + "!" * 3000 + "\n" * 3000,
    "".join(map(chr, range(0x20, 0x500))),
    "def f(x):\n    return {'a': [1, 2], \"b\": x**2}  # comment\n\n\nclass A:\n\tpass\n",
)


class FastEncoder:
    """encode_batch as that of `engine`, several times faster; `version` names the library. Texts with a character that the two
    cut differently go to `engine`. Each character is tried before the first text with it is encoded: of all that there are a
    corpus has few. in_threads: several threads are to encode at once."""

    def __init__(self, engine: RanksEngine, in_threads: bool = False) -> None:
        from importlib.metadata import version

        import gigatoken

        self.version = f"gigatoken {version('gigatoken')}"
        self._in_threads = in_threads
        # Without added tokens, which gigatoken would find inside ordinary text.
        self._tokenizer = gigatoken.Tokenizer.from_json(orjson.dumps(engine.content({}, {}, None)))
        self._reference = engine.encode_batch
        probe = RanksEngine(probe_ranks(), engine.pattern)
        self._probe_reference = probe.encode_batch
        self._probe = gigatoken.Tokenizer.from_json(orjson.dumps(probe.content({}, {}, None)))
        # A table: Python's re tries a class of so many characters one after the other, which takes longer than encoding.
        self._is_tried = np.zeros(sys.maxunicode + 1, dtype=bool)
        self._differs = np.zeros(sys.maxunicode + 1, dtype=bool)
        self._is_tried[0xD800:0xE000] = self._differs[0xD800:0xE000] = True  # no text has them
        self._try(np.arange(0x80))
        self._ascii_differs = bool(self._differs[:0x80].any())

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        avoided = [self._must_avoid(text) for text in texts]
        encoded = iter(self._encode([text for text, avoid in zip(texts, avoided, strict=True) if not avoid]))
        return [
            self._reference([text])[0] if avoid else next(encoded).view(np.int32)
            for text, avoid in zip(texts, avoided, strict=True)
        ]

    def _encode(self, texts: list[str]) -> list[np.ndarray]:
        if (
            not self._in_threads
        ):  # a loop: its own batch goes through another library, whose import takes a fifth of a second
            return [self._tokenizer.encode(text) for text in texts]
        # Its own batch lets other threads of Python run; two at once wait for each other, as they share what it remembers.
        rows = self._tokenizer.encode_batch(texts, parallel=False).layout
        ids = rows.content.data
        return [ids[start:end] for start, end in itertools.pairwise(rows.offsets.data.tolist())]

    def _must_avoid(self, text: str) -> bool:
        if text.isascii():
            return self._ascii_differs
        for at in range(0, len(text), 1 << 20):
            codes = np.frombuffer(text[at : at + (1 << 20)].encode("utf-32-le", "surrogatepass"), "<u4")
            if not self._is_tried[codes].all():
                self._try(np.unique(codes[~self._is_tried[codes]]))
            if self._differs[codes].any():
                return True
        return False

    def _try(self, codes: np.ndarray) -> None:
        different = characters_that_differ(self._encode_probes, self._probe_reference, [*map(chr, codes.tolist())])
        self._differs[[*map(ord, different)]] = True
        self._is_tried[codes] = True

    def _encode_probes(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self._probe.encode(text) for text in texts]


def fast_encoder(engine: RanksEngine, in_threads: bool = False) -> FastEncoder | None:
    try:
        return FastEncoder(engine, in_threads)
    except Exception:  # not installed; or of any class, for a pattern that it does not know
        return None


def probe_ranks() -> dict[bytes, int]:
    """A vocabulary that shows where a pattern cuts: the last byte of any character joins a following a, 1 or double quote,
    but only within one piece. So letters, digits, spaces and the rest can be told apart by their ids."""
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [bytes([last, after]) for last in [*range(0x80), *range(0x80, 0xC0)] for after in b'a1"']
    return {token: rank for rank, token in enumerate(dict.fromkeys(tokens))}


def characters_that_differ(fast: EncodeBatch, reference: EncodeBatch, characters: Sequence[str]) -> str:
    """Those that two encoders over probe_ranks cut differently: libraries know different versions of Unicode."""

    def probe(character: str) -> str:
        return f"{character}a {character}1 {character}\" '{character}a "

    found = []
    groups = [characters[i : i + 64] for i in range(0, len(characters), 64)]
    texts = ["".join(map(probe, group)) for group in groups]
    for group, got, wanted in zip(groups, fast(texts), reference(texts), strict=True):
        if not np.array_equal(got, wanted):
            found += [c for c in group if first_difference(fast, reference, [probe(c)]) is not None]
    return "".join(found)


def first_difference(fast: EncodeBatch, reference: EncodeBatch, texts: Sequence[str]) -> str | None:
    """The first text that the two encode differently; None if there is none."""
    for text, got, wanted in zip(texts, fast(texts), reference(texts), strict=True):
        if not np.array_equal(got, wanted):
            return text
    return None
