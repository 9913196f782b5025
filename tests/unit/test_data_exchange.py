"""slm-data stats, show, verify, import and export: the way back to a line, and other tools."""

import gzip
import json
import subprocess
import sys

import numpy as np
import pytest

from data_prep.job import os_errors_told
from slm.data.tokens import TokenDataset, decode_index
from slm.errors import EnvironmentProblem
from slm.tokenizer import SLMTokenizer, load_tokenizer
from tests.unit.test_data_inputs import write_as
from tests.unit.test_data_prep import REPOSITORY, documents, slm_data, texts_of, trained, write_jsonl

__all__ = ["slm_data", "trained"]  # fixtures


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
    arguments = (
        "import",
        tmp_path / "theirs",
        "--format",
        layout,
        "--tokenizer",
        trained,
        "--output",
        tmp_path / "back",
    )
    code, _, error = slm_data(*arguments)
    assert code == 0, error
    assert slm_data("verify", tmp_path / "back")[0] == 0
    suffixes = (".bin", ".idx")
    before, after = (
        [p.read_bytes() for p in sorted(f.iterdir()) if p.suffix in suffixes] for f in (train, tmp_path / "back")
    )
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
    """uint32 of a small vocabulary is not read as uint16: the table of documents tells, or --dtype, or the ids. A table that
    does not begin at token 0, or is no table, is told."""
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
        assert slm_data(*base, tmp_path / f"{width} found")[0] == 0
        for how in ("", " said", " found"):
            assert documents(tmp_path / f"{width}{how}", trained) == texts
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
