"""What a corpus is: which files, of which kind, cut into which pieces.

Owns finding and cutting; the documents in a piece are reading.py's. Kinds of input: JSON lines (a document a line),
Parquet and Arrow (a document a row), plain text (a file named by the user is one document, or several if it is long),
folders (structured files as such, every other text file a document) and Hugging Face datasets (hf://NAME).
JSON lines and text may be compressed (.gz, .zst, .bz2).

    files, skipped = find_files(["books.jsonl.zst", "cpython/Lib"], text_key="text")
    for piece in cut(files, piece_bytes=1 << 20):
        ...
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlencode

from slm.errors import UserError
from slm.names import file_inside

SKIPPED_FOLDERS = {"__pycache__", "site-packages", "dist-packages", "node_modules"}
# Files that are no text whatever their first bytes look like; others are found out by a NUL byte.
_BINARY_SUFFIXES = set(
    """.7z .a .avi .bin .bmp .class .dll .doc .docx .dylib .eot .exe .gif .h5 .ico .idx .jar .jpeg .jpg .lz4 .mo .mp3
    .mp4 .npy .npz .o .obj .ogg .otf .pdf .pickle .pkl .png .ppt .pptx .pt .pth .pyc .pyd .pyo .rar .safetensors .so
    .sqlite .sqlite3 .tar .tgz .tif .tiff .ttf .wav .webp .whl .woff .woff2 .xls .xlsx .xz .zip""".split()
)
_UNSUPPORTED_SUFFIXES = {".xz", ".lz4", ".zip", ".tar", ".tgz", ".7z", ".rar"}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
_JSON_SUFFIXES = (".jsonl", ".ndjson")
HUB = "hf://"
_HUB_KINDS = {"arrow", "csv", "json", "parquet", "text", "xml"}
_LOOK_BYTES = 4 << 20  # of text, to see how well a file is compressed
_PARTS_OF_A_SAMPLE = 64  # more of them would be spread better, and less of each file's bytes be used
_BOM = b"\xef\xbb\xbf"

# Why something that was found is not looked into: ordinary in healthy corpora.
EMPTY_FILE, BINARY_FILE, HIDDEN_FILE, SAME_FILE = "empty file", "binary file", "hidden file", "same file again"
LINKED_FOLDER = "linked folder"


class InputFile(NamedTuple):
    """kind: "jsonl", "parquet", "arrow", "hub", "text" (named by the user) or "tree" (found in a folder, where odd files
    are ordinary). size in bytes; of a dataset on the hub, its shards. mtime_ns: when it changed; of a dataset on the hub a
    number that is another when its files are others."""

    path: str
    kind: str
    size: int
    mtime_ns: int
    compression: str = ""


class Piece(NamedTuple):
    """A part of a file. start, end: bytes; row groups of Parquet; shards of the hub. Of JSON lines, a piece has the lines
    that begin in it. size: about its bytes."""

    file: InputFile
    start: int
    end: int
    size: int


# --- finding -------------------------------------------------------------------------------------------------


def find_files(
    inputs: Sequence[str | Path], exclude: str | None = None, text_key: str = "text"
) -> tuple[list[InputFile], Counter[str]]:
    """All files of the inputs, in their order, folders sorted; and how many were passed over, by reason.

    exclude: the real path of a folder that is not looked into, such as the output. Raises UserError for an input that
    is missing, empty, of a kind that cannot be read, or a table without a column text_key.
    """
    files: dict[str, InputFile] = {}
    skipped: Counter[str] = Counter()
    for given in inputs:
        path = Path(given)
        if str(given).startswith(HUB):
            found = [open_hub(str(given))[1]]
        elif path.is_dir():
            found = list(_walk(os.path.abspath(path), exclude, skipped))
            if not found:
                raise UserError(
                    f"the folder {path} has no text files (hidden and binary ones do not count): no documents",
                    fix="give a folder with text, JSON lines (.jsonl), Parquet or Arrow",
                )
        elif path.is_file():
            found = [_named_file(Path(os.path.abspath(path)))]
        else:
            what = "is no file and no folder" if path.exists() else "does not exist"
            raise UserError(f"the input {path} {what}: there is no text to read", fix="correct the path")
        for file in found:
            real = file.path if file.kind == "hub" else os.path.realpath(file.path)
            skipped[SAME_FILE] += real in files
            files.setdefault(real, file)
    if not sum(file.size for file in files.values()):
        raise UserError(
            f"all inputs are empty ({', '.join(map(str, inputs))}): no documents", fix="give files with text"
        )
    for real in [real for real, file in files.items() if not file.size]:
        del files[real]
        skipped[EMPTY_FILE] += 1
    for file in files.values():
        _check_column(file, text_key)
    return list(files.values()), +skipped


def _walk(folder: str, exclude: str | None, skipped: Counter[str]) -> Iterator[InputFile]:
    def refuse(error: OSError) -> None:
        raise UserError(f"the folder {error.filename} cannot be read: {error.strerror}", fix="change its permissions")

    for at, folders, names in os.walk(folder, onerror=refuse):
        if "dataset_dict.json" in names:
            splits = ", ".join(sorted(folders))
            raise UserError(
                f"{at} is a saved dataset of several splits ({splits}): training on all of them would mix in the held-out",
                fix=f"name the split: {os.path.join(at, 'train')}",
            )
        wanted = (name for name in folders if not name.startswith(".") and name not in SKIPPED_FOLDERS)
        folders[:] = sorted(name for name in wanted if os.path.realpath(os.path.join(at, name)) != exclude)
        skipped[LINKED_FOLDER] += sum(os.path.islink(os.path.join(at, name)) for name in folders)
        if "state.json" in names and "dataset_info.json" in names:  # datasets' save_to_disk; its caches lie beside
            names = _saved_files(Path(at))
        for name in sorted(names):
            path = os.path.join(at, name)
            kind, compression = kind_of(name)
            if name.startswith("."):
                skipped[HIDDEN_FILE] += 1
            elif kind == "binary" or not os.path.isfile(path):
                skipped[BINARY_FILE] += 1
            elif not (stat := os.stat(path)).st_size:
                skipped[EMPTY_FILE] += 1
            else:
                yield InputFile(path, kind, stat.st_size, stat.st_mtime_ns, compression)


def _saved_files(folder: Path) -> list[str]:
    state = folder / "state.json"
    try:
        names = [entry["filename"] for entry in json.loads(state.read_text())["_data_files"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{state} does not name the files of a saved dataset ({error!r})", fix="save it again"
        ) from None
    return [file_inside(folder, name, state).name for name in names]


def kind_of(name: str) -> tuple[str, str]:
    """(kind, compression) of a file found in a folder, by its name: "tree" for text, "binary" for what is not read."""
    stem, suffix = os.path.splitext(name.lower())
    compression = COMPRESSIONS.get(suffix, "")
    if compression:
        suffix = os.path.splitext(stem)[1]
        if suffix not in (*_JSON_SUFFIXES, ".json", ".txt"):  # an archive of anything else
            return "binary", ""
    if suffix in _JSON_SUFFIXES or (compression and suffix == ".json"):
        return "jsonl", compression
    if suffix in (".parquet", ".arrow"):
        return suffix[1:], ""
    return ("binary" if suffix in _BINARY_SUFFIXES else "tree"), compression


def _named_file(path: Path) -> InputFile:
    if path.suffix.lower() in _UNSUPPORTED_SUFFIXES:
        raise UserError(
            f"the input {path} is a {path.suffix} file, which is not read",
            fix="unpack it, or compress its JSON lines with gzip or zstd",
        )
    stat = path.stat()
    compression = COMPRESSIONS.get(path.suffix.lower(), "")
    suffix = path.with_suffix("").suffix.lower() if compression else path.suffix.lower()
    if suffix in (".parquet", ".arrow"):
        kind = suffix[1:]
    elif suffix in (*_JSON_SUFFIXES, ".json"):
        kind = "jsonl"
    else:
        kind = "text"
    if kind == "jsonl" and not compression and _first_bytes(path).removeprefix(_BOM).lstrip()[:1] == b"[":
        raise UserError(
            f"the input {path} is one JSON array; this reads JSON lines, one object a line",
            fix=f"convert it, such as with: jq -c '.[]' {path.name} > {path.stem}.jsonl",
        )
    return InputFile(str(path), kind, stat.st_size, stat.st_mtime_ns, compression)


def _first_bytes(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(256)
    except OSError as error:
        raise UserError(f"the input {path} cannot be read: {error.strerror}", fix="change its permissions") from None


# --- tables and the hub --------------------------------------------------------------------------------------


def _hub_builder(spec: str) -> tuple[Any, str, dict[str, str]]:
    """(datasets' builder, NAME, options) of hf://NAME?split=train&config=…&revision=…"""
    import datasets

    name, _, query = spec.removeprefix(HUB).partition("?")
    options = dict(parse_qsl(query))
    if unknown := options.keys() - {"split", "config", "revision"}:
        raise UserError(
            f"the input {spec} has the option {min(unknown)!r}, which is not known",
            fix="give split, config and revision, as in hf://NAME?split=train",
        )
    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)  # broken data are counted, and told once
    builder = datasets.load_dataset_builder(name, options.get("config"), revision=options.get("revision"))
    _check_builder(builder, name, spec)
    return builder, name, options


def _check_builder(builder: Any, name: str, spec: str) -> None:
    """Raises UserError unless the dataset is of plain tables or text, in files of its own. (Code of a dataset's own runs in no
    version of `datasets` since 4.0, which setup.cfg asks for; its README still says which files are read, and how.)"""
    kinds = {c.__module__.split(".")[2] for c in type(builder).__mro__ if c.__module__.startswith("datasets.packaged")}
    if not kinds & _HUB_KINDS:
        raise UserError(
            f"the input {spec} is a dataset of the kind {', '.join(sorted(kinds)) or type(builder).__name__}, whose files can "
            "hold more than text",
            fix=f"use one of {', '.join(sorted(_HUB_KINDS))} files, or make JSON lines of its text",
        )
    home = os.path.realpath(name) + os.sep if os.path.isdir(name) else f"{HUB}datasets/"
    for files in (builder.config.data_files or {}).values():
        for path in map(str, files):
            plain = path.rpartition("::")[2]  # of gzip://inner::outer
            real = os.path.realpath(plain) if os.path.isdir(name) else plain
            if not real.startswith(home) or ".." in plain.split("/"):
                raise UserError(
                    f"the input {spec} names the file {plain}, which is none of its own: a README must not choose files of this "
                    "machine",
                    fix="remove data_files from its README, or give the file itself as an input",
                )


def open_hub(spec: str) -> tuple[Any, InputFile]:
    """The streaming dataset of hf://NAME?split=train&config=…&revision=…, and what it is as an input: its path names the
    commit, so that whoever opens that reads the same. NAME may be a local folder. Raises UserError."""
    try:
        builder, name, options = _hub_builder(spec)
        dataset = builder.as_streaming_dataset(options.get("split", "train"))
        data_files = builder.config.data_files or {}
        state: list[Any] = [[path, _size_if_local(path)] for files in data_files.values() for path in files]
        state += [files.origin_metadata for files in data_files.values()]  # commits, or times of change
        number = int.from_bytes(hashlib.sha256(json.dumps([state, builder.hash]).encode()).digest()[:7], "big")
        if not os.path.isdir(name) and re.fullmatch("[0-9a-f]{40}", builder.hash or ""):  # a commit
            spec = f"{HUB}{name}?{urlencode({**options, 'revision': builder.hash})}"
        return dataset, InputFile(spec, "hub", dataset.num_shards, number)
    except UserError:
        raise
    except Exception as error:  # of many kinds: no such dataset, no network, no such split
        first = (str(error).strip() or "no reason given").splitlines()[0]
        raise UserError(
            f"the input {spec} cannot be opened: {type(error).__name__}: {first}",
            fix="check the name, the split and the network; a local folder of Parquet or JSON lines works too",
        ) from None


@lru_cache
def _hub_bytes(spec: str) -> int:
    """About the bytes of the files of a split, by some of them; 0 if that is not known."""
    from fsspec.core import url_to_fs

    try:
        builder, _, options = _hub_builder(spec)
        files = builder.config.data_files[options.get("split", "train")]
        sizes = [fs.size(path) for fs, path in map(url_to_fs, files[:: max(1, len(files) // 8)])]
        return sum(sizes) * len(files) // len(sizes)
    except Exception:  # of many kinds; it is a guess in any case
        return 0


def _size_if_local(path: str) -> int:
    return os.path.getsize(path) if os.path.isfile(path) else 0


def _check_column(file: InputFile, text_key: str) -> None:
    """Raises UserError if a table is not readable at all, or has no column text_key: known before anything is read."""
    if file.kind not in ("parquet", "arrow") or not file.size:
        return
    import pyarrow

    try:
        names = parquet_file(file.path).schema_arrow.names if file.kind == "parquet" else arrow_reader(file.path)[0]
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"the input {file.path} is not a readable {file.kind} file ({str(error).splitlines()[0]})",
            fix="copy it again, or leave it out",
        ) from None
    if text_key not in names:
        raise UserError(
            f"the input {file.path} has no column {text_key!r}; its columns are {', '.join(names)}",
            fix="name the column with the text by --text-key",
        )


def parquet_file(path: str) -> Any:
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(path, page_checksum_verification=True)


def arrow_reader(path: str) -> tuple[list[str], Iterator[Any]]:
    """(column names, record batches) of an Arrow file of either layout: random access, or the stream that datasets writes."""
    import pyarrow

    source = pyarrow.memory_map(path)
    try:
        reader = pyarrow.ipc.open_file(source)
        return reader.schema.names, (reader.get_batch(i) for i in range(reader.num_record_batches))
    except pyarrow.ArrowInvalid:
        source.seek(0)
        stream = pyarrow.ipc.open_stream(source)
        return stream.schema.names, iter(stream)


# --- cutting -------------------------------------------------------------------------------------------------


def cut(files: Iterable[InputFile], piece_bytes: int) -> list[Piece]:
    """Plain JSON lines in pieces of piece_bytes, Parquet by row groups, the hub by shards, other files whole."""
    pieces = []
    for file in files:
        if file.kind == "parquet" and file.size:
            metadata = parquet_file(file.path).metadata
            sizes = [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]
            pieces += [Piece(file, i, i + 1, size) for i, size in enumerate(sizes)]
        elif file.kind == "hub":
            pieces += [Piece(file, i, i + 1, piece_bytes) for i in range(file.size)]
        else:
            splits = file.kind == "jsonl" and not file.compression
            step = piece_bytes if splits else max(1, file.size)
            ends = ((at, min(at + step, file.size)) for at in range(0, max(1, file.size), step))
            pieces += [Piece(file, start, end, end - start) for start, end in ends]
    return pieces


def group(pieces: Iterable[Piece], unit_bytes: int) -> list[list[Piece]]:
    """Neighbours together up to unit_bytes (a single larger piece alone): the units of work and of restart."""
    units: list[list[Piece]] = []
    room = 0
    for piece in pieces:
        if not units or piece.size > room:
            units.append([])
            room = unit_bytes
        units[-1].append(piece)
        room -= piece.size
    return units


def text_bytes(piece: Piece) -> int:
    """About the bytes of its text: of compressed files by their beginning, of the hub by the size of the files."""
    file = piece.file
    if file.kind == "hub":
        return _hub_bytes(file.path) // file.size or piece.size
    return _unpacked_bytes(file) if file.compression else piece.size


def _unpacked_bytes(file: InputFile) -> int:
    import pyarrow

    try:
        with pyarrow.OSFile(file.path) as packed, pyarrow.CompressedInputStream(packed, file.compression) as stream:
            num_bytes = len(stream.read(_LOOK_BYTES))
            return num_bytes if num_bytes < _LOOK_BYTES else file.size * num_bytes // packed.tell()
    except OSError:  # broken: whoever reads it will count that
        return file.size


def sample(pieces: Sequence[Piece], max_bytes: int) -> list[tuple[Piece, int]]:
    """(piece, bytes to read of it at most) for max_bytes in all, evenly spread over the whole corpus; the same ones each
    time. A large piece is read from its beginning only, so that no input is left out because of its size."""
    share = max_bytes / max(1, sum(piece.size for piece in pieces))
    if share >= 1:  # sizes are guesses in part: what is left over goes to all in proportion
        return [(piece, int(piece.size * share)) for piece in pieces]
    chosen, budget = [], 0.0
    for piece in pieces:
        budget += piece.size * share
        if budget >= min(piece.size, max_bytes // _PARTS_OF_A_SAMPLE):
            limit = min(piece.size, int(budget))
            chosen.append((piece, limit))
            budget -= limit
    return chosen or [(min(pieces, key=lambda piece: piece.size), max_bytes)]


# --- showing -------------------------------------------------------------------------------------------------


def shown(path: str) -> str:
    """A path for the screen: names that are not UTF-8 would stop the print."""
    return os.fsencode(path).decode("utf-8", "replace")


def human_bytes(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"
