"""THE token-shard format: memory-mapped `.bin` + `.idx` files in the Megatron layout, and `manifest.json` over them.

Owns reader and writer; nothing else in the project knows the bytes (docs/formats.md describes them). Documents are
stored whole, BOS … EOS, back to back. A token's address is (shard, offset).

    with ShardWriter(folder, "corpus-00000", vocab_size=4096) as shard:
        shard.add(np.array([bos, *ids, eos]))
    tokenizer = {"fingerprint": "…", "vocab_size": 4096, "bos_id": 0, "eos_id": 1}
    write_manifest(folder, shards=[shard.entry], tokenizer=tokenizer)
    TokenDataset(folder).shards[0].tokens[10:20]
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from slm.errors import CorruptArtefact, UserError
from slm.names import file_inside
from slm.runtime import atomic_write

SCHEMA = "slm-tokens/1"
MANIFEST = "manifest.json"
_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document boundaries
_DTYPE_CODES: dict[int, np.dtype[Any]] = {8: np.dtype("<u2"), 4: np.dtype("<i4")}
_UINT16_VOCABULARY = 65500  # Megatron's DType.optimal_dtype: uint16 below it


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """uint16 where ids fit, else int32 (the format has no uint32)."""
    return _DTYPE_CODES[8] if vocab_size < _UINT16_VOCABULARY else _DTYPE_CODES[4]


# --- index files ---------------------------------------------------------------------------------------------


def encode_index(doc_tokens: np.ndarray, dtype: np.dtype[Any]) -> bytes:
    """The `.idx` of documents of doc_tokens tokens each, one sequence a document."""
    code = next(c for c, d in _DTYPE_CODES.items() if d == dtype)
    num_docs = len(doc_tokens)
    starts = np.zeros(num_docs, dtype="<i8")
    np.cumsum(doc_tokens[:-1], out=starts[1:])
    return b"".join(
        [
            _HEADER.pack(_MAGIC, 1, code, num_docs, num_docs + 1),
            doc_tokens.astype("<i4").tobytes(),
            (starts * dtype.itemsize).tobytes(),
            np.arange(num_docs + 1, dtype="<i8").tobytes(),
        ]
    )


def decode_index(data: bytes, path: object = "index") -> tuple[np.ndarray, np.dtype[Any]]:
    """(document starts in tokens, int64 [num_docs + 1]; dtype of the tokens). Raises CorruptArtefact."""
    if len(data) < _HEADER.size or data[:9] != _MAGIC:
        raise CorruptArtefact(f"{path} does not begin as an index file of this format does")
    _, version, code, num_sequences, num_bounds = _HEADER.unpack_from(data)
    if version != 1 or code not in _DTYPE_CODES:
        raise CorruptArtefact(f"{path} has version {version} and dtype code {code}; version 1 with 4 or 8 can be read")
    if len(data) != _HEADER.size + 12 * num_sequences + 8 * num_bounds:
        raise CorruptArtefact(f"{path} has {len(data)} bytes, which do not hold {num_sequences} sequences")
    dtype = _DTYPE_CODES[code]
    at = _HEADER.size
    lengths = np.frombuffer(data, "<i4", num_sequences, at)
    byte_starts = np.frombuffer(data, "<i8", num_sequences, at + 4 * num_sequences)
    bounds = np.frombuffer(data, "<i8", num_bounds, at + 12 * num_sequences)
    starts = np.zeros(num_sequences + 1, dtype=np.int64)
    np.cumsum(lengths, out=starts[1:])
    if np.any(lengths < 0) or np.any(byte_starts != starts[:-1] * dtype.itemsize):
        raise CorruptArtefact(f"{path}: its sequences do not stand back to back")
    if not len(bounds) or bounds[0] != 0 or bounds[-1] != num_sequences or np.any(np.diff(bounds) < 0):
        raise CorruptArtefact(f"{path}: its document boundaries do not run from 0 to {num_sequences}")
    return starts[bounds], dtype


# --- writing -------------------------------------------------------------------------------------------------


class ShardWriter:
    """Writes NAME.bin and NAME.idx; neither is there before the end of the `with`. `entry` is then the manifest's."""

    def __init__(self, folder: str | Path, name: str, *, vocab_size: int) -> None:
        self.folder, self.name, self.vocab_size = Path(folder), name, vocab_size
        self.dtype = token_dtype(vocab_size)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.entry: dict[str, Any] = {}
        self._temporary = self.folder / f".{name}.bin.{os.getpid()}.tmp"
        self._file = open(self._temporary, "wb")
        self._sha256 = hashlib.sha256()
        self.doc_tokens: list[int] = []

    def add(self, ids: np.ndarray) -> None:
        """Appends one document, BOS … EOS included."""
        self.add_many(ids, [len(ids)])

    def add_many(self, ids: np.ndarray, doc_tokens: list[int]) -> None:
        """Appends documents that stand back to back in ids, of doc_tokens tokens each."""
        ids = np.asarray(ids)
        # An id that the dtype cannot hold would be wrapped to another one without a word.
        if not doc_tokens or min(doc_tokens) < 1 or ids.min() < 0 or ids.max() >= self.vocab_size:
            raise ValueError(f"a document is empty or has ids outside the vocabulary of {self.vocab_size}")
        assert sum(doc_tokens) == len(ids)
        data = ids.astype(self.dtype).data
        self._sha256.update(data)
        self._file.write(data)
        self.doc_tokens += doc_tokens

    def close(self) -> dict[str, Any]:
        """Makes the shard visible: fsync, rename, the index last. Returns its manifest entry."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        doc_tokens = np.array(self.doc_tokens, dtype=np.int64)
        index = encode_index(doc_tokens, self.dtype)
        os.replace(self._temporary, self.folder / f"{self.name}.bin")
        atomic_write(self.folder / f"{self.name}.idx", index)
        self.entry = {
            "name": self.name,
            "dtype": self.dtype.name,
            "num_tokens": int(doc_tokens.sum()),
            "num_docs": len(doc_tokens),
            "bin_bytes": int(doc_tokens.sum()) * self.dtype.itemsize,
            "idx_bytes": len(index),
            "sha256_bin": self._sha256.hexdigest(),
            "sha256_idx": hashlib.sha256(index).hexdigest(),
        }
        return self.entry

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            self._file.close()
            self._temporary.unlink(missing_ok=True)


def write_manifest(
    folder: str | Path, *, shards: list[dict[str, Any]], tokenizer: dict[str, Any], **extra: Any
) -> dict[str, Any]:
    """Writes manifest.json, which makes the folder a dataset. `tokenizer`: fingerprint, vocab_size, bos_id, eos_id."""
    manifest = {
        "schema": SCHEMA,
        "tokenizer": tokenizer,
        "num_tokens": sum(s["num_tokens"] for s in shards),
        "num_docs": sum(s["num_docs"] for s in shards),
        **extra,
        "shards": shards,
    }
    manifest["sha256"] = _manifest_sha256(manifest)
    atomic_write(Path(folder) / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    return manifest


def _manifest_sha256(manifest: dict[str, Any]) -> str:
    """Of all but itself, however it is laid out."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


# --- reading -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenShard:
    """tokens: uint16 or int32 [num_tokens], memory-mapped. doc_offsets: int64 [num_docs + 1], in tokens."""

    name: str
    tokens: np.ndarray
    doc_offsets: np.ndarray

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_docs(self) -> int:
        return len(self.doc_offsets) - 1


class TokenDataset:
    """A folder of shards. Opening checks that every file is there with the right size; `verify` reads them all."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest = _read_manifest(self.path)
        tokenizer = self.manifest["tokenizer"]
        self.vocab_size: int = tokenizer["vocab_size"]
        self.bos_id: int | None = tokenizer["bos_id"]
        self.eos_id: int | None = tokenizer["eos_id"]
        self.tokenizer_fingerprint: str = tokenizer["fingerprint"]
        self.num_tokens: int = self.manifest["num_tokens"]
        self.num_docs: int = self.manifest["num_docs"]
        self._at_opening: dict[str, os.stat_result] = {}  # of each .bin, by name
        self.shards = [self._open(entry) for entry in self.manifest["shards"]]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what the tokens are (contents and tokenizer), not of where or when they were written."""
        parts = [self.tokenizer_fingerprint]
        parts += [s[key] for s in self.manifest["shards"] for key in ("dtype", "sha256_bin", "sha256_idx")]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def _open(self, entry: dict[str, Any]) -> TokenShard:
        fix = "run slm-data shards again into a new folder, or copy the file again"
        if wrong := self._wrong_sizes(entry):
            raise CorruptArtefact(wrong[0], fix=fix)
        index = self.path / (entry["name"] + ".idx")
        doc_offsets, dtype = decode_index(index.read_bytes(), index)
        if doc_offsets[-1] * dtype.itemsize != entry["bin_bytes"]:
            problem = f"{index} covers {doc_offsets[-1]} tokens, which are not the {entry['bin_bytes']} bytes there"
            raise CorruptArtefact(problem, fix=fix)
        # A plain array over the map: indexing a np.memmap costs 40 % more.
        file = self.path / (entry["name"] + ".bin")
        self._at_opening[entry["name"]] = file.stat()
        mapped = np.memmap(file, dtype, "r") if entry["bin_bytes"] else np.empty(0, dtype)
        return TokenShard(entry["name"], np.asarray(mapped), doc_offsets)

    def check_unchanged(self) -> None:
        """Raises CorruptArtefact if the tokens of a shard are others than at opening: a map shows what is written meanwhile.
        A look at each file; one that was only touched is read once. (What was removed or replaced stays mapped as it was.)"""
        for entry in self.manifest["shards"]:
            file, was = self.path / f"{entry['name']}.bin", self._at_opening[entry["name"]]
            try:
                now = file.stat()
            except OSError:
                continue
            if now.st_ino != was.st_ino or (now.st_size, now.st_mtime_ns) == (was.st_size, was.st_mtime_ns):
                continue
            if now.st_size != was.st_size or _file_sha256(file) != entry["sha256_bin"]:
                raise CorruptArtefact(
                    f"{file} was changed while it is in use: what is trained on since is not the data of the manifest",
                    fix="put the file back as it was (slm-data verify says whether it is); the same command goes on",
                )
            self._at_opening[entry["name"]] = now

    def _wrong_sizes(self, entry: dict[str, Any]) -> list[str]:
        wrong = []
        for suffix in _suffixes(entry):
            size = entry[f"{suffix}_bytes"]
            file = self.path / f"{entry['name']}.{suffix}"
            found = file.stat().st_size if file.is_file() else "no"
            if found != size:
                wrong.append(f"{file} has {found} bytes, but the manifest says {size}")
        return wrong

    def verify(self, advance: Callable[[int], object] = lambda num_bytes: None) -> list[str]:
        """Reads everything; returns what is wrong, in words. Empty: the dataset is whole. advance(bytes read)."""
        problems: list[str] = []
        for entry, shard in zip(self.manifest["shards"], self.shards, strict=True):
            if wrong := self._wrong_sizes(entry):
                problems += wrong
                continue  # reading a map past the end of its file would kill the process
            for suffix in _suffixes(entry):
                file = self.path / f"{entry['name']}.{suffix}"
                found, wanted = _file_sha256(file, advance), entry[f"sha256_{suffix}"]
                if found != wanted:
                    problems.append(f"{file}: SHA-256 is {found[:16]}…, the manifest says {wanted[:16]}…")
            for token in (int(shard.tokens.min()), int(shard.tokens.max())) if shard.num_tokens else ():
                if not 0 <= token < self.vocab_size:
                    problems.append(f"{shard.name}: holds token {token}; the vocabulary is {self.vocab_size}")
            not_empty = np.diff(shard.doc_offsets) > 0
            ends = shard.tokens[shard.doc_offsets[1:][not_empty] - 1]
            if self.eos_id is not None and np.any(ends != self.eos_id):
                problems.append(f"{shard.name}: {int((ends != self.eos_id).sum())} documents do not end in EOS")
        return problems


def _file_sha256(file: Path, advance: Callable[[int], object] = lambda num_bytes: None) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as handle:
        while chunk := handle.read(1 << 22):
            digest.update(chunk)
            advance(len(chunk))
    return digest.hexdigest()


def _suffixes(entry: dict[str, Any]) -> list[str]:
    """Of a shard's files; NAME.src, where each document came from, is there if slm-data shards wrote it."""
    return [suffix for suffix in ("bin", "idx", "src") if f"{suffix}_bytes" in entry]


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        what = "has no manifest.json, so it is no complete dataset" if folder.is_dir() else "does not exist"
        if folder.is_file():
            what = "is a file, and a dataset is a folder"
        fix = "make it with: slm-data shards INPUT --tokenizer T --output DIR, and name DIR/train and DIR/validation"
        if (folder / "train" / MANIFEST).is_file():
            fix = f"name {folder / 'train'} (or {folder / 'validation'})"
        raise UserError(f"the token dataset {folder} {what}", fix=fix)
    try:
        manifest = json.loads(path.read_text())
        schema = manifest["schema"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptArtefact(f"{path} is not readable ({error})") from None
    if schema != SCHEMA:
        raise CorruptArtefact(f"{path} has schema {schema!r}; this version reads {SCHEMA!r}")
    if missing := [key for key in ("tokenizer", "num_tokens", "num_docs", "shards") if key not in manifest]:
        raise CorruptArtefact(f"{path} lacks {', '.join(missing)}: it is no whole manifest")
    if manifest.get("sha256", "") not in ("", _manifest_sha256(manifest)):
        raise CorruptArtefact(f"{path} was changed: its contents do not have the SHA-256 that it names")
    for entry in manifest["shards"]:
        for suffix in _suffixes(entry):
            name = entry.get("name")
            file_inside(folder, f"{name}.{suffix}" if isinstance(name, str) else name, path)
    return manifest
