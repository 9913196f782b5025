"""Checkpoints as they lie on the disk: which of them is whole, which to go on from, and what is in it.

Owns the format of `checkpoints/PHASE-STEP/`, its verification, the choice of what to resume from, and reading. Saving them
is in saving.py; neither knows DeepSpeed.

    folder = choose(run_dir)                       # the newest that verifies
    reader = Reader(folder)
    engine.write_state(reader.read)                # reads the bytes that this rank needs, and no others

A folder holds rank-NNNNN.safetensors (tensors "KIND/NAME@START", 1-D float32), state.json, and manifest.json with the
size and SHA-256 of each file and of itself. A folder without a manifest is not a checkpoint.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import re
import socket
import stat
from collections import defaultdict
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Any

import torch

from slm import parallel
from slm.engine import STATE_KINDS
from slm.errors import CorruptArtefact, EnvironmentProblem, UserError
from slm.runtime import fsync_folder

log = logging.getLogger("slm")

FORMAT = "slm-checkpoint/2"
_READABLE = (
    FORMAT,
    "slm-checkpoint/1",
)  # 1 had no checksum of the manifest and named no optimiser; the rest is the same
OPTIMIZER = "adamw"  # whose state the tensors are: the only one that engine.py builds


def folder_name(phase: str, step: int) -> str:
    return f"{phase}-{step:08d}"


# --- the manifest, and what it promises --------------------------------------------------------------------------


def manifest_text(manifest: dict[str, Any]) -> str:
    """The bytes of manifest.json: the fields, and a checksum over them, without which a flipped digit would be believed."""
    fields = {key: value for key, value in manifest.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(fields).encode()).hexdigest()
    return json.dumps({**fields, "sha256": digest})


def read_manifest(folder: Path) -> dict[str, Any]:
    """A checkpoint's manifest. Raises CorruptArtefact unless it is whole, UserError if another version of slm wrote it."""
    path = folder / "manifest.json"
    try:
        text = path.read_text()
        manifest = json.loads(text)
        version, files, step = manifest["format"], manifest["files"], manifest["global_step"]
        names = [entry["file"] for entry in files]
        if not isinstance(step, int) or not all(isinstance(entry["bytes"], int) and entry["sha256"] for entry in files):
            raise TypeError("a field is of another type")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptArtefact(f"{path} is not readable ({type(error).__name__}: {error})") from None
    # Of what is not ours nothing more is asked than that it is what its writer wrote.
    is_whole = text == manifest_text(manifest)
    if version not in _READABLE and is_whole and re.fullmatch(r"slm-checkpoint/\d+", str(version)):
        raise UserError(
            f"{path} has format {version!r}, and this version of slm reads {' and '.join(_READABLE)}: it cannot know what "
            "the state means",
            fix="go on with the version of slm that wrote it, or move that folder away to go on from the one before",
        )
    if version not in _READABLE or (version == FORMAT and not is_whole):
        raise CorruptArtefact(f"{path} is not what was saved: its checksum is of another text")
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", name):
            raise CorruptArtefact(f"{path} names the file {name!r}, which is no plain name of a file in its folder")
    if len(set(names)) != len(names) or "state.json" not in names:
        raise CorruptArtefact(f"{path} names a file twice, or no state.json")
    return manifest


def file_digest(path: Path) -> dict[str, Any]:
    """{"bytes", "sha256"} of a file."""
    digest, num_bytes = hashlib.sha256(), 0
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(4 << 20):
            digest.update(chunk)
            num_bytes += len(chunk)
    return {"bytes": num_bytes, "sha256": digest.hexdigest()}


def _verify_file(folder: Path, entry: dict[str, Any]) -> None:
    path = folder / entry["file"]
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise CorruptArtefact(
                f"{path} is a link or no file at all: what is read must lie in the checkpoint's folder"
            )
        found = file_digest(path)
    except OSError as error:
        raise CorruptArtefact(f"{path} is not readable ({error})") from None
    if found != {"bytes": entry["bytes"], "sha256": entry["sha256"]}:
        raise CorruptArtefact(
            f"{path} is not what was saved: {found['bytes']} bytes, SHA-256 {found['sha256'][:12]}…; the manifest "
            f"says {entry['bytes']}, {entry['sha256'][:12]}…"
        )


def verify(folder: Path, rank: int = 0, world_size: int = 1) -> None:
    """Raises CorruptArtefact unless every file, of this rank's part, has the size and SHA-256 that the manifest says."""
    loads = [0] * world_size
    for entry in sorted(read_manifest(folder)["files"], key=lambda entry: (-entry["bytes"], entry["file"])):
        lightest = loads.index(min(loads))
        loads[lightest] += entry["bytes"]
        if lightest == rank:
            _verify_file(folder, entry)


def _verify_together(folder: Path) -> None:
    """verify, of which each rank does a part; all raise what one of them found."""
    theirs = parallel.broadcast(_text(folder))
    parallel.together(_check_shared, folder, theirs)
    parallel.together(verify, folder, parallel.rank(), parallel.world_size())


def _check_shared(folder: Path, text: str) -> None:
    if _text(folder) != text:
        raise EnvironmentProblem(
            f"rank {parallel.rank()} on {socket.gethostname()} does not see the {folder}/manifest.json that rank 0 sees: the "
            "ranks would go on from different states",
            fix="put the run directory (output) on a file system that all ranks share",
        )


def _text(folder: Path) -> str:
    try:
        return (folder / "manifest.json").read_text(errors="replace")
    except OSError:
        return ""


# --- choosing ------------------------------------------------------------------------------------------------


def newest_first(root: Path) -> list[Path]:
    """Folders with a manifest, by the step they were made at; unreadable ones last."""
    folders = [
        p.parent
        for p in root.glob("*/manifest.json")
        if not p.parent.name.startswith(".") and not re.search(r"\.damaged(-\d+)?$", p.parent.name)
    ]
    return sorted(folders, key=_global_step, reverse=True)


def _global_step(folder: Path) -> int:
    """As the manifest says, believed or not: a checkpoint of a newer slm must come up, to be refused by name."""
    try:
        step = json.loads((folder / "manifest.json").read_text())["global_step"]
        return step if isinstance(step, int) else -1
    except (OSError, ValueError, KeyError, TypeError):
        return -1


def recover(root: Path) -> None:
    """Puts in place, newest first, what a killed save left whole where there is no checkpoint of its name: the new one that was
    about to get it, or the old one that had it. By the run that owns the folder, while none of its saves is under way."""

    def age(folder: Path) -> int:
        return -(folder / "manifest.json").stat().st_mtime_ns

    for leftover in sorted((path.parent for path in root.glob(".staging-*/manifest.json")), key=age):
        match = re.fullmatch(r"\.staging-(?:replaced-)?(.+-\d+)-[0-9a-f]{8}", leftover.name)
        if match is None or os.path.lexists(final := root / match[1]):
            continue
        try:
            verify(leftover)
        except (CorruptArtefact, UserError):
            continue
        leftover.rename(final)
        fsync_folder(root)
        log.warning("%s was left whole by a save that was killed as it was committed: it is put in place", final)


def manifest_or_none(folder: Path) -> dict[str, Any] | None:
    """A checkpoint's manifest, or None if it is not readable or not ours."""
    try:
        return read_manifest(folder)
    except (CorruptArtefact, UserError):
        return None


def choose(run_dir: Path, *, own: bool = False) -> Path | None:
    """The newest checkpoint of a run that verifies; says which it passes over. None if there is none at all.

    own: asked by the run itself, with none of its saves under way. What a killed save left whole is then put in place before,
    and what is passed over is renamed NAME.damaged, which is no checkpoint.
    Raises CorruptArtefact if there are some but none verifies: never a silent start from step 0. UserError if one is of
    another version of slm, which may be newer than all the others.
    """
    root = run_dir / "checkpoints"
    folders = _recovered(root) if own else newest_first(root)
    chosen = _first_whole(run_dir, folders, verify)
    if own and chosen is not None:
        _set_aside(folders[: folders.index(chosen)])
    return chosen


def choose_together(run_dir: Path, up_to_step: int | None = None) -> Path | None:
    """choose with own, by all ranks: rank 0 lists, and each rank reads through a part of the files. up_to_step: none of a
    later global step."""
    folders = parallel.first_rank_decides(_recovered, run_dir / "checkpoints", up_to_step)
    chosen = _first_whole(run_dir, folders, _verify_together)
    if chosen is not None:
        parallel.first_rank_decides(_set_aside, folders[: folders.index(chosen)])
    return chosen


def _set_aside(damaged: list[Path]) -> None:
    """Renames what was found not whole, so that retention does not keep it in place of an older one that is."""
    for folder in damaged:
        number, to = 1, folder.with_name(f"{folder.name}.damaged")
        while os.path.lexists(to):
            number += 1
            to = folder.with_name(f"{folder.name}.damaged-{number}")
        try:
            folder.rename(to)
        except OSError as error:
            log.warning("%s cannot be renamed, and counts toward checkpoint.keep_last: %s", folder, error)
        else:
            log.warning("%s is kept as %s: look at it, or remove it", folder, to.name)


def _recovered(root: Path, up_to_step: int | None = None) -> list[Path]:
    recover(root)
    return [folder for folder in newest_first(root) if up_to_step is None or _global_step(folder) <= up_to_step]


def _first_whole(run_dir: Path, folders: list[Path], check: Callable[[Path], None]) -> Path | None:
    for folder in folders:
        try:
            check(folder)
            return folder
        except CorruptArtefact as error:
            if parallel.rank() == 0:
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


def locate_best(path: str | Path) -> Path:
    """As `locate`, but of a run the best one, if there is one yet."""
    best = Path(path) / "best"
    return locate(best if (best / "manifest.json").is_file() else path)


# --- reading -------------------------------------------------------------------------------------------------


class Reader:
    """Reads one checkpoint; fetches only the bytes that are asked for, and counts them in `bytes_read`.

    Files are read by position, not mapped: a map reads whole pages and what the kernel reads ahead of them, and a file that
    is cut short under it kills the process instead of raising. They stay open: `latest` may move on, and retention remove the
    folder, while this reads. weights_only: as if it held no moments.
    """

    def __init__(self, folder: Path, *, weights_only: bool = False) -> None:
        self.folder = folder = folder.resolve()
        self.weights_only = weights_only
        self.bytes_read = 0
        self.manifest = read_manifest(folder)
        self.state: dict[str, Any] = self._read_state()
        self.shapes = {name: tuple(shape) for name, shape in self.state["shapes"].items()}
        # {"kind/name": [(start, length, file, place of its first byte there)]}. Nothing but what the manifest names is read.
        self._where: dict[str, list[tuple[int, int, FileIO, int]]] = defaultdict(list)
        for entry in self.manifest["files"]:
            if entry["file"].endswith(".safetensors"):
                self._read_header(folder / entry["file"], entry["bytes"])
        for key, pieces in self._where.items():
            # Elements that are there twice would be counted for others that are not there at all.
            pieces.sort(key=lambda piece: piece[:2])
            for (at, size, *_), (after, *_) in itertools.pairwise(pieces):
                if at + size > after:
                    raise CorruptArtefact(f"{folder}: two pieces of {key} overlap at element {after}")

    def _read_state(self) -> dict[str, Any]:
        """Verified here, as sizes of the large files are below: all that is cheap, where nobody has done it, as after a phase."""
        path = self.folder / "state.json"
        digest = next(entry["sha256"] for entry in self.manifest["files"] if entry["file"] == path.name)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise CorruptArtefact(f"{path} is not readable ({error})") from None
        if hashlib.sha256(data).hexdigest() != digest:
            raise CorruptArtefact(f"{path} is not what was saved: its checksum is of another text")
        return json.loads(data)

    def _read_header(self, path: Path, num_bytes_promised: int) -> None:
        """https://github.com/huggingface/safetensors#format: u64 N, N bytes of JSON, then the values."""
        try:
            file = open(path, "rb", buffering=0)
            found = os.fstat(file.fileno()).st_size
            if found != num_bytes_promised:
                raise ValueError(f"it has {found} bytes, and the manifest says {num_bytes_promised}")
            rest = found - 8
            num_bytes = int.from_bytes(file.read(8), "little")
            if num_bytes > rest:
                raise ValueError(f"it says that its header has {num_bytes} bytes, and {rest} are left")
            rest -= num_bytes
            header = json.loads(file.read(num_bytes))
            header.pop("__metadata__", None)
            for key, tensor in header.items():
                name, start = key.rsplit("@", 1)
                first, end = tensor["data_offsets"]
                if tensor["dtype"] != "F32" or tensor["shape"] != [(end - first) // 4] or (end - first) % 4:
                    raise ValueError(f"{key} is not 1-D float32")
                if not 0 <= first <= end <= rest or int(start) < 0:
                    raise ValueError(f"{key} lies outside its file or its parameter")
                self._where[name].append((int(start), (end - first) // 4, file, 8 + num_bytes + first))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CorruptArtefact(f"{path} is not a whole safetensors file ({error})") from None
        self.bytes_read += 8 + num_bytes

    @property
    def num_bytes(self) -> int:
        """Of all its files."""
        return sum(entry["bytes"] for entry in self.manifest["files"])

    def read(self, kind: str, name: str, start: int, length: int) -> torch.Tensor:
        """Elements start..start+length of a flattened parameter's state: float32 1-D. Raises CorruptArtefact."""
        out = torch.empty(length, dtype=torch.float32)
        filled = 0
        for at, size, file, first_byte in self._where.get(f"{kind}/{name}", []):
            low, high = max(start, at), min(start + length, at + size)
            if low < high:
                self._fill(out[low - start : high - start], file, first_byte + 4 * (low - at))
                filled += high - low
        if filled != length:
            raise CorruptArtefact(
                f"{self.folder}: {kind} of {name} has {filled} of the {length} elements wanted, so its pieces are not "
                "all there or the model has another shape"
            )
        return out

    def _fill(self, out: torch.Tensor, file: FileIO, first_byte: int) -> None:
        rest = out.numpy().data.cast("B")
        file.seek(first_byte)
        while rest:  # one call reads 2 GiB at most
            count = file.readinto(rest)
            if not count:
                raise CorruptArtefact(f"{file.name!r} ends {len(rest)} bytes before a piece of it does")
            self.bytes_read += count
            rest = rest[count:]

    def missing_state(self) -> list[str]:
        """What a resume with this optimiser needs and the checkpoint does not hold, as KIND/NAME."""
        held = {key: sum(size for _, size, _, _ in pieces) for key, pieces in self._where.items()}
        return [
            f"{kind}/{name}"
            for kind in STATE_KINDS
            for name, shape in self.shapes.items()
            if held.get(f"{kind}/{name}", 0) != torch.Size(shape).numel()
        ]

    def check_optimizer(self) -> None:
        """Raises UserError unless a run with AdamW can go on from here."""
        where, optimizer = f"{self.folder} ({self.manifest['format']})", self.state.get("optimizer", OPTIMIZER)
        fix = "slm train --fresh-optimizer takes its weights and begins with moments of zero"
        if self.weights_only:
            return
        if optimizer != OPTIMIZER:
            raise UserError(
                f"{where} was made with the optimiser {optimizer!r}, whose state means nothing to {OPTIMIZER!r}",
                fix=fix,
            )
        if missing := self.missing_state():
            raise UserError(
                f"{where} lacks {len(missing)} of the tensors that the optimiser {OPTIMIZER!r} goes on from, such as "
                f"{missing[0]}",
                fix=fix,
            )

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
