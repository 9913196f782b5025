"""What an output folder was made from, so that the same command goes on and another one is refused.

Owns job.json: the inputs (path, size, time of change) and every option that decides the output's bytes.

    job = describe_job("shards", files, text_key="text")
    if not is_same_job(folder, job):
        write_job(folder, job)
"""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_prep.corpus import InputFile, shown
from slm.errors import CorruptArtefact, EnvironmentProblem, UserError
from slm.runtime import atomic_write

JOB = "job.json"


class OtherJob(UserError):
    """A folder is another job's. inputs_changed: of the same one, but for the files that it reads."""

    inputs_changed = False


def describe_job(command: str, files: Sequence[InputFile], **options: Any) -> dict[str, Any]:
    return {"schema": f"slm-data-{command}/1", **options, "files": {f.path: [f.size, f.mtime_ns] for f in files}}


def is_same_job(folder: Path, job: dict[str, Any], *, complete: bool = True) -> bool:
    """True if the folder is this very job's, False if it is free. Raises OtherJob, with the difference, otherwise.

    complete: whether there is a result, or only unfinished work.
    """
    there: dict[str, Any] = {}
    path = folder / JOB
    try:
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError("it is a file")
        if path.is_file():
            there = json.loads(path.read_text())
            difference = _difference(there, job)
        elif folder.is_dir() and any(not entry.name.startswith(".") for entry in folder.iterdir()):
            if path.is_file():  # another process has begun this very moment
                return is_same_job(folder, job, complete=complete)
            difference = "something that this command did not make"
        else:
            return False
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise CorruptArtefact(
            f"{path} is not readable ({error!r})", fix="remove the folder, or choose another"
        ) from None
    except OSError as error:
        raise _unusable(folder, error) from None
    if difference:
        what = difference if complete else difference.replace("the result of", "the unfinished work of")
        fix = "choose another --output folder, or remove this one"
        other = OtherJob(
            f"{folder} holds {what}. Nothing was changed",
            fix=fix
            if complete
            else f"give the command as it was, to go on; or {fix.replace('choose', 'begin anew: choose')}",
        )
        kept = {"files", "shard_bytes"}  # the size of the units follows from the files
        same_paths = list(there.get("files", [])) == list(job["files"]) and there.get("files") != job["files"]
        other.inputs_changed = same_paths and all(there.get(k) == job.get(k) for k in {*there, *job} - kept)
        raise other
    return True


def write_job(folder: Path, job: dict[str, Any]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(folder / JOB, json.dumps(job, indent=1) + "\n")
    except OSError as error:
        raise _unusable(folder, error) from None


def remove_job(folder: Path) -> None:
    (folder / JOB).unlink(missing_ok=True)


@contextmanager
def os_errors_told(output: Path, fix: str) -> Iterator[None]:
    """What the system refuses while `output` is written, as a message: EnvironmentProblem if the disk is full, else UserError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise EnvironmentProblem(
                f"the disk of {output} is full ({error.strerror})", fix=f"make room; {fix}"
            ) from None
        raise UserError(f"{error.filename or output}: {error.strerror or error}", fix=fix) from None


def _unusable(folder: Path, error: OSError) -> UserError:
    return UserError(f"the output folder {folder} cannot be used: {error}", fix="choose another --output folder")


def _difference(there: dict[str, Any], now: dict[str, Any]) -> str:
    for key in dict.fromkeys([*there, *now]):
        if key != "files" and there.get(key) != now.get(key):
            return f"the result of another {key.replace('_', ' ')}: {there.get(key)!r} there, {now.get(key)!r} now"
    old, new = there["files"], now["files"]
    if list(old) != list(new):
        added, gone = [p for p in new if p not in old], [p for p in old if p not in new]
        named = [f"{shown(p)} is new" for p in added[:1]] + [f"{shown(p)} is gone" for p in gone[:1]]
        counts = f"{len(old):,} there, {len(new):,} now"
        return f"the result of other input files ({'; '.join(named) or 'in another order'}; {counts})"
    changed = [p for p in new if new[p] != old[p]]
    return f"the result of an earlier state of {shown(changed[0])}, which has changed since" if changed else ""
