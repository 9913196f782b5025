"""slm-data over every kind of input, policy and filter; duplicates; many processes; the way back to a line; other tools."""

import bz2
import gzip
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.corpus import cut, find_files
from data_prep.duplicates import HASH_BYTES, dropped_path, hashes_path, write_duplicates
from data_prep.job import os_errors_told
from data_prep.reading import Reading, read_piece
from data_prep.shards import _first_texts, make_shards
from data_prep.tokenizer import make_tokenizer
from data_prep.units import UNITS
from slm.data.tokens import TokenDataset, decode_index
from slm.errors import EnvironmentProblem, UserError
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
    (tmp_path / "in" / "d.jsonl.zst").write_bytes(zstd("".join(json.dumps({"text": t}) + "\n" for t in wanted[30:]).encode()))
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
    code, _, error = slm_data("shards", tmp_path / "a.parquet", *options, "--text-key", "body", "--output", tmp_path / "o2")
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
    base = ("shards", path, "--tokenizer", trained, "--validation-fraction", 0, "--processes", 1, "--max-bad-fraction", 0.1)
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
    digests = [[hashlib.sha256(bytes([rng.randrange(80)])).digest()[:HASH_BYTES] for _ in range(n)] for n in (50, 0, 1, 70)]
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
    assert documents(tmp_path / "out" / "train", trained) == [t for t, n in zip(texts, lengths, strict=True) if 20 <= n <= 60]
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


# --- many processes ------------------------------------------------------------------------------------------


def command(corpus, trained, output, *more):
    arguments = ["shards", corpus, "--tokenizer", trained, "--output", output, "--shard-bytes", "30k", *more]
    return [sys.executable, "-m", "data_prep.cli", *map(str, arguments)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "a.jsonl", [*texts_of(1500, words=300), *texts_of(200, words=300)])


@pytest.fixture(scope="module")
def whole(corpus, trained, tmp_path_factory):
    """What one process writes."""
    output = tmp_path_factory.mktemp("whole") / "out"
    subprocess.run(command(corpus, trained, output, "--processes", 1, "--deduplicate"), cwd=REPOSITORY, check=True,
                   stdout=subprocess.DEVNULL)  # fmt: skip
    return contents(output)


def test_mpirun_gives_the_same_bytes(corpus, trained, whole, tmp_path):
    """Three real MPI ranks; only the first speaks; a mistake is said once and the code is not 0."""
    mpirun = [Path(sys.executable).with_name("mpirun"), "--allow-run-as-root", "--oversubscribe", "-n", "3"]
    result = subprocess.run([*map(str, mpirun), *command(corpus, trained, tmp_path / "out", "--deduplicate")],
                            cwd=REPOSITORY, capture_output=True, text=True, timeout=120)  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("next: name these folders") == 1
    assert contents(tmp_path / "out") == whole
    result = subprocess.run([*map(str, mpirun), *command("absent.jsonl", trained, tmp_path / "no")],
                            cwd=REPOSITORY, capture_output=True, text=True, timeout=120)  # fmt: skip
    assert result.returncode != 0
    assert result.stderr.count("absent.jsonl does not exist") == 1
    assert "Traceback" not in result.stderr


def test_processes_that_know_nothing_of_each_other_share_the_work(corpus, trained, whole, tmp_path):
    """The members of a SLURM array, started together; one is killed: the others finish its unit too."""
    output = tmp_path / "out"
    environment = {**os.environ, "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "1"}
    tasks = [
        subprocess.Popen(command(corpus, trained, output, "--processes", 1, "--deduplicate"), cwd=REPOSITORY,
                         env={**environment, "SLURM_ARRAY_TASK_ID": str(i)}, stdout=subprocess.DEVNULL)
        for i in (1, 2, 3)
    ]  # fmt: skip
    while tasks[0].poll() is None and not list(output.glob(f"{UNITS}/*.json")):
        time.sleep(0.005)
    tasks[2].send_signal(signal.SIGKILL)
    assert [task.wait(timeout=120) for task in tasks] == [0, 0, -signal.SIGKILL]
    assert contents(output) == whole


@pytest.mark.slow
def test_fifty_kills_at_random_moments(corpus, trained, whole, tmp_path):
    """SIGKILL to the main process, fifty times, in both passes: in the end the bytes of an uninterrupted run."""
    rng = random.Random()
    output = tmp_path / "out"
    num_killed = 0
    while num_killed < 50:
        process = subprocess.Popen(command(corpus, trained, output, "--processes", 2, "--deduplicate"), cwd=REPOSITORY,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
        time.sleep(rng.random() * 2.5)
        if process.poll() is None:
            process.kill()
            num_killed += 1
        elif process.returncode == 0:  # it finished: begin again, so that all kills hit something
            assert contents(output) == whole
            subprocess.run(["rm", "-r", str(output)], check=True)
        process.wait()
    assert subprocess.run(command(corpus, trained, output, "--deduplicate"), cwd=REPOSITORY,
                          stdout=subprocess.DEVNULL).returncode == 0  # fmt: skip
    assert contents(output) == whole


# --- engines -------------------------------------------------------------------------------------------------


def test_the_fast_engine_gives_the_same_bytes_and_is_named(tmp_path, slm_data, trained):
    """gigatoken and the reference: the same shards, the manifest says which; text like a special token stays text."""
    path = write_jsonl(tmp_path / "a.jsonl", [*texts_of(200), "x <|end_of_text|> y", "<|begin_of_text|>"])
    for engine in ("gigatoken", "reference"):
        options = ("--tokenizer", trained, "--processes", 2, "--engine", engine, "--validation-fraction", 0)
        assert slm_data("shards", path, *options, "--output", tmp_path / engine)[0] == 0
        assert manifest(tmp_path / engine)["tokenizer"]["engine"].split()[0] == engine.replace("reference", "tiktoken")
    shards = [contents(tmp_path / engine / "train") for engine in ("gigatoken", "reference")]
    for found in shards:
        del found["manifest.json"]
    assert shards[0] == shards[1]


def test_each_shard_names_the_engine_that_made_it(tmp_path, slm_data, trained):
    """A run that goes on with another engine: the manifest does not say that the last one made it all."""
    path = write_jsonl(tmp_path / "a.jsonl", [*texts_of(100), *["bad"] * 5])
    path.write_text(path.read_text() + "{\n" * 30)
    base = ("shards", path, "--tokenizer", trained, "--processes", 1, "--validation-fraction", 0, "--output", tmp_path / "out")
    base = (*base, "--shard-bytes", "2k", "--engine")
    assert slm_data(*base, "gigatoken")[0] == 2  # too much is bad; all units are there
    done = sorted((tmp_path / "out" / UNITS).glob("*.json"))
    assert len(done) > 3
    done[0].unlink()
    assert slm_data(*base, "reference", "--max-bad-fraction", 0.5)[0] == 0
    found = manifest(tmp_path / "out")
    engines = [shard["engine"].split()[0] for shard in found["shards"]]
    assert engines == ["tiktoken", *["gigatoken"] * (len(engines) - 1)]
    assert [name.split()[0] for name in found["tokenizer"]["engine"].split(", ")] == ["gigatoken", "tiktoken"]


def test_characters_of_another_unicode_version_go_to_the_reference(trained):
    """gigatoken's letters are not all tiktoken's. Which differ is found out for every character; their texts are encoded alike
    all the same, in neighbourhoods where it shows."""
    from slm.tokenizer_engines import RanksEngine
    from slm.tokenizer_fast import characters_that_differ, probe_ranks

    engine = RanksEngine(probe_ranks())
    assert characters_that_differ(engine.encode_batch, engine.encode_batch) == ""

    def letters_unknown(texts):  # as an older Unicode would see two letters
        return engine.encode_batch([text.replace("é", "\ue000").replace("漢", "\ue000") for text in texts])

    assert characters_that_differ(letters_unknown, engine.encode_batch) == "é漢"
    tokenizer = load_tokenizer(trained)
    assert tokenizer.use_fast_engine()
    for character in (*tokenizer.fast_differences[:40], "é", "漢"):
        text = f'x = [None, "{character}", 1{character}2, {character}{character} \'{character}s\n]'
        assert tokenizer.encode_batch([text])[0].tolist() == tokenizer.encode(text)


def test_an_engine_that_disagrees_is_not_used(trained, monkeypatch, caplog):
    """Parity is checked on hard strings and on the corpus's first texts before a run."""
    from slm import tokenizer_fast

    encode = tokenizer_fast.FastEncoder.encode_batch

    def wrong(self, texts):
        return [ids[:-1] if "needle" in text else ids for ids, text in zip(encode(self, texts), texts, strict=True)]

    monkeypatch.setattr(tokenizer_fast.FastEncoder, "encode_batch", wrong)
    tokenizer = load_tokenizer(trained)
    assert not tokenizer.use_fast_engine(["hay", "a needle"])
    assert "encodes 'a needle' otherwise" in caplog.text
    assert tokenizer.use_fast_engine(["hay"])


def test_the_corpus_is_not_read_for_an_engine_that_is_not_there(tmp_path):
    """A tokenizer without a fast engine says so before it looks at the first text."""
    SLMTokenizer().train(texts_of(300), vocab_size=320, kind="sentencepiece").save_pretrained(tmp_path / "sp")
    texts = iter(["not looked at"])
    assert not load_tokenizer(tmp_path / "sp").use_fast_engine(texts)
    assert list(texts) == ["not looked at"]
    units = [cut(find_files([write_jsonl(tmp_path / "a.jsonl", texts_of(9))])[0], 1 << 20)]
    (tmp_path / "a.jsonl").unlink()
    first = _first_texts(units, Reading())  # would fail, if it read
    with pytest.raises(UserError, match="cannot be read"):
        next(first)


# --- looking at it -------------------------------------------------------------------------------------------


def test_stats_and_show(tmp_path, slm_data, trained):
    """Totals agree with the manifest; sources and lengths add up; a document is traced to its very line."""
    texts = texts_of(400)
    inputs = [write_jsonl(tmp_path / "a.jsonl", texts[:300]), write_jsonl(tmp_path / "b.jsonl", texts[300:])]
    options = ("--tokenizer", trained, "--output", tmp_path / "out", "--shard-bytes", "3k", "--processes", 1)
    assert slm_data("shards", *inputs, *options, "--validation-fraction", 0.2)[0] == 0
    code, out, _ = slm_data("stats", tmp_path / "out", "--json")
    assert code == 0
    for found in json.loads(out):
        dataset = TokenDataset(found["path"])
        assert (found["docs"], found["tokens"]) == (dataset.num_docs, dataset.num_tokens)
        assert sum(docs for docs, _ in found["by_source"].values()) == dataset.num_docs
        assert sum(tokens for _, tokens in found["by_source"].values()) == dataset.num_tokens
        assert found["histogram"] == dataset.manifest["length_histogram"]
    code, out, _ = slm_data("stats", tmp_path / "out")
    assert code == 0
    assert "█" in out
    assert "400 kept" in out
    train = documents(tmp_path / "out" / "train", trained)
    for doc in (0, len(train) // 2, len(train) - 1):
        code, out, _ = slm_data("show", tmp_path / "out" / "train", "--doc", doc)
        assert code == 0
        index = texts.index(train[doc])
        path, line = (inputs[0], index + 1) if index < 300 else (inputs[1], index - 299)
        assert f"from {path}, line {line}\n" in out
        assert train[doc] in out
    code, _, error = slm_data("show", tmp_path / "out" / "train", "--doc", len(train))
    assert code == 2
    assert f"give 0 to {len(train) - 1}" in error


def test_stats_print_odd_paths_as_they_are(tmp_path, slm_data, trained, monkeypatch):
    """Square brackets are no markup; streamed datasets and files of this machine have no folder in common."""
    monkeypatch.setenv("COLUMNS", "300")
    folder = tmp_path / "[red]wiki [x] :smile:"
    folder.mkdir()
    inputs = [write_jsonl(folder / f"{i}[b].jsonl", texts_of(5)) for i in range(14)]
    inputs.append(write_as("hub", tmp_path, texts_of(200)))
    options = ("--tokenizer", trained, "--output", tmp_path / "[bold]out", "--validation-fraction", 0, "--processes", 1)
    assert slm_data("shards", *inputs, *options)[0] == 0
    code, out, _ = slm_data("stats", tmp_path / "[bold]out")
    assert code == 0
    assert out.startswith(f"{tmp_path / '[bold]out' / 'train'}: ")
    assert f"{folder} (files)" in out
    assert str(inputs[-1]) in out


def test_show_names_lines_of_text_and_says_when_the_source_changed(tmp_path, slm_data, trained):
    """A long text's document is traced to its line, compressed or not; of a file that is another now no line is named."""
    text = "\n".join(f"line {i} " + "words " * (i % 40) for i in range(1, 1500))
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(text.encode()))
    path = write_jsonl(tmp_path / "c.jsonl", texts_of(20))
    options = ("--tokenizer", trained, "--validation-fraction", 0, "--processes", 1, "--output")
    for source in (tmp_path / "a.txt", tmp_path / "b.txt.gz"):
        out = tmp_path / f"{source.name}.out"
        assert slm_data("shards", source, *options, out)[0] == 0
        printed = slm_data("show", out / "train", "--doc", 2)[1]
        first = next(line for line in documents(out / "train", trained)[2].splitlines() if line)
        assert f"from {source}, line {first.split()[1]}\n" in printed
    assert slm_data("shards", path, *options, tmp_path / "out")[0] == 0
    write_jsonl(path, ["other", *texts_of(20)])
    code, printed, _ = slm_data("show", tmp_path / "out" / "train", "--doc", 3)
    assert code == 0
    assert f"from {path}, which has changed since; it was byte " in printed
    path.unlink()
    assert f"from {path}, which is not there now" in slm_data("show", tmp_path / "out" / "train", "--doc", 3)[1]


def test_verify_covers_where_documents_came_from(tmp_path, slm_data, trained):
    path = write_jsonl(tmp_path / "a.jsonl", texts_of(50))
    options = ("--tokenizer", trained, "--output", tmp_path / "out", "--validation-fraction", 0, "--processes", 1)
    assert slm_data("shards", path, *options)[0] == 0
    (source,) = (tmp_path / "out" / "train").glob("*.src")
    data = bytearray(source.read_bytes())
    data[9] ^= 1
    source.write_bytes(data)
    code, out, _ = slm_data("verify", tmp_path / "out")
    assert code == 4
    assert f"{source.name}: SHA-256" in out


# --- other tools ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["megatron", "datatrove", "olmo"])
@pytest.mark.parametrize("with_metadata", [True, False])
def test_export_and_import_leave_the_tokens_alone(tmp_path, slm_data, trained, layout, with_metadata):
    """There and back: the same .bin and .idx bytes. OLMo's files also without the table of documents, by EOS."""
    path = write_jsonl(tmp_path / "a.jsonl", texts_of(200))
    options = ("--tokenizer", trained, "--output", tmp_path / "out", "--validation-fraction", 0, "--shard-bytes", "4k")
    assert slm_data("shards", path, *options)[0] == 0
    train = tmp_path / "out" / "train"
    assert slm_data("export", train, "--format", layout, "--output", tmp_path / "theirs")[0] == 0
    if layout == "olmo" and not with_metadata:
        for table in (tmp_path / "theirs").glob("*.csv.gz"):
            table.unlink()
    arguments = ("import", tmp_path / "theirs", "--format", layout, "--tokenizer", trained, "--output", tmp_path / "back")
    code, _, error = slm_data(*arguments)
    assert code == 0, error
    assert slm_data("verify", tmp_path / "back")[0] == 0
    suffixes = (".bin", ".idx")
    before, after = ([p.read_bytes() for p in sorted(f.iterdir()) if p.suffix in suffixes] for f in (train, tmp_path / "back"))
    assert before == after
    code, _, error = slm_data(*arguments)
    assert code == 2
    assert "is not empty" in error


def test_datatrove_reads_ours_and_ours_reads_datatroves(tmp_path, slm_data, trained):
    """Against datatrove's own writer and reader."""
    from datatrove.pipeline.tokens.tokenizer import TokenizedFile
    from datatrove.utils.dataset import DatatroveFileDataset

    tokenizer = load_tokenizer(trained)
    texts = texts_of(60)
    rows = [[tokenizer.bos_token_id, *tokenizer.encode(t), tokenizer.eos_token_id] for t in texts]
    theirs = TokenizedFile(str(tmp_path / "theirs"), "x.ds", save_final_metadata=True, token_size=2)
    for row in rows:
        theirs.write(row, None)
    theirs.close()
    arguments = ("--format", "datatrove", "--tokenizer", trained, "--output", tmp_path / "ours")
    assert slm_data("import", tmp_path / "theirs", *arguments)[0] == 0
    assert documents(tmp_path / "ours", trained) == texts
    assert slm_data("export", tmp_path / "ours", "--format", "datatrove", "--output", tmp_path / "again")[0] == 0
    for suffix in ("", ".index"):
        again = tmp_path / "again" / f"shard-00000.ds{suffix}"
        assert again.read_bytes() == (tmp_path / "theirs" / f"x.ds{suffix}").read_bytes()
    flat = [token for row in rows for token in row]
    read = DatatroveFileDataset(f"{tmp_path}/again/shard-00000.ds", seq_len=15, token_size=2)
    assert len(read) == len(flat) // 16
    for i in range(len(read)):
        assert read[i]["input_ids"].tolist() == flat[16 * i : 16 * i + 16]


def test_olmo_ids_of_either_width(tmp_path, slm_data, trained):
    """uint32 of a small vocabulary is not read as uint16: the table of documents tells, or --dtype; what could be both is
    refused. A table that does not begin at token 0, or is no table, is told."""
    tokenizer = load_tokenizer(trained)
    texts = texts_of(30)
    rows = [[tokenizer.bos_token_id, *tokenizer.encode(t), tokenizer.eos_token_id] for t in texts]
    ends = np.cumsum([len(row) for row in rows]).tolist()
    table = tmp_path / "in" / "part.v2.csv.gz"
    table.parent.mkdir()
    base = ("import", tmp_path / "in" / "part.v2", "--format", "olmo", "--tokenizer", trained, "--output")
    for width in ("uint16", "uint32"):
        np.array(sum(rows, []), width).tofile(tmp_path / "in" / "part.v2.npy")
        table.write_bytes(gzip.compress("".join(f"{a},{b}\n" for a, b in zip([0, *ends], ends, strict=False)).encode()))
        assert slm_data(*base, tmp_path / width)[0] == 0
        table.unlink()
        assert slm_data(*base, tmp_path / f"{width} said", "--dtype", width)[0] == 0
        assert documents(tmp_path / width, trained) == documents(tmp_path / f"{width} said", trained) == texts
        code, _, error = slm_data(*base, tmp_path / f"{width} found")
        assert (code, "say it by --dtype" in error) == ((0, False) if width == "uint16" else (2, True))
    for content, message in ((f"3,{ends[-1]}\n", "number 0 begins at token 3"), (f"0,{1 << 70}\n", "not readable")):
        table.write_bytes(gzip.compress(content.encode()))
        code, _, error = slm_data(*base, tmp_path / "no")
        assert code == 4
        assert message in error
    table.write_bytes(table.read_bytes()[:10] + b"\xff" * 20)
    assert slm_data(*base, tmp_path / "no")[0] == 4


def test_a_prefix_with_a_dot_is_not_another_file(tmp_path, slm_data, trained):
    """corpus.v2 that is not there is told, and corpus.bin not taken in its place."""
    path = write_jsonl(tmp_path / "a.jsonl", texts_of(50))
    options = ("--tokenizer", trained, "--validation-fraction", 0, "--processes", 1)
    assert slm_data("shards", path, *options, "--output", tmp_path / "out")[0] == 0
    for suffix in (".bin", ".idx"):
        (tmp_path / f"corpus{suffix}").write_bytes((tmp_path / "out" / "train" / f"shard-00000{suffix}").read_bytes())
    base = ("import", tmp_path / "corpus.v2", "--format", "megatron", "--tokenizer", trained, "--output")
    code, _, error = slm_data(*base, tmp_path / "no")
    assert code == 2
    assert "corpus.v2: there is no .bin file" in error
    for suffix in (".bin", ".idx"):
        (tmp_path / f"corpus{suffix}").rename(tmp_path / f"corpus.v2{suffix}")
    assert slm_data(*base, tmp_path / "yes")[0] == 0


def test_a_full_disk_is_a_message(tmp_path, slm_data, trained):
    """ENOSPC from a device that is always full; and a real export that may not write so much."""
    with pytest.raises(EnvironmentProblem, match="the disk of .* is full"), os_errors_told(tmp_path, "try again"):
        with open("/dev/full", "w") as file:
            file.write("x")
    path = write_jsonl(tmp_path / "a.jsonl", texts_of(500))
    options = ("--tokenizer", trained, "--output", tmp_path / "out", "--validation-fraction", 0, "--processes", 1)
    assert slm_data("shards", path, *options)[0] == 0
    export = f"{sys.executable} -m data_prep.cli export {tmp_path}/out/train --format olmo --output {tmp_path}/theirs"
    result = subprocess.run(["bash", "-c", f"ulimit -f 1; {export}"], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 2
    assert "File too large" in result.stderr
    assert "Traceback" not in result.stderr


def test_import_refusals(tmp_path, slm_data, trained):
    """A missing index, a wrong tokenizer and a file cut off are told before or instead of a dataset."""
    path = write_jsonl(tmp_path / "a.jsonl", texts_of(50))
    options = ("--tokenizer", trained, "--output", tmp_path / "out", "--validation-fraction", 0, "--processes", 1)
    assert slm_data("shards", path, *options)[0] == 0
    slm_data("export", tmp_path / "out" / "train", "--format", "megatron", "--output", tmp_path / "m")
    SLMTokenizer().save_pretrained(tmp_path / "bytes")
    base = ("import", tmp_path / "m", "--format", "megatron", "--output", tmp_path / "x", "--tokenizer")
    code, _, error = slm_data(*base, tmp_path / "bytes")
    assert code == 2
    assert "it is not the one that the tokens were made with" in error
    assert not (tmp_path / "x" / "manifest.json").exists()
    (binary,) = (tmp_path / "m").glob("*.bin")
    base = (*base[:5], tmp_path / "y", "--tokenizer", trained)
    binary.write_bytes(binary.read_bytes()[:-2])
    code, _, error = slm_data(*base)
    assert code == 4
    assert "its documents end at token" in error
    binary.with_suffix(".idx").unlink()
    code, _, error = slm_data(*base)
    assert code == 2
    assert "its index" in error
    assert slm_data("import", tmp_path / "nowhere", *base[2:])[0] == 2
    assert decode_index  # the reader of Megatron's index is tested against its bytes in test_tokens.py
