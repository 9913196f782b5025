"""Datasets of other tools, in and out, without touching a token: Megatron, datatrove, OLMo.

Owns the other tools' layouts. All of them keep ids back to back in little-endian files, so only what stands beside is
written anew. Verified against Megatron's description of its index and datatrove's own writer and reader.

    import_dataset([Path("my-corpus")], "megatron", "tokenizer", Path("data/mine"))
    export_dataset(Path("data/mine/train"), "datatrove", Path("out"))

megatron: PREFIX.bin, PREFIX.idx. datatrove: NAME.ds, NAME.ds.index (uint64 ends of documents), NAME.ds.metadata.
olmo: NAME.npy (raw, whatever its name says) and, if it is there, NAME.csv.gz (start, end, …), else EOS ends a document and
the ids show their width.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data_prep.job import os_errors_told
from data_prep.progress import byte_progress
from slm.data.tokens import TokenDataset, decode_index, encode_index, write_manifest
from slm.errors import CorruptArtefact, UserError
from slm.runtime import atomic_write

Format = Literal["megatron", "datatrove", "olmo"]
Width = Literal["uint16", "uint32"]
_WIDTHS: dict[str, np.dtype[Any]] = {
    "uint16": np.dtype("<u2"),
    "uint32": np.dtype("<i4"),
}  # the shard format's dtypes; no id needs the 32nd bit
_PAYLOAD = {"megatron": ".bin", "datatrove": ".ds", "olmo": ".npy"}


# --- in ------------------------------------------------------------------------------------------------------


def import_dataset(
    inputs: Sequence[Path], fmt: Format, tokenizer: str, output: Path, width: Width | None = None
) -> dict[str, Any]:
    """Copies each input's tokens as one shard of a dataset in `output`; returns its manifest. Raises UserError.

    inputs: files, prefixes, or folders of them. The tokenizer is what the tokens were made with: it says BOS and EOS.
    width: of an id; None finds it out from the table of documents beside the tokens, or from the ids.
    """
    from slm.tokenizer import load_tokenizer

    if fmt == "megatron" and width:
        raise UserError(f"--dtype {width}: the index of a Megatron file says its own", fix="leave it out")
    loaded = load_tokenizer(tokenizer)
    info = {**loaded.info(), "spec": str(tokenizer)}
    with os_errors_told(output, "if the folder was begun, remove it and give the command again"):
        return _import(inputs, fmt, info, output, width)


def _import(
    inputs: Sequence[Path], fmt: Format, info: dict[str, Any], output: Path, width: Width | None
) -> dict[str, Any]:
    payloads = [path for given in inputs for path in _payloads(given, fmt)]
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} is not empty; nothing was written", fix="give a new folder")
    plans = [(path, *_documents(path, fmt, info, width)) for path in payloads]  # all checks before the first byte
    _make(output)
    shards = []
    with byte_progress("copying", sum(path.stat().st_size for path in payloads)) as advance:
        for number, (path, doc_offsets, dtype) in enumerate(plans):
            name = f"shard-{number:05d}"
            largest, sha256 = _copy(path, output / f"{name}.bin", dtype, advance)
            if largest >= info["vocab_size"]:
                raise UserError(
                    f"{path} holds the token {largest}, but the tokenizer {info['spec']} has {info['vocab_size']}: it is not "
                    "the one that the tokens were made with",
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
        found = sorted(path for path in given.glob(f"*{suffix}") if path.is_file())
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


def _documents(path: Path, fmt: Format, info: dict[str, Any], width: Width | None) -> tuple[np.ndarray, np.dtype[Any]]:
    """(document starts and the end, in tokens; dtype). Raises CorruptArtefact if they do not fit the file."""
    size = path.stat().st_size
    offsets = None
    if fmt == "megatron":
        index = path.with_suffix(".idx")
        if not index.is_file():
            raise UserError(f"{path}: its index {index.name} is missing", fix="copy it too")
        offsets, dtype = decode_index(index.read_bytes(), index)
    else:
        if fmt == "datatrove":
            index = path.with_name(path.name + ".index")
            if not index.is_file():
                raise UserError(
                    f"{path}: its index {index.name} is missing", fix="write it with save_index=True, or copy it"
                )
            offsets = np.concatenate([[0], np.fromfile(index, "<u8").astype(np.int64)])
        elif (table := path.with_name(path.stem + ".csv.gz")).is_file():
            offsets = _olmo_offsets(table)
        if width:
            dtype = _WIDTHS[width]
        elif offsets is None:
            dtype = _width_by_ids(path, info["vocab_size"])
        else:  # bytes and tokens say it
            wide = offsets[-1] > 0 and size >= 4 * offsets[-1]
            dtype = _WIDTHS["uint32" if wide else "uint16"]
        if offsets is None:
            offsets = _offsets_by_eos(path, dtype, info["eos_id"])
    num_tokens, rest = divmod(size, dtype.itemsize)
    if rest or offsets[-1] != num_tokens or np.any(np.diff(offsets) < 0):
        raise CorruptArtefact(
            f"{path} has {size} bytes ({num_tokens} tokens of {dtype.itemsize} bytes), but its documents end "
            f"at token {int(offsets[-1])}",
            fix="copy both files again" + ("; or --dtype is not the one" if width else ""),
        )
    return offsets, dtype


def _width_by_ids(path: Path, vocab_size: int) -> np.dtype[Any]:
    """The width that can hold the tokenizer's ids and gives only such. Of two it is the larger: as uint16, every second id
    would be 0, which no text of 16-bit ids is. Raises UserError if there is none."""
    raw = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.zeros(0, np.uint8)

    def fits(kind: np.dtype[Any]) -> bool:
        if len(raw) % kind.itemsize or vocab_size > 1 << 8 * kind.itemsize:
            return False
        ids = raw.view(f"<u{kind.itemsize}")
        return all(ids[at : at + (1 << 24)].max() < vocab_size for at in range(0, len(ids), 1 << 24))

    possible = [kind for kind in _WIDTHS.values() if fits(kind)]
    if not possible:
        raise UserError(
            f"{path} has ids that are not the tokenizer's, which has {vocab_size}, as uint16 and as uint32",
            fix="give the tokenizer that the tokens were made with",
        )
    return possible[-1]


def _olmo_offsets(table: Path) -> np.ndarray:
    try:
        with gzip.open(table, "rt", newline="") as file:
            spans = np.array([(int(row[0]), int(row[1])) for row in csv.reader(file) if row], np.int64).reshape(-1, 2)
    except (OSError, EOFError, ValueError, OverflowError, IndexError, csv.Error, zlib.error) as error:
        raise CorruptArtefact(f"{table} is not readable ({error})", fix="copy it again") from None
    offsets = np.concatenate([[0], spans[:, 1]])
    for number in np.flatnonzero(spans[:, 0] != offsets[:-1])[:1].tolist():
        raise CorruptArtefact(
            f"{table}: its documents do not stand back to back from token 0 on: number {number} begins at token "
            f"{spans[number, 0]}, and what is before it ends at {offsets[number]}",
            fix="write the tokens anew without those of no document, or remove the table: EOS then ends a document",
        )
    return offsets


def _offsets_by_eos(path: Path, dtype: np.dtype[Any], eos_id: int | None) -> np.ndarray:
    if eos_id is None:
        raise UserError(
            f"{path}: without a table of documents they end at EOS, which the tokenizer lacks",
            fix="copy NAME.csv.gz too",
        )
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
    finally:
        temporary.unlink(missing_ok=True)
    return largest, digest.hexdigest()


# --- out -----------------------------------------------------------------------------------------------------


def export_dataset(folder: Path, fmt: Format, output: Path) -> list[Path]:
    """Writes every shard in another tool's layout; the files. Raises UserError if `output` holds something."""
    dataset = TokenDataset(folder)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} is not empty; nothing was written", fix="give a new folder")
    with os_errors_told(output, "remove the folder and give the command again"):
        return _export(dataset, fmt, output)


def _export(dataset: TokenDataset, fmt: Format, output: Path) -> list[Path]:
    folder = dataset.path
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
