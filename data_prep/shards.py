"""From a corpus to token shards: encode, split off validation, write; go on after a kill; same bytes on any machine.

Owns the units of work and what is recorded about them. A unit is a fixed part of the corpus and becomes one shard of
each split, so nothing depends on the number of processes; units/NNNNN.json is its last file, so a unit without one
is done again. The datasets' manifests come last. The bytes are slm/data/tokens.py's, the documents corpus.py's.

    result = make_shards(["corpus.jsonl"], "tokenizer", Path("data/mine"), processes=8)
    result.splits["train"]["num_tokens"]
"""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_prep.corpus import HARMLESS, NO_FIELD, Piece, cut, find_files, group, human_bytes, read_piece, shown
from data_prep.job import describe_job, is_same_job, remove_job, write_job
from data_prep.progress import byte_progress
from slm.data.tokens import MANIFEST, ShardWriter, TokenDataset, write_manifest
from slm.errors import EnvironmentProblem, UserError
from slm.runtime import RunLock, atomic_write

if TYPE_CHECKING:
    from slm.tokenizer import SLMTokenizer

SPLITS = ("train", "validation")
UNITS = "units"
_BATCH_BYTES = 1 << 20  # text handed to the tokenizer at once
_EXAMPLES_PER_UNIT = 5
_EXAMPLES_SHOWN = 10
# Units are 1/256 of the corpus, so that many cores have work and a kill costs little, within these bounds: smaller
# ones cost more to start than to encode, and at most a few thousand files of a terabyte are pleasant to hold.
_SMALLEST_UNIT_BYTES, _LARGEST_UNIT_BYTES = 1 << 21, 1 << 28


@dataclass(frozen=True)
class Settings:
    """What each worker needs to know."""

    output: Path
    tokenizer: str
    validation_fraction: float
    text_key: str


@dataclass
class Result:
    """splits: the manifests. already: nothing was left to do."""

    output: Path
    splits: dict[str, dict[str, Any]]
    already: bool = False


def make_shards(
    inputs: Sequence[str | Path],
    tokenizer: str,
    output: Path,
    *,
    validation_fraction: float = 0.02,
    processes: int | None = None,
    text_key: str = "text",
    max_bad_fraction: float = 0.01,
    shard_bytes: int | None = None,
) -> Result:
    """Writes output/train and output/validation, each a TokenDataset. The same call goes on with what was begun.

    processes: None for one a core. shard_bytes: text that goes into one shard; None chooses by the corpus.
    Raises UserError, also when more than max_bad_fraction of the documents are none (then there is no manifest).
    """
    _check(validation_fraction, processes, max_bad_fraction, shard_bytes)
    files, skipped = find_files(inputs, exclude=os.path.realpath(output))
    total_bytes = sum(file.size for file in files)
    unit_bytes = shard_bytes or min(max(total_bytes // 256, _SMALLEST_UNIT_BYTES), _LARGEST_UNIT_BYTES)
    loaded, info = _load(tokenizer)
    job = describe_job(
        "shards",
        files,
        tokenizer_fingerprint=info["fingerprint"],
        validation_fraction=validation_fraction,
        text_key=text_key,
        shard_bytes=unit_bytes,
    )
    if not is_same_job(output, job):
        write_job(output, job)
    elif (output / SPLITS[0] / MANIFEST).is_file():
        return _finished(output)
    settings = Settings(output, tokenizer, validation_fraction, text_key)
    units = group(cut(files, unit_bytes), unit_bytes)
    (output / UNITS).mkdir(exist_ok=True)
    with RunLock(output / UNITS):
        if (output / SPLITS[0] / MANIFEST).is_file():  # another process finished between the two looks
            return _finished(output)
        _remove_temporaries(output)
        try:
            reports = _encode_all(settings, units, loaded, _processes(processes), max_bad_fraction)
            described = [{"path": shown(os.path.abspath(path))} for path in inputs]
            result = _write_manifests(output, reports, info, described, skipped, validation_fraction, max_bad_fraction)
        except _NothingToKeep:
            _discard(output)  # the corrected command may then write into the same folder
            raise
    shutil.rmtree(output / UNITS, ignore_errors=True)
    return result


class _NothingToKeep(UserError):
    """A mistake under which no unit is of any use to the corrected command."""


def _discard(output: Path) -> None:
    for name in (*SPLITS, UNITS):
        shutil.rmtree(output / name, ignore_errors=True)
    remove_job(output)


def _check(validation_fraction: float, processes: int | None, max_bad: float, shard_bytes: int | None) -> None:
    if not 0 <= validation_fraction < 1:
        raise UserError(
            f"--validation-fraction is {validation_fraction}: it is no share", fix="give 0 to 0.99, such as 0.02"
        )
    if not 0 <= max_bad <= 1:
        raise UserError(f"--max-bad-fraction is {max_bad}: it is no share", fix="give 0 to 1, such as 0.01")
    if processes is not None and processes < 1:
        raise UserError(f"--processes is {processes}: nobody would do the work", fix="give 1 or more")
    if shard_bytes is not None and shard_bytes < 1:
        raise UserError(f"--shard-bytes is {shard_bytes}: shards would be empty", fix="give a size such as 64M")


def _processes(wanted: int | None) -> int:
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return wanted or available


def _load(spec: str) -> tuple[SLMTokenizer, dict[str, Any]]:
    from slm.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(spec)
    info = {**tokenizer.info(), "spec": str(spec)}
    if info["eos_id"] is None:
        raise UserError(
            f"the tokenizer {spec} has no end-of-text token (eos_token_id): documents could not be told apart",
            fix="use a tokenizer with one, or add it to the class or to tokenizer_config.json",
        )
    return tokenizer, info


# --- one unit ------------------------------------------------------------------------------------------------


class _Split:
    """What a unit's shard of one split is made of; no file before the first document."""

    def __init__(self, folder: Path, name: str, vocab_size: int, stack: ExitStack) -> None:
        self._folder, self._name, self._vocab_size, self._stack = folder, name, vocab_size, stack
        self.writer: ShardWriter | None = None
        self.text_bytes = 0
        self.docs: Counter[int] = Counter()  # by the power of two at or below their tokens
        self.tokens: Counter[int] = Counter()

    def add(self, ids: np.ndarray, text_bytes: int) -> None:
        if self.writer is None:
            self.writer = self._stack.enter_context(ShardWriter(self._folder, self._name, vocab_size=self._vocab_size))
        self.writer.add(ids)
        self.text_bytes += text_bytes
        bucket = 1 << (len(ids).bit_length() - 1)
        self.docs[bucket] += 1
        self.tokens[bucket] += len(ids)

    def report(self) -> dict[str, Any] | None:
        if self.writer is None:
            return None
        lengths = {str(b): [self.docs[b], self.tokens[b]] for b in sorted(self.docs)}
        return {"shard": self.writer.entry, "text_bytes": self.text_bytes, "length_histogram": lengths}


def encode_unit(tokenizer: SLMTokenizer, settings: Settings, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
    """Writes the shards of one unit and, last, its report, which it returns."""
    rejected: Counter[str] = Counter()
    examples: list[list[Any]] = []
    lines: list[list[Any]] = []
    bad_tree_files = bad_tree_bytes = 0

    def documents() -> Iterator[str]:
        nonlocal bad_tree_files, bad_tree_bytes
        for piece in pieces:
            line = 0
            for record in read_piece(piece, settings.text_key):
                line = record.line
                if record.text is not None:
                    yield record.text
                    continue
                rejected[record.problem] += 1
                if record.problem in HARMLESS:
                    continue
                if len(examples) < _EXAMPLES_PER_UNIT:
                    examples.append([len(lines), record.line, record.problem])
                if piece.file.kind == "tree":
                    bad_tree_files, bad_tree_bytes = bad_tree_files + 1, bad_tree_bytes + piece.file.size
            lines.append([piece.file.path, line])

    with ExitStack() as stack:
        name = f"shard-{index:05d}"
        splits = {s: _Split(settings.output / s, name, len(tokenizer), stack) for s in SPLITS}
        for texts, sizes, digests in _batches(documents()):
            for ids, size, digest in zip(_encode(tokenizer, texts), sizes, digests, strict=True):
                split = is_validation(digest, settings.validation_fraction)
                splits[SPLITS[split]].add(ids, size)
    # Examples name their place in `lines`: how many lines of the file came before is known when all units are.
    report = {
        "splits": {s: splits[s].report() for s in SPLITS},
        "rejected": dict(sorted(rejected.items())),
        "bad_tree": [bad_tree_files, bad_tree_bytes],
        "examples": examples,
        "lines": lines,
    }
    atomic_write(_report_path(settings.output, index), json.dumps(report) + "\n")
    return report


def is_validation(digest: bytes, fraction: float) -> bool:
    """Decided by the text's SHA-256: copies of a document are on the same side, in any order and any run."""
    return int.from_bytes(digest[:8], "big") < fraction * 2.0**64


def _batches(texts: Iterable[str]) -> Iterator[tuple[list[str], list[int], list[bytes]]]:
    """(texts, their UTF-8 bytes, their SHA-256s), about _BATCH_BYTES together."""
    batch: list[str] = []
    sizes: list[int] = []
    digests: list[bytes] = []
    room = _BATCH_BYTES
    for text in texts:
        data = text.encode()
        batch.append(text)
        sizes.append(len(data))
        digests.append(hashlib.sha256(data).digest())
        room -= len(data)
        if room <= 0:
            yield batch, sizes, digests
            batch, sizes, digests, room = [], [], [], _BATCH_BYTES
    if batch:
        yield batch, sizes, digests


def _encode(tokenizer: SLMTokenizer, texts: list[str]) -> Iterator[np.ndarray]:
    """BOS … EOS for each text (no BOS where the tokenizer has none)."""
    before = np.array([] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id], dtype=np.int32)
    after = np.array([tokenizer.eos_token_id], dtype=np.int32)
    for ids in tokenizer.encode_batch(texts):
        yield np.concatenate([before, ids, after])


# --- all units -----------------------------------------------------------------------------------------------


def _report_path(output: Path, index: int) -> Path:
    return output / UNITS / f"{index:05d}.json"


def _earlier_report(output: Path, index: int) -> dict[str, Any] | None:
    """The report of a unit that an earlier run finished, if its shards are there."""
    try:
        report = json.loads(_report_path(output, index).read_text())
        for split in SPLITS:
            if (part := report["splits"][split]) is not None:
                shard = part["shard"]
                for suffix, key in ((".bin", "bin_bytes"), (".idx", "idx_bytes")):
                    if (output / split / (shard["name"] + suffix)).stat().st_size != shard[key]:
                        return None
        return report
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _remove_temporaries(output: Path) -> None:
    for folder in (*SPLITS, UNITS):
        for path in (output / folder).glob(".*.tmp"):
            path.unlink(missing_ok=True)


def _encode_all(
    settings: Settings, units: list[list[Piece]], tokenizer: SLMTokenizer, processes: int, max_bad_fraction: float
) -> list[dict[str, Any]]:
    reports: dict[int, dict[str, Any]] = {}
    for index in range(len(units)):
        if (report := _earlier_report(settings.output, index)) is not None:
            reports[index] = report
    sizes = [sum(piece.end - piece.start for piece in unit) for unit in units]
    missing = [index for index in range(len(units)) if index not in reports]
    total, done = sum(sizes), sum(sizes[index] for index in reports)
    try:
        with byte_progress("encoding", total, done) as advance:

            def finish(index: int, report: dict[str, Any]) -> None:
                reports[index] = report
                advance(sizes[index])
                _stop_if_all_bad(report, max_bad_fraction)

            if min(processes, len(missing)) > 1:
                _in_processes(settings, units, missing, min(processes, len(missing)), finish)
            else:
                for index in missing:
                    finish(index, encode_unit(tokenizer, settings, index, units[index]))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise EnvironmentProblem(
                f"the disk of {settings.output} is full", fix="make room; the same command goes on"
            ) from None
        raise
    return [reports[index] for index in range(len(units))]


def _in_processes(
    settings: Settings,
    units: list[list[Piece]],
    missing: list[int],
    processes: int,
    finish: Callable[[int, dict[str, Any]], None],
) -> None:
    # spawn, not fork: the tokenizers' own threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_start_worker, initargs=(settings,))
    try:
        futures = {pool.submit(_work, index, units[index]): index for index in missing}
        for future in as_completed(futures):
            finish(futures[future], future.result())
    except BaseException as error:
        for child in set(multiprocessing.active_children()) - before:
            child.terminate()
        pool.shutdown(wait=False, cancel_futures=True)
        if isinstance(error, BrokenProcessPool):
            raise EnvironmentProblem(
                "a worker process died, most likely for want of memory; what is finished is kept",
                fix="give fewer --processes; the same command goes on",
            ) from None
        raise
    pool.shutdown()


_worker: tuple[SLMTokenizer, Settings] | None = None  # of a worker process


def _start_worker(settings: Settings) -> None:
    global _worker
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to hear; it ends the others
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the cores are taken by the other workers
    os.environ["RAYON_NUM_THREADS"] = "1"
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _worker = (_load(settings.tokenizer)[0], settings)


def _die_with_parent() -> None:
    """A worker whose main process was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _work(index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
    assert _worker is not None
    return encode_unit(*_worker, index, pieces)


# --- what came of it -----------------------------------------------------------------------------------------


def _num_docs(report: dict[str, Any]) -> int:
    return sum(part["shard"]["num_docs"] for part in report["splits"].values() if part)


def _bad(rejected: dict[str, int]) -> dict[str, int]:
    return {reason: count for reason, count in rejected.items() if reason not in HARMLESS}


def _bad_fraction(reports: list[dict[str, Any]]) -> float:
    """Of documents; but of bytes where files were found in folders, for source trees have a few small odd ones.

    (The tests of the Python library are 1 % of its files that are on purpose not UTF-8, and 0.1 % of its bytes.)
    """
    tree_files, tree_bytes = (sum(report["bad_tree"][i] for report in reports) for i in (0, 1))
    num_bad = sum(sum(_bad(report["rejected"]).values()) for report in reports) - tree_files
    num_docs = sum(map(_num_docs, reports))
    text_bytes = sum(part["text_bytes"] for report in reports for part in report["splits"].values() if part)
    return max(num_bad / max(1, num_bad + num_docs), tree_bytes / max(1, tree_bytes + text_bytes))


def _stop_if_all_bad(report: dict[str, Any], max_bad_fraction: float) -> None:
    """A wrong --text-key is told after the first unit, not after a night."""
    bad = _bad(report["rejected"])
    if not _num_docs(report) and sum(bad.values()) >= 1000 and max_bad_fraction < 1:
        raise _NothingToKeep(_bad_message(bad, 0, _examples([report]), "in one part "), fix=_bad_fix(bad))


def _bad_message(bad: dict[str, int], num_docs: int, examples: list[str], so_far: str = "") -> str:
    num_bad = sum(bad.values())
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in bad.items())
    first = "".join(f"\n  {example}" for example in examples)
    return f"{so_far}{num_bad:,} of {num_bad + num_docs:,} documents cannot be used ({reasons}), first of all:{first}"


def _bad_fix(bad: dict[str, int]) -> str:
    if NO_FIELD in bad:
        return "name the field with the text by --text-key, mend the input, or raise --max-bad-fraction"
    return "mend the input, or raise --max-bad-fraction to go on without these documents"


def _examples(reports: list[dict[str, Any]]) -> list[str]:
    """The first bad documents as file:line, counted over the pieces that a file was cut into."""
    found = []
    lines_before: Counter[str] = Counter()
    for report in reports:
        firsts = []
        for path, num_lines in report["lines"]:
            firsts.append((path, lines_before[path]))
            lines_before[path] += num_lines
        for place, line, problem in report["examples"]:
            path, before = firsts[place]
            found.append(f"{shown(path)}{f':{before + line}' if line else ''}: {problem}")
            if len(found) == _EXAMPLES_SHOWN:
                return found
    return found


def _write_manifests(
    output: Path,
    reports: list[dict[str, Any]],
    tokenizer: dict[str, Any],
    inputs: list[dict[str, Any]],
    skipped: Counter[str],
    validation_fraction: float,
    max_bad_fraction: float,
) -> Result:
    rejected: Counter[str] = Counter()
    for report in reports:
        rejected.update(report["rejected"])
    bad = dict(sorted(_bad(rejected).items()))
    harmless = skipped + Counter({reason: count for reason, count in rejected.items() if reason in HARMLESS})
    num_docs, examples = sum(map(_num_docs, reports)), _examples(reports)
    if _bad_fraction(reports) > max_bad_fraction:
        kind = UserError if num_docs else _NothingToKeep
        raise kind(
            f"{_bad_message(bad, num_docs, examples)}\n  That is more than --max-bad-fraction {max_bad_fraction:g}: "
            f"no manifest was written",
            fix=_bad_fix(bad),
        )
    if not num_docs:
        raise _NothingToKeep("the inputs hold no documents: there is nothing to train on", fix="give files with text")
    parts = {split: [part for r in reports if (part := r["splits"][split])] for split in SPLITS}
    if not parts["train"]:
        raise _NothingToKeep(
            f"all {num_docs} documents fell into validation (their hashes decide): there is nothing to train on",
            fix="give more documents, or --validation-fraction 0",
        )
    if validation_fraction and not parts["validation"]:
        raise _NothingToKeep(
            f"none of the {num_docs} documents fell into validation at --validation-fraction {validation_fraction:g} "
            "(their hashes decide): there would be nothing to evaluate on",
            fix=f"give more documents, a larger fraction such as {min(0.5, 4 / num_docs):.2g}, or 0 for no held-out part",
        )
    shared = {
        "inputs": inputs,
        "rejected": {"bad": bad, "harmless": dict(sorted(harmless.items()))},
        "bad_examples": examples,
        "validation_fraction": validation_fraction,
    }
    result = Result(output, {})
    for split in reversed(SPLITS):  # train last: its manifest says that all is complete
        if parts[split]:
            result.splits[split] = write_manifest(
                output / split,
                shards=[part["shard"] for part in parts[split]],
                tokenizer=tokenizer,
                split=split,
                text_bytes=sum(part["text_bytes"] for part in parts[split]),
                length_histogram=_sum_histograms([part["length_histogram"] for part in parts[split]]),
                **shared,
            )
    return result


def _sum_histograms(histograms: list[dict[str, list[int]]]) -> dict[str, dict[str, int]]:
    """{"64": {docs, tokens}} is of documents of 64 to 127 tokens."""
    docs: Counter[int] = Counter()
    tokens: Counter[int] = Counter()
    for histogram in histograms:
        for bucket, (num_docs, num_tokens) in histogram.items():
            docs[int(bucket)] += num_docs
            tokens[int(bucket)] += num_tokens
    return {str(b): {"docs": docs[b], "tokens": tokens[b]} for b in sorted(docs)}


def _finished(output: Path) -> Result:
    """What is there already. Opening checks the sizes of all files, so that "complete" is true."""
    present = [split for split in SPLITS if (output / split / MANIFEST).is_file()]
    shutil.rmtree(output / UNITS, ignore_errors=True)
    return Result(output, {split: TokenDataset(output / split).manifest for split in present}, already=True)


def summarise(result: Result) -> str:
    """For the screen."""
    lines = []
    for split in SPLITS:
        if (manifest := result.splits.get(split)) is None:
            continue
        num_tokens, text_bytes = manifest["num_tokens"], manifest["text_bytes"]
        lines.append(
            f"{result.output / split}: {manifest['num_docs']:,} documents, {num_tokens:,} tokens, "
            f"{human_bytes(text_bytes)} of text ({text_bytes / num_tokens:.2f} bytes per token), "
            f"{len(manifest['shards'])} shards"
        )
    train = result.splits["train"]
    for title, key in (("not used", "bad"), ("passed over", "harmless")):
        if counts := train["rejected"][key]:
            lines.append(f"{title}: " + ", ".join(f"{count:,} {reason}" for reason, count in counts.items()))
            if key == "bad":
                lines += [f"  {example}" for example in train["bad_examples"]]
    names = ", ".join(f"data.{'sources' if s == 'train' else s}" for s in SPLITS if s in result.splits)
    lines.append(f"next: name these folders in a recipe ({names}) and run slm train")
    return "\n".join(lines)
