"""What encodes and decodes behind SLMTokenizer: tiktoken, SentencePiece, Hugging Face tokenizers, a user's class.

Owns the engines and the training of vocabularies; special and added tokens are SLMTokenizer's, save in the engines
that know their own (`knows_special`). Byte-level BPE runs on tiktoken, several times faster than Hugging Face's:

    engine = RanksEngine(train_ranks(texts, num_tokens=8189))
    ids = engine.encode("text", allow_special=False)
"""

from __future__ import annotations

import base64
import hashlib
import inspect
import io
import itertools
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slm.errors import CorruptArtefact, UserError

# How Llama 3 cuts text before BPE (github.com/meta-llama/llama-models, tokenizer.py).
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPACE_RUN = 100_000  # characters; the regex engine runs out of stack at some millions
_SENTENCEPIECE_SPACE = "\u2581"


def check_utf8(text: str) -> None:
    """Raises UserError where text holds a lone surrogate: UTF-8 has no bytes for it, so it would not come back."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"the text has a lone surrogate U+{ord(text[error.start]):04X} at character {error.start}, which no UTF-8 "
            "text can hold: it comes of broken input, or of bytes that were read with surrogateescape",
            fix="read the text as UTF-8, or replace it: text.encode('utf-8', 'replace').decode()",
        ) from None


class Engine:
    """What an engine offers. knows_special: it handles special and added tokens itself."""

    kind: str
    version: str
    max_id: int
    knows_special = False

    def encode(self, text: str, allow_special: bool) -> list[int]:
        raise NotImplementedError

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.array(self.encode(text, False), dtype=np.int32) for text in texts]

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        raise NotImplementedError

    def has(self, id_: int) -> bool:
        return 0 <= id_ <= self.max_id

    def id_of(self, name: str) -> int | None:
        """The id of a token that the engine itself knows by this name."""
        return None

    def name_of(self, id_: int) -> str | None:
        return None

    def learned(self, token: str) -> bool:
        """Whether the vocabulary already has this text as a token."""
        return self.id_of(token) is not None

    def add_token(self, token: str, special: bool) -> int:
        raise NotImplementedError

    def control_tokens(self) -> dict[str, int]:
        return {}

    def content_sha256(self) -> str:
        raise NotImplementedError

    def files(
        self, special: dict[str, int], added: dict[str, int], bos_id: int | None, folder: Path
    ) -> dict[str, bytes | str]:
        """name: content of what keeps this tokenizer, special tokens included."""
        raise NotImplementedError


# --- byte-level BPE --------------------------------------------------------------------------------------------


class RanksEngine(Engine):
    """Byte-level BPE by rank, on tiktoken. Saved as a tokenizer.json that gives the same ids in transformers."""

    kind = "bpe"

    def __init__(self, ranks: dict[bytes, int], pattern: str = PATTERN) -> None:
        import tiktoken

        self.version = f"tiktoken {tiktoken.__version__}"
        self._ranks, self.pattern = ranks, pattern
        self._bytes = {rank: token for token, rank in ranks.items()}
        self.max_id = max(self._bytes)
        self._encoding = tiktoken.Encoding("slm", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})

    def __reduce__(self) -> tuple[Any, ...]:
        return RanksEngine, (self._ranks, self.pattern)

    def encode(self, text: str, allow_special: bool) -> list[int]:
        return self._encode_array(text).tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self._encode_array(text).astype(np.int32) for text in texts]

    def _encode_array(self, text: str) -> np.ndarray:
        # A loop beats tiktoken's own batch, which goes through lists.
        try:
            return self._encoding.encode_to_numpy(text, disallowed_special=())
        except ValueError:  # out of stack in a run of millions of spaces: cut such runs
            ends = [match.end() for match in re.finditer(rf"\s{{{_SPACE_RUN}}}", text)]
            parts = [text[start:end] for start, end in zip([0, *ends], [*ends, len(text)], strict=True)]
            return np.concatenate([self._encoding.encode_to_numpy(part, disallowed_special=()) for part in parts])

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return b"".join([self._bytes[i] for i in ids]).decode("utf-8", "replace")

    def has(self, id_: int) -> bool:
        return id_ in self._bytes

    def learned(self, token: str) -> bool:
        return token.encode() in self._ranks

    def content_sha256(self) -> str:
        digest = hashlib.sha256(self.pattern.encode())
        for rank, token in sorted(self._bytes.items()):
            digest.update(b"\n%s %d" % (base64.b64encode(token), rank))
        return digest.hexdigest()

    def files(
        self, special: dict[str, int], added: dict[str, int], bos_id: int | None, folder: Path
    ) -> dict[str, bytes | str]:
        content = self.content(special, added, bos_id)
        return {"tokenizer.json": json.dumps(content, indent=1, ensure_ascii=False) + "\n"}

    def content(self, special: dict[str, int], added: dict[str, int], bos_id: int | None) -> dict[str, Any]:
        """Of its tokenizer.json."""
        spelled = {token: token.decode("latin-1").translate(_CHARACTER_OF_BYTE) for token in self._ranks}
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
        split = {"type": "Split", "pattern": {"Regex": self.pattern}, "behavior": "Isolated", "invert": False}
        content: dict[str, Any] = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                {"id": id_, "content": name, "special": name in special}
                | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
                for name, id_ in sorted((special | added).items(), key=lambda item: item[1])
            ],
            "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, {**level, "use_regex": False}]},
            "post_processor": None,
            "decoder": {**level, "use_regex": True},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": True,
                "vocab": {spelled[token]: rank for rank, token in sorted(self._bytes.items())},
                "merges": [[spelled[left], spelled[right]] for left, right in all_merges(self._ranks)],
            },
        }
        bos = next((name for name, id_ in special.items() if id_ == bos_id), None)
        if bos is not None:  # as Llama 3's own: transformers puts BOS in front
            first = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
            content["post_processor"] = {
                "type": "TemplateProcessing",
                "single": first,
                "pair": [*first, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
            }
        return content


def _byte_characters() -> list[str]:
    """The character that stands for each byte in a byte-level tokenizer.json (openai/gpt-2, bytes_to_unicode)."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in visible else chr(next(others)) for byte in range(256)]


_CHARACTER_OF_BYTE = dict(enumerate(_byte_characters()))
# For str.translate: a character that stands for no byte becomes one that latin-1 refuses.
_BYTE_OF_CHARACTER = dict.fromkeys(range(256), 0xFFFF) | {ord(c): byte for byte, c in _CHARACTER_OF_BYTE.items()}


def all_merges(ranks: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """Every pair of tokens that joins to a token, by the rank of the whole.

    tiktoken joins any two neighbours whose whole is a token, Hugging Face only listed pairs: with all of them
    listed (as in the tokenizer.json of Llama 3) both give the same ids.
    """
    for token, _ in sorted(ranks.items(), key=lambda item: item[1]):
        cuts = range(1, len(token))
        pairs = [(left, right) for i in cuts if (left := token[:i]) in ranks and (right := token[i:]) in ranks]
        if len(pairs) > 1:
            pairs.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        yield from pairs


def ranks_of_json(content: dict[str, Any]) -> tuple[str, dict[bytes, int]] | None:
    """(pattern, ranks) of a tokenizer.json that tiktoken encodes exactly alike; None for any other.

    That is byte-level BPE as Llama 3's: one regex, no normalisation, whole words first, every merge listed.
    Raises ValueError where ids are doubled.
    """
    model, pre = content.get("model") or {}, content.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers") or []
    decoder, added = content.get("decoder") or {}, content.get("added_tokens") or []
    unlike = ("dropout", "unk_token", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix")
    if any(map(model.get, unlike)) or content.get("normalizer") or not model.get("ignore_merges"):
        return None
    if model.get("type") != "BPE" or decoder.get("type") != "ByteLevel":
        return None
    if [step.get("type") for step in steps] != ["Split", "ByteLevel"]:
        return None
    split, level = steps
    pattern = (split.get("pattern") or {}).get("Regex")
    if not pattern or split.get("behavior") != "Isolated" or split.get("invert"):
        return None
    if level.get("add_prefix_space") or level.get("use_regex", True):
        return None
    if any(token.get(flag) for token in added for flag in ("single_word", "lstrip", "rstrip")):
        return None
    extra = {token["content"] for token in added}
    vocab = {token: id_ for token, id_ in model["vocab"].items() if token not in extra}
    try:
        if len(set(vocab.values())) != len(vocab):
            raise ValueError("two tokens of its vocabulary have the same id")
        spelled = {token: token.translate(_BYTE_OF_CHARACTER).encode("latin-1") for token in vocab}
        ranks = {spelled[token]: id_ for token, id_ in vocab.items()}
        pairs = [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]
        merges = [tuple(map(spelled.__getitem__, pair)) for pair in pairs]
    except (KeyError, UnicodeEncodeError):
        return None
    if any(bytes([byte]) not in ranks for byte in range(256)) or set(merges) != set(all_merges(ranks)):
        return None
    wholes = [ranks[left + right] for left, right in merges]
    if wholes != sorted(wholes):
        return None
    try:
        RanksEngine({bytes([byte]): byte for byte in range(256)}, pattern)
    except ValueError:  # a regex that only Hugging Face's engine understands
        return None
    return pattern, ranks


def train_ranks(texts: Iterable[str], num_tokens: int) -> dict[bytes, int]:
    """Byte-level BPE of at most num_tokens tokens (256 bytes included), by Hugging Face's trainer."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    if num_tokens < 256:
        raise UserError(
            f"vocab_size is {num_tokens + 3}, too small for the 256 bytes and 3 special tokens", fix="give at least 259"
        )
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PATTERN), "isolated"), level])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=num_tokens, min_frequency=2, show_progress=False, initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(_nonempty(texts), trainer)
    vocab = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return {token.translate(_BYTE_OF_CHARACTER).encode("latin-1"): rank for rank, (token, _) in enumerate(vocab)}


def _nonempty(texts: Iterable[str]) -> Iterator[str]:
    """The texts, checked. Raises UserError at the end if there was nothing in them."""
    empty = True
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"texts holds a {type(text).__name__}; give strings")
        check_utf8(text)
        empty = empty and not text
        yield text
    if empty:
        raise UserError("there is no text to train a tokenizer on", fix="give texts that are not empty")


# --- SentencePiece ---------------------------------------------------------------------------------------------


class SentencePieceEngine(Engine):
    """A SentencePiece model, used as it is. `data` is the protobuf."""

    kind = "sentencepiece"

    def __init__(self, data: bytes, path: object = "the SentencePiece model") -> None:
        import sentencepiece

        self.version = f"sentencepiece {sentencepiece.__version__}"
        self._data = data
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=data)
        except RuntimeError as error:
            raise CorruptArtefact(
                f"{path} is not a readable SentencePiece model ({error})", fix="copy it again"
            ) from None
        self.max_id = len(self._model) - 1
        # U+2581 is how the model writes a space, so in text it would come back as one. Spelled in bytes it survives,
        # where the model has bytes and puts no space of its own before each text.
        spelled = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in _SENTENCEPIECE_SPACE.encode()]
        prefix = self._model.encode("a", out_type=str)[0].startswith(_SENTENCEPIECE_SPACE)
        self._spelled = spelled if all(map(self._model.is_byte, spelled)) and not prefix else None

    def encode(self, text: str, allow_special: bool) -> list[int]:
        if self._spelled is None or _SENTENCEPIECE_SPACE not in text:
            return self._model.encode(text)
        first, *rest = (self._model.encode(part) for part in text.split(_SENTENCEPIECE_SPACE))
        return first + [i for ids in rest for i in [*self._spelled, *ids]]

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return self._model.decode(ids)

    def id_of(self, name: str) -> int | None:
        id_ = self._model.piece_to_id(name)
        return id_ if self._model.id_to_piece(id_) == name else None

    def name_of(self, id_: int) -> str | None:
        return self._model.id_to_piece(id_)

    def control_tokens(self) -> dict[str, int]:
        return {self._model.id_to_piece(i): i for i in range(len(self._model)) if self._model.is_control(i)}

    def content_sha256(self) -> str:
        return hashlib.sha256(self._data).hexdigest()

    def files(
        self, special: dict[str, int], added: dict[str, int], bos_id: int | None, folder: Path
    ) -> dict[str, bytes | str]:
        return {"tokenizer.model": self._data}


def train_sentencepiece(texts: Iterable[str], vocab_size: int, roles: tuple[str, str, str]) -> bytes:
    """A SentencePiece BPE model that gives back every text: bytes for the unknown, no normalisation, spaces kept."""
    import sentencepiece

    model = io.BytesIO()
    bos, eos, pad = roles
    failures: list[Exception] = []  # of reading: SentencePiece makes a RuntimeError of its own out of them

    def sentences() -> Iterator[str]:
        try:
            yield from _sentences(_nonempty(texts))
        except Exception as error:
            failures.append(error)
            raise

    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences(),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            byte_fallback=True,
            character_coverage=0.9999,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=1 << 20,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            bos_piece=bos,
            eos_piece=eos,
            pad_piece=pad,
            minloglevel=2,
        )
    except RuntimeError as error:
        if failures:
            raise failures[0] from None
        raise UserError(
            f"SentencePiece cannot make {vocab_size} tokens of these texts ({str(error).splitlines()[0]})",
            fix="give more text, or a vocabulary of at least 260 and the number of different characters",
        ) from None
    return model.getvalue()


def _sentences(texts: Iterable[str], limit: int = 2000) -> Iterator[str]:
    """Whole lines, about `limit` characters together: pieces may span lines, and one long text costs no memory."""
    for text in texts:
        part = ""
        for line in text.splitlines(keepends=True):
            for at in range(0, len(line), limit):
                if len(part) + len(line) > limit and part:
                    yield part
                    part = ""
                part += line[at : at + limit]
        if part:
            yield part


# --- Hugging Face tokenizers, and a user's class -----------------------------------------------------------------


class HuggingFaceEngine(Engine):
    """Any other tokenizer.json, on Hugging Face tokenizers: exact, and slower."""

    kind = "huggingface"
    knows_special = True

    def __init__(self, text: str) -> None:
        import tokenizers

        self.version = f"tokenizers {tokenizers.__version__}"
        self._tokenizer = tokenizers.Tokenizer.from_str(text)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._added_token = tokenizers.AddedToken
        self._measure()

    def _measure(self) -> None:
        self.max_id = max(self._tokenizer.get_vocab(with_added_tokens=True).values())

    def encode(self, text: str, allow_special: bool) -> list[int]:
        self._tokenizer.encode_special_tokens = not allow_special  # True: as if they were ordinary text
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        self._tokenizer.encode_special_tokens = True
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(one.ids, dtype=np.int32) for one in encoded]

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        if all(self.has(i) for i in ids):
            return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
        # It leaves out an id that it does not know, and fails on a negative one.
        runs = ((known, list(run)) for known, run in itertools.groupby(ids, self.has))
        return "".join(self.decode(run, skip_special_tokens) if known else "\ufffd" * len(run) for known, run in runs)

    def id_of(self, name: str) -> int | None:
        return self._tokenizer.token_to_id(name)

    def name_of(self, id_: int) -> str | None:
        return self._tokenizer.id_to_token(id_)

    def add_token(self, token: str, special: bool) -> int:
        added = self._added_token(token, special=special, normalized=False)
        (self._tokenizer.add_special_tokens if special else self._tokenizer.add_tokens)([added])
        self._measure()
        id_ = self._tokenizer.token_to_id(token)
        assert id_ is not None
        return id_

    def content_sha256(self) -> str:
        return hashlib.sha256(self._tokenizer.to_str().encode()).hexdigest()

    def files(
        self, special: dict[str, int], added: dict[str, int], bos_id: int | None, folder: Path
    ) -> dict[str, bytes | str]:
        return {"tokenizer.json": self._tokenizer.to_str(pretty=True)}


class CustomEngine(Engine):
    """An object with encode, decode and __len__. Its ids are checked, because shards would hold them in silence."""

    kind = "custom"
    knows_special = True

    def __init__(self, tokenizer: Any, name: str) -> None:
        self._tokenizer, self._name, self.version = tokenizer, name, name

    @property
    def max_id(self) -> int:  # type: ignore[override]
        return len(self._tokenizer) - 1

    def encode(self, text: str, allow_special: bool) -> list[int]:
        ids = [int(i) for i in self._tokenizer.encode(text)]
        if ids and not (0 <= min(ids) and max(ids) <= self.max_id):
            wrong = min(ids) if min(ids) < 0 else max(ids)
            raise UserError(
                f"the tokenizer {self._name} gave the id {wrong}, but its length is {self.max_id + 1}",
                fix="make __len__ the largest id + 1",
            )
        return ids

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return self._tokenizer.decode(ids)

    def add_token(self, token: str, special: bool) -> int:
        if not hasattr(self._tokenizer, "add_tokens"):
            raise UserError(f"the tokenizer {self._name} has no add_tokens", fix="add the tokens in the class itself")
        if self._tokenizer.add_tokens([token]) == 0:
            raise UserError(f"the tokenizer {self._name} did not add {token!r}")
        return self.max_id

    def content_sha256(self) -> str:
        """Of its own fingerprint if it has one, else of its source and of what it does to a few texts."""
        own = getattr(self._tokenizer, "fingerprint", None)
        if own is None:
            try:
                source = inspect.getsource(sys.modules[type(self._tokenizer).__module__])
            except (OSError, TypeError, KeyError):
                source = ""
            probe = [self.encode(text, False) for text in ("Hello, world 123\n", "def f(x):\n    return x", "éß日本🎉")]
            own = json.dumps([source, len(self._tokenizer), probe])
        return hashlib.sha256(str(own).encode()).hexdigest()

    def files(
        self, special: dict[str, int], added: dict[str, int], bos_id: int | None, folder: Path
    ) -> dict[str, bytes | str]:
        if hasattr(self._tokenizer, "save_pretrained"):
            self._tokenizer.save_pretrained(str(folder))
            return {}
        return {"tokenizer.json": json.dumps({"user_class": self._name}) + "\n"}
