"""What is kept of a teacher: exact tails, unbiased samples, the codec's error, and a file that survives kills and flips."""

import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slm.distill.cache import Cache, CacheSpec, CacheWriter, Sums, block_bounds, new_planes, partial_path
from slm.distill.codec import (
    RawTargets,
    decode_values,
    encode_entries,
    encode_values,
    pack_index,
    token_tags,
    unpack_index,
)
from slm.distill.targets import sample, top_k
from slm.errors import CorruptArtefact, UserError

ROOT = Path(__file__).parents[2]


def teacher_like(n, vocab=20_000, seed=0):
    """Log-probabilities of about 2 nats of entropy with a long tail: a Zipf unigram under context noise."""
    g = torch.Generator().manual_seed(seed)
    base = -1.1 * torch.log(torch.arange(1, vocab + 1).float() + 2.7)
    return (2.1 * (base + 1.15 * torch.randn(n, vocab, generator=g))).log_softmax(1)


def labels_of(n):
    return torch.zeros(n, dtype=torch.long)


def decoded(entries, vocab, kind, temperatures=(1.0,), temperature=1.0, k=None):
    planes = encode_entries(entries, vocab, kind, temperatures)
    return RawTargets.of(kind, temperatures, planes).decode(temperature, k)


# --- targets -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [0.5, 1.0, 2.0, 4.0])
def test_tails_are_exact_at_every_temperature(T):
    """Against float64, from tails of nearly all to 1e-12 and none; between the bounds that concavity gives."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 50, generator=g)
    logits[:10, 5] += 40  # a tail of 1e-17
    logits[10:20, 3] += 22
    entries = top_k(logits, labels_of(40), 6, (1.0, T) if T != 1 else (1.0,))
    exact = (logits.double() / T).log_softmax(1)
    tail = exact.scatter(1, entries.index_CPK[:, 0], -torch.inf).logsumexp(1)
    torch.testing.assert_close(entries.log_tail_CT[:, -1].double(), tail, rtol=1e-5, atol=1e-5)
    # (sum of the tail)^(1/T) against the sum of its powers (reference: rho^(1/T) <= sum p^(1/T) for T > 1).
    p = logits.double().softmax(1).scatter(1, entries.index_CPK[:, 0], 0.0)
    powers, rho = (p[p.sum(1) > 1e-9] ** (1 / T)).sum(1), p.sum(1)[p.sum(1) > 1e-9]
    low, high = rho ** (1 / T), (50 - 6) ** (1 - 1 / T) * rho ** (1 / T)
    if T < 1:
        low, high = high, low
    assert ((powers >= low * (1 - 1e-9)) & (powers <= high * (1 + 1e-9))).all()


def test_all_entries_leave_no_tail():
    entries = top_k(torch.randn(3, 8), labels_of(3), 8, (1.0,))
    assert (entries.log_tail_CT == -torch.inf).all()


def draws(p, k, n, seed=0):
    g = torch.Generator().manual_seed(seed)
    uniform = torch.rand(n, 1, generator=g, dtype=torch.float64)
    order = torch.randperm(len(p), generator=g)
    entries = sample(p.log().float().expand(n, -1), labels_of(n), k, (1.0,), uniform, order)
    heads = entries.heads_CP[:, 0]
    tau = entries.log_tail_CT[:, 0].double().exp() / (k - heads)
    is_head = torch.arange(k) < heads[:, None]
    weights = torch.where(is_head, entries.log_p_CPK[:, 0].double().exp(), tau[:, None])
    return entries, weights


def standard_errors(p, entries, k):
    """Of the mean weight of each token, by the inclusion probability p / tau: variance p (tau - p), 0 for exact heads."""
    tau = entries.log_tail_CT[0, 0].double().exp() / (k - entries.heads_CP[0, 0])
    return (p.double() * (tau - p.double())).clamp(min=0).sqrt() / math.sqrt(len(entries.index_CPK))


@pytest.mark.parametrize("k", [1, 3, 12, 49])
def test_samples_are_unbiased(k):
    """20,000 draws of one distribution: every token's mean weight within 4.5 standard errors; exactly k distinct entries of
    mass 1."""
    g = torch.Generator().manual_seed(1)
    p = (2.5 * torch.randn(50, generator=g)).softmax(0)
    n = 20_000
    entries, weights = draws(p, k, n)
    index = entries.index_CPK[:, 0]
    assert (index.sort(1).values.diff(dim=1) > 0).all()
    assert (weights.sum(1) - 1).abs().max() < 1e-6
    t = torch.zeros(n, 50, dtype=torch.float64).scatter_(1, index, weights)
    assert ((t.mean(0) - p.double()).abs() < 4.5 * standard_errors(p, entries, k) + 1e-6).all()


@pytest.mark.parametrize(
    "p",
    [
        [1.0] + [0.0] * 9,
        [0.5, 0.5] + [0.0] * 8,
        [0.1] * 10,
        [0.4, 0.2, 0.2, 0.2] + [0.0] * 6,
        [1 - 1e-9, 1e-9] + [0.0] * 8,
    ],
)
@pytest.mark.parametrize("k", [1, 2, 4, 9, 10])
def test_degenerate_distributions_are_sampled_too(p, k):
    """Sure ones, ties, uniform ones, fewer tokens with mass than entries: still k distinct entries, mass 1, no mass where
    there is none, and right on the average."""
    n = 2000
    p = torch.tensor(p)
    entries, weights = draws(p, k, n)
    index = entries.index_CPK[:, 0]
    assert all(len(set(row)) == k for row in index.tolist())
    assert torch.isfinite(weights).all()
    assert (weights.sum(1) - 1).abs().max() < 1e-6
    t = torch.zeros(n, len(p), dtype=torch.float64).scatter_(1, index, weights)
    assert float(t[:, p == 0].sum()) == 0
    assert ((t.mean(0) - p.double()).abs() <= 4.5 * standard_errors(p, entries, k) + 1e-6).all()


def test_samples_vary_less_than_independent_draws():
    """The squared distance from the teacher against as many distinct entries of independent draws (RS-KD), on 100
    distributions."""
    g = torch.Generator().manual_seed(2)
    for i in range(100):
        p = (2 * torch.randn(60, generator=g)).softmax(0)
        entries, weights = draws(p, 8, 400, seed=i)
        t = torch.zeros(400, 60, dtype=torch.float64).scatter_(1, entries.index_CPK[:, 0], weights)
        ours = float(((t - p.double()) ** 2).sum(1).mean())
        # N draws have 8 distinct tokens on the average; their variance is known: sum p (1 - p) / N.
        num = next(m for m in range(1, 10_000) if float((1 - (1 - p.double()) ** m).sum()) >= 8)
        assert ours <= float((p * (1 - p)).sum()) / num * 1.02


# --- codec ---------------------------------------------------------------------------------------------------


def test_every_code_is_within_its_bound_and_in_order():
    R = 18.0
    x = torch.linspace(0, 40, 100_001)
    back = -decode_values(encode_values(-x, R), R)
    inside = x <= R
    bound = torch.sqrt(R * x) / 255 + R / (4 * 255**2)
    assert ((back - x).abs()[inside] <= bound[inside] + 4e-6).all()  # two units of float32 at 18
    assert (back[~inside] == R).all()
    assert (back.diff() >= 0).all()
    assert encode_values(decode_values(torch.arange(256, dtype=torch.uint8), R), R).tolist() == list(range(256))
    assert encode_values(torch.tensor([0.0, -0.0, -torch.inf]), R).tolist() == [0, 0, 255]


def test_the_codec_costs_little():
    """k = 64 on a teacher of about 2 nats: KL(exact, decoded) over entries and bucket at most 1e-4 nats on the average and
    1e-3 at worst; the mass is 1."""
    log_p = teacher_like(512)
    entropy = float(-(log_p.exp() * log_p).sum(1).mean())
    assert 1.5 < entropy < 2.5
    for declared, T in (((1.0,), 1.0), ((1.0, 2.0), 1.0), ((1.0, 2.0), 2.0), ((1.0, 4.0), 1.0), ((1.0, 4.0), 4.0)):
        entries = top_k(log_p, labels_of(512), 64, declared)
        index, head, tail = decoded(entries, 20_000, "top_k", declared, T)
        assert (head.double().exp().sum(1) + tail.double().exp() - 1).abs().max() < 1e-6
        exact = (log_p.double() / T).log_softmax(1)
        e_head = exact.gather(1, index)
        e_tail = exact.scatter(1, index, -torch.inf).logsumexp(1)
        kl = (e_head.exp() * (e_head - head)).sum(1) + e_tail.exp() * (e_tail - tail)
        print(
            f"T {T:g} of {declared}: codec KL mean {kl.mean():.2e}, max {kl.max():.2e}, per nat {kl.mean() / entropy:.2e}"
        )
        assert kl.mean() <= 1e-4
        assert kl.max() <= 1e-3
        assert (head.diff(dim=1) <= 1e-6).all()


def test_what_the_codec_adds_to_a_sample_is_small():
    """The mean of decoded samples against the teacher: mass exactly 1; the bias is that of 8-bit heads, below 1 % of the
    mass of any token."""
    p = (2 * torch.randn(50, generator=torch.Generator().manual_seed(5))).softmax(0)
    entries, _ = draws(p, 12, 20_000)
    index, log_t, tail = decoded(entries, 50, "sampled")
    assert tail is None
    assert (log_t.double().exp().sum(1) - 1).abs().max() < 1e-5
    t = torch.zeros(20_000, 50, dtype=torch.float64).scatter_(1, index, log_t.double().exp())
    bias = (t.mean(0) - p.double()).abs()
    assert (bias <= 4.5 * standard_errors(p, entries, 12) + 0.03 * p.double() + 1e-6).all()
    assert float(bias.sum()) < 0.02


def test_a_cache_of_64_serves_32():
    log_p = teacher_like(64)
    whole = top_k(log_p, labels_of(64), 64, (1.0,))
    index, head, tail = decoded(whole, 20_000, "top_k", k=32)
    own_index, own_head, own_tail = decoded(top_k(log_p, labels_of(64), 32, (1.0,)), 20_000, "top_k")
    assert torch.equal(index, own_index)
    assert (head.double().exp().sum(1) + tail.double().exp() - 1).abs().max() < 1e-6
    # The same entries, the same order; the masses differ by the 8-bit values of the entries that were cut.
    torch.testing.assert_close(head, own_head, rtol=0, atol=0.01)
    torch.testing.assert_close(tail, own_tail, rtol=0, atol=0.1)
    with pytest.raises(ValueError, match="cannot be had"):
        decoded(whole, 20_000, "top_k", k=65)
    with pytest.raises(ValueError, match=r"temperature 2.0 is not among"):
        decoded(whole, 20_000, "top_k", temperature=2.0)


@pytest.mark.parametrize("vocab", [50, 65_536, 65_537, 128_256, 131_072, 151_936, 262_144])
@pytest.mark.parametrize("k", [1, 7, 8, 12])
def test_every_index_comes_back(vocab, k):
    edges = np.array([i for i in (0, 1, 65_535, 65_536, 131_071, 131_072, 151_935, 262_143) if i < vocab] + [vocab - 1])
    ids = np.concatenate([edges, np.random.default_rng(0).integers(0, vocab, 1000)])
    ids = ids[: len(ids) // k * k].reshape(-1, k)
    low, high = pack_index(ids, vocab)
    assert high.shape == (len(ids), max(0, (vocab - 1).bit_length() - 16), -(-k // 8))
    assert np.array_equal(unpack_index(torch.from_numpy(low.view(np.int16)), torch.from_numpy(high)).numpy(), ids)


def test_every_id_up_to_18_bits_comes_back():
    ids = np.arange(262_144).reshape(-1, 64)
    low, high = pack_index(ids, 262_144)
    assert np.array_equal(unpack_index(torch.from_numpy(low.view(np.int16)), torch.from_numpy(high)).numpy(), ids)


def test_tags_tell_a_shift_a_change_and_another_place():
    """False agreement is one in 65,536 a token; over a batch it does not happen."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 50_000, 20_001)
    places = np.arange(20_000)
    tags = token_tags(tokens[:-1], tokens[1:], places)
    assert (token_tags(tokens[:-1], tokens[1:], places + 1) == tags).mean() < 1e-3
    assert (token_tags(tokens[1:], np.append(tokens[2:], 3), places) == tags).mean() < 1e-3
    changed = tokens.copy()
    changed[100] += 1
    assert np.flatnonzero(token_tags(changed[:-1], changed[1:], places) != tags).tolist() == [99, 100]
    assert token_tags(tokens[:1], np.array([-1]), places[:1]) != tags[:1]


def test_bytes_a_token():
    base = dict(
        vocab_size=128_256, num_tokens=1, piece_length=8, block_tokens=8, seed=0, teacher={}, tokenizer="", shard={}
    )
    assert CacheSpec("top_k", 64, (1.0,), **base).bytes_per_token <= 208
    assert CacheSpec("sampled", 12, (1.0,), **base).bytes_per_token <= 48


# --- the file ------------------------------------------------------------------------------------------------

OFFSETS = np.cumsum([0, 30, 5, 1, 200, 64, 17, 90, 2, 41])
PIECE, BLOCK = 32, 50


def spec_of(**changes):
    fields = dict(kind="top_k", k=5, temperatures=(1.0, 2.0), vocab_size=70_000, num_tokens=int(OFFSETS[-1]),
                  piece_length=PIECE, block_tokens=BLOCK, seed=0, teacher={"path": "t"}, tokenizer="tok",
                  shard={"name": "s", "sha256": "ab"})  # fmt: skip
    return CacheSpec(**{**fields, **changes})


def fill(writer, pause=0.0):
    """Writes the missing blocks with what is a function of the block alone."""
    for block in range(len(writer.bounds) - 1):
        with writer.claim(block) as mine:
            if mine and not writer.done[block]:
                rng = np.random.default_rng(block)
                planes = new_planes(writer.spec, int(np.diff(writer.bounds)[block]))
                for name, plane in planes.items():
                    whole = plane.dtype.kind == "u"
                    planes[name] = (rng.integers(0, 200, plane.shape) if whole else -rng.random(plane.shape)).astype(
                        plane.dtype
                    )
                writer.write_block(block, planes, Sums(3, 1.5 * block, 2.0, 0.5))
                time.sleep(pause)


def write(path, **changes):
    writer = CacheWriter(path, spec_of(**changes), block_bounds(OFFSETS, PIECE, BLOCK))
    fill(writer)
    return writer.finish()


def test_blocks_begin_at_pieces():
    bounds = block_bounds(OFFSETS, PIECE, BLOCK)
    starts = {int(o) + i for o, e in zip(OFFSETS[:-1], OFFSETS[1:], strict=True) for i in range(0, int(e - o), PIECE)}
    assert bounds[0] == 0
    assert bounds[-1] == OFFSETS[-1]
    assert set(bounds[:-1].tolist()) <= starts | {int(OFFSETS[-1])}
    assert (np.diff(bounds) >= 0).all()
    assert block_bounds(np.array([0, 500]), 200, 50).tolist() == [0, 200, 200, 200, 200, 400, 400, 400, 400, 500, 500]


def test_what_was_written_is_read(tmp_path):
    path = write(tmp_path / "a.kdc")
    cache = Cache(path, doc_offsets=OFFSETS)
    assert cache.spec == spec_of()
    assert cache.verify() == {}
    assert cache.totals().num_targets == 3 * (len(cache.bounds) - 1)
    planes = new_planes(cache.spec, 10)
    cache.copy_into(planes, 2, 40, 6)
    assert np.array_equal(planes["val"][2:8], cache.plane("val")[40:46])
    assert not planes["val"][8:].any()
    assert set(os.listdir(tmp_path)) == {"a.kdc", ".a.kdc.lock"}


@given(st.floats(0, 1, exclude_max=True), st.integers(0, 7))
@settings(max_examples=150, deadline=None)
def test_any_flipped_bit_is_named(tmp_path_factory, place, bit):
    """In the header it is refused when opened; in a row or the table its block is named. (Nothing is in the padding.)"""
    folder = tmp_path_factory.getbasetemp() / "flips"
    folder.mkdir(exist_ok=True)
    path = folder / "a.kdc"
    if not path.exists():
        write(path)
    data = bytearray(path.read_bytes())
    at = int(place * len(data))
    data[at] ^= 1 << bit
    bad = folder / "bad.kdc"
    bad.write_bytes(data)
    good = Cache(path, doc_offsets=OFFSETS)
    ends = [
        good._layout.offsets[n] + good.spec.num_tokens * d.itemsize * int(np.prod(s))
        for n, (d, s) in good.spec.planes().items()
    ]
    padding = (
        at < good._layout.table
        and at >= 65_536
        and not any(good._layout.offsets[n] <= at < e for n, e in zip(good.spec.planes(), ends, strict=True))
    )
    try:
        problems = Cache(bad, doc_offsets=OFFSETS).verify()
    except CorruptArtefact:
        assert at < 65_536 or at >= good._layout.table
        return
    assert padding == (problems == {})
    assert all("block" in p and "tokens" in p for p in problems.values())


def test_other_files_are_refused_by_name(tmp_path):
    path = write(tmp_path / "a.kdc")
    with pytest.raises(UserError, match="does not exist"):
        Cache(tmp_path / "none.kdc", doc_offsets=OFFSETS)
    (tmp_path / "short.kdc").write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CorruptArtefact, match=r"has \d+ bytes, and should have"):
        Cache(tmp_path / "short.kdc", doc_offsets=OFFSETS)
    (tmp_path / "text.kdc").write_text("no cache")
    with pytest.raises(CorruptArtefact, match="does not begin as"):
        Cache(tmp_path / "text.kdc", doc_offsets=OFFSETS)
    with pytest.raises(CorruptArtefact, match="not the one of these documents"):
        Cache(path, doc_offsets=np.delete(OFFSETS, 4))
    with pytest.raises(CorruptArtefact, match="has rows for 450 tokens"):
        Cache(path, doc_offsets=OFFSETS[:-1])


def test_what_is_not_complete_is_read_only_if_asked(tmp_path):
    path = tmp_path / "a.kdc"
    writer = CacheWriter(path, spec_of(), block_bounds(OFFSETS, PIECE, BLOCK))
    planes = new_planes(writer.spec, int(np.diff(writer.bounds)[2]))
    writer.write_block(2, planes, Sums(1, 1.0, 1.0, 0.5))
    with pytest.raises(UserError, match="is not complete"):
        Cache(path, doc_offsets=OFFSETS)
    cache = Cache(path, doc_offsets=OFFSETS, allow_partial=True)
    assert cache.missing.tolist() == [b != 2 for b in range(len(writer.bounds) - 1)]
    assert cache.missing_at(np.array([writer.bounds[2], writer.bounds[2] - 1])).tolist() == [False, True]
    assert cache.num_missing_tokens == writer.spec.num_tokens - len(planes["val"])
    with pytest.raises(UserError, match="begun with other settings"):
        CacheWriter(path, spec_of(k=6), writer.bounds)


def kill_at_random(path, moments):
    """Starts a writer, kills it after a moment, again and again; then lets it end."""
    code = f"from tests.unit import test_teacher_cache as t; import pathlib; t.run_writer(pathlib.Path({str(path)!r}))"
    for moment in moments:
        process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "begun\n"
        time.sleep(moment)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        if path.exists():
            break
    return write(path)


def run_writer(path):
    print("begun", flush=True)
    writer = CacheWriter(path, spec_of(), block_bounds(OFFSETS, PIECE, BLOCK))
    fill(writer, pause=0.02)
    writer.finish()


@pytest.mark.parametrize("kills", [4, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.timeout(1500)
def test_a_killed_writer_leaves_nothing_wrong(tmp_path, kills):
    """SIGKILL at random moments: what is completed after is byte for byte what was never interrupted."""
    whole = write(tmp_path / "whole.kdc").read_bytes()
    rng = random.Random(0)
    done = 0
    while done < kills:
        path = tmp_path / f"{done}.kdc"
        moments = [rng.random() * 0.25 for _ in range(min(5, kills - done))]
        done += len(moments)
        assert kill_at_random(path, moments).read_bytes() == whole
        assert Cache(path, doc_offsets=OFFSETS).verify() == {}


def test_two_processes_share_a_file(tmp_path):
    path = tmp_path / "a.kdc"
    code = f"from tests.unit import test_teacher_cache as t; import pathlib; t.run_both(pathlib.Path({str(path)!r}))"
    both = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) for _ in range(2)]
    assert [p.wait(120) for p in both] == [0, 0]
    assert path.read_bytes() == write(tmp_path / "whole.kdc").read_bytes()
    assert not partial_path(path).exists()


def run_both(path):
    writer = CacheWriter(path, spec_of(), block_bounds(OFFSETS, PIECE, BLOCK))
    while not writer.done.all():
        fill(writer, pause=0.01)
    writer.finish()
