"""The documents in a piece of a corpus, or the reason why there is none.

Owns reading and the reasons; which pieces there are is corpus.py's. It counts nothing and writes nothing: every line,
row or file that is looked at gives one Record, so that documents in = documents out + rejects.

    for record in read_piece(piece, Reading(text_key="text")):
        print(record.line, record.text or record.problem)
"""

from __future__ import annotations

import io
import json
import os
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal, NamedTuple

import orjson

from data_prep.corpus import BINARY_FILE, EMPTY_FILE, Piece, arrow_reader, open_hub, parquet_file
from slm.errors import UserError

_BATCH_ROWS, _BATCH_BYTES = 256, 1 << 28  # of Parquet, read at once
_HUB_ROWS = 64  # read at once; what is buffered when the data break is lost
_LONG_TEXT = 1 << 14  # bytes of the documents that a named text file is cut into
_BOM = b"\xef\xbb\xbf"
DEFAULT_MAX_DOC_BYTES = 64 << 20

# Why a record is no document. The harmless ones are ordinary in healthy corpora and not held against them.
BLANK_LINE = "blank line"
HARMLESS = {BLANK_LINE, EMPTY_FILE, BINARY_FILE}
NOT_UTF8, LONE_SURROGATE, BROKEN_JSON = "not UTF-8", "lone surrogate", "broken JSON"
NO_OBJECT, NO_FIELD, NOT_TEXT = "not a JSON object", "no such field", "field is not a string"
EMPTY, TOO_LONG, UNREADABLE = "empty document", "document too long", "cannot be read"
TRUNCATED = "compressed data broken or cut off: the rest of the file is lost"
CORRUPT_ROW = "row in a corrupt part of a table"
BROKEN_SHARD = "broken data: the rest of the shard is lost"

OnBad = Literal["skip", "replace", "fail"]


@dataclass(frozen=True)
class Reading:
    """text_key: the field or column with the text. on_bad: "replace" puts U+FFFD where bytes are no text. A document of
    more than max_doc_bytes is rejected, so that memory stays bounded whatever the input."""

    text_key: str = "text"
    on_bad: OnBad = "skip"
    max_doc_bytes: int = DEFAULT_MAX_DOC_BYTES


class Record(NamedTuple):
    """A document, or the reason why there is none here (both where characters were replaced).

    line: lines or rows of the piece up to this one, from 1; 0 for a text file. at: where it begins: byte of plain JSON
    lines, line of compressed ones (from 0), row of a table or of a shard, byte of a text.
    """

    text: str | None
    problem: str
    line: int
    at: int


def read_piece(piece: Piece, reading: Reading) -> Iterator[Record]:
    """One record for each line of JSON lines that begins in the piece, each row of a table, each file of text.

    Raises UserError if the file changed since it was found, or cannot be read.
    """
    file = piece.file
    if file.kind == "hub":
        yield from _hub_records(piece, reading)
        return
    try:
        _check_unchanged(piece)
        if file.kind == "parquet":
            yield from _parquet_records(piece, reading)
        elif file.kind == "arrow":
            yield from _arrow_records(piece, reading)
        elif file.compression:
            yield from _compressed_records(piece, reading)
        elif file.kind == "jsonl":
            with open(file.path, "rb", buffering=1 << 20) as stream:
                yield from _json_records(stream, piece, reading)
        else:
            with open(file.path, "rb") as stream:
                yield from _text_records(stream, file.kind, reading)
        _check_unchanged(piece)
    except OSError as error:
        if file.kind != "tree":
            raise UserError(
                f"the input {file.path} cannot be read: {error.strerror or error}", fix="mend the file or leave it out"
            ) from None
        yield Record(None, UNREADABLE, 0, 0)


def _check_unchanged(piece: Piece) -> None:
    stat = os.stat(piece.file.path)
    if (stat.st_size, stat.st_mtime_ns) != (piece.file.size, piece.file.mtime_ns):
        raise _changed(piece.file.path)


def _changed(path: str) -> UserError:
    return UserError(
        f"the input {path} changed while it was being read: its shards would be a mixture",
        fix="start again with a new output folder, when the file is at rest",
    )


# --- where a record is ---------------------------------------------------------------------------------------


def place(path: str, kind: str, compression: str, start: int, at: int, *, as_it_was: bool = True) -> str:
    """Where in its file a record begins: "line 5", "row 5", "shard 0, row 5"; "" for a file that is one document.

    start: of its piece. as_it_was: whether the file is still the one that was read; its lines can be counted then, else it
    is "byte 99" of what is plain. Lines and rows from 1, bytes and shards from 0.
    """
    if kind == "tree":
        return ""
    if kind in ("parquet", "arrow", "hub"):
        return f"shard {start}, row {at + 1}" if kind == "hub" else f"row {at + 1}"
    if kind == "jsonl" and compression:
        return f"line {at + 1}"
    line = _line_at(path, compression, at) if as_it_was else 0
    return f"line {line}" if line else f"byte {at}"


def _line_at(path: str, compression: str, byte: int) -> int:
    """The line, from 1, that this byte of the text is in; 0 if the file cannot be read."""
    import pyarrow

    lines = 1
    try:
        with pyarrow.CompressedInputStream(path, compression) if compression else open(path, "rb") as file:
            while byte > 0 and (data := file.read(min(byte, 1 << 22))):
                lines += data.count(b"\n")
                byte -= len(data)
    except OSError:
        return 0
    return lines


# --- text ----------------------------------------------------------------------------------------------------


def _text_records(file: BinaryIO, kind: str, reading: Reading) -> Iterator[Record]:
    """A file found in a folder is one document; one that the user named is cut into several."""
    if kind == "text":
        for at, part in split_text(file):
            yield _text_file_record(part if at else part.removeprefix(_BOM), NOT_UTF8, EMPTY, reading, at)
        return
    data = file.read(reading.max_doc_bytes + 1)
    if len(data) > reading.max_doc_bytes:
        yield Record(None, TOO_LONG, 0, 0)
    else:
        yield _text_file_record(data.removeprefix(_BOM), BINARY_FILE, EMPTY_FILE, reading, 0)


def _text_file_record(data: bytes, if_binary: str, if_empty: str, reading: Reading, at: int) -> Record:
    if b"\0" in data:
        return Record(None, if_binary, 0, at)
    problem = ""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        if reading.on_bad != "replace":
            return Record(None, NOT_UTF8, 0, at)
        text, problem = data.decode(errors="replace"), NOT_UTF8
    return Record(text, problem, 0, at) if text.strip() else Record(None, if_empty, 0, at)


def split_text(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """(start, part). A named file of text is often a whole corpus in one: it is cut into documents of about _LONG_TEXT
    bytes, at blank lines where there are some, else at line ends, so that a part can be held out. White space alone is
    no part, unless there is nothing else."""
    buffer, start, end_of_file, found = b"", 0, False, False
    while True:
        while len(buffer) <= 2 * _LONG_TEXT and not end_of_file:
            more = file.read(1 << 17)
            buffer, end_of_file = buffer + more, not more
        end = len(buffer)
        if end > 2 * _LONG_TEXT:
            end = buffer.find(b"\n\n", _LONG_TEXT, 2 * _LONG_TEXT) + 2
            end = end if end > 1 else buffer.find(b"\n", _LONG_TEXT, 2 * _LONG_TEXT) + 1
            if not end:  # no line ends: between two characters
                end = 2 * _LONG_TEXT
                while end > _LONG_TEXT and buffer[end] & 0xC0 == 0x80:
                    end -= 1
        part, buffer = buffer[:end], buffer[end:]
        if part.strip() or (not buffer and end_of_file and not found):
            found = True
            yield start, part
        start += end
        if not buffer and end_of_file:
            return


# --- JSON lines ----------------------------------------------------------------------------------------------


def _json_records(file: BinaryIO, piece: Piece, reading: Reading) -> Iterator[Record]:
    at = piece.start
    if at:  # the line that the cut went through belongs to the piece before; a cut right after "\n" loses nothing
        file.seek(at - 1)
        at += _skip_line(file) - 1
    line = 0
    while at < piece.end and (data := file.readline(reading.max_doc_bytes)):
        line += 1
        start = at
        at += len(data)
        if len(data) == reading.max_doc_bytes and not data.endswith(b"\n") and (more := _skip_line(file)):
            at += more
            yield Record(None, TOO_LONG, line, start)
        else:
            yield _json_record(data if start else data.removeprefix(_BOM), reading, line, start)


def _skip_line(file: BinaryIO) -> int:
    """Reads to the end of the line, holding little of it; its bytes."""
    skipped = 0
    while part := file.readline(1 << 20):
        skipped += len(part)
        if part.endswith(b"\n"):
            break
    return skipped


def _json_record(data: bytes, reading: Reading, line: int, at: int) -> Record:
    problem = ""
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError:
        if not data.strip():
            return Record(None, BLANK_LINE, line, at)
        value, problem = _parsed_with_care(data)
        if problem in (BROKEN_JSON, NOT_UTF8) and (value is None or reading.on_bad != "replace"):
            return Record(None, problem, line, at)
    if not isinstance(value, dict):
        return Record(None, NO_OBJECT, line, at)
    if reading.text_key not in value:
        return Record(None, NO_FIELD, line, at)
    return _text_record(value[reading.text_key], reading, line, at, problem)


def _parsed_with_care(data: bytes) -> tuple[Any, str]:
    """(value or None, problem) of what orjson refuses: bytes that are no UTF-8, lone surrogates, NaN, or real nonsense."""
    problem = ""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        text, problem = data.decode(errors="replace"), NOT_UTF8
    try:
        return json.loads(text), problem  # Python's own takes NaN, and surrogates, which _text_record looks for
    except (ValueError, RecursionError):
        return None, problem or BROKEN_JSON


def _text_record(text: Any, reading: Reading, line: int, at: int, problem: str = "") -> Record:
    if not isinstance(text, str):
        return Record(None, NOT_TEXT, line, at)
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            if reading.on_bad != "replace":
                return Record(None, LONE_SURROGATE, line, at)
            text, problem = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"), LONE_SURROGATE
    if not text or text.isspace():
        return Record(None, EMPTY, line, at)
    return Record(text, problem, line, at)


# --- compressed files ----------------------------------------------------------------------------------------


def _compressed_records(piece: Piece, reading: Reading) -> Iterator[Record]:
    import pyarrow

    file = piece.file
    line = 0
    raw = pyarrow.CompressedInputStream(pyarrow.OSFile(file.path), file.compression)
    with io.BufferedReader(raw, 1 << 16) as stream:  # what is buffered when the data end too early is lost
        try:
            if file.kind == "jsonl":
                while data := stream.readline(reading.max_doc_bytes):
                    line += 1
                    if len(data) == reading.max_doc_bytes and not data.endswith(b"\n") and _skip_line(stream):
                        yield Record(None, TOO_LONG, line, line - 1)
                    else:
                        yield _json_record(data.removeprefix(_BOM) if line == 1 else data, reading, line, line - 1)
            else:
                yield from _text_records(stream, file.kind, reading)
        except OSError:  # the file itself was opened; what is in it is not whole
            yield Record(None, TRUNCATED, line + 1, line)


# --- tables --------------------------------------------------------------------------------------------------


def _parquet_records(piece: Piece, reading: Reading) -> Iterator[Record]:
    import pyarrow

    table = parquet_file(piece.file.path)
    groups = [table.metadata.row_group(i).num_rows for i in range(piece.end)]
    line = 0
    for index in range(piece.start, piece.end):
        first, done = sum(groups[:index]), 0
        try:
            rows = _rows_at_once(table.metadata.row_group(index), table.schema_arrow.names.index(reading.text_key))
            for batch in table.iter_batches(rows, row_groups=[index], columns=[reading.text_key], use_threads=False):
                for record in _row_records(batch.column(0), reading, line, first + done):
                    line, done = record.line, done + 1
                    yield record
        except (pyarrow.ArrowException, OSError):
            for row in range(done, groups[index]):
                line += 1
                yield Record(None, CORRUPT_ROW, line, first + row)


def _rows_at_once(group: Any, index: int) -> int:
    """Rows of a batch, so that it stays within _BATCH_BYTES whatever the file says: by a dictionary, a few bytes can be a long
    text in every row. How large one is when unpacked is not told; a text is no larger than its column, or, where that is
    packed as texts are, than some 50 times the packed dictionary."""
    if group.num_columns <= index:  # nested columns before it: the index is not the column's
        return 1
    column = group.column(index)
    if not column.has_dictionary_page:  # each row's text stands there
        return _BATCH_ROWS
    longest = column.total_uncompressed_size
    if longest < 50 * column.total_compressed_size:
        longest = min(longest, 50 * max(1, column.data_page_offset - column.dictionary_page_offset))
    return max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(1, longest)))


def _arrow_records(piece: Piece, reading: Reading) -> Iterator[Record]:
    import pyarrow

    line = 0
    try:
        names, batches = arrow_reader(piece.file.path)
        column = names.index(reading.text_key)
        for batch in batches:
            for record in _row_records(batch.column(column), reading, line, line):
                line = record.line
                yield record
    except (pyarrow.ArrowException, OSError):
        yield Record(None, TRUNCATED, line + 1, line)


def _row_records(column: Any, reading: Reading, line: int, row: int) -> Iterator[Record]:
    """line, row: of the ones before the first here."""
    import pyarrow

    types = pyarrow.types
    indices = None
    if types.is_dictionary(column.type):  # decoded row by row: one long text may be that of every row
        indices, column = column.indices, column.dictionary
    is_text = types.is_string(column.type) or types.is_large_string(column.type) or types.is_string_view(column.type)
    values = column.cast(pyarrow.large_binary()) if is_text else column  # as bytes: they need not be UTF-8
    is_json = str(column.type) == "extension<arrow.json>"  # what datasets makes of a column of several types
    for i in range(len(values if indices is None else indices)):
        at = i if indices is None else indices[i].as_py()
        found, problem = None if at is None else values[at], ""
        if is_text and found is not None and found.is_valid:
            if found.as_buffer().size > reading.max_doc_bytes:  # not copied first: it may be of any size
                yield Record(None, TOO_LONG, line + i + 1, row + i)
                continue
        value = None if found is None else found.as_py()
        if is_json and value is not None:
            with suppress(ValueError):  # it leaves the first value of a file as it is
                value = json.loads(value)
        if is_text and value is not None:
            try:
                value = value.decode()
            except UnicodeDecodeError:
                if reading.on_bad != "replace":
                    yield Record(None, NOT_UTF8, line + i + 1, row + i)
                    continue
                value, problem = value.decode(errors="replace"), NOT_UTF8
        yield _text_record(value, reading, line + i + 1, row + i, problem)


def _hub_records(piece: Piece, reading: Reading) -> Iterator[Record]:
    import pyarrow

    dataset, now = open_hub(piece.file.path)
    if now != piece.file:
        raise _changed(piece.file.path)
    shard = dataset.shard(num_shards=piece.file.size, index=piece.start)
    line = 0
    try:
        for table in shard.with_format("arrow").iter(_HUB_ROWS):  # Arrow: a row that is no text does not end the shard
            if reading.text_key not in table.column_names:
                for _ in range(len(table)):
                    line += 1
                    yield Record(None, NO_FIELD, line, line - 1)
                continue
            for column in table.column(reading.text_key).chunks:
                yield from _row_records(column, reading, line, line)
                line += len(column)
    except Exception as error:
        # What the parsers say of broken data. All else is the network's, and no reason to lose a document.
        is_arrows = type(error) is OSError and error.errno is None
        if is_arrows or isinstance(error, (pyarrow.ArrowException, ValueError, EOFError, zlib.error)):
            yield Record(None, BROKEN_SHARD, line + 1, line)
            return
        first = (str(error).strip() or "no reason given").splitlines()[0]
        raise UserError(
            f"the input {piece.file.path} cannot be read: {type(error).__name__}: {first}",
            fix="check the network; the same command goes on",
        ) from None
