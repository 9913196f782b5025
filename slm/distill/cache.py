"""THE teacher-cache format: one `.kdc` file of what a teacher said at every token of a shard, cut at one piece length.

Owns reader and writer; nothing else in the project knows the bytes (docs/formats.md describes them). Row i belongs to token
i of the shard: the teacher's distribution of the token after it, given the same piece of its document that the student
will see. So it serves any packing, batch, order and number of ranks.

    writer = CacheWriter(path, spec, block_bounds(doc_offsets, 8192, 65536))
    with writer.claim(0) as mine: mine and writer.write_block(0, planes, sums)
    writer.finish()
    cache = Cache(path); cache.copy_into(planes, at=0, start=100, length=28)

The file: 64 KiB of JSON header; the planes, each one array over all tokens, at multiples of 4 KiB; a table of the blocks. Until
all blocks are there its name ends in `.partial`. Block b holds the pieces that start in [b, b + 1) * block_tokens.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from rich.filesize import decimal

from slm.data.packing import pieces_of
from slm.distill.codec import index_bits, value_range
from slm.errors import CorruptArtefact, EnvironmentProblem, UserError
from slm.runtime import fsync_folder

SCHEMA = "slm-teacher/1"
_MAGIC = b"SLMKDC1\n"
_HEADER_BYTES = 1 << 16
_PAGE = 4096
_TABLE = np.dtype([("done", "<u4"), ("crc32", "<u4"), ("num_targets", "<u8"), ("nll", "<f8"), ("entropy", "<f8"),
                   ("head_mass", "<f8")])  # fmt: skip


@dataclass(frozen=True)
class CacheSpec:
    """What a cache is of. Two with equal specs hold the same, so that one process may go on with another's file."""

    kind: Literal["top_k", "sampled"]
    k: int
    temperatures: tuple[float, ...]
    vocab_size: int
    num_tokens: int
    piece_length: int
    block_tokens: int
    seed: int
    teacher: dict[str, Any]
    tokenizer: str  # fingerprint
    shard: dict[str, Any]  # name, and SHA-256 of its tokens and of its index

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def at(self, piece_length: int) -> CacheSpec:
        return replace(self, piece_length=piece_length)

    def planes(self) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        """name: (dtype, shape of one row)."""
        P = len(self.temperatures) if self.kind == "sampled" else 1
        found: dict[str, tuple[str, tuple[int, ...]]] = {
            "idx_lo": ("<u2", (P, self.k)),
            "idx_hi": ("u1", (P, index_bits(self.vocab_size), -(-self.k // 8))),
            "val": ("u1", (P, self.k)),
            "log_tail": ("<f4", (len(self.temperatures),)),
            "label": ("<f2", ()),
            "tag": ("<u2", ()),
        }
        if self.kind == "sampled":
            found["heads"] = ("u1", (P,))
        return {name: (np.dtype(dtype), shape) for name, (dtype, shape) in found.items()}

    @property
    def bytes_per_token(self) -> int:
        return sum(dtype.itemsize * int(np.prod(shape)) for dtype, shape in self.planes().values())


@dataclass(frozen=True)
class Sums:
    """Over the tokens of a block, or of all, that predict one: of the teacher's loss, its entropy and the entries' mass."""

    num_targets: int
    nll: float
    entropy: float
    head_mass: float  # at the first temperature


def new_planes(spec: CacheSpec, num_tokens: int) -> dict[str, np.ndarray]:
    """Blank rows."""
    return {name: np.zeros((num_tokens, *shape), dtype) for name, (dtype, shape) in spec.planes().items()}


def block_bounds(doc_offsets: np.ndarray, piece_length: int, block_tokens: int) -> np.ndarray:
    """int64 [num_blocks + 1]: where blocks begin, each at the start of a piece. A long piece can leave some empty."""
    num_tokens = int(doc_offsets[-1])
    starts, _, _ = pieces_of(doc_offsets, piece_length)
    wanted = np.arange(0, num_tokens, block_tokens)
    found = np.searchsorted(starts, wanted)
    inner = np.append(starts, num_tokens)[found]
    inner[:1] = 0
    return np.append(inner, num_tokens).astype(np.int64)


@dataclass(frozen=True)
class _Layout:
    """Where everything stands in the file."""

    offsets: dict[str, int]
    table: int
    size: int

    @classmethod
    def of(cls, spec: CacheSpec, num_blocks: int) -> _Layout:
        at, offsets = _HEADER_BYTES, {}
        for name, (dtype, shape) in spec.planes().items():
            offsets[name] = at
            num_bytes = spec.num_tokens * dtype.itemsize * int(np.prod(shape))
            at = -(-(at + num_bytes) // _PAGE) * _PAGE
        return cls(offsets, at, at + num_blocks * _TABLE.itemsize)


def _header(spec: CacheSpec, bounds: np.ndarray) -> bytes:
    layout = _Layout.of(spec, len(bounds) - 1)
    planes = [
        {"name": name, "dtype": dtype.str, "shape": [spec.num_tokens, *shape], "offset": layout.offsets[name]}
        for name, (dtype, shape) in spec.planes().items()
    ]
    content = {
        "schema": SCHEMA,
        "spec": asdict(spec),
        "codec": {
            "values": "-range * (byte / 255)^2, less than the first entry of the row",
            "range_nats": value_range(spec.kind, spec.temperatures),
            "index": "idx_lo + bits of idx_hi << 16",
        },
        "shift": 1,
        "documents": "each piece alone, positions from 0",
        "planes": planes,
        "blocks": {"offset": layout.table, "dtype": _TABLE.descr, "count": len(bounds) - 1,
                   "bounds_sha256": hashlib.sha256(bounds.astype("<i8").tobytes()).hexdigest()},
    }  # fmt: skip
    text = json.dumps(content, sort_keys=True).encode()
    framed = _MAGIC + len(text).to_bytes(8, "little") + zlib.crc32(text).to_bytes(4, "little") + text
    if len(framed) > _HEADER_BYTES:
        raise ValueError(f"a header of {len(framed)} bytes; {_HEADER_BYTES} are kept for it")
    return framed.ljust(_HEADER_BYTES, b"\0")


def partial_path(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


# --- writing -------------------------------------------------------------------------------------------------


class CacheWriter:
    """Opens or begins PATH.partial; any number of processes may, each writing blocks of its own.

    Raises UserError if the file that is there is of another spec.
    """

    def __init__(self, path: Path, spec: CacheSpec, bounds: np.ndarray) -> None:
        self.path, self.spec, self.bounds = Path(path), spec, bounds
        self._layout = _Layout.of(spec, len(bounds) - 1)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._locks = open(self.path.with_name(f".{self.path.name}.lock"), "ab")
            with self._locked(len(bounds)):
                self._file = self._open()
        except OSError as error:
            raise EnvironmentProblem(
                f"{self.path} cannot be made: {error.strerror or error}",
                fix="set another folder for the teacher's cache",
            ) from None

    def _open(self) -> IO[bytes]:
        partial = partial_path(self.path)
        if self.path.exists():  # another process has just finished it
            return open(self.path, "r+b")
        header = _header(self.spec, self.bounds)
        if not partial.exists():
            for stale in partial.parent.glob(
                f".{partial.name}.*.tmp"
            ):  # of a process that was killed here; we hold the lock
                stale.unlink(missing_ok=True)
            # Under a name of its own first: who finds the file finds it whole.
            fresh = partial.with_name(f".{partial.name}.{os.getpid()}.tmp")
            with open(fresh, "wb") as begun:
                begun.write(header)
                _reserve(begun, self._layout.size)
                os.fsync(begun.fileno())
            os.replace(fresh, partial)
            fsync_folder(partial.parent)
        file = open(partial, "r+b")
        if file.read(_HEADER_BYTES) != header or os.fstat(file.fileno()).st_size != self._layout.size:
            file.close()
            raise UserError(
                f"{partial} was begun with other settings (kind, k, temperatures, teacher, tokens or block_tokens)",
                fix="put them back, or remove the file to begin anew",
            )
        return file

    @property
    def done(self) -> np.ndarray:
        """bool [num_blocks], of this moment, whoever did them."""
        return self._table()["done"] == 1

    def _table(self) -> np.ndarray:
        size = self._layout.size - self._layout.table
        return np.frombuffer(os.pread(self._file.fileno(), size, self._layout.table), _TABLE)

    @contextmanager
    def claim(self, block: int) -> Iterator[bool]:
        """True while this process holds the block's lock, False if another does. The kernel frees those of a dead one."""
        try:
            fcntl.lockf(self._locks, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, block)
        except (BlockingIOError, PermissionError):
            yield False
            return
        except OSError as error:
            raise self._no_locks(error) from None
        try:
            yield True
        finally:
            fcntl.lockf(self._locks, fcntl.LOCK_UN, 1, block)

    def _no_locks(self, error: OSError) -> EnvironmentProblem:
        return EnvironmentProblem(
            f"{self._locks.name} cannot be locked ({error.strerror}), so several processes could do the same work",
            fix="write to a file system with locks (for Lustre, mount it with -o flock)",
        )

    @contextmanager
    def _locked(self, place: int) -> Iterator[None]:
        try:
            fcntl.lockf(self._locks, fcntl.LOCK_EX, 1, place)
        except OSError as error:
            raise self._no_locks(error) from None
        try:
            yield
        finally:
            fcntl.lockf(self._locks, fcntl.LOCK_UN, 1, place)

    def write_block(self, block: int, planes: dict[str, np.ndarray], sums: Sums) -> None:
        """planes: the rows of tokens bounds[block] to bounds[block + 1]. Visible as done only once it is on the disk."""
        start = int(self.bounds[block])
        entry = np.array([(0, 0, sums.num_targets, sums.nll, sums.entropy, sums.head_mass)], _TABLE)
        crc = _sums_crc(entry)
        try:
            for name, (dtype, shape) in self.spec.planes().items():
                rows = np.ascontiguousarray(planes[name], dtype=dtype)
                assert rows.shape == (int(self.bounds[block + 1]) - start, *shape), name
                data = rows.tobytes()
                crc = zlib.crc32(data, crc)
                _write_at(self._file, data, self._layout.offsets[name] + start * dtype.itemsize * int(np.prod(shape)))
            entry["crc32"] = crc
            _write_at(self._file, entry.tobytes(), self._layout.table + block * _TABLE.itemsize)
            os.fdatasync(self._file.fileno())
            # "done" alone and last: torn by a failing machine, an entry must not say so of another's checksum.
            _write_at(self._file, entry["done"].dtype.type(1).tobytes(), self._layout.table + block * _TABLE.itemsize)
            os.fdatasync(self._file.fileno())
        except OSError as error:
            raise EnvironmentProblem(
                f"{partial_path(self.path)} cannot be written ({error.strerror})",
                fix="make room; the same command goes on",
            ) from None

    def finish(self) -> Path:
        """Gives the file its name; all blocks must be done."""
        assert self.done.all()
        with self._locked(len(self.bounds)):
            partial = partial_path(self.path)
            if partial.exists():
                os.fsync(self._file.fileno())
                os.replace(partial, self.path)
                fsync_folder(self.path.parent)
        self.close()
        return self.path

    def close(self) -> None:
        self._file.close()
        self._locks.close()


def _reserve(file: IO[bytes], size: int) -> None:
    """The file at its full length, without its blocks on the disk: writing them twice would take hours on some file systems."""
    disk = os.statvfs(file.name)
    if disk.f_bavail * disk.f_frsize < size:
        os.unlink(file.name)
        raise EnvironmentProblem(
            f"{file.name}: there is no room for {decimal(size)}, only for {decimal(disk.f_bavail * disk.f_frsize)}",
            fix="make room, use a smaller k or kind: sampled, or set another folder for the teacher's cache",
        )
    os.ftruncate(file.fileno(), size)


def _sums_crc(entry: np.ndarray) -> int:
    return zlib.crc32(b"".join(entry[name].tobytes() for name in ("num_targets", "nll", "entropy", "head_mass")))


def _write_at(file: IO[bytes], data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(file.fileno(), view, offset)
        view, offset = view[written:], offset + written


# --- reading -------------------------------------------------------------------------------------------------


def read_spec(path: Path) -> CacheSpec:
    """What a file says that it is of. Raises UserError, CorruptArtefact."""
    try:
        with open(path, "rb") as file:
            data = file.read(_HEADER_BYTES)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    if data[: len(_MAGIC)] != _MAGIC:
        raise CorruptArtefact(f"{path} does not begin as a teacher cache does", fix=ANEW)
    at = len(_MAGIC)
    length, crc = int.from_bytes(data[at : at + 8], "little"), int.from_bytes(data[at + 8 : at + 12], "little")
    text = data[at + 12 : at + 12 + length]
    if len(text) != length or zlib.crc32(text) != crc or data[at + 12 + length :].strip(b"\0"):
        raise CorruptArtefact(f"{path}: its header is damaged", fix=ANEW)
    header = json.loads(text)
    if header.get("schema") != SCHEMA:
        raise CorruptArtefact(f"{path} has schema {header.get('schema')!r}; this version reads {SCHEMA!r}")
    try:
        return CacheSpec(**{**header["spec"], "temperatures": tuple(header["spec"]["temperatures"])})
    except (KeyError, TypeError) as error:
        raise CorruptArtefact(f"{path}: its header lacks something ({error})", fix=ANEW) from None


class Cache:
    """A cache's rows, from memory maps. With allow_partial, also one that is not complete, or not there at all.

    Raises UserError if it is missing or not complete, CorruptArtefact if it is damaged.
    """

    def __init__(self, path: str | Path, *, doc_offsets: np.ndarray, allow_partial: bool = False) -> None:
        self.path = Path(path)
        if not self.path.exists():
            partial = partial_path(self.path)
            what = "is not complete" if partial.exists() else "does not exist"
            if not (allow_partial and partial.exists()):
                raise UserError(
                    f"the teacher cache {self.path} {what}",
                    fix="make it with: slm teacher RECIPE"
                    + (", or set loss.allow_partial" if partial.exists() else ""),
                )
            self.path = partial
        self.spec = read_spec(self.path)
        try:
            self.bounds = block_bounds(doc_offsets, self.spec.piece_length, self.spec.block_tokens)
            same = _header(self.spec, self.bounds)
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptArtefact(f"{self.path}: its header lacks something ({error})", fix=ANEW) from None
        if int(doc_offsets[-1]) != self.spec.num_tokens:
            raise CorruptArtefact(
                f"{self.path}: has rows for {self.spec.num_tokens} tokens, and its shard has {int(doc_offsets[-1])}",
                fix="make the cache of these shards with slm teacher, or name the right ones",
            )
        with open(self.path, "rb") as file:
            if file.read(_HEADER_BYTES) != same:
                raise CorruptArtefact(
                    f"{self.path}: its header is not the one of these documents, cut at {self.spec.piece_length}",
                    fix=ANEW,
                )
        self._layout = _Layout.of(self.spec, len(self.bounds) - 1)
        size = self.path.stat().st_size
        if size != self._layout.size:
            raise CorruptArtefact(f"{self.path}: has {size} bytes, and should have {self._layout.size}", fix=ANEW)
        self._maps = {
            name: np.asarray(
                np.memmap(self.path, dtype, "r", self._layout.offsets[name], (self.spec.num_tokens, *shape))
                if self.spec.num_tokens and 0 not in shape
                else np.empty((self.spec.num_tokens, *shape), dtype)
            )
            for name, (dtype, shape) in self.spec.planes().items()
        }
        if not self._table["done"].all() and self.path.suffix != ".partial":
            raise CorruptArtefact(f"{self.path}: its table lacks blocks, though it has its final name", fix=ANEW)

    @cached_property
    def _table(self) -> np.ndarray:
        with open(self.path, "rb") as file:
            file.seek(self._layout.table)
            return np.frombuffer(file.read(), _TABLE)

    @cached_property
    def missing(self) -> np.ndarray:
        """bool [num_blocks]."""
        return self._table["done"] != 1

    def missing_at(self, places: np.ndarray) -> np.ndarray:
        """bool: which of these tokens have no row yet."""
        return self.missing[self.block_of(places)]

    def block_of(self, places: np.ndarray) -> np.ndarray:
        """The block that holds each token's row."""
        return np.searchsorted(self.bounds, places, side="right") - 1

    @property
    def num_missing_tokens(self) -> int:
        return int(np.diff(self.bounds)[self.missing].sum())

    def plane(self, name: str) -> np.ndarray:
        """[num_tokens, ...], mapped."""
        return self._maps[name]

    def rows(self, places: Any) -> dict[str, np.ndarray]:
        """Of a slice or of chosen tokens, by plane."""
        return {name: plane[places] for name, plane in self._maps.items()}

    def copy_into(self, planes: dict[str, np.ndarray], at: int, start: int, length: int) -> None:
        """Puts the rows of tokens start … into rows at … of `planes` (new_planes of an equal row shape)."""
        for name, plane in self._maps.items():
            planes[name][at : at + length] = plane[start : start + length]

    def totals(self) -> Sums:
        """Over the blocks that are there."""
        table = self._table[~self.missing]
        return Sums(int(table["num_targets"].sum()), *(float(table[x].sum()) for x in ("nll", "entropy", "head_mass")))

    def verify(self) -> dict[int, str]:
        """Reads everything; what is wrong, in words, by block."""
        found = {block: self._problem_of(block) for block in range(len(self.bounds) - 1)}
        return {block: problem for block, problem in found.items() if problem}

    def forget(self, blocks: Iterable[int]) -> None:
        """Marks blocks as missing, so that `slm teacher` makes them, and only them, again. The file is partial from now on."""
        partial = partial_path(self.path) if self.path.suffix != ".partial" else self.path
        os.replace(self.path, partial)
        fsync_folder(partial.parent)
        with open(partial, "r+b") as file:
            for block in blocks:
                _write_at(file, bytes(_TABLE["done"].itemsize), self._layout.table + block * _TABLE.itemsize)
            os.fsync(file.fileno())

    def check_blocks(self, blocks: Iterable[int]) -> None:
        """Raises CorruptArtefact if one of these is not whole."""
        for block in blocks:
            if problem := self._problem_of(block):
                raise CorruptArtefact(problem, fix=REPAIR)

    def _problem_of(self, block: int) -> str:
        low, high = int(self.bounds[block]), int(self.bounds[block + 1])
        where = f"{self.path}: block {block} (tokens {low} to {high - 1})"
        if self.missing[block]:
            return f"{where} is missing"
        crc = _sums_crc(self._table[block : block + 1])
        for name in self.spec.planes():
            crc = zlib.crc32(np.ascontiguousarray(self._maps[name][low:high]).tobytes(), crc)
        if crc != int(self._table["crc32"][block]):
            return f"{where} is damaged: its checksum is {crc:08x}, written was {self._table['crc32'][block]:08x}"
        if np.isnan(self._maps["log_tail"][low:high]).any() or not np.isfinite(self._maps["label"][low:high]).all():
            return f"{where} holds a value that is not a number"
        return ""


ANEW = "remove the file, then: slm teacher RECIPE, which makes it anew"
REPAIR = "slm teacher verify RECIPE --repair, then slm teacher RECIPE, which makes the damaged blocks again"
