"""SLMTokenizer: text to token ids and back, over the three formats in use and over a user's own class.

Owns loading (the format is told apart by content, never by name), training, saving and the special tokens; the
engines that do the work are in tokenizer_engines.py.

    tokenizer = SLMTokenizer(vocab_size=8192).train(texts)
    tokenizer.save_pretrained("tokenizer")
    assert tokenizer.decode(tokenizer.encode("héllo <|end_of_text|>")) == "héllo <|end_of_text|>"

Text that looks like a special token stays text unless allow_special=True: a corpus cannot end its own documents.
"""

from __future__ import annotations

import base64
import hashlib
import importlib
import json
import logging
import os
import re
import sys
from collections.abc import Iterable, Sequence, Sized
from pathlib import Path
from typing import Any

import numpy as np

from slm.errors import CorruptArtefact, UserError
from slm.runtime import atomic_write
from slm.tokenizer_engines import (
    PATTERN,
    CustomEngine,
    Engine,
    HuggingFaceEngine,
    RanksEngine,
    SentencePieceEngine,
    check_utf8,
    ranks_of_json,
    train_ranks,
    train_sentencepiece,
)
from slm.tokenizer_fast import (
    HARD_TEXTS,
    FastEncoder,
    fast_encoder,
    first_difference,
)

log = logging.getLogger("slm")

BOS, EOS, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|pad|>"
# Names of the same roles elsewhere, asked for in this order where no tokenizer_config.json (or, of older folders,
# special_tokens_map.json) settles it.
_ROLE_NAMES = {
    "bos": (BOS, "<s>", "<bos>", "<|startoftext|>", "<|endoftext|>"),
    "eos": (EOS, "</s>", "<eos>", "<|endoftext|>", "<|im_end|>"),
    "pad": (PAD, "<|finetune_right_pad_id|>", "<pad>", "[PAD]"),
}
_LLAMA3_RANKS = 128_000


class SLMTokenizer:
    """Without a file: bytes plus three special tokens, whatever vocab_size says (that is what `train` makes)."""

    def __init__(self, vocab_size: int | None = None) -> None:
        ranks = {bytes([byte]): byte for byte in range(256)}
        self._set(RanksEngine(ranks), {BOS: 256, EOS: 257, PAD: 258})
        self._wanted = vocab_size
        if vocab_size is not None and vocab_size != len(self):
            log.warning(
                "SLMTokenizer(vocab_size=%d) has no file yet: it encodes bytes and has %d tokens until "
                ".train(texts) or SLMTokenizer.from_pretrained(path)",
                vocab_size,
                len(self),
            )

    _fast: FastEncoder | None = None  # see use_fast_engine
    _wanted: int | None = None  # the vocabulary size that `train` makes by default

    def _set(
        self,
        engine: Engine,
        special: dict[str, int],
        added: dict[str, int] | None = None,
        roles: dict[str, Any] | None = None,
    ) -> None:
        """roles: {"bos": name, or None where there is none, …}; one left out, or unknown, is guessed by names."""
        self._engine, self._special, self._added = engine, dict(special), dict(added or {})
        self._roles: dict[str, int | None] = {}
        for role, names in _ROLE_NAMES.items():
            given = roles.get(role, ...) if roles else ...
            wanted = () if given is None else names if given is ... else (given, *names)
            found = [id_ for name in wanted if (id_ := self._id_of(name)) is not None]
            self._roles[role] = found[0] if found else None
        self._refresh()

    def _id_of(self, name: str) -> int | None:
        return self._special.get(name, self._added.get(name, self._engine.id_of(name)))

    def _refresh(self) -> None:
        self._length = 1 + max([self._engine.max_id, *self._special.values(), *self._added.values()])
        self._names = {id_: name for name, id_ in (self._special | self._added).items()}
        self._special_ids = frozenset(self._special.values())
        self._added_pattern = _any_of(self._added)
        self._all_pattern = _any_of(self._special | self._added)
        self._fingerprint = ""
        self._fast = None

    # --- what it is ------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Rows that an embedding needs: the largest id + 1."""
        return self._length

    @property
    def vocab_size(self) -> int:
        return len(self)

    @property
    def bos_token_id(self) -> int | None:
        return self._roles["bos"]

    @property
    def eos_token_id(self) -> int | None:
        return self._roles["eos"]

    @property
    def pad_token_id(self) -> int | None:
        """The padding token, or EOS where there is none: padding is masked wherever it is used."""
        return self._roles["pad"] if self._roles["pad"] is not None else self.eos_token_id

    @property
    def kind(self) -> str:
        """bpe, sentencepiece, huggingface (any other tokenizer.json) or custom."""
        return self._engine.kind

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides which ids a text gets; the same after saving and loading."""
        if not self._fingerprint:
            what: list[Any] = [self._engine.kind, self._engine.content_sha256(), sorted(self._special.items())]
            what += [sorted(self._added.items()), sorted(self._roles.items())]
            self._fingerprint = hashlib.sha256(json.dumps(what).encode()).hexdigest()
        return self._fingerprint

    def info(self) -> dict[str, Any]:
        """What a manifest records."""
        return {
            "kind": self.kind,
            "engine": self._fast.version if self._fast else self._engine.version,
            "fingerprint": self.fingerprint,
            "vocab_size": len(self),
            "bos_id": self.bos_token_id,
            "eos_id": self.eos_token_id,
            "pad_id": self.pad_token_id,
        }

    def __getstate__(self) -> dict[str, Any]:
        """For another process, which asks use_fast_engine itself."""
        return {**self.__dict__, "_fast": None}

    def __repr__(self) -> str:
        return f"SLMTokenizer({self.kind}, {len(self)} tokens)"

    # --- text and ids ----------------------------------------------------------------------------------------

    def encode(
        self, text: str, *, add_bos: bool = False, add_eos: bool = False, allow_special: bool = False
    ) -> list[int]:
        """Token ids. Raises UserError for a lone surrogate, which no UTF-8 text holds."""
        check_utf8(text)
        if self._engine.knows_special:
            ids = self._engine.encode(text, allow_special)
        else:
            ids = []
            for piece, id_ in self._split(text, self._all_pattern if allow_special else self._added_pattern):
                ids += self._engine.encode(piece, False) if id_ is None else [id_]
        if add_bos:
            ids = [self._role("bos"), *ids]
        return [*ids, self._role("eos")] if add_eos else ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """int32 [T] for each text, as `encode` without its options gives it; the fast way to encode many."""
        for text in texts:
            check_utf8(text)
        if self._engine.knows_special or self._added_pattern is None:
            return (self._fast or self._engine).encode_batch(texts)
        return [np.array(self.encode(text), dtype=np.int32) for text in texts]

    def use_fast_engine(self, texts: Iterable[str] = (), *, in_threads: bool = False) -> bool:
        """Lets `encode_batch` run on gigatoken if it is installed and encodes HARD_TEXTS and `texts` exactly as the engine
        so far; whether it does. Only byte-level BPE has a faster engine; without one `texts` are not looked at.

        in_threads: several threads will call `encode_batch` at once.
        """
        if not isinstance(self._engine, RanksEngine) or self._added_pattern is not None:
            return False
        fast = fast_encoder(self._engine, in_threads)
        if fast is None:
            return False
        different = first_difference(fast.encode_batch, self._engine.encode_batch, [*HARD_TEXTS, *texts])
        if different is not None:
            log.warning(
                "%s encodes %r otherwise than %s, which is used instead",
                fast.version,
                different[:60],
                self._engine.version,
            )
            return False
        self._fast = fast
        return True

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text. An id without a token, and bytes that are no UTF-8, become U+FFFD."""
        ids = [int(i) for i in ids]
        if self._engine.knows_special:
            return self._engine.decode(ids, skip_special_tokens)
        parts: list[str] = []
        run: list[int] = []
        for id_ in ids:
            name = self._names.get(id_)
            if name is None and self._engine.has(id_):
                run.append(id_)
                continue
            if name is not None and skip_special_tokens and id_ in self._special_ids:
                name = ""
            parts += [self._engine.decode(run, True), "\ufffd" if name is None else name]
            run = []
        return "".join([*parts, self._engine.decode(run, True)])

    def _split(self, text: str, pattern: re.Pattern[str] | None) -> Iterable[tuple[str, int | None]]:
        """(text, None) and (name, its id), in order."""
        at = 0
        for match in pattern.finditer(text) if pattern else ():
            if match.start() > at:
                yield text[at : match.start()], None
            yield match[0], self._id_of(match[0])
            at = match.end()
        if at < len(text):
            yield text[at:], None

    def _role(self, role: str) -> int:
        id_ = self._roles[role]
        if id_ is None:
            raise UserError(
                f"this tokenizer ({self.kind}, {len(self)} tokens) has no {role.upper()} token",
                fix=f"use one that has it; a class of your own needs an attribute {role}_token_id",
            )
        return id_

    # --- making and changing ---------------------------------------------------------------------------------

    def train(
        self,
        texts: Iterable[str],
        *,
        vocab_size: int | None = None,
        kind: str = "bpe",
        show_progress: bool = False,
    ) -> SLMTokenizer:
        """Learns a vocabulary of up to vocab_size tokens, special ones included (default: the constructor's).

        texts is read once, text by text. kind: "bpe" (byte-level BPE with Llama 3's splitting) or "sentencepiece"
        (BPE with byte fallback and no normalisation); both give back every text as it was. show_progress: a bar of
        the texts read, on stderr. Raises UserError.
        """
        wanted = vocab_size if vocab_size is not None else self._wanted
        if isinstance(texts, (str, bytes)):
            raise ValueError("texts is one string; give a list of strings")
        if wanted is None:
            raise UserError("the size of the vocabulary to train is not given", fix="train(texts, vocab_size=8192)")
        if show_progress:
            from rich.console import Console
            from rich.progress import track

            total = len(texts) if isinstance(texts, Sized) else None
            texts = track(texts, "reading texts", total=total, console=Console(stderr=True))
        if kind == "bpe":
            ranks = train_ranks(texts, wanted - 3)
            self._set(RanksEngine(ranks), {name: len(ranks) + i for i, name in enumerate((BOS, EOS, PAD))})
        elif kind == "sentencepiece":
            engine = SentencePieceEngine(train_sentencepiece(texts, wanted, (BOS, EOS, PAD)))
            self._set(engine, engine.control_tokens())
        else:
            raise UserError(f"kind is {kind!r}", fix="give bpe or sentencepiece")
        self._wanted = wanted
        if len(self) < wanted:
            log.warning("the texts gave %d of the %d tokens asked for; more text gives more", len(self), wanted)
        return self

    def add_tokens(self, tokens: Sequence[str], *, special: bool = False) -> int:
        """Adds whole tokens at the end; returns how many were new. Then resize the model's embeddings.

        A token is found wherever its text occurs; a special one only with allow_special.
        """
        if isinstance(tokens, str):
            raise ValueError("tokens is one string; give a list of strings")
        new = [t for t in dict.fromkeys(tokens) if t and self._id_of(t) is None and not self._engine.learned(t)]
        for token in new:
            check_utf8(token)
            id_ = self._engine.add_token(token, special) if self._engine.knows_special else len(self)
            (self._special if special else self._added)[token] = id_
            self._length = max(self._length, id_ + 1)
        self._refresh()
        return len(new)

    # --- files -----------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes tokenizer.json, which transformers reads too (SentencePiece: tokenizer.model), and its config."""
        folder = Path(folder)
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is a file; a tokenizer is saved as a folder", fix="give another name")
        folder.mkdir(parents=True, exist_ok=True)
        config: dict[str, Any] = {  # null says that there is none, so that loading does not guess one
            f"{role}_token": None if id_ is None else self._names.get(id_, self._engine.name_of(id_))
            for role, id_ in self._roles.items()
        }
        config |= {"clean_up_tokenization_spaces": False, "model_max_length": 1 << 30}
        for name, data in self._engine.files(self._special, self._added, self.bos_token_id, folder).items():
            atomic_write(folder / name, data)
        if self.kind == "sentencepiece":  # the protobuf knows its own tokens only
            own = self._engine.control_tokens()
            config["added_tokens_decoder"] = {
                str(id_): {"content": name, "special": id_ in self._special_ids}
                for id_, name in sorted(self._names.items())
                if name not in own
            }
        elif self.kind != "custom":
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
        if self.kind != "custom":
            atomic_write(folder / "tokenizer_config.json", json.dumps(config, indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def from_pretrained(cls, path: str | Path) -> SLMTokenizer:
        """A folder or a file: tokenizer.json, a SentencePiece model, or tiktoken ranks.

        Raises UserError, CorruptArtefact.
        """
        path = Path(path)
        file = _find_file(path)
        try:
            data = file.read_bytes()
        except OSError as error:
            raise UserError(f"{file} cannot be read ({error.strerror})", fix="check its permissions") from None
        roles, later = _read_config(file.parent)
        self = cls()
        if data.lstrip()[:1] == b"{" or data[:4] == b"\xef\xbb\xbf{":
            self._load_json(data, file, roles)
        elif data[:1] == b"\x0a":
            engine = SentencePieceEngine(data, file)
            special = engine.control_tokens()
            later = [token for token in later if token[0] > engine.max_id]
            special |= {name: id_ for id_, name, is_special in later if is_special}
            self._set(engine, special, {name: id_ for id_, name, is_special in later if not is_special}, roles)
        elif re.match(rb"[A-Za-z0-9+/=]+ \d+\s", data):
            ranks = _read_ranks(data, file)
            if len(ranks) != _LLAMA3_RANKS:
                log.warning(
                    "%s has %d ranks; Llama 3's has %d. A rank file does not say how text is split before merging, so "
                    "Llama 3's way is taken: another family's ids would differ from its own tokenizer's",
                    file,
                    len(ranks),
                    _LLAMA3_RANKS,
                )
            self._set(RanksEngine(ranks), special_tokens_of(len(ranks)), None, roles)
        else:
            raise UserError(
                f"{file} is no tokenizer: it begins with {data[:12]!r}, which is neither a tokenizer.json, "
                "a SentencePiece model nor a list of tiktoken ranks",
                fix="give a folder or file of one of these, or make one: slm-data tokenizer INPUT --output DIR",
            )
        return self

    def _load_json(self, data: bytes, file: Path, roles: dict[str, str | None]) -> None:
        try:
            text = data.decode("utf-8-sig")
            content = json.loads(text)
            if content.get("user_class"):
                raise UserError(
                    f"{file} only records that the tokenizer was {content['user_class']}, a class of yours",
                    fix=f"give {content['user_class']} itself",
                )
            converted = ranks_of_json(content)
            engine: Engine = RanksEngine(converted[1], converted[0]) if converted else HuggingFaceEngine(text)
            tokens = content.get("added_tokens") or []
            special = {token["content"]: int(token["id"]) for token in tokens if token.get("special")}
            added = {token["content"]: int(token["id"]) for token in tokens if not token.get("special")}
            taken = [name for name, id_ in (special | added).items() if not engine.knows_special and engine.has(id_)]
            if taken:
                raise ValueError(f"{taken[0]} has the id of another token")
        except UserError:
            raise
        except Exception as error:  # tokenizers raises plain Exception
            raise CorruptArtefact(f"{file} is not a readable tokenizer.json ({error})", fix="copy it again") from None
        self._set(engine, special, added, roles)


def load_tokenizer(spec: str | Path, said_by: object = None) -> SLMTokenizer:
    """A path, or `module:Class` for a class with encode, decode and __len__ (found from the current folder too).

    said_by: the checkpoint or dataset that names it, if it was not the user: that may have come from anywhere, and a class
    that it names is not run. Raises UserError, CorruptArtefact.
    """
    text = str(spec)
    if not Path(text).exists() and re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", text):
        if said_by is not None:
            raise UserError(
                f"{said_by} names a Python class as its tokenizer, {text}: to load it is to run what whoever wrote that chose",
                fix=f"if it is yours, say so: --tokenizer {text}",
            )
        return as_tokenizer(_load_class(text), text)
    if said_by is not None and not Path(text).exists():
        raise UserError(
            f"{said_by} names its tokenizer as {text}, which does not exist seen from here",
            fix="call from the folder that it was trained in, or say where the tokenizer is now: --tokenizer PATH",
        )
    return SLMTokenizer.from_pretrained(text)


def as_tokenizer(tokenizer: Any, name: str = "") -> SLMTokenizer:
    """Any object with encode, decode and __len__ behind the interface of SLMTokenizer."""
    if isinstance(tokenizer, SLMTokenizer):
        return tokenizer
    missing = [method for method in ("encode", "decode", "__len__") if not hasattr(tokenizer, method)]
    name = name or f"{type(tokenizer).__module__}:{type(tokenizer).__qualname__}"
    if missing:
        raise UserError(f"the tokenizer {name} has no {', '.join(missing)}", fix="give it encode, decode and __len__")
    self = SLMTokenizer()
    self._set(CustomEngine(tokenizer, name), {})
    self._roles = {role: getattr(tokenizer, f"{role}_token_id", None) for role in _ROLE_NAMES}
    return self


def special_tokens_of(num_ranks: int) -> dict[str, int]:
    """What follows the ranks of a tiktoken file: Llama 3's 256 tokens after its 128,000 ranks, else our three.

    The names are those of the tokenizer.json published with Llama 3.1 and later. (llama-models, tokenizer.py, calls
    the id 128005 <|step_id|> and counts its reserved ones accordingly: the ids that have a use are the same.)
    """
    if num_ranks != _LLAMA3_RANKS:
        return {name: num_ranks + i for i, name in enumerate((BOS, EOS, PAD))}
    known = {0: BOS, 1: EOS, 4: "<|finetune_right_pad_id|>", 6: "<|start_header_id|>", 7: "<|end_header_id|>"}
    known |= {8: "<|eom_id|>", 9: "<|eot_id|>", 10: "<|python_tag|>"}
    tokens, num_reserved = {}, 0
    for i in range(256):
        if i not in known:
            num_reserved += 1
        tokens[known.get(i, f"<|reserved_special_token_{num_reserved - 1}|>")] = num_ranks + i
    return tokens


def _load_class(spec: str) -> Any:
    module_name, _, class_name = spec.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
        for part in class_name.split("."):
            found = getattr(found, part)
    except ModuleNotFoundError as error:
        raise UserError(
            f"the tokenizer {spec}: there is no module {error.name!r}", fix="run it from its folder, or set PYTHONPATH"
        ) from None
    except AttributeError:
        raise UserError(f"the tokenizer {spec}: {module_name} has no {class_name}", fix="give module:Class") from None
    if not isinstance(found, type):
        return found
    try:
        return found()
    except TypeError as error:
        raise UserError(
            f"the tokenizer {spec} cannot be made without arguments ({error})", fix="give its arguments defaults"
        ) from None


def _find_file(path: Path) -> Path:
    if path.is_file():
        file: Path | None = path
    elif path.is_dir():
        names = ["tokenizer.json", "tokenizer.model"]
        names += sorted(p.name for p in path.iterdir() if p.suffix in (".model", ".tiktoken"))
        file = next((path / name for name in names if (path / name).is_file()), None)
    else:
        raise UserError(
            f"the tokenizer {path} does not exist",
            fix="give a folder, a file or module:Class; make one with: slm-data tokenizer INPUT --output DIR",
        )
    if file is None:
        raise UserError(
            f"the folder {path} holds no tokenizer (tokenizer.json, tokenizer.model, *.tiktoken)",
            fix="copy the whole folder of a model again; make a new tokenizer with: slm-data tokenizer INPUT --output DIR",
        )
    if file.stat().st_size == 0:
        raise UserError(f"the tokenizer file {file} is empty", fix="copy or make it again")
    return file


def _read_config(folder: Path) -> tuple[dict[str, str | None], list[tuple[int, str, bool]]]:
    """({"bos": name or None, …}, [(id, name, whether special), …] of the added tokens) of a folder's JSON files."""
    roles: dict[str, str | None] = {}
    added: list[tuple[int, str, bool]] = []
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            config = json.loads(path.read_bytes())
            for role in _ROLE_NAMES:
                if (key := f"{role}_token") not in config:
                    continue
                token = config[key]["content"] if isinstance(config[key], dict) else config[key]
                if not isinstance(token, str | None):
                    raise ValueError(f"{key} is {token!r}")
                roles[role] = roles.get(role) or token or None
            for id_, token in config.get("added_tokens_decoder", {}).items():
                added.append((int(id_), str(token["content"]), bool(token.get("special"))))
        except (OSError, ValueError, AttributeError, TypeError, KeyError, RecursionError) as error:
            raise CorruptArtefact(
                f"{path} is not readable ({type(error).__name__}: {error})", fix="copy it again, or remove it"
            ) from None
    return roles, added


def _read_ranks(data: bytes, file: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as error:
            raise CorruptArtefact(f"{file}, line {number}: {line[:40]!r} is not `base64 rank` ({error})") from None
    lacks = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if sorted(ranks.values()) != list(range(len(ranks))) or lacks:
        raise CorruptArtefact(
            f"{file} has no token for the byte {lacks[0]}" if lacks else f"{file}: its ranks have gaps or doubles",
            fix="copy it again: lines are missing or doubled",
        )
    return ranks


def _any_of(names: Iterable[str]) -> re.Pattern[str] | None:
    """Longest first, so that <a>b wins over <a>."""
    listed = sorted(names, key=lambda name: (-len(name), name))
    return re.compile("|".join(map(re.escape, listed))) if listed else None


__all__ = ["BOS", "EOS", "PAD", "PATTERN", "SLMTokenizer", "as_tokenizer", "load_tokenizer", "special_tokens_of"]
