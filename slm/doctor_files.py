"""Whether all nodes see one file system, and whether renames and locks hold between them.

checks = shared_files(meeting, folder)        # on rank 0; the others take part
"""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

from slm.doctor_meeting import MEET_SECONDS, Meeting
from slm.doctor_node import OK, WARNING, WRONG, Check

_SEEN_SECONDS = 30.0  # for a new file to be seen elsewhere; NFS may keep what it knows of a folder so long
_RENAMES = 20


def shared_files(meeting: Meeting, folder: Path) -> list[Check]:
    """Rank 0 writes, renames and locks a file; the first rank of each other node looks on."""
    mine, others = meeting.ranks.rank, [ranks[0] for ranks in meeting.nodes.values() if ranks[0] != 0]
    scratch = folder / f".doctor-{meeting.port}-{os.environ.get('SLURM_JOB_ID', '')}"
    if mine == 0:
        return _write_for_others(meeting, scratch, others)
    if mine in others:
        meeting.hear("files/written", 0, 10 * MEET_SECONDS)
        meeting.tell(f"files/seen/{mine}", _seconds_until_seen(scratch / "name"))
        meeting.hear("files/renaming", 0)
        meeting.tell(f"files/read/{mine}", _torn_reads(meeting, scratch / "name"))
        meeting.hear("files/locked", 0)
        meeting.tell(f"files/lock/{mine}", _is_refused(scratch / "lock"))
    return []


def _write_for_others(meeting: Meeting, scratch: Path, others: list[int]) -> list[Check]:
    scratch.mkdir(parents=True, exist_ok=True)
    name = scratch / "name"
    try:
        _write(name, "a")
        meeting.tell("files/written")
        seen = {rank: meeting.hear(f"files/seen/{rank}", rank) for rank in others}
        meeting.tell("files/renaming")
        for turn in range(_RENAMES):
            _write(name, "ab"[turn % 2])
            time.sleep(0.02)
        meeting.tell("files/renamed")
        torn = {rank: meeting.hear(f"files/read/{rank}", rank) for rank in others}
        with open(scratch / "lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = True
            except OSError:
                held = False
            meeting.tell("files/locked")
            refused = {rank: meeting.hear(f"files/lock/{rank}", rank) for rank in others}
    finally:
        for path in scratch.glob("*"):
            path.unlink()
        scratch.rmdir()
    called = meeting.names
    blind = [called[rank] for rank, seconds in seen.items() if seconds is None]
    if blind:
        told = f"{', '.join(blind)} did not see in {_SEEN_SECONDS:.0f} s what {called[0]} wrote into {scratch.parent.absolute()}"
        return [
            Check(
                "shared files", WRONG, told, "mount one file system there on all nodes, or give another folder (output)"
            )
        ]
    slowest = max(seen.values())
    told = f"all nodes saw what {called[0]} wrote, the last after {slowest:.2f} s"
    checks = [Check("shared files", OK, told, "", {"seconds_until_seen": {called[r]: s for r, s in seen.items()}})]
    if broken := [called[rank] for rank, (num_torn, _) in torn.items() if num_torn]:
        told = f"{', '.join(broken)} found no whole file while {called[0]} renamed one over it"
        checks.append(Check("shared rename", WRONG, told, "give runs another file system: checkpoints rely on it"))
    else:
        reads = sum(count for _, count in torn.values())
        checks.append(
            Check("shared rename", OK, f"{reads:,} reads during {_RENAMES} renames elsewhere, each of a whole file")
        )
    passed = [called[rank] for rank, answer in refused.items() if not answer]
    if passed or not held:
        told = f"a lock that {called[0]} holds does not hold on {', '.join(passed)}" if held else "there are no locks"
        fix = "mount it with locks (NFS 4; Lustre with -o flock), and start no two jobs in one run"
        checks.append(Check("shared flock", WARNING, told, fix))
    else:
        checks.append(Check("shared flock", OK, f"a lock that {called[0]} holds is refused on all other nodes"))
    return checks


_LENGTH = 1 << 16  # more than a page: a reader in the middle of a change would find both letters


def _write(path: Path, letter: str) -> None:
    other = path.with_name("other")
    with open(other, "w") as file:
        file.write(letter * _LENGTH)
        file.flush()
        os.fsync(file.fileno())
    os.replace(other, path)


def _seconds_until_seen(path: Path) -> float | None:
    began = time.monotonic()
    while (waited := time.monotonic() - began) < _SEEN_SECONDS:
        try:
            if len(path.read_text()) == _LENGTH:
                return waited
        except OSError:
            pass
        time.sleep(0.01)
    return None


def _torn_reads(meeting: Meeting, path: Path) -> tuple[int, int]:
    """(reads that found no whole file, reads) until rank 0 has renamed for the last time."""
    torn = count = 0
    deadline = time.monotonic() + MEET_SECONDS
    while not meeting.store.check(["files/renamed"]) and time.monotonic() < deadline:
        count += 1
        try:
            text = path.read_text()
            torn += text not in ("a" * _LENGTH, "b" * _LENGTH)
        except FileNotFoundError:
            torn += 1
        except (
            OSError
        ):  # ESTALE of NFS: the file that was opened is no longer the one of that name; opened again it is whole
            pass
    return torn, count


def _is_refused(path: Path) -> bool:
    try:
        with open(path) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError:
        return False
