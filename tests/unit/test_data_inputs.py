"""slm-data over every kind of input, policy and filter; duplicates."""

import bz2
import gzip
import hashlib
import json
import random
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.corpus import cut, find_files
from data_prep.duplicates import HASH_BYTES, dropped_path, hashes_path, write_duplicates
from data_prep.reading import Reading, read_piece
from data_prep.shards import make_shards
from data_prep.tokenizer import make_tokenizer
from slm.data.tokens import TokenDataset
from slm.errors import UserError
from slm.tokenizer import SLMTokenizer, load_tokenizer
from tests.unit.test_data_prep import REPOSITORY, contents, documents, slm_data, texts_of, trained, write_jsonl

__all__ = ["slm_data", "trained"]  # fixtures


def manifest(folder, split="train"):
    return TokenDataset(folder / split).manifest


def zstd(data):
    return pa.compress(data, codec="zstd", asbytes=True)


# --- kinds of input ------------------------------------------------------------------------------------------


def write_as(kind, folder, texts):
    """The same documents as an input of some kind."""
    lines = "".join(json.dumps({"text": t}) + "\n" for t in texts).encode()
    table = pa.table({"id": list(range(len(texts))), "text": texts})
    if kind in ("gz", "zst", "bz2"):
        pack = {"gz": gzip.compress, "zst": zstd, "bz2": bz2.compress}[kind]
        half = lines.index(b"\n", len(lines) // 2) + 1
        path = folder / f"a.jsonl.{kind}"
        path.write_bytes(pack(lines[:half]) + pack(lines[half:]))  # two members, as appending gives
    elif kind == "parquet":
        path = folder / "a.parquet"
        pq.write_table(table, path, row_group_size=37)
    elif kind in ("arrow-file", "arrow-stream"):
        path = folder / "a.arrow"
        new = pa.ipc.new_file if kind == "arrow-file" else pa.ipc.new_stream
        with new(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=50)
    elif kind in ("saved", "hub"):
        import datasets

        path = folder / "saved"
        if kind == "saved":
            datasets.Dataset.from_dict({"text": texts}).save_to_disk(path, num_shards=2)
        else:
            path.mkdir()
            pq.write_table(table.slice(0, 100), path / "train-00000-of-00002.parquet")
            pq.write_table(table.slice(100), path / "train-00001-of-00002.parquet")
            return f"hf://{path}?split=train"
    else:
        path = folder / "a.jsonl"
        path.write_bytes(lines)
    return path


@pytest.mark.parametrize("kind", ["gz", "zst", "bz2", "parquet", "arrow-file", "arrow-stream", "saved", "hub"])
def test_every_kind_gives_the_tokens_of_plain_json_lines(tmp_path, slm_data, trained, kind):
    """Same documents, same order, same counts; in one process and in two; each traced back to its row or line."""
    texts = texts_of(300)
    source = write_as(kind, tmp_path, texts)
    for processes in (1, 2):
        options = ("--tokenizer", trained, "--processes", processes, "--validation-fraction", 0, "--shard-bytes", "4k")
        code, _, error = slm_data("shards", source, *options, "--output", tmp_path / str(processes))
        assert code == 0, error
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    assert documents(tmp_path / "1" / "train", trained) == texts
    assert manifest(tmp_path / "1")["documents"]["read"] == 300
    code, out, _ = slm_data("show", tmp_path / "1" / "train", "--doc", 123)
    assert code == 0
    assert texts[123] in out
    unit, row = ("line" if kind in ("gz", "zst", "bz2") else "row"), (24 if kind == "hub" else 124)
    assert out.splitlines()[1].endswith(f"{unit} {row}")


@pytest.mark.parametrize("kind", ["jsonl", "gz", "zst", "bz2", "parquet", "hub"])
def test_a_tokenizer_is_learned_from_so_much_text_of_any_kind(tmp_path, kind):
    """--max-bytes is of text, not of compressed files or shards."""
    texts = [f"{i} " + "the same words again " * 100 for i in range(300)]
    source = write_as(kind, tmp_path, texts)
    _, num_bytes = make_tokenizer([source], tmp_path / "t", vocab_size=300, max_bytes=100_000)
    assert 85_000 < num_bytes <= 100_000
    _, num_bytes = make_tokenizer([source], tmp_path / "all", vocab_size=300, max_bytes=10_000_000)
    assert num_bytes == sum(map(len, texts))


def test_compressed_text_and_folders_of_tables(tmp_path, slm_data, trained):
    """A folder holds what it holds: text, JSON lines and tables, compressed or not; archives of other things are passed over."""
    (tmp_path / "in").mkdir()
    wanted = texts_of(40)
    (tmp_path / "in" / "a.txt.gz").write_bytes(gzip.compress(wanted[0].encode()))
    write_jsonl(tmp_path / "in" / "b.jsonl", wanted[1:20])
    pq.write_table(pa.table({"text": wanted[20:30]}), tmp_path / "in" / "c.parquet")
    (tmp_path / "in" / "d.jsonl.zst").write_bytes(
        zstd("".join(json.dumps({"text": t}) + "\n" for t in wanted[30:]).encode())
    )
    (tmp_path / "in" / "e.tar.gz").write_bytes(gzip.compress(b"not text"))
    options = ("--tokenizer", trained, "--output", tmp_path / "out", "--validation-fraction", 0, "--processes", 1)
    assert slm_data("shards", tmp_path / "in", *options)[0] == 0
    assert documents(tmp_path / "out" / "train", trained) == wanted
    assert manifest(tmp_path / "out")["rejected"]["harmless"] == {"binary file": 1}


# --- bad input -----------------------------------------------------------------------------------------------


def test_tables_with_bad_rows(tmp_path, slm_data, trained):
    """null, empty and bytes that are no UTF-8 are each counted; a wrong column is told with those that are there."""
    good = texts_of(200)
    raw = [t.encode() for t in good]
    raw[5:5] = [None, b"", b"caf\xe9"]
    column = pa.array(raw, pa.binary()).view(pa.string()) if hasattr(pa.Array, "view") else pa.array(raw, pa.binary())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet", row_group_size=50)
    options = ("--tokenizer", trained, "--validation-fraction", 0, "--processes", 1, "--max-bad-fraction", 0.1)
    assert slm_data("shards", tmp_path / "a.parquet", *options, "--output", tmp_path / "out")[0] == 0
    found = manifest(tmp_path / "out")
    assert found["rejected"]["bad"] == {"empty document": 1, "field is not a string": 1, "not UTF-8": 1}
    assert found["documents"] == {"read": 203, "kept": 200, "rejected": 3, "filtered": 0, "duplicates": 0}
    code, _, error = slm_data(
        "shards", tmp_path / "a.parquet", *options, "--text-key", "body", "--output", tmp_path / "o2"
    )
    assert code == 2
    assert "no column 'body'; its columns are text" in error


def test_a_streamed_dataset_has_bad_rows_too(tmp_path, slm_data, trained):
    """Counted by reason as a table's: no text, no UTF-8, too long; data that break end their shard and are counted as that."""
    good = [f"text {t}" for t in texts_of(200)]
    raw = [t.encode() for t in good]
    raw[5:5] = [None, b"", b"caf\xe9", b"x" * 20_000]
    (tmp_path / "hub").mkdir()
    pq.write_table(pa.table({"text": pa.array(raw, pa.binary()).view(pa.string())}), tmp_path / "hub" / "train.parquet")
    source = f"hf://{tmp_path / 'hub'}"
    options = ("--tokenizer", trained, "--validation-fraction", 0, "--processes", 1, "--max-bad-fraction", 0.1)
    options = (*options, "--max-doc-bytes", 10_000)
    assert slm_data("shards", source, *options, "--output", tmp_path / "out")[0] == 0
    reasons = ("document too long", "empty document", "field is not a string", "not UTF-8")
    assert manifest(tmp_path / "out")["rejected"]["bad"] == dict.fromkeys(reasons, 1)
    assert documents(tmp_path / "out" / "train", trained) == good
    (tmp_path / "json").mkdir()
    lines = [json.dumps({"text": t}) for t in good]
    (tmp_path / "json" / "train-0.jsonl").write_text("\n".join([*lines[:100], '{"text": "abc']))
    (tmp_path / "json" / "train-1.jsonl").write_text("\n".join(lines[100:150] + ['{"text": 5}'] + lines[150:]))
    code, out, _ = slm_data("shards", f"hf://{tmp_path / 'json'}", *options, "--output", tmp_path / "broken")
    assert code == 0
    reasons = ("broken data: the rest of the shard is lost", "field is not a string")
    assert manifest(tmp_path / "broken")["rejected"]["bad"] == dict.fromkeys(reasons, 1)
    assert documents(tmp_path / "broken" / "train", trained) == good[100:]


def test_a_streamed_dataset_that_changed_is_not_mixed(tmp_path, slm_data, trained):
    """Its files are part of the job: complete shards are refused, unfinished ones begun anew; what changes meanwhile is told."""
    source = write_as("hub", tmp_path, texts_of(200))
    base = ("shards", source, "--tokenizer", trained, "--validation-fraction", 0, "--processes", 1, "--output")
    assert slm_data(*base, tmp_path / "out")[0] == 0
    assert "complete already" in slm_data(*base, tmp_path / "out")[1]
    (piece, *_) = cut(find_files([source])[0], 1 << 20)
    pq.write_table(pa.table({"text": texts_of(80, seed=1)}), tmp_path / "saved" / "train-00001-of-00002.parquet")
    code, _, error = slm_data(*base, tmp_path / "out")
    assert code == 2
    assert f"an earlier state of {source}, which has changed since" in error
    with pytest.raises(UserError, match="changed while it was being read"):
        list(read_piece(piece, Reading()))


def test_a_corrupt_page_costs_its_rows_and_no_more(tmp_path, slm_data, trained):
    """A flipped byte in one row group: all its rows are counted as lost, every other row is there."""
    texts = texts_of(400)
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": texts}), path, row_group_size=100, write_page_checksum=True, compression="none",
                   use_dictionary=False)  # fmt: skip
    column = pq.ParquetFile(path).metadata.row_group(2).column(0)
    data = bytearray(path.read_bytes())
    data[column.data_page_offset + column.total_compressed_size // 2] ^= 0x40
    path.write_bytes(data)
    options = ("--tokenizer", trained, "--output", tmp_path / "out", "--validation-fraction", 0, "--processes", 1)
    assert slm_data("shards", path, *options)[0] == 2
    assert slm_data("shards", path, *options, "--max-bad-fraction", 0.5)[0] == 0
    found = manifest(tmp_path / "out")
    assert found["documents"]["read"] == 400
    assert found["rejected"]["bad"] == {"row in a corrupt part of a table": 100}
    assert documents(tmp_path / "out" / "train", trained) == texts[:200] + texts[300:]
    path.write_bytes(data[: len(data) // 2])
    code, _, error = slm_data("shards", path, *options[:2], "--output", tmp_path / "cut")
    assert code == 2
    assert "is not a readable parquet file" in error


@pytest.mark.parametrize(("suffix", "pack"), [("gz", gzip.compress), ("zst", zstd)])
def test_a_truncated_archive_is_told_and_what_came_before_is_kept(tmp_path, slm_data, trained, suffix, pack):
    rng = random.Random(3)
    texts = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz ", k=500)) for _ in range(2000)]
    packed = pack("".join(json.dumps({"text": t}) + "\n" for t in texts).encode())
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(packed[: len(packed) // 2])
    options = ("--tokenizer", trained, "--output", tmp_path / "out", "--validation-fraction", 0, "--processes", 1)
    code, out, error = slm_data("shards", path, *options)
    kept = [] if code else documents(tmp_path / "out" / "train", trained)
    assert "compressed data broken or cut off: the rest of the file is lost" in out + error
    assert texts[: len(kept)] == kept
    if suffix == "gz":  # zstd's blocks are larger than this file
        assert len(kept) > 500


def test_long_lines_are_rejected_in_bounded_memory(tmp_path, trained):
    """A line of 100 MB costs neither the other documents nor the memory of 100 MB."""
    path = tmp_path / "a.jsonl"
    texts = texts_of(50)
    lines = [json.dumps({"text": t}) for t in texts]
    with open(path, "w") as file:
        file.write("\n".join(lines[:25]) + '\n{"text": "')
        for _ in range(100):
            file.write("x" * (1 << 20))
        file.write('"}\n' + "\n".join(lines[25:]))
    code = (
        "import resource, sys; from pathlib import Path; from data_prep.shards import make_shards\n"
        "from data_prep.reading import Reading\n"
        f"r = make_shards([{str(path)!r}], {str(trained)!r}, Path({str(tmp_path / 'out')!r}), processes=1,"
        " reading=Reading(max_doc_bytes=1 << 20), max_bad_fraction=0.5, validation_fraction=0)\n"
        "peak = int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) // 1024\n"
        "print(r.splits['train']['rejected']['bad'], peak)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert "{'document too long': 1}" in result.stdout, result.stderr
    assert int(result.stdout.split()[-1]) < 300
    assert documents(tmp_path / "out" / "train", trained) == texts


def test_policies(tmp_path, slm_data, trained):
    """skip counts and leaves out, replace puts U+FFFD where bytes are no text, fail stops at the first and names it."""
    lines = [json.dumps({"text": t}).encode() for t in texts_of(100)]
    lines[10:10] = [b'{"text": "caf\xe9"}', b'{"text": "a\\ud800b"}', b'{"text": NaN}', b'{"text": "x", "n": NaN}']
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines))
    base = (
        "shards",
        path,
        "--tokenizer",
        trained,
        "--validation-fraction",
        0,
        "--processes",
        1,
        "--max-bad-fraction",
        0.1,
    )
    assert slm_data(*base, "--output", tmp_path / "skip")[0] == 0
    found = manifest(tmp_path / "skip")
    assert found["rejected"]["bad"] == {"field is not a string": 1, "lone surrogate": 1, "not UTF-8": 1}
    assert documents(tmp_path / "skip" / "train", trained)[10] == "x"  # NaN elsewhere in the line harms nobody
    code, out, _ = slm_data(*base, "--on-bad", "replace", "--output", tmp_path / "replace")
    assert code == 0
    assert documents(tmp_path / "replace" / "train", trained)[10:13] == ["caf\ufffd", "a\ufffdb", "x"]
    assert manifest(tmp_path / "replace")["replaced"] == {"lone surrogate": 1, "not UTF-8": 1}
    assert "characters replaced in: 1 lone surrogate, 1 not UTF-8" in out
    code, _, error = slm_data(*base, "--on-bad", "fail", "--output", tmp_path / "fail")
    assert code == 2
    assert f"{path}, line 11: not UTF-8" in error
    code, _, error = slm_data(*base, "--on-bad", "fail", "--shard-bytes", 200, "--output", tmp_path / "fail2")
    assert f"{path}, line 11: not UTF-8" in error  # of the file, not of the part
    assert not (tmp_path / "fail" / "train" / "manifest.json").exists()


def test_a_file_that_changes_while_it_is_read(tmp_path, trained, monkeypatch):
    """Appended to in the middle of the run: an error, and no manifest over a mixture."""
    path = write_jsonl(tmp_path / "a.jsonl", texts_of(3000, words=400))
    encode, calls = SLMTokenizer.encode_batch, []

    def appending(self, texts):
        if not calls:
            with open(path, "a") as file:
                file.write('{"text": "late"}\n')
        calls.append(1)
        return encode(self, texts)

    monkeypatch.setattr(SLMTokenizer, "encode_batch", appending)
    with pytest.raises(UserError, match="changed while it was being read"):
        make_shards([path], str(trained), tmp_path / "out", processes=1, engine="reference")
    assert not list(tmp_path.rglob("manifest.json"))


# --- duplicates and filters ----------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [1, 3])
def test_exact_duplicates_keep_the_first(tmp_path, slm_data, trained, processes):
    """Over pieces, files and kinds; the first in the order of the input stays, whatever the number of workers."""
    texts = texts_of(200)
    rng = random.Random(1)
    first, second = [*texts[:150], *rng.choices(texts[:100], k=60)], [*texts[120:], *rng.choices(texts, k=40)]
    inputs = [write_jsonl(tmp_path / "a.jsonl", first), tmp_path / "b.parquet"]
    pq.write_table(pa.table({"text": second}), inputs[1], row_group_size=30)
    options = ("--tokenizer", trained, "--output", tmp_path / "out", "--validation-fraction", 0, "--shard-bytes", "2k")
    code, out, _ = slm_data("shards", *inputs, *options, "--processes", processes, "--deduplicate")
    assert code == 0
    assert documents(tmp_path / "out" / "train", trained) == list(dict.fromkeys([*first, *second]))
    counts = manifest(tmp_path / "out")["documents"]
    assert counts["duplicates"] == len(first) + len(second) - len(set(first + second))
    assert f"duplicates removed: {counts['duplicates']} documents" in out
    assert counts["read"] == len(first) + len(second)


def test_duplicates_in_buckets_are_those_of_a_set(tmp_path):
    """The same documents are dropped however few hashes may be held at once."""
    rng = random.Random(0)
    digests = [
        [hashlib.sha256(bytes([rng.randrange(80)])).digest()[:HASH_BYTES] for _ in range(n)] for n in (50, 0, 1, 70)
    ]
    seen, wanted = set(), []
    for unit in digests:
        wanted.append([i for i, d in enumerate(unit) if d in seen or seen.add(d)])
    for bucket_hashes in (10**6, 7):
        for i, unit in enumerate(digests):
            hashes_path(tmp_path, i).write_bytes(b"".join(unit))
        assert write_duplicates(tmp_path, 4, bucket_hashes) == sum(map(len, wanted))
        assert [np.fromfile(dropped_path(tmp_path, i), "<i8").tolist() for i in range(4)] == wanted


def test_length_filters_are_counted(tmp_path, slm_data, trained):
    texts = texts_of(300)
    lengths = [len(load_tokenizer(trained).encode(t)) + 2 for t in texts]
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    options = ("--tokenizer", trained, "--output", tmp_path / "out", "--validation-fraction", 0, "--processes", 1)
    code, out, _ = slm_data("shards", path, *options, "--min-tokens", 20, "--max-tokens", 60)
    assert code == 0
    assert documents(tmp_path / "out" / "train", trained) == [
        t for t, n in zip(texts, lengths, strict=True) if 20 <= n <= 60
    ]
    short, long = sum(n < 20 for n in lengths), sum(n > 60 for n in lengths)
    assert manifest(tmp_path / "out")["filtered"] == {"fewer than 20 tokens": short, "more than 60 tokens": long}
    assert "filtered out: " in out
    for arguments, message in (
        (("--min-tokens", 50, "--max-tokens", 20), "less than --min-tokens"),
        (("--min-tokens", 10**6), "have fewer than 1000000 tokens"),
        (("--max-doc-bytes", "0"), "--max-doc-bytes is 0"),
    ):
        code, _, error = slm_data("shards", path, "--tokenizer", trained, "--output", tmp_path / "no", *arguments)
        assert code == 2
        assert message in error
