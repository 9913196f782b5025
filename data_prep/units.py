"""One unit of work: a fixed part of the corpus becomes one shard of each split, and a report; the worker processes and threads.

Owns what is done to a unit and by whom on this machine; which units there are is shards.py's, who takes which claims.py's.
A unit depends on nothing but the corpus and the settings, so any number of workers gives the same bytes. Its report,
units/NNNNN.json, is its last file: a unit without one is done again.

    report = encode_unit(tokenizer, settings, index, pieces, threading.Event())
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import threading
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_prep.corpus import Piece, shown
from data_prep.duplicates import HASH_BYTES, dropped_path, hashes_path
from data_prep.reading import HARMLESS, Reading, Record, place, read_piece
from slm.data.tokens import ShardWriter
from slm.errors import UserError
from slm.runtime import atomic_write

if TYPE_CHECKING:
    from slm.tokenizer import SLMTokenizer

SPLITS = ("train", "validation")
UNITS = "units"
_BATCH_BYTES = 1 << 20  # text handed to the tokenizer at once
_EXAMPLES_PER_UNIT = 5


@dataclass(frozen=True)
class Settings:
    """What each worker needs to know. min_tokens, max_tokens: of a document, BOS and EOS included; others are left out."""

    output: Path
    tokenizer: str
    validation_fraction: float
    reading: Reading
    min_tokens: int = 0
    max_tokens: int | None = None
    deduplicate: bool = False
    fast: bool = False  # with SLMTokenizer.use_fast_engine

    @property
    def units(self) -> Path:
        return self.output / UNITS


class Split:
    """What a unit's shard of one split is made of; no file before the first document."""

    def __init__(self, folder: Path, name: str, tokenizer: SLMTokenizer, stack: ExitStack) -> None:
        self._folder, self._name, self._vocab_size, self._stack = folder, name, len(tokenizer), stack
        # Of each document (no BOS where the tokenizer has none).
        self._before = np.array([] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id], dtype=np.int32)
        self._after = np.array([tokenizer.eos_token_id], dtype=np.int32)
        self.num_added = len(self._before) + len(self._after)
        self.writer: ShardWriter | None = None
        self.text_bytes = 0
        self._parts: list[np.ndarray] = []  # of documents that are not written yet
        self._doc_tokens: list[int] = []
        self._origins = array("q")  # two numbers a document

    def add(self, ids: np.ndarray, text_bytes: int, origin: tuple[int, int]) -> None:
        """ids: without BOS and EOS. origin: (which piece of the unit, where in it)."""
        self._parts += (self._before, ids, self._after)
        self._doc_tokens.append(len(ids) + self.num_added)
        self.text_bytes += text_bytes
        self._origins.extend(origin)

    def write(self) -> None:
        """What was added: many documents at once, for each call of numpy costs as much as the copying of a short one."""
        if not self._parts:
            return
        if self.writer is None:
            self.writer = self._stack.enter_context(ShardWriter(self._folder, self._name, vocab_size=self._vocab_size))
        self.writer.add_many(np.concatenate(self._parts), self._doc_tokens)
        self._parts, self._doc_tokens = [], []

    def report(self, pieces: Sequence[Piece], engine: str) -> dict[str, Any] | None:
        """Writes NAME.src, int64 [num_docs, 2], so that a document can be traced to its line; the shard's entry."""
        if self.writer is None:
            return None
        origins = np.array(self._origins, dtype="<i8").tobytes()
        atomic_write(self._folder / f"{self._name}.src", origins)
        sources = [
            {
                "path": shown(p.file.path),
                "kind": p.file.kind,
                "compression": p.file.compression,
                "size": p.file.size,
                "mtime_ns": p.file.mtime_ns,
                "start": p.start,
                "end": p.end,
            }
            for p in pieces
        ]
        entry = {
            **self.writer.entry,
            "src_bytes": len(origins),
            "sha256_src": hashlib.sha256(origins).hexdigest(),
            "engine": engine,  # a run that goes on may have another
            "sources": sources,
        }
        return {
            "shard": entry,
            "text_bytes": self.text_bytes,
            "length_histogram": length_histogram(np.array(self.writer.doc_tokens)),
        }


def length_histogram(doc_tokens: np.ndarray) -> dict[str, list[int]]:
    """[documents, tokens] by the power of two at or below a document's tokens."""
    powers = np.frexp(doc_tokens)[1] - 1  # exact: a float64 holds these lengths
    docs, tokens = np.bincount(powers), np.bincount(powers, weights=doc_tokens)
    return {str(1 << power): [int(docs[power]), int(tokens[power])] for power in np.flatnonzero(docs).tolist()}


class Stopped(Exception):
    """Another thread has failed, or Ctrl-C was heard: what is under way is left, and done again another time."""


class _Reader:
    """A unit's records, counted: documents out, and the others by reason."""

    def __init__(self, settings: Settings, pieces: Sequence[Piece], stop: threading.Event) -> None:
        self._settings, self._pieces, self._stop = settings, pieces, stop
        self.num_read = self.bad_tree_files = self.bad_tree_bytes = 0
        self.rejected: Counter[str] = Counter()
        self.replaced: Counter[str] = Counter()
        self.examples: list[list[Any]] = []
        self.lines: list[list[Any]] = []

    def documents(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """(text, (index of its piece, where in it))."""
        for index, piece in enumerate(self._pieces):
            line = 0
            for record in read_piece(piece, self._settings.reading):
                if self._stop.is_set():
                    raise Stopped
                line = record.line
                self.num_read += 1
                if record.problem:
                    self._note(record, piece)
                if record.text is not None:
                    yield record.text, (index, record.at)
            self.lines.append([piece.file.path, line])

    def _note(self, record: Record, piece: Piece) -> None:
        (self.rejected if record.text is None else self.replaced)[record.problem] += 1
        if record.problem in HARMLESS:
            return
        if self._settings.reading.on_bad == "fail":
            file = piece.file
            where = place(file.path, file.kind, file.compression, piece.start, record.at)
            raise UserError(
                f"{', '.join(filter(None, [shown(file.path), where]))}: {record.problem}",
                fix="mend the input, or give --on-bad skip",
            )
        if len(self.examples) < _EXAMPLES_PER_UNIT:
            self.examples.append([len(self.lines), record.line, record.problem])
        if piece.file.kind == "tree" and record.text is None:
            self.bad_tree_files, self.bad_tree_bytes = self.bad_tree_files + 1, self.bad_tree_bytes + piece.file.size


def encode_unit(
    tokenizer: SLMTokenizer, settings: Settings, index: int, pieces: Sequence[Piece], stop: threading.Event
) -> dict[str, Any]:
    """Writes the shards of one unit and, last, its report, which it returns. Raises Stopped soon after stop is set."""
    reader = _Reader(settings, pieces, stop)
    name = f"shard-{index:05d}"
    for split in SPLITS:  # of a worker that was killed here
        for leftover in (settings.output / split).glob(f".{name}.*.tmp"):
            leftover.unlink(missing_ok=True)
    dropped = set(np.fromfile(dropped_path(settings.units, index), "<i8").tolist()) if settings.deduplicate else set()
    filtered: Counter[str] = Counter()
    num_duplicates = number = 0
    with ExitStack() as stack:
        train, validation = (Split(settings.output / s, name, tokenizer, stack) for s in SPLITS)
        for batch in _batches(reader.documents()):
            for ids, (text, origin) in zip(tokenizer.encode_batch([text for text, _ in batch]), batch, strict=True):
                number += 1
                num_tokens = len(ids) + train.num_added
                if number - 1 in dropped:
                    num_duplicates += 1
                elif num_tokens < settings.min_tokens:
                    filtered[f"fewer than {settings.min_tokens} tokens"] += 1
                elif settings.max_tokens is not None and num_tokens > settings.max_tokens:
                    filtered[f"more than {settings.max_tokens} tokens"] += 1
                else:
                    data = text.encode()
                    held_out = is_validation(data, settings.validation_fraction)
                    (validation if held_out else train).add(ids, len(data), origin)
            train.write()
            validation.write()
    # Examples name their place in `lines`: how many lines of the file came before is known when all units are.
    report: dict[str, Any] = {
        "splits": {
            s: split.report(pieces, tokenizer.info()["engine"])
            for s, split in zip(SPLITS, (train, validation), strict=True)
        },
        "read": reader.num_read,
        "rejected": dict(sorted(reader.rejected.items())),
        "replaced": dict(sorted(reader.replaced.items())),
        "filtered": dict(sorted(filtered.items())),
        "duplicates": num_duplicates,
        "bad_tree": [reader.bad_tree_files, reader.bad_tree_bytes],
        "examples": reader.examples,
        "lines": reader.lines,
    }
    kept = sum(part["shard"]["num_docs"] for part in report["splits"].values() if part)
    lost = sum(reader.rejected.values()) + sum(filtered.values()) + num_duplicates
    assert reader.num_read == kept + lost, "documents in = documents out + counted rejects"
    atomic_write(report_path(settings.units, index), json.dumps(report) + "\n")
    return report


def hash_unit(settings: Settings, index: int, pieces: Sequence[Piece], stop: threading.Event) -> None:
    """Writes the hashes of a unit's documents, in order, for finding duplicates before anything is encoded."""
    reader = _Reader(settings, pieces, stop)
    digests = (hashlib.sha256(text.encode()).digest()[:HASH_BYTES] for text, _ in reader.documents())
    atomic_write(hashes_path(settings.units, index), b"".join(digests))


def is_validation(text: bytes, fraction: float) -> bool:
    """Decided by the text's SHA-256: copies of a document are on the same side, in any order and any run."""
    return fraction > 0 and int.from_bytes(hashlib.sha256(text).digest()[:8], "big") < fraction * 2.0**64


def _batches(documents: Iterable[tuple[str, tuple[int, int]]]) -> Iterator[list[tuple[str, tuple[int, int]]]]:
    batch, room = [], _BATCH_BYTES
    for text, origin in documents:
        batch.append((text, origin))
        room -= len(text)
        if room <= 0:
            yield batch
            batch, room = [], _BATCH_BYTES
    if batch:
        yield batch


def report_path(units: Path, index: int) -> Path:
    return units / f"{index:05d}.json"


def earlier_report(settings: Settings, index: int) -> dict[str, Any] | None:
    """The report of a unit that is finished, if its shards are there."""
    try:
        report = json.loads(report_path(settings.units, index).read_text())
        for split in SPLITS:
            if (part := report["splits"][split]) is not None:
                shard = part["shard"]
                for suffix in ("bin", "idx", "src"):
                    path = settings.output / split / f"{shard['name']}.{suffix}"
                    if path.stat().st_size != shard[f"{suffix}_bytes"]:
                        return None
        return report
    except (OSError, ValueError, KeyError, TypeError):
        return None


# --- worker processes and threads --------------------------------------------------------------------------------


class Pool:
    """Worker processes of this machine; or threads of this process; or neither: the work is then done when it is submitted."""

    def __init__(self, settings: Settings, tokenizer: SLMTokenizer, processes: int, threads: int) -> None:
        self.workers, self._settings, self._tokenizer = max(processes, threads), settings, tokenizer
        self._before = set(multiprocessing.active_children())
        self._stop = threading.Event()
        self._pool: Executor | None = None
        if processes > 1:
            # spawn, not fork: the tokenizers' own threads do not survive a fork.
            context = multiprocessing.get_context("spawn")
            # Byte-level BPE is sent, which takes a tenth of the time of reading its file; a user's class may not be sendable.
            sent = tokenizer if tokenizer.kind == "bpe" else None
            self._pool = ProcessPoolExecutor(processes, context, initializer=_start_worker, initargs=(settings, sent))
        elif threads > 1:
            self._pool = ThreadPoolExecutor(threads, "units")

    def submit(self, stage: str, index: int, pieces: Sequence[Piece]) -> Future[Any]:
        if isinstance(self._pool, ProcessPoolExecutor):
            return self._pool.submit(_work, stage, index, pieces)
        here = (self._tokenizer, self._settings, stage, index, pieces, self._stop)
        if self._pool is not None:
            return self._pool.submit(_do, *here)
        future: Future[Any] = Future()
        future.set_result(_do(*here))
        return future

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._pool is None:
            return
        if kind is not None:  # what is under way is ended, and done again another time
            self._stop.set()
            for child in set(multiprocessing.active_children()) - self._before:
                child.terminate()
        wait = kind is None or isinstance(self._pool, ThreadPoolExecutor)
        self._pool.shutdown(wait=wait, cancel_futures=kind is not None)


def _do(
    tokenizer: SLMTokenizer,
    settings: Settings,
    stage: str,
    index: int,
    pieces: Sequence[Piece],
    stop: threading.Event,
) -> Any:
    if stage == "hash":
        return hash_unit(settings, index, pieces, stop)
    return encode_unit(tokenizer, settings, index, pieces, stop)


_worker: tuple[SLMTokenizer, Settings] | None = None  # of a worker process


def _start_worker(settings: Settings, tokenizer: SLMTokenizer | None) -> None:
    global _worker
    import signal

    from slm.tokenizer import load_tokenizer

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to hear; it ends the others
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the cores are taken by the other workers
    os.environ["RAYON_NUM_THREADS"] = "1"
    threading.Thread(target=_die_with_parent, daemon=True).start()
    if tokenizer is None:
        tokenizer = load_tokenizer(settings.tokenizer)
    if settings.fast:
        tokenizer.use_fast_engine()
    _worker = (tokenizer, settings)


def _die_with_parent() -> None:
    """A worker whose main process was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _work(stage: str, index: int, pieces: Sequence[Piece]) -> Any:
    assert _worker is not None
    return _do(*_worker, stage, index, pieces, threading.Event())
