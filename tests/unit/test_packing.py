"""Packing: every token once, nothing over capacity, as few sequences as best-fit decreasing can make."""

from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slm.data.packing import best_fit, load_plan, pack, save_plan
from slm.data.selection import by_length, by_share, selection_digest, without

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
        selection=[by_length(offsets(lengths), least, most) for lengths in lengths_by_shard],
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
    shards = [offsets([3, 4, 5, 6, 7])]
    plan = pack(shards, 8, selection=[by_length(shards[0], 4, 6)])
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
    assert plan.fingerprint == "d2eae70cc3ea9072832b4cc1015f64f0a81527da31d77d7a54c8ad0bbd2b0c44"


def test_fingerprint_is_of_the_plan():
    base = pack([offsets([9, 5, 30])], 16).fingerprint
    assert pack([offsets([9, 5, 30])], 16, selection=[np.ones(3, bool)]).fingerprint == base
    assert pack([offsets([9, 5, 30])], 17).fingerprint != base
    assert pack([offsets([5, 9, 30])], 16).fingerprint != base
    assert pack([offsets([9, 5]), offsets([30])], 16).fingerprint != base


def test_a_plan_comes_back_from_its_file_or_not_at_all(tmp_path):
    """Of the same key and whole, it is the same plan; of another key, cut off or with a flipped bit, it is none."""
    plan = pack([offsets([9, 5, 30, 64])], 16)
    path = tmp_path / "a" / "plan.npz"
    save_plan(plan, path, "key")
    found = load_plan(path, "key")
    for field in fields(plan):
        assert np.array_equal(getattr(found, field.name), getattr(plan, field.name)), field.name
    assert load_plan(path, "other") is None
    assert load_plan(tmp_path / "absent", "key") is None
    data = path.read_bytes()
    for at in range(0, len(data), 37):
        path.write_bytes(data[:at])
        assert load_plan(path, "key") is None
        path.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
        again = load_plan(path, "key")
        assert again is None or again.fingerprint == plan.fingerprint  # the zip's own bookkeeping may not matter


def test_shares_and_what_was_seen():
    """A share is the same documents each time, near its size; without them, exactly the others are left."""
    for share in (0.1, 0.5, 0.9):
        chosen = [by_share(shard, 20_000, share) for shard in (0, 1)]
        assert [abs(c.mean() - share) < 0.015 for c in chosen] == [True, True]
        assert not np.array_equal(*chosen)
        assert np.array_equal(chosen[0], by_share(0, 20_000, share))
        rest = without([np.ones(20_000, bool)] * 2, [chosen])
        assert all(np.array_equal(r, ~c) for r, c in zip(rest, chosen, strict=True))
    assert by_share(0, 20_000, 0.1)[~by_share(0, 20_000, 0.5)].sum() == 0  # a smaller share is part of a larger one
    assert by_share(3, 5, 1.0).all()
    assert selection_digest([np.ones(3, bool)]) != selection_digest([np.ones(4, bool)])


def test_fits_closely_at_scale():
    lengths = np.random.default_rng(0).lognormal(6, 1, 40_000).astype(np.int64) + 2
    plan = pack([offsets(lengths)], 8192)
    assert plan.num_padding < 0.001 * plan.num_sequences * 8192
