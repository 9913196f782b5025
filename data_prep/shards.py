"""From a corpus to token shards: find, cut, (drop duplicates,) encode, write; go on after a kill; same bytes on any machine.

Owns the order of things; a unit's work is units.py's, who does which claims.py's, the accounting report.py's. Units are
fixed parts of the corpus, so nothing depends on the number of processes, ranks or machines. The manifests come last.

    result = make_shards(["corpus.jsonl"], "tokenizer", Path("data/mine"), processes=8)
    result.splits["train"]["num_tokens"]
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from data_prep.claims import Share, claim, find_share, take
from data_prep.corpus import HUB, InputFile, Piece, cut, find_files, group, shown
from data_prep.duplicates import found_path, hashes_path, write_duplicates
from data_prep.job import JOB, OtherJob, describe_job, is_same_job, remove_job, write_job
from data_prep.progress import byte_progress
from data_prep.reading import Reading, read_piece
from data_prep.report import NothingToKeep, Result, readable_docs, stop_if_all_bad, summarise, write_manifests
from data_prep.units import SPLITS, UNITS, Pool, Settings, earlier_report
from slm.data.tokens import MANIFEST, TokenDataset
from slm.errors import EnvironmentProblem, UserError

if TYPE_CHECKING:
    from slm.tokenizer import SLMTokenizer

log = logging.getLogger("slm")

__all__ = ["Result", "make_shards", "summarise"]
# Units are 1/256 of the corpus, so that many cores have work and a kill costs little, within these bounds: smaller
# ones cost more to start than to encode, and at most a few thousand files of a terabyte are pleasant to hold.
_SMALLEST_UNIT_BYTES, _LARGEST_UNIT_BYTES = 1 << 21, 1 << 28
_SECONDS_BETWEEN_LOOKS = 0.2  # at units that other processes hold
_SECONDS_FOR_OTHERS = 5.0  # to discard what is of no use
LOCK = ".lock"  # held shared by all who are at work here, alone by who discards their work


def make_shards(
    inputs: Sequence[str | Path],
    tokenizer: str,
    output: Path,
    *,
    validation_fraction: float = 0.02,
    processes: int | None = None,
    reading: Reading = Reading(),  # noqa: B008 (frozen)
    max_bad_fraction: float = 0.01,
    shard_bytes: int | None = None,
    min_tokens: int = 0,
    max_tokens: int | None = None,
    deduplicate: bool = False,
    engine: str = "auto",
) -> Result:
    """Writes output/train and output/validation, each a TokenDataset. The same call goes on with what was begun, and
    several at once share the work (under mpirun, srun, a SLURM array, or in two terminals).

    engine: "auto" takes gigatoken where it is installed and gives the same ids, "gigatoken" insists on it, "reference" does not.
    processes: None for one a core (one under mpirun). shard_bytes: text that goes into one shard; None chooses by the
    corpus. Raises UserError, also when more than max_bad_fraction of the documents are none (then there is no manifest).
    """
    settings = Settings(output, tokenizer, validation_fraction, reading, min_tokens, max_tokens, deduplicate)
    _check(settings, processes, max_bad_fraction, shard_bytes)
    share = find_share()
    exclude = os.path.realpath(output)
    files, skipped = share.from_first(lambda: find_files(inputs, exclude, reading.text_key))
    total_bytes = sum(file.size for file in files)
    unit_bytes = shard_bytes or min(max(total_bytes // 256, _SMALLEST_UNIT_BYTES), _LARGEST_UNIT_BYTES)
    loaded, info = _load(tokenizer)
    job = _describe(settings, files, info, unit_bytes)
    if share.from_first(lambda: _is_begun(output, job)):
        if _is_complete(output):
            return _finished(output)
    else:
        write_job(output, job)
    units = group(cut(files, unit_bytes), unit_bytes)
    num_processes = min(_processes(processes, share), len(units))
    threads = _threads(num_processes, share, loaded)
    if engine != "reference" and loaded.use_fast_engine(_first_texts(units, reading), in_threads=threads > 1):
        settings = replace(settings, fast=True)
        info["engine"] = loaded.info()["engine"]
    elif engine == "gigatoken":
        raise UserError(
            f"gigatoken cannot be used for {tokenizer}: it is not installed, does not know this kind of tokenizer, or gives "
            "other ids",
            fix="pip install gigatoken, or --engine auto, which falls back to the reference",
        )
    described = [{"path": shown(str(p) if str(p).startswith(HUB) else os.path.abspath(p))} for p in inputs]
    lock = take(output / LOCK, wait=True, shared=True)  # nobody discards what processes are at work on
    assert lock is not None
    try:
        if not is_same_job(output, job):  # asked again, now that it can no longer change
            write_job(output, job)
        if _is_complete(output):  # another process was faster
            return _finished(output)
        settings.units.mkdir(exist_ok=True)
        with Pool(settings, loaded, num_processes, threads) as pool:
            reports = _all_stages(pool, settings, units, share, max_bad_fraction)
        with claim(settings.units / "manifest.lock"):
            if _is_complete(output):
                return _finished(output)
            result = write_manifests(settings, reports, info, described, skipped, max_bad_fraction)
            _clear_up(output)
        return result
    except NothingToKeep:
        _discard(output)  # the corrected command may then write into the same folder
        raise
    except FileNotFoundError:
        if _is_complete(output):  # another process was faster and has cleared up
            return _finished(output)
        if settings.units.is_dir():
            raise
        if not (output / JOB).exists():  # what this one wrote since would be in the way of the next
            _discard(output)
        raise UserError(
            f"another process of this job has given up and cleared {output}",
            fix="see its message; the same command begins anew",
        ) from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise EnvironmentProblem(
                f"the disk of {output} is full", fix="make room; the same command goes on"
            ) from None
        raise
    except BrokenProcessPool:
        raise EnvironmentProblem(
            "a worker process died, most likely for want of memory; what is finished is kept",
            fix="give fewer --processes; the same command goes on",
        ) from None
    finally:
        lock.close()


def _is_begun(output: Path, job: dict[str, Any]) -> bool:
    """Whether this very job has begun here. Unfinished work on files that have changed since is of no use, and removed: who
    mends the input, as an error said, gives the same command again."""
    give_up = time.monotonic() + _SECONDS_FOR_OTHERS
    while (begun := _begun_or_useless(output, job)) is None:
        lock = take(output / LOCK)
        if lock is None and time.monotonic() > give_up:
            raise UserError(
                f"the input has changed since {output} was begun, and other processes are still at work on it as it was",
                fix="end them, and give the same command again",
            )
        if lock is None:  # or one has just begun anew
            time.sleep(_SECONDS_BETWEEN_LOOKS)
            continue
        with lock:
            if _begun_or_useless(output, job) is None:  # asked again: it may have been done meanwhile
                log.warning("the input has changed since %s was begun and not finished: it is begun anew", output)
                _discard(output)
                write_job(output, job)
    return begun


def _begun_or_useless(output: Path, job: dict[str, Any]) -> bool | None:
    """is_same_job, but None where there is unfinished work on files that have changed since."""
    complete = _is_complete(output)
    try:
        return is_same_job(output, job, complete=complete)
    except OtherJob as error:
        if complete or not error.inputs_changed:
            raise
        return None


def _describe(settings: Settings, files: list[InputFile], info: dict[str, Any], unit_bytes: int) -> dict[str, Any]:
    """Every option that decides the bytes, and the files."""
    reading = settings.reading
    return describe_job(
        "shards",
        files,
        tokenizer_fingerprint=info["fingerprint"],
        validation_fraction=settings.validation_fraction,
        text_key=reading.text_key,
        on_bad="replace" if reading.on_bad == "replace" else "skip",  # failing at once leaves the same bytes
        max_doc_bytes=reading.max_doc_bytes,
        min_tokens=settings.min_tokens,
        max_tokens=settings.max_tokens,
        deduplicate=settings.deduplicate,
        shard_bytes=unit_bytes,
    )


def _check(settings: Settings, processes: int | None, max_bad: float, shard_bytes: int | None) -> None:
    fraction, reading = settings.validation_fraction, settings.reading
    if not 0 <= fraction < 1:
        raise UserError(f"--validation-fraction is {fraction}: it is no share", fix="give 0 to 0.99, such as 0.02")
    if not 0 <= max_bad <= 1:
        raise UserError(f"--max-bad-fraction is {max_bad}: it is no share", fix="give 0 to 1, such as 0.01")
    if processes is not None and processes < 1:
        raise UserError(f"--processes is {processes}: nobody would do the work", fix="give 1 or more")
    if shard_bytes is not None and shard_bytes < 1:
        raise UserError(f"--shard-bytes is {shard_bytes}: shards would be empty", fix="give a size such as 64M")
    if reading.max_doc_bytes < 1:
        raise UserError(
            f"--max-doc-bytes is {reading.max_doc_bytes}: every document would be too long",
            fix="give a size such as 64M",
        )
    if settings.max_tokens is not None and settings.max_tokens < settings.min_tokens:
        raise UserError(
            f"--max-tokens is {settings.max_tokens}, less than --min-tokens {settings.min_tokens}: no document would be left",
            fix="raise one or lower the other",
        )


def _processes(wanted: int | None, share: Share) -> int:
    if wanted is None and share.comm is not None:
        return 1  # the ranks are the processes
    return wanted or _cores()


def _threads(processes: int, share: Share, tokenizer: SLMTokenizer) -> int:
    """One process alone uses a second core: while one thread encodes, which needs no lock of Python's, another reads, counts
    and writes. A third would wait for that lock. Not with a class of a user's, which may not stand two threads."""
    return 2 if processes == 1 and share.count == 1 and _cores() > 1 and tokenizer.kind == "bpe" else 1


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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


def _first_texts(units: list[list[Piece]], reading: Reading) -> Iterator[str]:
    """The first documents of the corpus, up to 200 or 1 MB: engines must agree on them before a run. Nothing is read before
    they are asked for."""
    room, num_texts, num_records = 1 << 20, 0, 0
    for piece in (piece for unit in units for piece in unit):
        for record in read_piece(piece, reading):
            if record.text is not None:
                yield record.text
                num_texts += 1
                room -= len(record.text)
            num_records += 1
            if num_records == 1000 or num_texts == 200 or room < 0:
                return


# --- all units -----------------------------------------------------------------------------------------------


def _all_stages(
    pool: Pool, settings: Settings, units: list[list[Piece]], share: Share, max_bad_fraction: float
) -> list[dict[str, Any]]:
    if settings.deduplicate:
        _stage("hash", pool, settings, units, share, lambda i: hashes_path(settings.units, i).exists() or None)
        with claim(settings.units / "duplicates.lock"):
            if not found_path(settings.units).exists():
                write_duplicates(settings.units, len(units))
    any_good = False

    def check(report: dict[str, Any]) -> None:
        nonlocal any_good
        any_good = any_good or readable_docs(report) > 0
        if not any_good:  # else it is one odd part, which counts with the rest
            stop_if_all_bad(report, max_bad_fraction)

    return _stage("encode", pool, settings, units, share, lambda index: earlier_report(settings, index), check)


def _stage(
    stage: str,
    pool: Pool,
    settings: Settings,
    units: list[list[Piece]],
    share: Share,
    done: Callable[[int], Any],
    check: Callable[[Any], None] = lambda result: None,
) -> list[Any]:
    """Does every unit that nobody else does, waits for the others, and returns done(index) of all."""
    sizes = [sum(piece.size for piece in unit) for unit in units]
    results = {index: found for index in range(len(units)) if (found := done(index)) is not None}
    for found in results.values():
        check(found)
    # Own share first: processes that start together then seldom reach for the same unit.
    pending = sorted(set(range(len(units))) - results.keys(), key=lambda i: (i % share.count != share.index, i))
    running: dict[Future[Any], tuple[int, IO[bytes]]] = {}
    title = {"hash": "hashing", "encode": "encoding"}[stage]
    with byte_progress(title, sum(sizes), sum(sizes[i] for i in results), enabled=share.leads) as advance:

        def finish(index: int) -> None:
            results[index] = done(index)
            if results[index] is None:  # another process has finished the job and cleared up since
                raise FileNotFoundError(f"the report of unit {index}")
            pending.remove(index)
            advance(sizes[index])
            check(results[index])

        while pending:
            left = len(pending)
            taken = {index for index, _ in running.values()}
            for index in [i for i in pending if i not in taken]:
                if len(running) > pool.workers:  # one more than can run: no worker waits for its next
                    break
                if done(index) is not None:
                    finish(index)
                elif (lock := take(settings.units / f"{index:05d}.lock")) is not None:
                    if done(index) is not None:  # finished by another between the two looks
                        lock.close()
                        finish(index)
                    else:
                        running[pool.submit(stage, index, units[index])] = (index, lock)
            for future in wait(running, return_when=FIRST_COMPLETED).done if running else ():
                index, lock = running.pop(future)
                future.result()
                lock.close()
                finish(index)
            if len(pending) == left and not running:  # others hold all that is left
                time.sleep(_SECONDS_BETWEEN_LOOKS)
    return [results[index] for index in range(len(units))]


# --- before and after ----------------------------------------------------------------------------------------


def _is_complete(output: Path) -> bool:
    return (output / SPLITS[0] / MANIFEST).is_file()


def _finished(output: Path) -> Result:
    """What is there already. Opening checks the sizes of all files, so that "complete" is true."""
    present = [split for split in SPLITS if (output / split / MANIFEST).is_file()]
    _clear_up(output)
    return Result(output, {split: TokenDataset(output / split).manifest for split in present}, already=True)


def _clear_up(output: Path) -> None:
    """What a complete job needs no longer."""
    shutil.rmtree(output / UNITS, ignore_errors=True)
    (output / LOCK).unlink(missing_ok=True)


def _discard(output: Path) -> None:
    for name in (*SPLITS, UNITS):
        shutil.rmtree(output / name, ignore_errors=True)
    remove_job(output)
