"""Packing: every token once, nothing over capacity, as few sequences as best-fit decreasing can make."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slm.data.packing import best_fit, pack

shards_of_lengths = st.lists(st.lists(st.integers(0, 70), max_size=25), min_size=1, max_size=3)


def offsets(lengths):
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def pieces_of(plan, sequence):
    return range(plan.sequence_offsets[sequence], plan.sequence_offsets[sequence + 1])


def simple_best_fit(lengths, capacity):
    """Rooms left, by definition: longest first, into the sequence with the least room that is enough."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting, key=lambda i: rooms[i])] -= length
        else:
            rooms.append(capacity - length)
    return sorted(rooms)


@given(shards_of_lengths, st.integers(1, 40), st.integers(0, 20), st.none() | st.integers(20, 60), st.integers(1, 30))
@settings(max_examples=200, deadline=None)
def test_every_kept_token_once(lengths_by_shard, seq_len, least, most, block_pieces):
    plan = pack(
        [offsets(lengths) for lengths in lengths_by_shard],
        seq_len,
        min_doc_tokens=least,
        max_doc_tokens=most,
        block_pieces=block_pieces,
    )
    expected, dropped, filtered = {}, 0, 0  # (shard, start) -> (length, is last)
    for shard, lengths in enumerate(lengths_by_shard):
        for start, length in zip(offsets(lengths)[:-1].tolist(), lengths, strict=True):
            if not least <= length <= (most or length):
                filtered += length
                continue
            for cut in range(0, length, seq_len):
                piece = min(seq_len, length - cut)
                last = cut + piece == length
                if last and piece == 1:
                    dropped += 1
                else:
                    expected[shard, start + cut] = (piece, last)
    columns = (plan.piece_shard, plan.piece_start, plan.piece_length, plan.piece_is_last)
    pieces = list(zip(*(column.tolist() for column in columns), strict=True))
    assert len(pieces) == len(expected)  # so no piece stands twice
    assert {(shard, start): rest for shard, start, *rest in pieces} == {k: list(v) for k, v in expected.items()}
    used = [int(plan.piece_length[pieces_of(plan, s)].sum()) for s in range(plan.num_sequences)]
    assert all(0 < n <= seq_len for n in used)
    assert plan.num_tokens == sum(used)
    assert plan.num_padding == plan.num_sequences * seq_len - sum(used)
    assert (plan.num_dropped, plan.num_filtered) == (dropped, filtered)
    assert plan.num_tokens + dropped + filtered == sum(map(sum, lengths_by_shard))
    assert plan.max_pieces_per_sequence == max((len(pieces_of(plan, s)) for s in range(plan.num_sequences)), default=0)
    assert (plan.sequence_offsets[0], plan.sequence_offsets[-1]) == (0, len(pieces))


@given(st.integers(1, 2000), st.data())
@settings(max_examples=200, deadline=None)
def test_best_fit_is_best_fit_decreasing(capacity, data):
    lengths = data.draw(st.lists(st.integers(1, capacity) | st.integers(1, min(capacity, 9)), max_size=120))
    order, sizes = best_fit(np.array(lengths, dtype=np.int32), capacity)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    ends = np.cumsum(sizes)
    parts = np.split(np.array(lengths, dtype=np.int64)[order], ends[:-1]) if len(sizes) else []
    assert sorted(capacity - int(part.sum()) for part in parts) == simple_best_fit(lengths, capacity)


@pytest.mark.parametrize("capacity", [512, 8192, 131072])
def test_best_fit_at_real_sizes(capacity):
    lengths = np.minimum(capacity, np.random.default_rng(1).lognormal(6, 1.2, 1500).astype(np.int64) + 2)
    _, sizes = best_fit(lengths, capacity)
    assert len(sizes) == len(simple_best_fit(lengths.tolist(), capacity))


def test_documents_are_cut_at_multiples_from_their_own_start():
    plan = pack([np.array([100, 125])], 10)
    columns = (plan.piece_start.tolist(), plan.piece_length.tolist(), plan.piece_is_last.tolist())
    assert sorted(zip(*columns, strict=True)) == [(100, 10, False), (110, 10, False), (120, 5, True)]


def test_a_tail_of_one_token_is_dropped_and_stays_a_label():
    plan = pack([offsets([21])], 10)
    assert (plan.num_sequences, plan.num_dropped, plan.num_tokens, plan.num_padding) == (2, 1, 20, 0)
    assert not plan.piece_is_last.any()  # the token after the second piece is its last label


def test_filters_are_inclusive():
    plan = pack([offsets([3, 4, 5, 6, 7])], 8, min_doc_tokens=4, max_doc_tokens=6)
    assert sorted(plan.piece_length.tolist()) == [4, 5, 6]
    assert plan.num_filtered == 10


@pytest.mark.parametrize("shards", [[], [np.zeros(1, np.int64)], [offsets([0, 0])], [offsets([1])]])
def test_nothing_to_pack(shards):
    plan = pack(shards, 8)
    assert (plan.num_sequences, plan.num_tokens, plan.num_padding, plan.max_pieces_per_sequence) == (0, 0, 0, 0)
    assert plan.sequence_offsets.tolist() == [0]


def test_sizes_must_be_positive():
    with pytest.raises(ValueError, match="positive"):
        pack([offsets([5])], 0)


def test_golden_plan():
    """The order of training hangs on the plan: it must not change from one version to the next."""
    shards = [offsets((np.arange(400) * k % 997) + 2) for k in (37, 101)]
    plan = pack(shards, 256, block_pieces=300)
    assert plan.fingerprint == pack(shards, 256, block_pieces=300).fingerprint
    assert (plan.num_sequences, plan.num_tokens, plan.num_dropped) == (1557, 394952, 1)
    assert plan.fingerprint == "3c04c4295daab9ce1c8572ddb987b31c2d974842cbd0288b035b9e219f804359"


def test_fingerprint_is_of_the_plan():
    base = pack([offsets([9, 5, 30])], 16).fingerprint
    assert pack([offsets([9, 5, 30])], 16, max_doc_tokens=99).fingerprint == base
    assert pack([offsets([9, 5, 30])], 17).fingerprint != base
    assert pack([offsets([5, 9, 30])], 16).fingerprint != base
    assert pack([offsets([9, 5]), offsets([30])], 16).fingerprint != base


def test_fits_closely_at_scale():
    lengths = np.random.default_rng(0).lognormal(6, 1, 40_000).astype(np.int64) + 2
    plan = pack([offsets(lengths)], 8192)
    assert plan.num_padding < 0.001 * plan.num_sequences * 8192
