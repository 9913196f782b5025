"""The order of training sequences, as a pure function of an index: no state to save, none to lose.

Owns the keyed permutation and the mixture of sources. Imports no torch and reads no data.

    order = PhaseOrder([1000, 500], [0.7, 0.3], key=phase_key(seed, "main", plan_fingerprints))
    source, sequence, epoch = order.locate(123_456)
    sources, sequences, epochs = order.locate_many(1024 * 7, 1024)
"""

from __future__ import annotations

import functools
import hashlib
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

_WEIGHT_ONE = 1 << 32
_BLOCK = 1024  # sequences over which a mixture is exact
_ROUNDS = 8  # of the Feistel network; 4 do for wide halves (Luby and Rackoff, 1988) but not for a few bits
_MASK64 = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio: splitmix64's step


def permute(index: int, size: int, key: int) -> int:
    """A keyed bijection of [0, size): a Feistel network over an even number of bits, walked until inside."""
    # Python's own integers: numpy's would overflow in the products below.
    index, size, key = operator.index(index), operator.index(size), operator.index(key)
    if not 0 <= index < size:
        raise ValueError(f"index {index} is outside [0, {size})")
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    half_mask = (1 << half_bits) - 1
    value = index
    while True:
        left, right = value >> half_bits, value & half_mask
        for round_number in range(_ROUNDS):
            left, right = right, left ^ (_mix(right, key, round_number) & half_mask)
        value = left << half_bits | right
        if value < size:  # the domain is at most 4 times as large, so the walk is short
            return value


def permute_many(indices: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """permute() of many indices at once, each under its own key. int64 [n] in [0, size), uint64 [n] -> int64 [n]."""
    half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    half_mask = np.uint64((1 << int(half_bits)) - 1)
    values = indices.astype(np.uint64)
    walking = np.arange(len(values))  # those that are not inside yet
    with np.errstate(over="ignore"):
        while len(walking):
            left, right = values[walking] >> half_bits, values[walking] & half_mask
            for round_number in range(_ROUNDS):
                mixed = mix_many(right, keys[walking] + np.uint64((round_number + 1) * GOLDEN & _MASK64))
                left, right = right, left ^ (mixed & half_mask)
            values[walking] = left << half_bits | right
            walking = walking[values[walking] >= size]
    return values.astype(np.int64)


def mix_many(values: np.ndarray, added: np.ndarray | np.uint64) -> np.ndarray:
    """splitmix64's finaliser over values + added, modulo 2^64. uint64 [n]."""
    with np.errstate(over="ignore"):
        x = values + added
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def _mix(value: int, key: int, round_number: int) -> int:
    """splitmix64's finaliser over value, key and round."""
    x = (value + key + (round_number + 1) * GOLDEN) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


@functools.lru_cache(maxsize=256, typed=True)  # the keys of one epoch or block are asked for again and again
def derive_key(*parts: object) -> int:
    """64 bits from strings, integers and tuples of them."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little")


def phase_key(seed: int, phase: str, plan_fingerprints: Sequence[str]) -> int:
    """The key of a phase: other seed, name or packing, other order."""
    return derive_key("phase", operator.index(seed), phase, tuple(plan_fingerprints))


@dataclass(frozen=True)
class PhaseOrder:
    """Index k of a phase -> (source, sequence within it, epoch of that source).

    Mixture: in every block of `block_size` indices source i stands as often as its weight says, exactly up to
    rounding that does not add up; inside a block the places are permuted. A source's own sequences come in a
    permutation of each epoch: none is repeated before all were used (in a mixture, up to the shuffle of the
    block in which an epoch ends).
    """

    num_sequences: list[int]
    weights: list[float]
    key: int
    block_size: int = field(init=False)
    _bounds: list[int] = field(init=False)  # cumulative integer weights, 0 … 2^32

    def __post_init__(self) -> None:
        total = math.fsum(self.weights)  # rounded once, so the same in every version of Python
        if len(self.num_sequences) != len(self.weights) or not total > 0 or min(self.weights) < 0:
            raise ValueError(f"weights {self.weights} do not fit {len(self.num_sequences)} sources")
        for count, weight in zip(self.num_sequences, self.weights, strict=True):
            if weight > 0 and count < 1:
                raise ValueError(f"a source of weight {weight} has no sequences")
        ends = range(1, len(self.weights) + 1)
        bounds = [0, *(round(math.fsum(self.weights[:end]) / total * _WEIGHT_ONE) for end in ends)]
        smallest = min(w for w in self.weights if w > 0) / total
        if smallest * _WEIGHT_ONE < 2:  # rounded to an integer it could be 0
            raise ValueError(f"weights {self.weights} are too far apart: the least is {smallest:g} of their sum")
        object.__setattr__(self, "_bounds", bounds)
        # With 2 or more of the rarest source in a block, rounding never makes a count negative.
        object.__setattr__(self, "block_size", max(_BLOCK, math.ceil(2 / smallest)))

    def quota(self, source: int, index: int) -> int:
        """How many of the first `index` places (a multiple of the block size) belong to a source."""
        low, high = self._bounds[source], self._bounds[source + 1]
        return _rounded(index * high) - _rounded(index * low)

    def locate(self, index: int) -> tuple[int, int, int]:
        """In constant time for any index >= 0."""
        block, place = divmod(operator.index(index), self.block_size)
        if block < 0:
            raise ValueError(f"index {index} is negative")
        if len(self.weights) > 1:
            place = permute(place, self.block_size, derive_key(self.key, "block", block))
        for source in range(len(self.weights)):
            before = self.quota(source, block * self.block_size)
            here = self.quota(source, (block + 1) * self.block_size) - before
            if place < here:
                epoch, at = divmod(before + place, self.num_sequences[source])
                key = derive_key(self.key, "source", source, epoch)
                return source, permute(at, self.num_sequences[source], key), epoch
            place -= here
        raise AssertionError("the quotas of a block do not add up to its size")

    def locate_many(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """locate() of `count` consecutive indices: (sources, sequences, epochs), each int64 [count]."""
        found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        while count > 0:
            block, place = divmod(first, self.block_size)
            here = min(count, self.block_size - place)
            found.append(self._in_block(block, np.arange(place, place + here)))
            first, count = first + here, count - here
        sources, sequences, epochs = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return sources, sequences, epochs

    def _in_block(self, block: int, places: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if len(self.weights) > 1:
            key = np.full(len(places), derive_key(self.key, "block", block), np.uint64)
            places = permute_many(places, self.block_size, key)
        before = [self.quota(source, block * self.block_size) for source in range(len(self.weights))]
        after = [self.quota(source, (block + 1) * self.block_size) for source in range(len(self.weights))]
        ends = np.cumsum([b - a for a, b in zip(before, after, strict=True)])
        sources = np.searchsorted(ends, places, side="right")
        sequences, epochs = np.empty_like(places), np.empty_like(places)
        for source in np.unique(sources).tolist():
            own = sources == source
            drawn = places[own] - (ends[source] - (after[source] - before[source])) + before[source]
            size = self.num_sequences[source]
            epochs[own], at = drawn // size, drawn % size
            of_epoch, nth = np.unique(epochs[own], return_inverse=True)
            keys = np.array([derive_key(self.key, "source", source, epoch) for epoch in of_epoch.tolist()], np.uint64)
            sequences[own] = permute_many(at, size, keys[nth])
        return sources, sequences, epochs


def _rounded(scaled: int) -> int:
    return (scaled + _WEIGHT_ONE // 2) // _WEIGHT_ONE
