"""The order: bijections, exact mixtures, and values that must never change from one version to the next."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from slm.data import order as order_module
from slm.data.order import PhaseOrder, derive_key, permute, phase_key

keys = st.integers(0, 2**64 - 1)
# Ordinary weights and tiny ones side by side.
weights_lists = st.lists(st.floats(1e-3, 1.0) | st.floats(1e-8, 1e-3) | st.just(0.0), min_size=1, max_size=6)


@given(st.integers(1, 2000), keys)
@settings(max_examples=60, deadline=None)
def test_permute_is_a_bijection(size, key):
    assert sorted(permute(i, size, key) for i in range(size)) == list(range(size))


@pytest.mark.parametrize("size", [*range(1, 20), 255, 256, 257, 1024, 1025, 2000])
def test_permute_is_a_bijection_at_the_edges(size):
    for key in (0, 1, 2**64 - 1):
        assert sorted(permute(i, size, key) for i in range(size)) == list(range(size))


def test_permute_shuffles():
    """Neither fixed points nor neighbours that stay neighbours, beyond what chance gives; other key, other order."""
    size = 2000
    first, second = ([permute(i, size, derive_key(k)) for i in range(size)] for k in (1, 2))
    assert sum(i == p for i, p in enumerate(first)) < 10
    assert sum(abs(a - b) == 1 for a, b in zip(first[:-1], first[1:], strict=True)) < 15
    assert sum(a == b for a, b in zip(first, second, strict=True)) < 10
    assert abs(np.corrcoef(np.arange(size), first)[0, 1]) < 0.1


def test_small_permutations_are_about_equally_likely():
    counts = Counter(tuple(permute(i, 3, derive_key(k)) for i in range(3)) for k in range(1200))
    assert len(counts) == 6
    assert min(counts.values()) > 140


@pytest.mark.parametrize("index", [-1, 7])
def test_permute_outside(index):
    with pytest.raises(ValueError, match="outside"):
        permute(index, 7, 0)


@given(weights_lists, st.integers(0, 10**6))
@settings(max_examples=300, deadline=None)
def test_quotas_are_exact_and_never_negative(weights, block):
    total = sum(weights)
    assume(total > 0)
    order = PhaseOrder([10] * len(weights), weights, key=1)
    size = order.block_size
    here = [order.quota(s, (block + 1) * size) - order.quota(s, block * size) for s in range(len(weights))]
    assert sum(here) == size
    for source, weight in enumerate(weights):
        # 2^-32 is the resolution of a weight; it adds up over indices, rounding does not.
        assert abs(here[source] - size * weight / total) < 2 + size / 2**32
        until = (block + 1) * size
        assert abs(order.quota(source, until) - until * weight / total) < 1 + until / 2**32
        assert here[source] >= (1 if weight else 0)


@given(st.lists(st.sampled_from([1.0, 0.5, 0.3, 0.01, 0.002, 0.0]), min_size=1, max_size=4), st.integers(0, 50), keys)
@settings(max_examples=25, deadline=None)
def test_a_block_holds_its_quotas(weights, block, key):
    assume(sum(weights) > 0)
    order = PhaseOrder([97] * len(weights), weights, key)
    size = order.block_size
    found = Counter(order.locate(k)[0] for k in range(block * size, (block + 1) * size))
    for source in range(len(weights)):
        assert found[source] == order.quota(source, (block + 1) * size) - order.quota(source, block * size)


@given(st.lists(st.tuples(st.integers(1, 300), st.floats(0.05, 1.0)), min_size=1, max_size=3), keys)
@settings(max_examples=12, deadline=None)
def test_nothing_is_repeated_within_an_epoch(sources, key):
    """All indices of some blocks: each (source, sequence, epoch) once, and every epoch but the last whole."""
    counts, weights = [list(column) for column in zip(*sources, strict=True)]
    order = PhaseOrder(counts, weights, key)
    located = [order.locate(k) for k in range(2 * order.block_size)]
    assert len(set(located)) == len(located)
    per_epoch = Counter((source, epoch) for source, _, epoch in located)
    last = {source: max(e for s, _, e in located if s == source) for source, _, _ in located}
    for (source, epoch), used in per_epoch.items():
        assert used <= counts[source]
        assert epoch == last[source] or used == counts[source]


def test_one_source_goes_epoch_by_epoch():
    order = PhaseOrder([50], [3.0], key=7)
    for epoch in range(4):
        located = [order.locate(k) for k in range(epoch * 50, (epoch + 1) * 50)]
        assert sorted(sequence for _, sequence, _ in located) == list(range(50))
        assert {e for _, _, e in located} == {epoch}
    assert [order.locate(k)[1] for k in range(50)] != [order.locate(k)[1] for k in range(50, 100)]


def test_any_place_of_a_run_can_be_asked_for(monkeypatch):
    """Constant work however far away, counted in permutations; a place at 10^18 is as valid as the first."""
    calls = []
    permute_itself = order_module.permute
    monkeypatch.setattr(order_module, "permute", lambda *args: calls.append(args) or permute_itself(*args))
    order = PhaseOrder([10**9, 10**7], [0.9, 0.1], key=3)
    for k in (0, 10**18):
        calls.clear()
        source, sequence, _ = order.locate(k)
        assert len(calls) == 2  # the place in the block, the sequence in the epoch
        assert 0 <= sequence < order.num_sequences[source]


@given(
    st.lists(st.tuples(st.integers(1, 300), st.sampled_from([1.0, 0.3, 0.01, 1e-4, 0.0])), min_size=1, max_size=4),
    st.integers(0, 10**15) | st.integers(0, 3000),
    st.integers(1, 1500),
    keys,
)
@settings(max_examples=60, deadline=None)
def test_many_places_at_once_are_the_places_one_by_one(sources, first, count, key):
    """Vectorised 64-bit arithmetic against Python's integers."""
    counts, weights = zip(*sources, strict=True)
    assume(sum(weights) > 0)
    order = PhaseOrder(list(counts), list(weights), key)
    many = zip(*(column.tolist() for column in order.locate_many(first, count)), strict=True)
    assert list(many) == [order.locate(k) for k in range(first, first + count)]


def test_index_types_do_not_matter():
    order = PhaseOrder([100, 30], [0.5, 0.5], key=3)
    assert order.locate(np.int64(123_456)) == order.locate(123_456)
    with pytest.raises(ValueError, match="negative"):
        order.locate(-1)


@pytest.mark.parametrize(
    ("counts", "weights"),
    [([1], [1.0, 1.0]), ([1, 1], [0.0, 0.0]), ([1, 1], [2.0, -1.0]), ([1, 0], [0.5, 0.5]), ([], []),
     ([1], [float("nan")]), ([1, 1], [1.0, 1e-12])],
)  # fmt: skip
def test_weights_that_make_no_mixture(counts, weights):
    with pytest.raises(ValueError, match="weight"):
        PhaseOrder(counts, weights, key=0)


def test_a_source_of_weight_0_may_be_empty():
    assert {PhaseOrder([5, 0], [1.0, 0.0], key=0).locate(k)[0] for k in range(100)} == {0}


def test_golden_keys():
    assert phase_key(np.int64(0), "a", ("f",)) == phase_key(0, "a", ["f"])
    assert phase_key(0, "a", ["f"]) == 7963824858101972569
    others = [(0, "a", ["f"]), (1, "a", ["f"]), (0, "b", ["f"]), (0, "a", ["g"]), (0, "a", ["f", "f"])]
    assert len({phase_key(*other) for other in others}) == 5


def test_golden_permutation():
    assert [permute(i, 10, 0) for i in range(10)] == [5, 2, 6, 0, 3, 7, 4, 8, 1, 9]
    assert [permute(i, 10**6, 2**64 - 1) for i in range(4)] == [160282, 547675, 676900, 186206]


def test_golden_order():
    order = PhaseOrder([1000, 50, 7], [0.7, 0.299, 0.001], key=phase_key(5, "main", ["p", "q", "r"]))
    assert order.block_size == 2000
    assert [order.locate(k) for k in (0, 1, 2, 1999, 2000, 123_456, 10**12)] == [
        (0, 499, 1), (0, 8, 1), (0, 864, 0), (1, 26, 0), (0, 412, 2), (0, 881, 85), (0, 569, 700000000),
    ]  # fmt: skip
