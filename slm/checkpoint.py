"""Checkpoints: state by parameter name in safetensors, committed by one rename.

Owns the format of `checkpoints/PHASE-STEP/`, saving in the background, choosing what to resume from, `latest` and
`best`, retention, and turning a checkpoint into a model folder. Does not know DeepSpeed: it gets fragments.

    saver = Checkpointer(run_dir, keep_last=2)
    saver.save(engine.fragments(), shapes, state, name="main-00000500")    # returns after copying to memory
    saver.wait()
    reader = Reader(run_dir / "checkpoints" / "main-00000500")
    engine.write_state(reader.read)

A folder holds rank-NNNNN.safetensors (tensors "KIND/NAME@START", 1-D float32), state.json, and manifest.json with the
size and SHA-256 of each file. A folder without a manifest is not a checkpoint.
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
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from slm import parallel
from slm.engine import Fragment
from slm.errors import CorruptArtefact, EnvironmentProblem, UserError
from slm.runtime import atomic_write, fsync_folder

log = logging.getLogger("slm")

FORMAT = "slm-checkpoint/1"
_PEERS_TIMEOUT_SECONDS = 1800.0


def folder_name(phase: str, step: int) -> str:
    return f"{phase}-{step:08d}"


# --- writing -------------------------------------------------------------------------------------------------


class Checkpointer:
    """Saves in the background, one at a time. Every rank makes one and calls the same methods."""

    def __init__(self, run_dir: Path, keep_last: int) -> None:
        self.root = run_dir / "checkpoints"
        self.keep_last = keep_last
        self._attempt = parallel.broadcast(uuid.uuid4().hex[:8])  # names staging folders: none is ever reused
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        if parallel.rank() == 0:
            self.root.mkdir(parents=True, exist_ok=True)
            for leftover in self.root.glob(".staging-*"):
                shutil.rmtree(leftover, ignore_errors=True)
        parallel.barrier()

    def save(
        self,
        fragments: Iterable[Fragment],
        shapes: dict[str, tuple[int, ...]],
        state: dict[str, Any],
        *,
        name: str,
        permanent: bool = False,
        best: bool = False,
    ) -> None:
        """Saves the fragments and `state` (JSON; with global_step) as checkpoints/NAME.

        Copies the fragments to memory (training waits for this alone) and writes them in a thread; waits first
        for the save before. `permanent` is never pruned; `best` makes runs/NAME/best point here.
        Raises what the save before raised.
        """
        self.wait()
        tensors = {
            f"{kind}/{fragment.name}@{fragment.start}": value.detach().to("cpu", torch.float32, copy=True)
            for fragment in fragments
            for kind, value in fragment.values.items()
        }
        state = {**state, "shapes": {n: list(s) for n, s in shapes.items()}, "permanent": permanent}
        staging = self.root / f".staging-{name}-{self._attempt}"
        work = (tensors, state, staging, self.root / name, best, parallel.rank(), parallel.world_size())
        self._thread = threading.Thread(target=self._run, args=work, name=f"save {name}", daemon=True)
        self._thread.start()

    @property
    def failed(self) -> bool:
        """True if the save before went wrong; `wait` raises why."""
        return self._error is not None

    def finish(self, timeout_seconds: float) -> None:
        """On the way out of a run that has failed: gives a save under way the time to be committed."""
        if self._thread is not None:
            self._thread.join(timeout_seconds)

    def wait(self) -> None:
        """Returns when the save under way is committed (on rank 0) or written (elsewhere). Raises its error."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _run(self, *work: Any) -> None:
        staging, rank = work[2], work[5]
        try:
            self._write_and_commit(*work)
        except BaseException as error:
            problem = f"the checkpoint could not be written: {error}"
            fix = "free disk space; the checkpoints before are whole"
            self._error = (
                EnvironmentProblem(problem, fix=fix) if isinstance(error, OSError | SafetensorError) else error
            )
            try:
                atomic_write(staging / f"rank-{rank:05d}.failed", str(error))  # so that rank 0 does not wait for it
            except OSError:
                log.error("rank %d could not say that its save failed: %s", rank, error)

    def _write_and_commit(
        self,
        tensors: dict[str, Any],
        state: dict[str, Any],
        staging: Path,
        final: Path,
        best: bool,
        rank: int,
        world: int,
    ) -> None:
        staging.mkdir(exist_ok=True)
        entry: dict[str, Any] | None = None
        if tensors:
            path = staging / f"rank-{rank:05d}.safetensors"
            save_file(tensors, path)
            path.chmod(0o644)  # safetensors makes it readable by the owner alone
            entry = {"file": path.name, **_fsync_and_hash(path)}
        # Ranks tell each other through files: a collective call here would meet those of the training thread.
        atomic_write(staging / f"rank-{rank:05d}.done", json.dumps(entry))
        if rank != 0:
            return
        entries = [e for e in _wait_for_peers(staging, world) if e]
        atomic_write(staging / "state.json", json.dumps(state, indent=1))
        entries.append({"file": "state.json", **_fsync_and_hash(staging / "state.json")})
        manifest = {
            "format": FORMAT,
            "global_step": state["global_step"],
            "permanent": state["permanent"],
            "files": entries,
        }
        atomic_write(staging / "manifest.json", json.dumps(manifest))
        for done in staging.glob("*.done"):
            done.unlink()
        if final.exists():  # a run that fell back to an older checkpoint comes by here again
            discarded = final.with_name(f".staging-replaced-{final.name}-{uuid.uuid4().hex[:8]}")
            final.rename(discarded)
            shutil.rmtree(discarded, ignore_errors=True)
        staging.rename(final)
        fsync_folder(self.root)
        _point(self.root.parent / "latest", final)
        if best:
            _point(self.root.parent / "best", final)
        self._prune()

    def _prune(self) -> None:
        """Removes all but the newest keep_last, the permanent ones and those that `best` and `latest` name."""
        kept = {p.resolve() for p in (self.root.parent / "best", self.root.parent / "latest") if p.exists()}
        manifests = {folder: _read_manifest(folder) for folder in newest_first(self.root)}
        # A folder that cannot be read is neither counted nor removed: somebody may want to look at it.
        candidates = [f for f, manifest in manifests.items() if manifest and not manifest.get("permanent", True)]
        for folder in candidates[self.keep_last :]:
            if folder.resolve() not in kept:
                # The manifest goes first: what is half removed is then no checkpoint.
                (folder / "manifest.json").unlink()
                shutil.rmtree(folder, ignore_errors=True)


def _wait_for_peers(staging: Path, world: int) -> list[dict[str, Any] | None]:
    paths = [staging / f"rank-{rank:05d}.done" for rank in range(world)]
    deadline = time.monotonic() + _PEERS_TIMEOUT_SECONDS
    while missing := [p.name for p in paths if not p.exists()]:
        for failed in staging.glob("*.failed"):
            raise EnvironmentProblem(f"{failed.stem} could not write its part of a checkpoint: {failed.read_text()}")
        if time.monotonic() > deadline:
            raise EnvironmentProblem(
                f"{staging}: after {_PEERS_TIMEOUT_SECONDS:.0f} s there is still no {missing[0]}: is the folder on a "
                "file system that all ranks share?"
            )
        time.sleep(0.02)
    return [json.loads(p.read_text()) for p in paths]


def _fsync_and_hash(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256") if hasattr(hashlib, "file_digest") else _digest(file)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _digest(file: Any) -> Any:
    digest = hashlib.sha256()  # Python 3.10 has no hashlib.file_digest
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest


def _point(link: Path, target: Path) -> None:
    """Makes link a relative symbolic link to target, by one rename."""
    temporary = link.with_name(f".{link.name}.{uuid.uuid4().hex[:8]}")
    temporary.symlink_to(os.path.relpath(target, link.parent))
    temporary.replace(link)


# --- choosing and reading ------------------------------------------------------------------------------------


def newest_first(root: Path) -> list[Path]:
    """Folders with a manifest, by the step they were made at; unreadable ones last."""
    folders = [p.parent for p in root.glob("*/manifest.json") if not p.parent.name.startswith(".")]
    return sorted(folders, key=_global_step, reverse=True)


def _global_step(folder: Path) -> int:
    manifest = _read_manifest(folder)
    return manifest["global_step"] if manifest else -1


def _read_manifest(folder: Path) -> dict[str, Any]:
    """A checkpoint's manifest, or {} if it is not readable or not ours."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        return manifest if isinstance(manifest["global_step"], int) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def verify(folder: Path) -> None:
    """Raises CorruptArtefact unless every file has the size and SHA-256 that the manifest says."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        files = manifest["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptArtefact(f"{folder}/manifest.json is not readable ({error})") from None
    if manifest.get("format") != FORMAT:
        raise CorruptArtefact(f"{folder} has format {manifest.get('format')!r}; this version reads {FORMAT!r}")
    for entry in files:
        path = folder / entry["file"]
        try:
            found = _fsync_and_hash(path)
        except OSError as error:
            raise CorruptArtefact(f"{path} is not readable ({error})") from None
        if found != {"bytes": entry["bytes"], "sha256": entry["sha256"]}:
            raise CorruptArtefact(
                f"{path} is not what was saved: {found['bytes']} bytes, SHA-256 {found['sha256'][:12]}…; the manifest "
                f"says {entry['bytes']}, {entry['sha256'][:12]}…"
            )


def choose(run_dir: Path, up_to_step: int | None = None) -> Path | None:
    """The newest checkpoint of a run that verifies; says which it passes over. None if there is none at all.

    up_to_step: none of a later global step. Raises CorruptArtefact if there are some but none verifies: never a silent
    start from step 0.
    """
    folders = newest_first(run_dir / "checkpoints")
    if up_to_step is not None:
        folders = [folder for folder in folders if _global_step(folder) <= up_to_step]
    for folder in folders:
        try:
            verify(folder)
            return folder
        except CorruptArtefact as error:
            log.warning("passing over a checkpoint: %s", error)
    if folders:
        raise CorruptArtefact(
            f"none of the {len(folders)} checkpoints in {run_dir}/checkpoints is whole, so there is nothing to go on from",
            fix="remove that folder to start from step 0, or restore it from a copy",
        )
    return None


def locate(path: str | Path) -> Path:
    """The checkpoint folder that a user means by a run directory, its latest/best link or the folder itself."""
    path = Path(path)
    if (path / "manifest.json").is_file() and (path / "state.json").is_file():
        verify(path)
        return path.resolve()
    if (path / "checkpoints").is_dir():
        chosen = choose(path)
        if chosen is not None:
            return chosen
    raise UserError(
        f"{path} is neither a run with a checkpoint nor a checkpoint",
        fix="give runs/NAME, runs/NAME/best or a folder in runs/NAME/checkpoints",
    )


class Reader:
    """Reads one checkpoint; fetches only the bytes that are asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state: dict[str, Any] = json.loads((folder / "state.json").read_text())
        self.shapes = {name: tuple(shape) for name, shape in self.state["shapes"].items()}
        # {"kind/name": [(start, length, file)]}
        self._where: dict[str, list[tuple[int, int, Path]]] = defaultdict(list)
        self._open: dict[Path, Any] = {}
        for path in sorted(folder.glob("rank-*.safetensors")):
            try:
                handle = safe_open(path, "pt").__enter__()
            except (SafetensorError, OSError) as error:
                raise CorruptArtefact(f"{path} is not a whole safetensors file ({error})") from None
            self._open[path] = handle
            for key in handle.keys():
                name, start = key.rsplit("@", 1)
                self._where[name].append((int(start), handle.get_slice(key).get_shape()[0], path))

    def read(self, kind: str, name: str, start: int, length: int) -> torch.Tensor:
        """Elements start..start+length of a flattened parameter's state: float32 1-D. Raises CorruptArtefact."""
        out = torch.empty(length, dtype=torch.float32)
        filled = 0
        for at, size, path in self._where.get(f"{kind}/{name}", []):
            low, high = max(start, at), min(start + length, at + size)
            if low < high:
                stored = self._open[path].get_slice(f"{kind}/{name}@{at}")
                out[low - start : high - start] = stored[low - at : high - at]
                filled += high - low
        if filled != length:
            raise CorruptArtefact(
                f"{self.folder}: {kind} of {name} has {filled} of the {length} elements wanted, so its pieces are not "
                "all there or the model has another shape"
            )
        return out

    def weight(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """A whole float32 weight. Raises UserError if the checkpoint's model has another shape."""
        self.check_shape(name, shape)
        return self.read("master", name, 0, torch.Size(shape).numel()).view(shape)

    @torch.no_grad()
    def fill(self, model: torch.nn.Module) -> None:
        """Copies the weights into a whole (not partitioned) model, in its dtype. Raises UserError for another shape."""
        for name, parameter in model.named_parameters():
            parameter.copy_(self.weight(name, tuple(parameter.shape)))

    def check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Raises UserError if the checkpoint's model has another shape there."""
        if self.shapes.get(name) != shape:
            raise UserError(
                f"{self.folder}: {name} has shape {self.shapes.get(name, 'nothing of the kind')}, but the recipe's model "
                f"has {shape}",
                fix="use the model section of the run that the checkpoint is from",
            )


def weight_source(path: str) -> tuple[Callable[[str, tuple[int, ...]], torch.Tensor], Reader | None]:
    """Weights of a Hugging Face folder or of a checkpoint of ours: (value(name, shape), Reader of ours or None)."""
    if (Path(path) / "config.json").is_file():
        from slm.model.hf import weight_reader

        return weight_reader(path), None
    # One rank chooses and verifies for all: the other run may be saving, and the ranks must not load different states.
    reader = Reader(parallel.first_rank_decides(locate, path))
    return reader.weight, reader
