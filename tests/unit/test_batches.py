"""Batches: every token but a document's first is a label once, whatever the ranks and micro-batches."""

import hashlib
import threading
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slm.data.batches import Batch, EvaluationBatches, PhaseData, assemble
from slm.data.selection import by_length
from slm.data.tokens import ShardWriter, TokenDataset, write_manifest
from slm.errors import UserError
from slm.losses import IGNORE
from slm.parallel import Share
from tests.shards import make_dataset


def unique_dataset(folder, lengths, *, num_shards=2, first=2):
    """A dataset in which every token is another one (its own address), so that a label says where it is from."""
    entries, at = [], first
    vocab_size = first + sum(lengths)
    for shard in range(num_shards):
        with ShardWriter(folder, f"u-{shard}", vocab_size=vocab_size) as writer:
            for length in lengths[shard::num_shards]:
                writer.add(np.arange(at, at + length))
                at += length
        entries.append(writer.entry)
    tokenizer = {"fingerprint": "u", "vocab_size": vocab_size, "bos_id": None, "eos_id": None}
    write_manifest(folder, shards=entries, tokenizer=tokenizer)
    return TokenDataset(folder)


def documents(dataset):
    for shard in dataset.shards:
        for start, end in zip(shard.doc_offsets[:-1], shard.doc_offsets[1:], strict=True):
            yield shard.tokens[start:end].tolist()


def pieces(batch: Batch):
    """(tokens, labels, positions) of each piece in piece_bounds, padding among them."""
    bounds = batch.piece_bounds.tolist()
    columns = [t.flatten().tolist() for t in (batch.tokens_BT, batch.labels_BT, batch.positions_BT)]
    for start, end in zip(bounds[:-1], bounds[1:], strict=True):
        if end > start:
            yield tuple(column[start:end] for column in columns)


def check_shape(batch: Batch, max_pieces: int):
    """What holds for every batch, whatever is in it."""
    B, T = batch.tokens_BT.shape
    for tensor in (batch.tokens_BT, batch.labels_BT, batch.positions_BT):
        assert tensor.shape == (B, T)
        assert tensor.dtype == torch.int64
    bounds = batch.piece_bounds
    assert bounds.shape == (B * (max_pieces + 1) + 1,)
    assert bounds.dtype == torch.int32
    assert bounds[0] == 0
    assert bounds[-1] == B * T
    assert (bounds.diff() >= 0).all()
    assert set(range(0, B * T + 1, T)) <= set(bounds.tolist())
    assert len(set(bounds.tolist())) - 1 == (bounds.diff() > 0).sum()
    found = list(pieces(batch))
    for tokens, _, positions in found:
        assert positions == list(range(len(tokens)))
    assert batch.num_targets == int((batch.labels_BT != IGNORE).sum())


lengths_lists = st.lists(st.integers(1, 60), min_size=2, max_size=40).filter(lambda lengths: max(lengths) > 1)


@given(lengths_lists, st.integers(2, 24), st.sampled_from([1, 2, 3]))
@settings(max_examples=40, deadline=None)
def test_every_token_but_the_first_is_a_label_once(tmp_path_factory, lengths, seq_len, micro_batch):
    dataset = unique_dataset(tmp_path_factory.mktemp("u"), lengths)
    expected = {}  # label -> the token before it
    for ids in documents(dataset):
        expected.update(zip(ids[1:], ids[:-1], strict=True))
    found, num_tokens, pairs, pairs_full = {}, 0, 0, 0
    for batch in EvaluationBatches(dataset, seq_len, micro_batch):
        check_shape(batch, (batch.piece_bounds.numel() - 1) // micro_batch - 1)
        for tokens, labels, _ in pieces(batch):
            if tokens[0] == 0:  # padding: no document holds token 0
                assert set(tokens) == {0}
                assert set(labels) == {IGNORE}
                continue
            assert tokens == list(range(tokens[0], tokens[0] + len(tokens)))  # one document, without a gap
            num_tokens += len(tokens)
            pairs += len(tokens) * (len(tokens) + 1) // 2
            pairs_full += len(tokens) ** 2
            for token, label in zip(tokens, labels, strict=True):
                if label != IGNORE:
                    assert label not in found
                    found[label] = token
        num_tokens -= batch.num_tokens
        pairs -= batch.attention_pairs
        pairs_full -= batch.attention_pairs_full
    assert found == expected
    assert (num_tokens, pairs, pairs_full) == (0, 0, 0)


def test_the_last_label_of_a_piece_is_read_from_the_shard(tmp_path):
    dataset = unique_dataset(tmp_path, [21, 3], num_shards=1)
    batch = next(iter(EvaluationBatches(dataset, 10, 3)))
    assert batch.labels_BT.tolist() == [
        list(range(3, 13)),
        list(range(13, 23)),  # its last label is the dropped one-token tail
        [24, 25, *[IGNORE] * 8],
    ]
    assert batch.positions_BT[2].tolist() == [0, 1, 2, *range(7)]
    assert batch.piece_bounds.tolist() == [0, 10, 20, 23, 30, 30, 30]
    assert (batch.num_tokens, batch.num_targets) == (23, 22)
    assert (batch.attention_pairs, batch.attention_pairs_full) == (55 + 55 + 6, 100 + 100 + 9)


def test_an_empty_row_is_padding():
    batch = assemble([[], [(np.array([5, 6, 7]), None)]], 4, 9, 2)
    assert batch.tokens_BT.tolist() == [[9, 9, 9, 9], [5, 6, 7, 9]]
    assert batch.labels_BT.tolist() == [[IGNORE] * 4, [6, 7, IGNORE, IGNORE]]
    assert batch.positions_BT.tolist() == [[0, 1, 2, 3], [0, 1, 2, 0]]
    assert batch.piece_bounds.tolist() == [0, 4, 7, 8, 8, 8, 8]
    assert (batch.num_tokens, batch.num_targets) == (3, 2)


# --- a phase -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return {"web": make_dataset(folder / "web"), "code": make_dataset(folder / "code", seed=5, num_shards=1)}


def longer(sources, name, least):
    return {name: [by_length(shard.doc_offsets, least, None) for shard in sources[name].shards]}


@pytest.fixture
def phase(two_sources):
    return PhaseData(two_sources, {"web": 0.7, "code": 0.3}, seq_len=64, seed=0, phase_name="a")


FIELDS = ("tokens_BT", "labels_BT", "positions_BT")


def step_rows(data, step, world, micro_batch):
    """A step's rows in order, over all ranks."""
    batches = []
    for rank in range(world):
        mine = data.step_batches(step, global_batch=8, micro_batch=micro_batch, share=Share(rank, world))
        assert [len(b.tokens_BT) for b in mine] == [micro_batch] * (8 // world // micro_batch)
        batches += [
            {name: getattr(b, name).clone() for name in FIELDS} for b in mine
        ]  # the next call takes their memory
    return {name: torch.cat([b[name] for b in batches]) for name in FIELDS}


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("micro_batch", [1, 2])
def test_one_token_stream_for_every_world_and_micro_batch(phase, world, micro_batch):
    for step in (0, 1, 2, 7):
        rows = step_rows(phase, step, world, micro_batch)
        (whole,) = phase.step_batches(step, global_batch=8, micro_batch=8, share=Share())
        for name in FIELDS:
            assert torch.equal(rows[name], getattr(whole, name))


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("micro_batch", [1, 2, 4])
@pytest.mark.parametrize("sequence_parallel", [1, 2])
@pytest.mark.parametrize("ahead", [True, False])
def test_the_stream_of_every_step_has_one_hash(two_sources, world, micro_batch, sequence_parallel, ahead):
    """Over world, micro-batch, sequence-parallel degree (whose ranks share a row) and prefetching or not; from a resume in
    the middle of an epoch; in each of two phases of different length."""
    if world % sequence_parallel or 8 % (world // sequence_parallel * micro_batch):
        return

    def hashes(seq_len, name, steps, world, micro_batch, sequence_parallel, ahead):
        data = PhaseData(two_sources, None, seq_len=seq_len, seed=0, phase_name=name)
        ranks = [PhaseData(two_sources, None, seq_len=seq_len, seed=0, phase_name=name) for _ in range(world)]
        found = []
        for step in steps:
            rows: dict[int, list[torch.Tensor]] = {}
            counts = [0, 0, 0]
            for rank, mine in enumerate(ranks):
                share = Share.of(rank, world, sequence_parallel)
                how = dict(global_batch=8, micro_batch=micro_batch, share=share)
                batches = mine.step_batches(step, **how) if ahead else data._make(step, *how.values())
                parts = [torch.stack([b.tokens_BT, b.labels_BT, b.positions_BT], 1) for b in batches]
                rows.setdefault(share.data_rank, []).append(torch.cat(parts))
                for b in batches:
                    counts = [
                        c + n for c, n in zip(counts, (b.num_targets, b.num_tokens, b.attention_pairs), strict=True)
                    ]
            whole = torch.cat([torch.cat(parts, 2) for parts in rows.values()])
            found.append((hashlib.sha256(whole.numpy().tobytes()).hexdigest(), *counts))
        return found

    for seq_len, name in ((32, "short"), (128, "long")):
        epoch = PhaseData(two_sources, None, seq_len=seq_len, seed=0, phase_name=name).num_sequences // 8
        reference = hashes(seq_len, name, range(epoch + 2), 1, 8, 1, True)
        assert len(set(reference)) == len(reference)
        middle = epoch // 2
        layout = (world, micro_batch, sequence_parallel)
        assert hashes(seq_len, name, range(middle, epoch + 2), *layout, ahead) == reference[middle:]


def test_preparing_the_next_step_leaves_this_ones_memory_alone(two_sources):
    """Two sets of buffers in turn; a step asked for out of turn waits for the thread that may be writing."""
    mine, fresh = (PhaseData(two_sources, None, seq_len=64, seed=0, phase_name="a") for _ in range(2))
    share = dict(global_batch=8, micro_batch=2, share=Share())
    addresses = set()
    for step in (0, 1, 2, 3, 9, 10, 4, 6):
        batches = mine.step_batches(step, **share)
        mine._ahead[1].result()  # the next step is in memory
        addresses |= {b.tokens_BT.data_ptr() for b in batches}
        for got, wanted in zip(batches, fresh._make(step, *share.values()), strict=True):
            for name in FIELDS:
                assert torch.equal(getattr(got, name), getattr(wanted, name))
    assert len(addresses) == 2 * 4


def test_batches_of_a_phase_are_well_formed(phase):
    for step in range(10):
        for batch in phase.step_batches(step, global_batch=8, micro_batch=2, share=Share(1, 2)):
            check_shape(batch, phase.max_pieces)


def test_sources_by_weight(phase):
    names = [name for name, _, _ in phase.sample_ids(0, 200)]
    assert 30 <= Counter(names)["code"] <= 90


def test_without_weights_a_source_is_drawn_as_often_as_its_filters_leave_sequences(two_sources):
    """Nearly all of `web` is filtered out: what is left is not repeated to fill the place of the rest."""
    data = PhaseData(two_sources, None, seq_len=64, seed=0, phase_name="a", selections=longer(two_sources, "web", 120))
    sequences = {name: row["sequences"] for name, row in data.report().items()}
    drawn = Counter(name for name, _, _ in data.sample_ids(0, 1024))  # a block, over which a mixture is exact
    assert 0 < sequences["web"] < sequences["code"]
    for name in two_sources:
        assert abs(drawn[name] - 1024 * sequences[name] / data.num_sequences) <= 1
        assert abs(drawn[name] - 1024 * data.report()[name]["share"]) <= 1


def test_an_epoch_shows_every_label_once(tmp_path):
    dataset = unique_dataset(tmp_path, [5, 17, 40, 3, 2, 33])
    data = PhaseData({"u": dataset}, {"u": 1.0}, seq_len=8, seed=1, phase_name="a")
    epoch = dict(global_batch=data.num_sequences, micro_batch=data.num_sequences, share=Share())
    labels = data.step_batches(0, **epoch)[0].labels_BT.clone()
    expected = sorted(token for ids in documents(dataset) for token in ids[1:])
    assert sorted(labels[labels != IGNORE].tolist()) == expected
    again = data.step_batches(1, **epoch)[0].labels_BT
    assert sorted(again[again != IGNORE].tolist()) == expected
    assert not torch.equal(labels, again)


def test_seed_and_phase_name_change_the_order(two_sources):
    def ids(**kwargs):
        settings = {"seq_len": 64, "seed": 0, "phase_name": "a", **kwargs}
        data = PhaseData(two_sources, {"web": 0.7, "code": 0.3}, **settings)
        return data.sample_ids(0, 32), data.fingerprint

    base = ids()
    assert ids() == base
    for changed in (ids(seed=1), ids(phase_name="b"), ids(seq_len=65)):
        assert changed[0] != base[0]
        assert changed[1] != base[1]


def test_golden_order_of_a_phase(tmp_path):
    """From bytes to batches: a run that goes on with a later version must see the same sequences."""
    a, b = unique_dataset(tmp_path / "a", list(range(1, 90))), unique_dataset(tmp_path / "b", [30] * 9, first=7)
    data = PhaseData({"a": a, "b": b}, {"a": 3, "b": 1}, seq_len=32, seed=42, phase_name="main")
    assert data.fingerprint == "64cf72b3d030226d-3.0/1.0"
    assert data.sample_ids(5, 6) == [("a", 84, 5), ("a", 14, 2), ("b", 1, 1), ("a", 42, 4), ("b", 0, 24), ("a", 110, 0)]
    (batch,) = data.step_batches(50, global_batch=2, micro_batch=2, share=Share())
    assert batch.tokens_BT[:, :3].tolist() == [[171, 172, 173], [1970, 1971, 1972]]


def test_filters_and_report(two_sources):
    data = PhaseData(
        two_sources,
        {"web": 1.0, "code": 1.0},
        seq_len=64,
        seed=0,
        phase_name="a",
        selections={"web": [by_length(s.doc_offsets, 50, 100) for s in two_sources["web"].shards]},
    )
    lengths = [len(ids) for ids in documents(two_sources["web"])]
    report = data.report()
    assert report["web"]["filtered"] == sum(n for n in lengths if not 50 <= n <= 100)
    assert report["code"]["filtered"] == 0
    for name, row in report.items():
        assert row["tokens"] + row["dropped"] + row["filtered"] == two_sources[name].num_tokens
        assert row["tokens"] + row["padding"] == row["sequences"] * 64
        assert name in data.describe()


def test_a_source_without_documents(two_sources):
    settings = {"seq_len": 64, "seed": 0, "phase_name": "a", "selections": longer(two_sources, "code", 10**6)}
    with pytest.raises(UserError, match="'code' has no document"):
        PhaseData(two_sources, {"web": 1.0, "code": 1.0}, **settings)
    data = PhaseData(two_sources, {"web": 1.0, "code": 0.0}, **settings)
    assert {name for name, _, _ in data.sample_ids(0, 50)} == {"web"}


def test_a_step_that_cannot_be_split(phase):
    for world, micro_batch, rank in ((3, 1, 0), (2, 3, 0), (2, 1, 2)):
        with pytest.raises(ValueError, match="cannot be split"):
            phase.step_batches(0, global_batch=8, micro_batch=micro_batch, share=Share(rank, world))


def test_the_next_step_is_prepared_ahead(phase, monkeypatch):
    made = []
    real = phase._make

    def make(*args):
        made.append((args[0], threading.current_thread() is threading.main_thread()))
        return real(*args)

    monkeypatch.setattr(phase, "_make", make)
    how = {"global_batch": 8, "micro_batch": 2, "share": Share()}
    for step in range(3):
        phase.step_batches(step, **how)
    assert [step for step, in_main in made if in_main] == [0]
    phase.step_batches(9, **how)  # a jump: nothing stale comes back
    assert (9, True) in made


def test_an_error_of_the_thread_is_raised_where_its_step_is_asked_for(phase, monkeypatch):
    how = {"global_batch": 8, "micro_batch": 2, "share": Share()}
    real = phase._make

    def make(step, *rest):
        if step == 1 and threading.current_thread() is not threading.main_thread():
            raise OSError("the disk is gone")
        return real(step, *rest)

    monkeypatch.setattr(phase, "_make", make)
    phase.step_batches(0, **how)
    with pytest.raises(OSError, match="the disk is gone"):
        phase.step_batches(1, **how)
    assert len(phase.step_batches(1, **how)) == 4


# --- evaluation ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("micro_batch", [1, 2])
@pytest.mark.parametrize("most", [None, 1, 7, 10**6])
def test_evaluation_shows_each_sequence_once(tmp_path, world, micro_batch, most):
    dataset = unique_dataset(tmp_path, [5, 17, 40, 3, 2, 33, 16, 9, 60])
    whole = [row for b in EvaluationBatches(dataset, 16, 1) for row in b.tokens_BT.tolist()]
    expected = min(len(whole), most or len(whole))
    by_rank = [list(EvaluationBatches(dataset, 16, micro_batch, Share(r, world), most)) for r in range(world)]
    assert {len(batches) for batches in by_rank} == {-(-expected // (micro_batch * world))}
    assert len({b.piece_bounds.shape for batches in by_rank for b in batches}) == 1
    rows = [row for i in range(len(by_rank[0])) for r in range(world) for row in by_rank[r][i].tokens_BT.tolist()]
    assert all(set(row) == {0} for row in rows[expected:])  # the empty ones stand at the end
    kept = rows[:expected]
    assert len({tuple(row) for row in kept}) == expected
    assert [row for row in whole if row in kept] == kept  # in packed order
    if expected == len(whole):
        assert kept == whole
    total = sum(b.num_targets for batches in by_rank for b in batches)
    assert total <= sum(len(ids) - 1 for ids in documents(dataset))
    assert (total == sum(len(ids) - 1 for ids in documents(dataset))) == (expected == len(whole))


def test_a_part_of_an_evaluation_is_not_the_longest_documents(tmp_path):
    dataset = unique_dataset(tmp_path, [80] * 10 + [7] * 100)
    batches = list(EvaluationBatches(dataset, 16, 1, max_sequences=20))
    assert len(batches) == 20
    short = [int(b.piece_bounds.diff().max()) < 16 for b in batches]
    assert 5 <= sum(short) <= 12  # 50 of 100 sequences are of short documents


def test_an_empty_dataset_has_no_batches(tmp_path):
    assert list(EvaluationBatches(unique_dataset(tmp_path, []), 16, 2)) == []
