"""What a corpus is: which files, cut into which pieces, and the documents in a piece.

Owns finding, cutting and reading of input: JSON lines (one document a line), plain text (a file named by the user is one
document, or several if it is long) and folders (source trees: each text file a document, each .jsonl file JSON lines).
It counts nothing and writes nothing; what is no document is told by its reason.

    files, skipped = find_files(["books.jsonl", "cpython/Lib"])
    for piece in cut(files, piece_bytes=1 << 20):
        for record in read_piece(piece, text_key="text"):
            print(record.line, record.text or record.problem)
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import orjson

from slm.errors import UserError

SKIPPED_FOLDERS = {"__pycache__", "site-packages", "dist-packages", "node_modules"}
# Files that are no text whatever their first bytes look like; others are found out by a NUL byte.
_BINARY_SUFFIXES = set(
    """.7z .a .arrow .avi .bin .bmp .bz2 .class .dll .doc .docx .dylib .eot .exe .gif .gz .h5 .ico .idx .jar .jpeg .jpg
    .lz4 .mo .mp3 .mp4 .npy .npz .o .obj .ogg .otf .parquet .pdf .pickle .pkl .png .ppt .pptx .pt .pth .pyc .pyd .pyo
    .rar .safetensors .so .sqlite .sqlite3 .tar .tgz .tif .tiff .ttf .wav .webp .whl .woff .woff2 .xls .xlsx .xz .zip
    .zst""".split()
)
_UNSUPPORTED_SUFFIXES = {".gz", ".zst", ".bz2", ".xz", ".parquet", ".arrow", ".zip", ".tar"}
_LONG_TEXT = 1 << 14
_BOM = b"\xef\xbb\xbf"

# Why a record is no document. The first three are ordinary in healthy corpora and not held against them.
BLANK_LINE, EMPTY_FILE, BINARY_FILE = "blank line", "empty file", "binary file"
HARMLESS = {BLANK_LINE, EMPTY_FILE, BINARY_FILE}
NOT_UTF8, BROKEN_JSON, NO_OBJECT = "not UTF-8", "broken JSON", "not a JSON object"
NO_FIELD, NOT_TEXT, EMPTY, UNREADABLE = "no such field", "field is not a string", "empty document", "cannot be read"


class InputFile(NamedTuple):
    """kind: "jsonl", "text" (named by the user) or "tree" (found in a folder, where odd files are ordinary)."""

    path: str
    kind: str
    size: int
    mtime_ns: int


class Piece(NamedTuple):
    """Bytes start to end of a file. Of JSON lines, a piece has the lines that begin in it."""

    file: InputFile
    start: int
    end: int


class Record(NamedTuple):
    """A document, or the reason why there is none here. line: 1 for the first of the piece; 0 for a whole file."""

    text: str | None
    problem: str
    line: int


# --- finding -------------------------------------------------------------------------------------------------


def find_files(inputs: Sequence[str | Path], exclude: str | None = None) -> tuple[list[InputFile], Counter[str]]:
    """All files of the inputs, in their order, folders sorted; and how many were passed over, by reason.

    exclude: the real path of a folder that is not looked into, such as the output. Raises UserError for an input that
    is missing, empty, or of a kind that cannot be read.
    """
    files: dict[str, InputFile] = {}
    skipped: Counter[str] = Counter()
    for given in inputs:
        path = Path(given)
        if path.is_dir():
            found = list(_walk(os.path.abspath(path), exclude, skipped))
            if not found:
                raise UserError(
                    f"the folder {path} has no text files (hidden and binary ones do not count): no documents",
                    fix="give a folder with text, or JSON lines (.jsonl)",
                )
        elif path.is_file():
            found = [_named_file(Path(os.path.abspath(path)))]
        else:
            what = "is no file and no folder" if path.exists() else "does not exist"
            raise UserError(f"the input {path} {what}: there is no text to read", fix="correct the path")
        for file in found:
            real = os.path.realpath(file.path)
            skipped["same file again"] += real in files
            files.setdefault(real, file)
    if not sum(file.size for file in files.values()):
        raise UserError(
            f"all inputs are empty ({', '.join(map(str, inputs))}): no documents", fix="give files with text"
        )
    return list(files.values()), +skipped


def _walk(folder: str, exclude: str | None, skipped: Counter[str]) -> Iterator[InputFile]:
    for at, folders, names in os.walk(folder):
        wanted = (name for name in folders if not name.startswith(".") and name not in SKIPPED_FOLDERS)
        folders[:] = sorted(name for name in wanted if os.path.realpath(os.path.join(at, name)) != exclude)
        for name in sorted(names):
            path = os.path.join(at, name)
            suffix = os.path.splitext(name)[1].lower()
            if name.startswith("."):
                skipped["hidden file"] += 1
            elif suffix in _BINARY_SUFFIXES or not os.path.isfile(path):
                skipped[BINARY_FILE] += 1
            elif not (stat := os.stat(path)).st_size:
                skipped[EMPTY_FILE] += 1
            else:
                yield InputFile(path, "jsonl" if suffix == ".jsonl" else "tree", stat.st_size, stat.st_mtime_ns)


def _named_file(path: Path) -> InputFile:
    suffix = path.suffix.lower()
    if suffix in _UNSUPPORTED_SUFFIXES:
        raise UserError(f"the input {path} is a {suffix} file, which is not read", fix="unpack or convert it to .jsonl")
    stat = path.stat()
    kind = "jsonl" if suffix in (".jsonl", ".json", ".ndjson") else "text"
    if kind == "jsonl" and _first_bytes(path).removeprefix(_BOM).lstrip()[:1] == b"[":
        raise UserError(
            f"the input {path} is one JSON array; this reads JSON lines, one object a line",
            fix=f"convert it, such as with: jq -c '.[]' {path.name} > {path.stem}.jsonl",
        )
    return InputFile(str(path), kind, stat.st_size, stat.st_mtime_ns)


def _first_bytes(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(256)
    except OSError as error:
        raise UserError(f"the input {path} cannot be read: {error.strerror}", fix="change its permissions") from None


# --- cutting -------------------------------------------------------------------------------------------------


def cut(files: Iterable[InputFile], piece_bytes: int) -> list[Piece]:
    """JSON lines in pieces of piece_bytes, other files whole."""
    pieces = []
    for file in files:
        step = piece_bytes if file.kind == "jsonl" else max(1, file.size)
        pieces += [Piece(file, at, min(at + step, file.size)) for at in range(0, max(1, file.size), step)]
    return pieces


def group(pieces: Iterable[Piece], unit_bytes: int) -> list[list[Piece]]:
    """Neighbours together up to unit_bytes (a single larger piece alone): the units of work and of restart."""
    units: list[list[Piece]] = []
    room = 0
    for piece in pieces:
        size = piece.end - piece.start
        if not units or size > room:
            units.append([])
            room = unit_bytes
        units[-1].append(piece)
        room -= size
    return units


def sample(pieces: Sequence[Piece], max_bytes: int) -> list[Piece]:
    """About max_bytes of the pieces, evenly spread over the whole corpus; the same ones each time."""
    total = sum(piece.end - piece.start for piece in pieces)
    if total <= max_bytes:
        return list(pieces)
    chosen, budget = [], 0.0
    for piece in pieces:
        size = piece.end - piece.start
        budget += size * max_bytes / total
        if budget >= size:
            chosen.append(piece)
            budget -= size
    return chosen or [min(pieces, key=lambda piece: piece.end - piece.start)]


# --- reading -------------------------------------------------------------------------------------------------


def read_piece(piece: Piece, text_key: str) -> Iterator[Record]:
    """One record for each line of JSON lines that begins in the piece, or one for a file of text."""
    path = piece.file.path
    try:
        with open(path, "rb", buffering=1 << 20) as file:
            stat = os.fstat(file.fileno())
            if (stat.st_size, stat.st_mtime_ns) != (piece.file.size, piece.file.mtime_ns):
                raise UserError(
                    f"the input {path} changed while it was being read: its shards would be a mixture",
                    fix="start again with a new output folder, when the file is at rest",
                )
            if piece.file.kind == "jsonl":
                yield from _json_records(file, piece, text_key)
            else:
                record = _text_record(file.read(), piece.file.kind)
                if piece.file.kind == "text" and record.text is not None:
                    yield from (Record(text, "", 0) for text in split_text(record.text))
                else:
                    yield record
    except OSError as error:
        if piece.file.kind == "jsonl":
            raise UserError(
                f"the input {path} cannot be read: {error.strerror}", fix="mend the file or leave it out"
            ) from None
        yield Record(None, UNREADABLE, 0)


def _text_record(data: bytes, kind: str) -> Record:
    if b"\0" in data:
        return Record(None, BINARY_FILE if kind == "tree" else NOT_UTF8, 0)
    try:
        text = data.removeprefix(_BOM).decode()
    except UnicodeDecodeError:
        return Record(None, NOT_UTF8, 0)
    if not text.strip():
        return Record(None, EMPTY_FILE if kind == "tree" else EMPTY, 0)
    return Record(text, "", 0)


def split_text(text: str) -> Iterator[str]:
    """A named file of text is often a whole corpus in one: it is cut into documents of about _LONG_TEXT characters, at
    blank lines where there are some, else at line ends, so that a part can be held out."""
    start = 0
    while len(text) - start > 2 * _LONG_TEXT:
        low, high = start + _LONG_TEXT, start + 2 * _LONG_TEXT
        end = text.find("\n\n", low, high)
        end = end + 2 if end >= 0 else text.find("\n", low, high) + 1 or high
        yield text[start:end]
        start = end
    rest = text[start:]
    if rest.strip():
        yield rest


def _json_records(file: BinaryIO, piece: Piece, text_key: str) -> Iterator[Record]:
    at = piece.start
    if at:  # the line that the cut went through belongs to the piece before; a cut right after "\n" loses nothing
        file.seek(at - 1)
        at += len(file.readline()) - 1
    line = 0
    while at < piece.end and (data := file.readline()):
        line += 1
        yield _json_record(data if at else data.removeprefix(_BOM), text_key, line)
        at += len(data)


def _json_record(data: bytes, text_key: str, line: int) -> Record:
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError:
        if not data.strip():
            return Record(None, BLANK_LINE, line)
        try:
            data.decode()
        except UnicodeDecodeError:
            return Record(None, NOT_UTF8, line)
        return Record(None, BROKEN_JSON, line)
    if not isinstance(value, dict):
        return Record(None, NO_OBJECT, line)
    if text_key not in value:
        return Record(None, NO_FIELD, line)
    text = value[text_key]
    if not isinstance(text, str):
        return Record(None, NOT_TEXT, line)
    return Record(text, "", line) if text.strip() else Record(None, EMPTY, line)


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
