"""Saving checkpoints while training goes on: a copy in host memory, a thread that writes it, one rename that commits it.

Owns the copy, the commit among the ranks, what happens when a save fails or comes while the one before is still being
written, and which checkpoints are kept. What lies in a folder is in checkpoint.py. Does not know DeepSpeed: it gets fragments.

    saver = Checkpointer(run_dir, recipe.checkpoint, metrics.event)
    saver.save(engine.fragments(), engine.shapes, state, name="main-00000500")    # returns after copying to memory
    saver.wait()

Every rank makes one and calls the same methods. They agree in the training thread, by collective calls, on what was and is
to be done; the writing threads tell each other through files, because a collective call there would meet those of training.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from slm import parallel, watchdog
from slm.checkpoint import (
    FORMAT,
    OPTIMIZER,
    file_digest,
    manifest_or_none,
    manifest_text,
    newest_first,
    recover,
)
from slm.engine import Fragment
from slm.errors import EnvironmentProblem, SLMError
from slm.recipe import Checkpoint
from slm.runtime import atomic_write, fsync_folder

log = logging.getLogger("slm")

_PEERS_TIMEOUT_SECONDS = 1800.0
_PEERS_STILL_SECONDS = 60.0  # without a new byte from ranks of other machines, after training has failed
_WAIT_SAID_SECONDS = 1.0
_FAILURES_IN_A_ROW = 3  # with on_failure: continue
_CHUNK_BYTES = 8 << 20
_SMALL_FILES_BYTES = 64 << 10  # manifest, done-files and their blocks


class _Abandoned(Exception):
    """Another rank's part of this save will not come."""


@dataclass(frozen=True)
class _Save:
    """One save on its way, as this rank sees it."""

    pieces: list[tuple[str, torch.Tensor]]  # "KIND/NAME@START": a part of the host copy
    state: str  # state.json
    global_step: int
    permanent: bool
    best: bool
    staging: Path
    final: Path


class Checkpointer:
    """Saves in the background, one at a time."""

    def __init__(self, run_dir: Path, settings: Checkpoint, event: Callable[..., None]) -> None:
        """event(kind, **fields) writes a line of events.jsonl (metrics.MetricsLogger.event)."""
        self.root = run_dir / "checkpoints"
        self.settings = settings
        self._event = event
        self._attempt = parallel.broadcast(uuid.uuid4().hex[:8])  # names staging folders: none is ever reused
        self._copy = HostCopy()
        self._save: _Save | None = None
        self._thread: threading.Thread | None = None
        self._abandoned = threading.Event()  # another rank's part will not come
        self._processes = parallel.gather_objects(watchdog.myself())
        self._missing: list[int] = []  # the ranks for whose parts rank 0, done with its own, waits
        self._error: Exception | None = None
        self._seconds = 0.0
        self._failures = 0
        parallel.first_rank_decides(self._begin)  # what it raises is raised on all: none waits for it

    def _begin(self) -> None:
        """Makes the folder, and removes what a killed save left half-written."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            recover(self.root)
            for leftover in self.root.glob(".staging-*"):
                remove(leftover)
        except OSError as error:
            raise EnvironmentProblem(
                f"{self.root} cannot be written, so no checkpoint could be saved: {error}",
                fix="give the run (output) a folder where this user may make files",
            ) from None

    # --- what training calls -----------------------------------------------------------------------------------

    def save(
        self,
        fragments: Iterable[Fragment],
        shapes: dict[str, tuple[int, ...]],
        state: dict[str, Any],
        *,
        name: str,
        permanent: bool = False,
        best: bool = False,
        required: bool = False,
    ) -> bool:
        """Begins to save the fragments and `state` (JSON; with global_step and position) as checkpoints/NAME.

        Training waits for the copy to memory, and for the save before where `checkpoint.when_busy` says so; else False comes
        back, and nothing is saved. `permanent` (a phase's end) is never pruned; `best` makes runs/NAME/best point here: both
        always wait. `required` (the run ends after it) does too, and no failure of it is gone on from, nor of a permanent one.
        Raises EnvironmentProblem, on all ranks, where `checkpoint.on_failure` does not say to go on.
        """
        required = required or permanent
        if self.settings.when_busy == "skip" and not required and not best:
            if parallel.agree(self._thread is not None and self._thread.is_alive()):
                self._tell("save skipped", f"the save before is still being written, so {name} is skipped", name=name)
                return False
        busy, begun = self._thread is not None and self._thread.is_alive(), time.monotonic()
        self._settle(required=False)
        if busy and (seconds := time.monotonic() - begun) > _WAIT_SAID_SECONDS:
            text = f"training waited {seconds:.1f} s for the save before, until {name} could begin"
            self._tell("save waited", text, name=name, seconds=round(seconds, 3))
        milestone = self.settings.keep_every_steps and state["position"]["step"] % self.settings.keep_every_steps == 0
        listed = {"shapes": {n: list(s) for n, s in shapes.items()}, "permanent": permanent, "optimizer": OPTIMIZER}
        pieces, copy = self._copy.lay_out(fragments)
        self._save = _Save(
            pieces,
            json.dumps({**state, **listed}, indent=1),  # now: what it holds may change while the thread is at work
            state["global_step"],
            bool(permanent or milestone),
            best,
            self.root / f".staging-{name}-{self._attempt}",
            self.root / name,
        )
        header_bytes = len(_header(pieces)) if pieces else 0
        num_bytes = int(parallel.reduce_sum([header_bytes + sum(piece.nbytes for _, piece in pieces)])[0])
        no_room = parallel.first_rank_decides(self._no_room, self._save, num_bytes)
        if no_room is not None:
            self._failed(no_room, required)
            return False
        copy()
        self._abandoned.clear()
        self._missing = []
        self._thread = threading.Thread(
            target=self._run,
            args=(self._save, parallel.rank(), parallel.world_size()),
            name=f"save {name}",
            daemon=True,
        )
        self._thread.start()
        return True

    @property
    def failed(self) -> bool:
        """True if the save before went wrong and the run is to stop for it; `wait` raises why."""
        return self._error is not None and self.settings.on_failure == "stop"

    def wait(self) -> None:
        """Returns when the save under way is committed, for all ranks. Raises, on all of them, why it could not be."""
        self._settle(required=True)

    def finish(self, timeout_seconds: float) -> None:
        """On the way out of a run that has failed: gives a save under way the time to be committed. (No agreement: the other
        ranks may be gone. Of those on this machine the thread notices it; others are given up when they write no more.)"""
        deadline = time.monotonic() + timeout_seconds
        size, since = -1, time.monotonic()
        while self._thread is not None and self._thread.is_alive() and time.monotonic() < deadline:
            self._thread.join(0.2)
            assert self._save is not None
            try:
                now = sum(p.stat().st_size for p in self._save.staging.glob("*"))
            except FileNotFoundError:  # just committed
                continue
            # This rank's own part always comes to an end; an fsync of many GB adds no bytes for long.
            if not self._missing or now != size:
                size, since = now, time.monotonic()
            elif time.monotonic() - since > _PEERS_STILL_SECONDS:
                log.warning("%s is given up: another rank no longer writes its part", self._save.final.name)
                return

    # --- agreeing on how it went ---------------------------------------------------------------------------------

    def _settle(self, *, required: bool) -> None:
        """Waits for the save under way on all ranks, and says on all of them how it went."""
        save = self._save
        try:
            self._join()
        except SLMError as error:
            self._failed(error, required)
            return
        if save is not None:
            self._failures = 0
            self._event("saved", name=save.final.name, step=save.global_step, seconds=round(self._seconds, 3))
        self._save = None

    def _join(self) -> None:
        """Ends all threads; raises on all ranks what went wrong on the first that has something to say."""
        if self._thread is not None and parallel.rank() != 0:
            self._thread.join()
        if parallel.agree(self._error is not None):  # then rank 0 would wait for a part that does not come
            self._abandoned.set()
        if self._thread is not None:
            self._thread.join()
        self._thread = None
        error, self._error = self._error, None
        parallel.together(_raise, error)

    def _failed(self, error: SLMError, required: bool) -> None:
        assert self._save is not None
        save, self._save = self._save, None
        self._failures += 1
        if parallel.rank() == 0:
            shutil.rmtree(save.staging, ignore_errors=True)
        self._event("save failed", name=save.final.name, step=save.global_step, reason=error.problem)
        if self.settings.on_failure == "stop" or required:
            raise error
        if self._failures >= _FAILURES_IN_A_ROW:
            raise EnvironmentProblem(
                f"{self._failures} saves in a row failed; the last: {error.problem}", fix=error.fix
            )
        if parallel.rank() == 0:
            log.error(
                "%s was NOT saved (%d in a row; the run stops at %d): %s. Training goes on, and tries again at the next save",
                save.final.name, self._failures, _FAILURES_IN_A_ROW, error,
            )  # fmt: skip

    def _tell(self, kind: str, text: str, **fields: Any) -> None:
        self._event(kind, reason=text, **fields)
        if parallel.rank() == 0:
            log.warning("%s", text)

    def _no_room(self, save: _Save, num_bytes: int) -> EnvironmentProblem | None:
        """Asked before anything is written. What retention will remove goes only after the new one is committed: it does not
        count."""
        needed = num_bytes + len(save.state) + _SMALL_FILES_BYTES
        free = shutil.disk_usage(self.root).free
        if free >= needed:
            return None
        manifests = (manifest_or_none(folder) for folder in self._outdated(keep_last=self.settings.keep_last - 1))
        later = sum(entry["bytes"] for manifest in manifests if manifest for entry in manifest["files"])
        return EnvironmentProblem(
            f"the checkpoint {save.final.name} needs {needed:,} bytes and {self.root} has {free:,} free"
            + (f" (the {later:,} of older ones that it replaces are only removed once it is whole)" if later else ""),
            fix=f"free {needed - free:,} bytes, or give the run (output) a larger disk; {self._before()}",
        )

    def _before(self) -> str:
        folders = newest_first(self.root)
        return f"the checkpoints before are whole, the newest {folders[0].name}" if folders else "none was saved before"

    # --- the thread --------------------------------------------------------------------------------------------

    def _run(self, save: _Save, rank: int, world: int) -> None:
        begun = time.monotonic()
        try:
            self._write_and_commit(save, rank, world)
        except _Abandoned:
            pass  # the rank that failed raises why, for all
        except Exception as error:
            problem = f"rank {rank} could not write the checkpoint {save.final.name}: {error}"
            fix = f"free disk space; {self._before()}"
            self._error = EnvironmentProblem(problem, fix=fix) if isinstance(error, OSError) else error
            log.error("%s", self._error)
            try:
                # Its own part first: on a full disk it makes the room for saying so to rank 0.
                _part(save.staging, rank).unlink(missing_ok=True)
                atomic_write(save.staging / f"rank-{rank:05d}.failed", problem)
            except OSError as second:
                log.error("rank %d could not leave word that its save failed: %s", rank, second)
        else:
            self._seconds = time.monotonic() - begun
            if rank == 0:
                log.info("saved %s in %.1f s%s", save.final.name, self._seconds, ", the best so far" * save.best)

    def _write_and_commit(self, save: _Save, rank: int, world: int) -> None:
        staging, final = save.staging, save.final
        staging.mkdir(exist_ok=True)
        entry: dict[str, Any] | None = None
        if save.pieces:
            path = _part(staging, rank)
            entry = {"file": path.name, **write_tensors(path, save.pieces)}
        atomic_write(staging / f"rank-{rank:05d}.done", json.dumps(entry))
        if rank != 0:
            return
        entries = [e for e in self._wait_for_peers(staging, world) if e]
        atomic_write(staging / "state.json", save.state)
        entries.append({"file": "state.json", **file_digest(staging / "state.json")})
        manifest = {
            "format": FORMAT,
            "global_step": save.global_step,
            "permanent": save.permanent,
            "best": save.best,
            "files": entries,
        }
        for done in staging.glob("*.done"):
            done.unlink()
        atomic_write(staging / "manifest.json", manifest_text(manifest))
        _put_in_place(staging, final)
        _point(self.root.parent / "latest", final)
        if save.best:
            _point(self.root.parent / "best", final)
        for folder in self._outdated(keep_last=self.settings.keep_last):
            remove(folder)

    def _wait_for_peers(self, staging: Path, world: int) -> list[dict[str, Any] | None]:
        paths = [staging / f"rank-{rank:05d}.done" for rank in range(world)]
        begun = asked = time.monotonic()
        while True:
            gone: set[int] = set()
            if time.monotonic() - asked > 0.5:
                # Before it is looked what is there: a rank may end after its part was done.
                gone, asked = {r for r in self._missing if watchdog.is_gone(self._processes[r])}, time.monotonic()
            self._missing = [rank for rank, path in enumerate(paths) if not path.exists()]
            if not self._missing:
                return [json.loads(p.read_text()) for p in paths]
            for failed in staging.glob("*.failed"):
                raise EnvironmentProblem(failed.read_text(), fix=f"free disk space; {self._before()}")
            if self._abandoned.is_set():
                raise _Abandoned
            if lost := gone.intersection(self._missing):
                raise EnvironmentProblem(f"{staging}: rank {min(lost)} has gone before its part was written")
            if time.monotonic() - begun > _PEERS_TIMEOUT_SECONDS:
                raise EnvironmentProblem(
                    f"{staging}: after {_PEERS_TIMEOUT_SECONDS:.0f} s there is still no {paths[self._missing[0]].name}: is "
                    "the folder on a file system that all ranks share?"
                )
            time.sleep(0.02)

    def _outdated(self, keep_last: int) -> list[Path]:
        """All but the newest keep_last, the permanent ones, the newest best and those that `best` and `latest` name."""
        kept = {p.resolve() for p in (self.root.parent / "best", self.root.parent / "latest") if p.exists()}
        manifests = {folder: manifest_or_none(folder) for folder in newest_first(self.root)}
        # The links alone are not enough: they may be gone, or a kill may fall between a commit and its link.
        best = next((folder for folder, manifest in manifests.items() if manifest and manifest.get("best")), None)
        # A folder that cannot be read is neither counted nor removed: somebody may want to look at it.
        passing = [f for f, manifest in manifests.items() if manifest and not manifest.get("permanent", True)]
        return [folder for folder in passing[keep_last:] if folder.resolve() not in kept and folder != best]


def _raise(error: Exception | None) -> None:
    if error is not None:
        raise error


def _part(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.safetensors"


def _put_in_place(staging: Path, final: Path) -> None:
    """The commit. A run that fell back to an older checkpoint comes by a name again: what has it goes only when the new one
    is there for good. After a kill in between `checkpoint.recover` puts back whichever is newer."""
    replaced = None
    if os.path.lexists(final):
        replaced = final.with_name(f".staging-replaced-{final.name}-{uuid.uuid4().hex[:8]}")
        final.rename(replaced)
    try:
        staging.rename(final)
    except OSError:
        if replaced is not None:
            replaced.rename(final)
        raise
    fsync_folder(final.parent)
    if replaced is not None:
        remove(replaced)


def remove(folder: Path) -> None:
    """Removes a checkpoint; of one that lies elsewhere, perhaps in another run, the link alone."""
    try:
        if folder.is_symlink():
            folder.unlink()
            return
        # The manifest goes first: what is half removed is then no checkpoint.
        (folder / "manifest.json").unlink(missing_ok=True)
    except OSError as error:
        log.warning("%s cannot be removed: %s", folder, error)
        return
    shutil.rmtree(folder, ignore_errors=True)


def _point(link: Path, target: Path) -> None:
    """Makes link a relative symbolic link to target, by one rename."""
    temporary = link.with_name(f".{link.name}.{uuid.uuid4().hex[:8]}")
    temporary.symlink_to(os.path.relpath(target, link.parent))
    temporary.replace(link)


# --- the copy in host memory -----------------------------------------------------------------------------------


class HostCopy:
    """Host memory for one copy of this rank's state, made at the first save and used again by each.

    On a GPU it is pinned, so that all copies are under way at once and one synchronisation waits for them.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0)
        self._pinned = False

    def lay_out(self, fragments: Iterable[Fragment]) -> tuple[list[tuple[str, torch.Tensor]], Callable[[], None]]:
        """(the pieces of the copy by their keys, a function that fills them from the fragments as they then are)."""
        sources = [(f"{kind}/{f.name}@{f.start}", value) for f in fragments for kind, value in f.values.items()]
        on_gpu = any(value.is_cuda for _, value in sources)
        self._allocate(sum(value.numel() for _, value in sources), on_gpu)
        pieces, at = [], 0
        for key, value in sources:
            pieces.append((key, self._memory[at : at + value.numel()]))
            at += value.numel()

        def fill() -> None:
            for (_, piece), (_, value) in zip(pieces, sources, strict=True):
                piece.copy_(value.detach(), non_blocking=True)
            if on_gpu:
                torch.cuda.synchronize()

        return pieces, fill

    def _allocate(self, num_elements: int, pinned: bool) -> None:
        if self._memory.numel() == num_elements:
            return
        if self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._memory.data_ptr())
        self._memory, self._pinned = torch.empty(0), False  # the old one goes before the new one comes
        self._memory = torch.empty(num_elements, dtype=torch.float32)
        if pinned and num_elements:
            # Not by pin_memory=True, which takes the next power of two: up to twice this rank's state.
            code = int(torch.cuda.cudart().cudaHostRegister(self._memory.data_ptr(), self._memory.nbytes, 1))
            self._pinned = code == 0
            if code:
                log.warning("host memory for checkpoints could not be pinned (CUDA %d): saves block longer", code)


def _header(pieces: list[tuple[str, torch.Tensor]]) -> bytes:
    fields, at = {}, 0
    for key, piece in pieces:
        fields[key] = {"dtype": "F32", "shape": [piece.numel()], "data_offsets": [at, at + piece.nbytes]}
        at += piece.nbytes
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # values begin at multiples of 8
    return len(text).to_bytes(8, "little") + text


def write_tensors(path: Path, pieces: list[tuple[str, torch.Tensor]]) -> dict[str, Any]:
    """Writes a safetensors file and makes it last; {"bytes", "sha256"} of what was meant to be in it.

    safetensors' own writer copies every tensor to a bytes object first, a second copy of this rank's state, and would have to
    be read back for the checksum. Writing and hashing here leave Python's lock to training.
    """
    digest, num_bytes = hashlib.sha256(), 0
    with open(path, "wb", buffering=0) as file:
        for data in (memoryview(_header(pieces)), *(piece.numpy().data.cast("B") for _, piece in pieces)):
            for first in range(0, len(data), _CHUNK_BYTES):
                chunk = data[first : first + _CHUNK_BYTES]
                digest.update(chunk)
                num_bytes += len(chunk)
                while chunk:
                    chunk = chunk[file.write(chunk) :]
        os.fsync(file.fileno())
    return {"bytes": num_bytes, "sha256": digest.hexdigest()}
