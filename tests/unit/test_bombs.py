"""Inputs that are small on the disk and without end when unpacked: an error in bounded memory."""

import gzip
import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.corpus import cut, find_files
from data_prep.reading import TOO_LONG, Reading, read_piece
from tests.unit.test_data_prep import REPOSITORY, trained

__all__ = ["trained"]  # a fixture
ZEROS = gzip.compress(bytes(50 << 20), 9)  # a gzip file may have many members, one after the other


_MEASURED = """
import sys
from data_prep.cli import main
try:
    main()
finally:
    print("peak", int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) // 1024)
"""


def peak_mb(*words):
    """(exit code, what slm-data said, most resident memory of its process in MB). (wait4's figure is the parent's, if larger.)"""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _MEASURED, *map(str, words)]
    done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=800)
    return done.returncode, done.stderr, int(done.stdout.split()[-1])


@pytest.mark.parametrize("members", [6, pytest.param(205, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
@pytest.mark.parametrize("name", ["a.jsonl.gz", "folder/a.txt.gz"])
def test_a_compressed_line_without_end_is_an_error_in_bounded_memory(tmp_path, trained, name, members):
    """10 GB of zeros in 10 MB, and 300 MB of them in the quick case: more than a process of some 64 MB documents may hold."""
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    with open(path, "wb") as file:
        for _ in range(members):
            file.write(ZEROS)
    given = path if name.endswith(".jsonl.gz") else path.parent
    code, said, peak = peak_mb(
        "shards", given, "--tokenizer", trained, "--output", tmp_path / "out", "--processes", "1",
        "--max-doc-bytes", "16M",
    )  # fmt: skip
    assert code != 0
    assert "document too long" in said
    assert "Traceback" not in said
    assert peak < 400, f"{peak} MB"
    assert not (tmp_path / "out" / "train" / "manifest.json").exists()


@pytest.mark.parametrize("store_schema", [True, False])
def test_a_dictionary_does_not_make_a_batch_of_any_size(tmp_path, store_schema):
    """Parquet of some kB: 60 rows that are all the one text of 40 MB of a dictionary, 2.4 GB in one batch."""
    path = tmp_path / "a.parquet"
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 60, pa.int32()), pa.array(["a" * (40 << 20)]))
    pq.write_table(pa.table({"text": column}), path, compression="zstd", store_schema=store_schema)
    assert path.stat().st_size < 100_000
    code = (
        "from data_prep.corpus import cut, find_files\n"
        "from data_prep.reading import Reading, read_piece\n"
        f"found = [r.problem for p in cut(find_files([{str(path)!r}])[0], 1 << 20)\n"
        "         for r in read_piece(p, Reading(max_doc_bytes=1 << 20))]\n"
        "peak = int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) // 1024\n"
        "print(len(found), set(found), peak)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=200)
    assert done.stdout.startswith(f"60 {{'{TOO_LONG}'}} "), done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) < 1500


def test_a_dictionary_of_ordinary_rows_is_read_as_it_was(tmp_path):
    """Nulls and repetitions, in order, whatever the size of the batches."""
    texts = ["one", None, "two", "one", "three", None, "two"] * 100
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": pa.array(texts).dictionary_encode(), "n": range(700)}), path, row_group_size=150)
    pieces = cut(find_files([path])[0], 1 << 20)
    assert [r.text for p in pieces for r in read_piece(p, Reading())] == texts
