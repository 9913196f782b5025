"""Learning a tokenizer from a corpus: which part of it is read, and where the result goes.

Owns the choice of text and the output folder; the learning is slm/tokenizer.py's. Of a corpus with more text than max_bytes,
evenly spread pieces are read, so that every input is heard in its proportion.

    make_tokenizer(["corpus.jsonl"], Path("tokenizer"), vocab_size=8192)
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.corpus import Piece, cut, find_files, sample, text_bytes
from data_prep.job import describe_job, is_same_job, os_errors_told, write_job
from data_prep.progress import byte_progress
from data_prep.reading import HARMLESS, Reading, read_piece
from slm.errors import UserError

if TYPE_CHECKING:
    from slm.tokenizer import SLMTokenizer

_PIECE_BYTES = 1 << 20


def make_tokenizer(
    inputs: Sequence[str | Path],
    output: Path,
    *,
    vocab_size: int,
    kind: str = "bpe",
    max_bytes: int = 200_000_000,
    text_key: str = "text",
    max_bad_fraction: float = 0.01,
) -> tuple[SLMTokenizer, int]:
    """Writes the tokenizer into output; (it, bytes of text read: 0 if it was there already). Raises UserError."""
    from slm.tokenizer import SLMTokenizer

    if max_bytes < 1:
        raise UserError(f"--max-bytes is {max_bytes}: no text would be read", fix="give a size such as 200M")
    output = Path(os.path.abspath(output))
    files, _ = find_files(inputs, os.path.realpath(output), text_key)
    job = describe_job("tokenizer", files, vocab_size=vocab_size, kind=kind, max_bytes=max_bytes, text_key=text_key)
    if is_same_job(output, job):
        return SLMTokenizer.from_pretrained(output), 0
    if output.is_dir() and any(output.iterdir()):  # only hidden files: others were refused above
        raise UserError(
            f"{output} holds hidden files, and a tokenizer's folder is put in place as a whole",
            fix="choose another --output folder, or remove this one",
        )
    pieces = sample([piece._replace(size=text_bytes(piece)) for piece in cut(files, _PIECE_BYTES)], max_bytes)
    num_bytes = 0

    def texts(advance: Callable[[int], None]) -> Iterator[str]:
        nonlocal num_bytes
        for text in _documents(pieces, text_key, max_bad_fraction, advance):
            num_bytes += _utf8_bytes(text)
            yield text

    # Made beside the output and renamed: it is there whole or not at all.
    staging = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        write_job(staging, job)  # before the long part, so that a folder that cannot be written is told now
        with byte_progress("reading", sum(min(piece.size, limit) for piece, limit in pieces)) as advance:
            tokenizer = SLMTokenizer().train(texts(advance), vocab_size=vocab_size, kind=kind)
        with os_errors_told(output, "the same command begins anew"):
            tokenizer.save_pretrained(staging)
            os.replace(staging, output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return tokenizer, num_bytes


def _utf8_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _documents(
    pieces: Sequence[tuple[Piece, int]], text_key: str, max_bad_fraction: float, advance: Callable[[int], None]
) -> Iterator[str]:
    """Of each piece as much text as its share, and what earlier ones left of theirs; one document in any case."""
    num_docs = num_bad = room = 0
    first = ""
    for piece, limit in pieces:
        room += limit
        for record in read_piece(piece, Reading(text_key)):
            if record.text is not None:
                size = _utf8_bytes(record.text)
                if size > room and num_docs:
                    break
                room -= size
                num_docs += 1
                yield record.text
            elif record.problem not in HARMLESS and piece.file.kind != "tree":  # shards.py will weigh those
                num_bad += 1
                first = first or f"{piece.file.path}: {record.problem}"
        advance(min(piece.size, limit))
    if num_bad > max_bad_fraction * (num_bad + num_docs):
        raise UserError(
            f"{num_bad:,} of {num_bad + num_docs:,} documents cannot be used, the first in {first}",
            fix="mend the input, name the field with the text by --text-key, or raise --max-bad-fraction",
        )
