"""Exact duplicates over a whole corpus: of equal documents the first in the order of the input stays.

Owns the files of hashes, one a unit, and what is found in them; the hashing is units.py's. Memory is bounded: hashes are
compared in buckets.

    write_duplicates(units_folder, num_units=128)
    dropped = np.fromfile(dropped_path(units_folder, 5), "<i8")    # documents of unit 5, counted from 0
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from slm.runtime import atomic_write

HASH_BYTES = 16  # of SHA-256: for 10^12 documents two different ones are alike by chance once in 10^14
_BUCKET_HASHES = 1 << 23  # held at once: 128 MiB, and about as much again for their order


def hashes_path(units: Path, index: int) -> Path:
    return units / f"{index:05d}.hashes"


def dropped_path(units: Path, index: int) -> Path:
    return units / f"{index:05d}.dropped"


def found_path(units: Path) -> Path:
    """Written last, when every unit has its list."""
    return units / "duplicates.found"


def write_duplicates(units: Path, num_units: int, bucket_hashes: int = _BUCKET_HASHES) -> int:
    """Writes for each unit which of its documents an earlier one equals; their number."""
    total = sum(hashes_path(units, i).stat().st_size for i in range(num_units)) // HASH_BYTES
    num_buckets = max(1, -(-total // bucket_hashes))
    dropped: list[list[np.ndarray]] = [[] for _ in range(num_units)]
    for bucket in range(num_buckets):
        hashes, owners, numbers = [], [], []
        for unit in range(num_units):
            own = np.fromfile(hashes_path(units, unit), "<u8").reshape(-1, 2)
            here = np.flatnonzero(own[:, 0] % num_buckets == bucket)
            hashes.append(own[here])
            owners.append(np.full(len(here), unit, dtype=np.int32))
            numbers.append(here)
        alike, owner, number = np.concatenate(hashes), np.concatenate(owners), np.concatenate(numbers)
        order = np.lexsort((alike[:, 1], alike[:, 0]))  # stable, so equal ones stay in the order of the input
        ordered = alike[order]
        again = order[1:][(ordered[1:] == ordered[:-1]).all(1)]
        for unit in np.unique(owner[again]).tolist():
            dropped[unit].append(number[again[owner[again] == unit]])
    for unit in range(num_units):
        found = np.sort(np.concatenate([np.zeros(0, np.int64), *dropped[unit]])).astype("<i8")
        atomic_write(dropped_path(units, unit), found.tobytes())
    num_found = sum(len(part) for parts in dropped for part in parts)
    atomic_write(found_path(units), f"{num_found}\n")
    return num_found
