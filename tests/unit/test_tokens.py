"""The token-shard format: its bytes, what opening and verifying find, and what a killed writer leaves."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slm.data.tokens import (
    ShardWriter,
    TokenDataset,
    decode_index,
    encode_index,
    token_dtype,
    write_manifest,
)
from slm.errors import CorruptArtefact, UserError
from tests.shards import make_dataset

TOKENIZER = {"fingerprint": "f", "vocab_size": 512, "bos_id": 0, "eos_id": 1}

# The index that Megatron's own writer makes of the documents [5 6 7 1], [9 1], [128000 2 3 4 1] as int32.
GOLDEN_DOCS = [[5, 6, 7, 1], [9, 1], [128000, 2, 3, 4, 1]]
GOLDEN_IDX = bytes.fromhex(
    "4d4d49444944580000" "0100000000000000" "04" "0300000000000000" "0400000000000000"
    "040000000200000005000000"
    "0000000000000000" "1000000000000000" "1800000000000000"
    "0000000000000000" "0100000000000000" "0200000000000000" "0300000000000000"
)  # fmt: skip


def write(folder, docs, *, vocab_size=512, tokenizer=TOKENIZER):
    with ShardWriter(folder, "t-00000", vocab_size=vocab_size) as shard:
        for ids in docs:
            shard.add(np.array(ids))
    write_manifest(folder, shards=[shard.entry], tokenizer={**tokenizer, "vocab_size": vocab_size})
    return TokenDataset(folder)


def change_byte(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


# --- bytes ---------------------------------------------------------------------------------------------------


def test_index_bytes_are_megatrons():
    assert len(GOLDEN_IDX) == 102
    assert encode_index(np.array([4, 2, 5]), np.dtype("<i4")) == GOLDEN_IDX
    starts, dtype = decode_index(GOLDEN_IDX)
    assert starts.tolist() == [0, 4, 6, 11]
    assert starts.dtype == np.int64
    assert dtype == np.dtype("<i4")


def test_files_on_disk(tmp_path):
    dataset = write(tmp_path, GOLDEN_DOCS, vocab_size=128256)
    assert (tmp_path / "t-00000.idx").read_bytes() == GOLDEN_IDX
    assert (tmp_path / "t-00000.bin").read_bytes() == np.array(sum(GOLDEN_DOCS, []), "<i4").tobytes()
    assert dataset.shards[0].tokens.tolist() == sum(GOLDEN_DOCS, [])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["manifest.json", "t-00000.bin", "t-00000.idx"]
    assert dataset.verify() == []


def test_small_vocabularies_take_two_bytes(tmp_path):
    dataset = write(tmp_path, [[5, 6, 1], [511, 1]])
    assert (tmp_path / "t-00000.bin").read_bytes() == bytes.fromhex("0500060001 00ff010100".replace(" ", ""))
    idx = (tmp_path / "t-00000.idx").read_bytes()
    assert idx[17] == 8
    assert np.frombuffer(idx, "<i8", 2, 34 + 8).tolist() == [0, 6]  # in bytes, not tokens
    assert dataset.shards[0].tokens.dtype == np.uint16
    assert token_dtype(65499) == np.uint16
    assert token_dtype(65500) == np.int32


@given(st.lists(st.lists(st.integers(0, 511), min_size=1, max_size=9), max_size=8))
@settings(max_examples=30, deadline=None)
def test_round_trip(tmp_path_factory, docs):
    dataset = write(tmp_path_factory.mktemp("t"), docs)
    shard = dataset.shards[0]
    offsets = shard.doc_offsets
    assert [shard.tokens[a:b].tolist() for a, b in zip(offsets[:-1], offsets[1:], strict=True)] == docs
    assert (dataset.num_docs, dataset.num_tokens) == (len(docs), sum(map(len, docs)))
    assert (shard.num_docs, shard.num_tokens) == (len(docs), sum(map(len, docs)))


def test_empty_documents_of_other_writers_are_read(tmp_path):
    """A document boundary with no sequence is an empty document (Megatron's preprocessing makes such)."""
    data = bytearray(GOLDEN_IDX) + (3).to_bytes(8, "little")
    data[26] = 5
    assert decode_index(bytes(data))[0].tolist() == [0, 4, 6, 11, 11]


@pytest.mark.parametrize("at", [0, 8, 9, 17, 18, 26, 34, 46, 54, 70, 94])
def test_every_field_of_an_index_is_checked(at):
    data = bytearray(GOLDEN_IDX)
    data[at] ^= 1
    with pytest.raises(CorruptArtefact):
        decode_index(bytes(data))


@given(st.binary(max_size=120) | st.integers(0, 101).map(lambda n: GOLDEN_IDX[:n]))
def test_no_bytes_make_the_reader_crash(data):
    with pytest.raises(CorruptArtefact):
        decode_index(data)


# --- opening -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
@pytest.mark.parametrize("change", ["shorter", "longer", "missing"])
def test_sizes_are_checked_at_open(tmp_path, suffix, change):
    write(tmp_path, [[0, 5, 1], [0, 1]])
    file = tmp_path / f"t-00000{suffix}"
    data = file.read_bytes()
    if change == "missing":
        file.unlink()
    else:
        file.write_bytes(data[:-1] if change == "shorter" else data + b"\0")
    with pytest.raises(CorruptArtefact, match=f"t-00000{suffix}"):
        TokenDataset(tmp_path)


def test_an_index_of_other_documents_is_refused(tmp_path):
    write(tmp_path, [[0, 5, 1], [0, 1]])
    (tmp_path / "t-00000.idx").write_bytes(encode_index(np.array([3, 3]), np.dtype("<u2")))
    with pytest.raises(CorruptArtefact, match="covers 6 tokens"):
        TokenDataset(tmp_path)


def test_what_is_no_dataset(tmp_path):
    with pytest.raises(UserError, match="slm-data shards"):
        TokenDataset(tmp_path / "absent")
    with pytest.raises(UserError, match="no complete dataset"):
        TokenDataset(tmp_path)
    for content in ("{", "[]", '{"schema": "slm-tokens/99"}', '{"schema": "slm-tokens/1"}'):
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(CorruptArtefact):
            TokenDataset(tmp_path)


# --- verifying -----------------------------------------------------------------------------------------------


def test_a_whole_dataset_has_no_problems(tmp_path):
    assert make_dataset(tmp_path, [5, 9, 2, 30]).verify() == []


@pytest.mark.parametrize("at", [0, 6, 9])
def test_verify_finds_a_flipped_bit(tmp_path, at):
    write(tmp_path, [[0, 5, 1], [0, 1]])
    change_byte(tmp_path / "t-00000.bin", at)
    assert any("SHA-256" in problem for problem in TokenDataset(tmp_path).verify())


def test_verify_finds_documents_cut_elsewhere(tmp_path):
    write(tmp_path, [[0, 5, 1], [0, 1]])
    (tmp_path / "t-00000.idx").write_bytes(encode_index(np.array([2, 3]), np.dtype("<u2")))
    problems = TokenDataset(tmp_path).verify()
    assert any("t-00000.idx: SHA-256" in p for p in problems)
    assert any("1 documents do not end in EOS" in p for p in problems)


def test_verify_finds_a_truncation_after_opening(tmp_path):
    dataset = write(tmp_path, [[0, 5, 1]] * 3000)
    os.truncate(tmp_path / "t-00000.bin", 1000)
    assert any("1000 bytes" in problem for problem in dataset.verify())


def test_verify_finds_ids_out_of_vocabulary_and_a_missing_end(tmp_path):
    dataset = write(tmp_path, [[0, 400, 1], [0, 7]])
    assert dataset.verify() == ["t-00000: 1 documents do not end in EOS"]
    write_manifest(tmp_path, shards=dataset.manifest["shards"], tokenizer={**TOKENIZER, "vocab_size": 400})
    assert any("token 400" in p for p in TokenDataset(tmp_path).verify())


def test_a_changed_manifest_is_refused(tmp_path):
    dataset = write(tmp_path, [[0, 400, 1]])
    manifest = {**dataset.manifest, "num_tokens": 4}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CorruptArtefact, match="was changed"):
        TokenDataset(tmp_path)


def test_verify_says_how_far_it_is(tmp_path):
    steps = []
    write(tmp_path, GOLDEN_DOCS, vocab_size=128256).verify(steps.append)
    assert sum(steps) == 44 + 102


def test_verify_finds_negative_ids(tmp_path):
    write(tmp_path, [[0, 400, 1]], vocab_size=70_000)
    (tmp_path / "t-00000.bin").write_bytes(np.array([0, -5, 1], "<i4").tobytes())
    assert any("token -5" in p for p in TokenDataset(tmp_path).verify())


# --- identity ------------------------------------------------------------------------------------------------


def test_fingerprint_is_of_the_contents_alone(tmp_path):
    first = make_dataset(tmp_path / "a", [5, 9, 2])
    assert make_dataset(tmp_path / "b", [5, 9, 2]).fingerprint == first.fingerprint
    assert make_dataset(tmp_path / "c", [5, 9, 3]).fingerprint != first.fingerprint
    assert make_dataset(tmp_path / "d", [5, 9, 2], seed=1).fingerprint != first.fingerprint
    assert make_dataset(tmp_path / "e", [5, 9, 2], fingerprint="other").fingerprint != first.fingerprint


def test_golden_fingerprint(tmp_path):
    """The order of training hangs on it: it must not change from one version to the next."""
    dataset = write(tmp_path, GOLDEN_DOCS, vocab_size=128256)
    assert dataset.fingerprint == "e605b70927ed222a4b70db6e96305368ad3791fb0b58c134bc17e45c269de515"


# --- writing -------------------------------------------------------------------------------------------------


def visible(folder):
    return [p.name for p in folder.iterdir() if not p.name.startswith(".")]


def test_nothing_is_visible_before_close(tmp_path):
    with ShardWriter(tmp_path, "t", vocab_size=512) as shard:
        shard.add(np.array([0, 5, 1]))
        assert visible(tmp_path) == []
    assert sorted(visible(tmp_path)) == ["t.bin", "t.idx"]


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), ShardWriter(tmp_path, "t", vocab_size=512) as shard:  # noqa: PT012
        shard.add(np.array([0, 5, 1]))
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_an_error_at_close_leaves_no_temporary(tmp_path, monkeypatch):
    def full(_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"), ShardWriter(tmp_path, "t", vocab_size=512) as shard:
        shard.add(np.array([0, 5, 1]))
    assert list(tmp_path.iterdir()) == []


def test_a_killed_writer_leaves_nothing_visible(tmp_path):
    code = (
        "import numpy as np, os, signal\n"
        "from slm.data.tokens import ShardWriter\n"
        f"shard = ShardWriter({str(tmp_path)!r}, 't', vocab_size=512)\n"
        "for _ in range(20000): shard.add(np.arange(50))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    assert visible(tmp_path) == []
    with ShardWriter(tmp_path, "t", vocab_size=512) as shard:  # and the next attempt is not in its way
        shard.add(np.array([0, 5, 1]))
    assert shard.entry["num_tokens"] == 3


@pytest.mark.parametrize("ids", [[], [0, 512, 1], [0, 65536, 1], [-1, 1]])
def test_ids_that_do_not_fit_are_refused(tmp_path, ids):
    with pytest.raises(ValueError, match="vocabulary"), ShardWriter(tmp_path, "t", vocab_size=512) as shard:
        shard.add(np.array(ids, dtype=np.int64))
    assert list(tmp_path.iterdir()) == []
