"""slm-data where inputs are odd: broken rows of a streamed dataset, sources that changed since, names with dots and brackets,
files of other tools that do not say what they are."""

import gzip
import json
import os

import numpy as np
import pytest

from data_prep.exchange import export_dataset, import_dataset
from data_prep.shards import make_shards
from data_prep.show import show
from data_prep.tokenizer import make_tokenizer
from slm.data.tokens import TokenDataset
from slm.errors import CorruptArtefact, EnvironmentProblem, UserError
from tests.unit.test_data_prep import slm_data, texts_of, trained, write_jsonl

__all__ = ["slm_data", "trained"]  # fixtures


def hub(folder, lines):
    folder.mkdir(exist_ok=True)
    (folder / "data.jsonl").write_text("".join(line + "\n" for line in lines))
    return f"hf://{folder}?split=train"


def test_rows_of_a_streamed_dataset_are_judged_like_others(tmp_path, trained):
    """Too long ones and rows that cannot be read are counted by reason, not a traceback."""
    spec = hub(tmp_path / "set", [json.dumps({"text": t}) for t in ("good " * 9, "long " * 999, "fine " * 9)])
    result = make_shards([spec], str(trained), tmp_path / "a", reading=reading(max_doc_bytes=1000), max_bad_fraction=1.0,
                         validation_fraction=0.0, processes=1)  # fmt: skip
    assert result.splits["train"]["num_docs"] == 2
    assert result.splits["train"]["documents"]["rejected"] == 1
    spec = hub(tmp_path / "broken", [json.dumps({"text": "good " * 9}), '{"text": "cut', "x"])
    with pytest.raises(UserError, match="the rest of the shard is lost"):
        make_shards([spec], str(trained), tmp_path / "b", reading=reading(), max_bad_fraction=0.0, processes=1)


def reading(**more):
    from data_prep.reading import Reading

    return Reading(**more)


def test_another_revision_of_a_streamed_dataset_is_not_mixed_in(tmp_path, trained):
    spec = hub(tmp_path / "set", [json.dumps({"text": "one " * 20})])
    make_shards([spec], str(trained), tmp_path / "out", processes=1, validation_fraction=0.0)
    hub(tmp_path / "set", [json.dumps({"text": "another " * 20})])
    with pytest.raises(UserError, match="an earlier state of hf://"):
        make_shards([spec], str(trained), tmp_path / "out", processes=1, validation_fraction=0.0)


def test_show_says_that_the_source_has_changed(tmp_path, trained):
    corpus = write_jsonl(tmp_path / "c.jsonl", texts_of(20))
    make_shards([corpus], str(trained), tmp_path / "out", processes=1, validation_fraction=0.0)
    assert f"{corpus}, line 4\n" in show(tmp_path / "out" / "train", 3) + "\n"
    os.utime(corpus, (1, 1))
    assert f"{corpus}, which has changed since" in show(tmp_path / "out" / "train", 3)


def test_show_gives_lines_of_long_texts(tmp_path, trained):
    text = tmp_path / "book.txt"
    text.write_text("".join(f"line {i} of a book\n" + "\n" * (i % 50 == 0) for i in range(5000)))
    make_shards([text], str(trained), tmp_path / "out", processes=1, validation_fraction=0.0)
    shown = show(tmp_path / "out" / "train", 1)
    line = int(shown.split(", line ")[1].split("\n")[0])
    first = shown.split("\n\n", 1)[1].splitlines()[0]
    assert first in text.read_text().splitlines()[line - 1] + "\n"


def test_failing_names_the_line_of_the_file(tmp_path, trained):
    """Also in the middle of a large file, whose parts are counted for themselves."""
    corpus = write_jsonl(tmp_path / "c.jsonl", ["word " * 400] * 3000)
    lines = corpus.read_text().splitlines(keepends=True)
    lines[2500] = "broken\n"
    corpus.write_text("".join(lines))
    with pytest.raises(UserError, match=r"c\.jsonl, line 2501: broken JSON"):
        make_shards(
            [corpus], str(trained), tmp_path / "out", reading=reading(on_bad="fail"), shard_bytes=1 << 20, processes=1
        )


def test_a_tokenizer_learns_from_so_many_bytes_of_text(tmp_path, monkeypatch):
    """Not of what a compressed file has on the disk."""
    from slm.tokenizer import SLMTokenizer

    corpus = tmp_path / "c.jsonl.gz"
    corpus.write_bytes(
        gzip.compress("".join(json.dumps({"text": f"row {i} " * 50}) + "\n" for i in range(4000)).encode())
    )
    read = []
    learn = SLMTokenizer.train
    monkeypatch.setattr(
        SLMTokenizer, "train", lambda self, texts, **o: learn(self, (read.append(len(t)) or t for t in texts), **o)
    )
    make_tokenizer([corpus], tmp_path / "t", vocab_size=400, max_bytes=200_000)
    assert 150_000 < sum(read) < 210_000


@pytest.fixture
def dataset(tmp_path, trained):
    corpus = write_jsonl(tmp_path / "c.jsonl", texts_of(30))
    make_shards([corpus], str(trained), tmp_path / "data", processes=1, validation_fraction=0.0)
    return tmp_path / "data" / "train"


def test_olmo_files_of_32_bits_are_seen_as_such(tmp_path, dataset, trained):
    """A small vocabulary in uint32, without the list of documents: the same tokens, not twice as many."""
    ids = np.concatenate([shard.tokens for shard in TokenDataset(dataset).shards])
    assert ids.dtype == np.uint16
    ids.astype("<u4").tofile(tmp_path / "wide.npy")
    import_dataset([tmp_path / "wide.npy"], "olmo", str(trained), tmp_path / "in")
    found = TokenDataset(tmp_path / "in")
    assert np.array_equal(np.concatenate([s.tokens for s in found.shards]), ids)
    assert found.num_docs == TokenDataset(dataset).num_docs
    export_dataset(dataset, "olmo", tmp_path / "olmo")
    (csv,) = (tmp_path / "olmo").glob("*.csv.gz")
    rows = gzip.decompress(csv.read_bytes()).decode().splitlines()
    csv.write_bytes(gzip.compress("\n".join(rows[1:]).encode()))
    with pytest.raises(CorruptArtefact, match="do not stand back to back"):
        import_dataset([tmp_path / "olmo"], "olmo", str(trained), tmp_path / "in2")


def test_a_dot_in_a_prefix_begins_no_suffix(tmp_path, dataset, trained):
    export_dataset(dataset, "megatron", tmp_path / "m")
    for file in (tmp_path / "m").iterdir():
        file.rename(tmp_path / "m" / f"corpus{file.suffix}")
    with pytest.raises(UserError, match=r"corpus\.v2: there is no \.bin file"):
        import_dataset([tmp_path / "m" / "corpus.v2"], "megatron", str(trained), tmp_path / "in")
    import_dataset([tmp_path / "m" / "corpus.idx"], "megatron", str(trained), tmp_path / "in")


def test_a_full_disk_while_copying_is_a_message(tmp_path, dataset, monkeypatch):
    import errno

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("data_prep.exchange.os.fsync", full)
    with pytest.raises(EnvironmentProblem, match="No space left"):
        export_dataset(dataset, "megatron", tmp_path / "m")
    assert not [p for p in (tmp_path / "m").iterdir() if p.suffix == ".bin"]


def test_stats_of_odd_names(tmp_path, slm_data, trained):
    """Brackets are no markup; a hub beside local files has no folder in common with them."""
    folder = tmp_path / "[red]x"
    folder.mkdir()
    specs = [hub(tmp_path / "set", [json.dumps({"text": "one " * 20})])]
    for i in range(24):
        specs.append(str(write_jsonl(folder / f"{i}.jsonl", texts_of(2, seed=i))))
    make_shards(specs, str(trained), folder / "out", processes=1, validation_fraction=0.0)
    code, out, _ = slm_data("stats", folder / "out" / "train")
    assert code == 0
    assert "[red]x" in out
    assert "hf://" in out
