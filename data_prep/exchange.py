"""Datasets of other tools, in and out, without touching a token: Megatron, datatrove, OLMo.

Owns the other tools' layouts. All of them keep ids back to back in little-endian files, so only what stands beside is
written anew. Verified against Megatron's description of its index and datatrove's own writer and reader.

    import_dataset([Path("my-corpus")], "megatron", "tokenizer", Path("data/mine"))
    export_dataset(Path("data/mine/train"), "datatrove", Path("out"))

megatron: PREFIX.bin, PREFIX.idx. datatrove: NAME.ds, NAME.ds.index (uint64 ends of documents), NAME.ds.metadata.
olmo: NAME.npy (raw, whatever its name says) and, if it is there, NAME.csv.gz (start, end, …), else EOS ends a document.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data_prep.progress import byte_progress
from slm.data.tokens import TokenDataset, decode_index, encode_index, token_dtype, write_manifest
from slm.errors import CorruptArtefact, EnvironmentProblem, UserError
from slm.runtime import atomic_write

Format = Literal["megatron", "datatrove", "olmo"]
_PAYLOAD = {"megatron": ".bin", "datatrove": ".ds", "olmo": ".npy"}


# --- in ------------------------------------------------------------------------------------------------------


def import_dataset(inputs: Sequence[Path], fmt: Format, tokenizer: str, output: Path) -> dict[str, Any]:
    """Copies each input's tokens as one shard of a dataset in `output`; returns its manifest. Raises UserError.

    inputs: files, prefixes, or folders of them. The tokenizer is what the tokens were made with: it says BOS, EOS and the
    width of an id (uint16 below 65,500 tokens).
    """
    from slm.tokenizer import load_tokenizer

    loaded = load_tokenizer(tokenizer)
    info = {**loaded.info(), "spec": str(tokenizer)}
    payloads = [path for given in inputs for path in _payloads(given, fmt)]
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} is not empty; nothing was written", fix="give a new folder")
    plans = [(path, *_documents(path, fmt, info)) for path in payloads]  # all checks before the first byte
    _make(output)
    shards = []
    with byte_progress("copying", sum(path.stat().st_size for path in payloads)) as advance:
        for number, (path, doc_offsets, dtype) in enumerate(plans):
            name = f"shard-{number:05d}"
            largest, sha256 = _copy(path, output / f"{name}.bin", dtype, advance)
            if largest >= len(loaded):
                raise UserError(
                    f"{path} holds the token {largest}, but the tokenizer {tokenizer} has {len(loaded)}: it is not the one "
                    "that the tokens were made with",
                    fix="give the right tokenizer; the folder written so far can be removed",
                )
            index = encode_index(np.diff(doc_offsets), dtype)
            atomic_write(output / f"{name}.idx", index)
            shards.append(
                {
                    "name": name,
                    "dtype": dtype.name,
                    "num_tokens": int(doc_offsets[-1]),
                    "num_docs": len(doc_offsets) - 1,
                    "bin_bytes": path.stat().st_size,
                    "idx_bytes": len(index),
                    "sha256_bin": sha256,
                    "sha256_idx": hashlib.sha256(index).hexdigest(),
                    "imported_from": {"path": os.path.abspath(path), "format": fmt},
                }
            )
    return write_manifest(output, shards=shards, tokenizer=info)


def _make(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{output} cannot be made: {error.strerror}", fix="give another folder") from None


def _payloads(given: Path, fmt: Format) -> list[Path]:
    suffix = _PAYLOAD[fmt]
    if given.is_dir():
        found = sorted(given.glob(f"*{suffix}"))
    else:
        # The other file of a pair may be named; a dot inside a prefix (corpus.v2) begins no suffix.
        known = given.suffix in (".bin", ".idx", ".ds", ".npy", ".index", ".metadata", ".gz")
        candidates = (given, given.with_name(given.name + suffix), given.with_suffix(suffix) if known else given)
        found = [path for path in candidates if path.is_file() and path.suffix == suffix][:1]
    if not found:
        raise UserError(
            f"{given}: there is no {suffix} file of the {fmt} format", fix="give a file, a prefix or a folder"
        )
    return found


def _documents(path: Path, fmt: Format, info: dict[str, Any]) -> tuple[np.ndarray, np.dtype[Any]]:
    """(document starts and the end, in tokens; dtype). Raises CorruptArtefact if they do not fit the file."""
    dtype = token_dtype(info["vocab_size"])
    if fmt == "megatron":
        index = path.with_suffix(".idx")
        if not index.is_file():
            raise UserError(f"{path}: its index {index.name} is missing", fix="copy it too")
        offsets, dtype = decode_index(index.read_bytes(), index)
    elif fmt == "datatrove":
        index = path.with_name(path.name + ".index")
        if not index.is_file():
            raise UserError(
                f"{path}: its index {index.name} is missing", fix="write it with save_index=True, or copy it"
            )
        offsets = np.concatenate([[0], np.fromfile(index, "<u8").astype(np.int64)])
    else:
        dtype = _olmo_dtype(path, dtype)
        offsets = _olmo_offsets(path, dtype, info["eos_id"])
    num_tokens, rest = divmod(path.stat().st_size, dtype.itemsize)
    if rest or offsets[-1] != num_tokens or np.any(np.diff(offsets) < 0):
        raise CorruptArtefact(
            f"{path} has {path.stat().st_size} bytes ({num_tokens} tokens of {dtype.itemsize} bytes), but its documents end "
            f"at token {int(offsets[-1])}",
            fix="copy both files again; or the tokenizer is not the one, and ids have another width",
        )
    return offsets, dtype


def _olmo_dtype(path: Path, dtype: np.dtype[Any]) -> np.dtype[Any]:
    """OLMo's files do not say how wide an id is, and a small vocabulary may be stored in 32 bits: then every second 16 bits
    are 0, which no text of 16-bit ids is."""
    words = np.fromfile(path, "<u2", 1 << 20)
    wide = dtype.itemsize == 2 and len(words) > 1 and path.stat().st_size % 4 == 0 and not words[1::2].any()
    return np.dtype("<i4") if wide else dtype


def _olmo_offsets(path: Path, dtype: np.dtype[Any], eos_id: int | None) -> np.ndarray:
    metadata = path.with_name(path.stem + ".csv.gz")
    if metadata.is_file():
        try:
            with gzip.open(metadata, "rt", newline="") as file:
                spans = [(int(row[0]), int(row[1])) for row in csv.reader(file) if row]
        except (OSError, EOFError, ValueError, IndexError) as error:
            raise CorruptArtefact(f"{metadata} is not readable ({error})", fix="copy it again") from None
        if any(end != start for (_, end), (start, _) in zip([(0, 0), *spans], spans, strict=False)):
            raise CorruptArtefact(f"{metadata}: its documents do not stand back to back")
        return np.array([0, *(end for _, end in spans)], dtype=np.int64)
    if eos_id is None:
        raise UserError(f"{path}: without {metadata.name} documents end at EOS, which the tokenizer lacks")
    tokens = np.memmap(path, dtype, "r") if path.stat().st_size else np.zeros(0, dtype)
    ends = [np.flatnonzero(tokens[at : at + (1 << 24)] == eos_id) + at + 1 for at in range(0, len(tokens), 1 << 24)]
    offsets = np.concatenate([[0], *ends]).astype(np.int64)
    return offsets if offsets[-1] == len(tokens) else np.append(offsets, len(tokens))


def _copy(source: Path, target: Path, dtype: np.dtype[Any], advance: Any) -> tuple[int, str]:
    """Copies, fsyncs, renames; (largest id, SHA-256)."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    digest, largest = hashlib.sha256(), -1
    try:
        with open(source, "rb") as reading, open(temporary, "wb") as writing:
            while chunk := reading.read(1 << 24):
                ids = np.frombuffer(chunk, dtype)
                largest = max(largest, int(ids.max()), (1 << 31) if int(ids.min()) < 0 else -1)
                digest.update(chunk)
                writing.write(chunk)
                advance(len(chunk))
            writing.flush()
            os.fsync(writing.fileno())
        temporary.replace(target)
    except OSError as error:
        raise EnvironmentProblem(
            f"{target} cannot be written: {error.strerror or error}",
            fix="make room, or give another folder; what is written so far can be removed",
        ) from None
    finally:
        temporary.unlink(missing_ok=True)
    return largest, digest.hexdigest()


# --- out -----------------------------------------------------------------------------------------------------


def export_dataset(folder: Path, fmt: Format, output: Path) -> list[Path]:
    """Writes every shard in another tool's layout; the files. Raises UserError if `output` holds something."""
    dataset = TokenDataset(folder)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} is not empty; nothing was written", fix="give a new folder")
    _make(output)
    written = []
    with byte_progress("copying", sum(entry["bin_bytes"] for entry in dataset.manifest["shards"])) as advance:
        for shard in dataset.shards:
            payload = output / (shard.name + _PAYLOAD[fmt])
            _copy(folder / f"{shard.name}.bin", payload, shard.tokens.dtype, advance)
            if fmt == "megatron":
                beside = {f"{shard.name}.idx": (folder / f"{shard.name}.idx").read_bytes()}
            elif fmt == "datatrove":
                beside = _datatrove_files(dataset, shard)
            else:
                beside = {f"{shard.name}.csv.gz": _olmo_csv(shard)}
            for name, data in beside.items():
                atomic_write(output / name, data)
            written += [payload, *(output / name for name in beside)]
    return written


def _datatrove_files(dataset: TokenDataset, shard: Any) -> dict[str, bytes]:
    name = f"{dataset.manifest['tokenizer'].get('spec') or 'unknown tokenizer'}|{shard.tokens.dtype.itemsize}"
    return {
        f"{shard.name}.ds.index": shard.doc_offsets[1:].astype("<u8").tobytes(),
        f"{shard.name}.ds.metadata": f"{name}\n{shard.num_tokens}\n{shard.num_tokens / 1e9:.3g} GT".encode(),
    }


def _olmo_csv(shard: Any) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    for number, (start, end) in enumerate(zip(shard.doc_offsets[:-1], shard.doc_offsets[1:], strict=True)):
        writer.writerow([int(start), int(end), number, shard.name, number])
    return gzip.compress(text.getvalue().encode(), mtime=0)
