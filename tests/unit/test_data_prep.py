"""data_prep: corpora found, cut and read; shards that do not depend on processes or kills; bad input; verify."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from data_prep import cli
from data_prep.corpus import InputFile, cut, find_files, group, sample
from data_prep.reading import Reading, read_piece
from data_prep.units import is_validation
from slm.data.tokens import TokenDataset
from slm.tokenizer import load_tokenizer

REPOSITORY = Path(__file__).parents[2]
WORDS = "def return self import the data of model é 漢字 {x} while 3.14 <|end_of_text|> \n    \n".split(" ")


def texts_of(count, seed=0, words=60):
    rng = random.Random(seed)
    return [f"{i} " + " ".join(rng.choices(WORDS, k=rng.randint(1, words))) for i in range(count)]


def write_jsonl(path, texts, key="text"):
    path.write_text("".join(json.dumps({"id": i, key: text}) + "\n" for i, text in enumerate(texts)))
    return path


@pytest.fixture
def slm_data(monkeypatch, capsys):
    """Runs the command in this process: (exit code, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["slm-data", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return caught.value.code or 0, captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small byte-level BPE."""
    from data_prep.tokenizer import make_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer([write_jsonl(folder / "a.jsonl", texts_of(300))], folder / "bpe", vocab_size=300)
    return folder / "bpe"


def documents(folder, tokenizer):
    loaded = load_tokenizer(tokenizer)
    found = []
    for shard in TokenDataset(folder).shards:
        for start, end in zip(shard.doc_offsets[:-1], shard.doc_offsets[1:], strict=True):
            ids = shard.tokens[start:end]
            assert (ids[0], ids[-1]) == (loaded.bos_token_id, loaded.eos_token_id)
            found.append(loaded.decode(ids[1:-1]))
    return found


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# --- the corpus ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", ["", "\n", "\n\n"])
def test_pieces_of_any_size_have_each_line_once(tmp_path, newline, bom, end):
    """However JSON lines are cut, every document is read once and in order, also when a cut meets a line's end."""
    texts = ["", "a", "bb" * 40, "é", "c" * 7, "d\n"]
    path = tmp_path / "a.jsonl"
    path.write_bytes(bom + (newline.join(json.dumps({"text": t + "x"}) for t in texts) + end).encode())
    files, _ = find_files([path])
    for size in range(1, path.stat().st_size + 2):
        records = [r for piece in cut(files, size) for r in read_piece(piece, Reading())]
        assert [r.text for r in records if r.text] == [t + "x" for t in texts], size
        assert {r.problem for r in records if not r.text} <= {"blank line"}


def test_a_folder_gives_its_text_files_sorted(tmp_path):
    """Hidden, binary, empty and installed files are passed over; .jsonl in a folder is JSON lines."""
    wanted = ["a.py", "z.txt", "b/c.md", "b/d.jsonl"]
    unwanted = [".hidden", ".git/x.py", "__pycache__/x.py", "lib/site-packages/p.py", "node_modules/p.js", "x.png"]
    for name in [*wanted, *unwanted, "out/old.txt"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")
    (tmp_path / "empty.py").touch()
    (tmp_path / "again.py").symlink_to("a.py")
    files, skipped = find_files([tmp_path, tmp_path / "z.txt"], exclude=os.path.realpath(tmp_path / "out"))
    assert [Path(f.path).name for f in files] == ["a.py", "z.txt", "c.md", "d.jsonl"]
    assert [f.kind for f in files] == ["tree", "tree", "tree", "jsonl"]
    assert skipped == {"hidden file": 1, "binary file": 1, "empty file": 1, "same file again": 2}


def test_groups_and_samples():
    """Groups keep the order and the bound; a sample is spread over the whole corpus and near its size."""
    pieces = cut([InputFile(f"f{i}", "tree", size, 0) for i, size in enumerate([5, 5, 5, 30, 1, 9] * 50)], 100)
    groups = group(pieces, 10)
    assert [p for g in groups for p in g] == pieces
    assert all(sum(p.size for p in g) <= 10 or len(g) == 1 for g in groups)
    chosen = sample(pieces, 500)
    assert 400 <= sum(limit for _, limit in chosen) <= 500
    assert pieces.index(chosen[0][0]) < 60
    assert pieces.index(chosen[-1][0]) > 240
    assert [piece for piece, limit in sample(pieces, 10**6) if limit >= piece.size] == pieces
    large = cut([InputFile("a", "tree", 10**9, 0), InputFile("b", "tree", 10**9, 0)], 100)
    assert [(piece.file.path, limit) for piece, limit in sample(large, 500)] == [("a", 250), ("b", 250)]


# --- what is written -----------------------------------------------------------------------------------------


def test_documents_come_back_and_copies_stay_on_one_side(tmp_path, slm_data, trained):
    """Every document is in one of the splits, as it was; duplicates never straddle; the manifest's numbers are true."""
    texts = texts_of(400)
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    for i, text in enumerate(texts[:50]):  # copies of lines, as files
        (tree / "sub" / f"{i}.py").write_text(text)
    corpus = write_jsonl(tmp_path / "a.jsonl", texts)
    options = ("--tokenizer", trained, "--output", tmp_path / "out", "--processes", 1, "--validation-fraction", 0.2)
    code, out, _ = slm_data("shards", corpus, tree, *options, "--shard-bytes", "4k")
    assert code == 0
    train, validation = (documents(tmp_path / "out" / s, trained) for s in ("train", "validation"))
    assert sorted(train + validation) == sorted(texts + texts[:50])
    assert not set(train) & set(validation)
    assert 40 < len(validation) < 140
    dataset = TokenDataset(tmp_path / "out" / "train")
    assert dataset.verify() == []
    manifest = dataset.manifest
    assert manifest["text_bytes"] == sum(len(t.encode()) for t in train)
    assert sum(b["docs"] for b in manifest["length_histogram"].values()) == len(train)
    assert sum(b["tokens"] for b in manifest["length_histogram"].values()) == dataset.num_tokens
    assert manifest["tokenizer"]["fingerprint"] == load_tokenizer(trained).fingerprint
    assert manifest["tokenizer"]["spec"] == str(trained)
    assert [i["path"] for i in manifest["inputs"]] == [str(corpus), str(tree)]
    assert len(dataset.shards) > 3
    assert f"{len(train)} documents" in out
    assert not (tmp_path / "out" / "units").exists()


def test_the_split_has_the_asked_share():
    """Hashes are uniform: 2 % of many documents, none at 0."""
    texts = [str(i).encode() for i in range(20000)]
    assert 320 < sum(is_validation(text, 0.02) for text in texts) < 480
    assert not any(is_validation(text, 0.0) for text in texts)


def test_any_number_of_processes_gives_the_same_bytes(tmp_path, slm_data, trained):
    """1 and 3 processes write the same files, byte for byte."""
    corpus = write_jsonl(tmp_path / "a.jsonl", texts_of(300))
    for processes in (1, 3):
        options = ("--tokenizer", trained, "--output", tmp_path / str(processes), "--shard-bytes", "5k")
        assert slm_data("shards", corpus, *options, "--processes", processes)[0] == 0
    assert contents(tmp_path / "1") == contents(tmp_path / "3")


def test_killed_runs_go_on_to_the_same_bytes(tmp_path, slm_data, trained):
    """SIGKILL at three random moments: the same command then ends with the bytes of an uninterrupted run."""
    corpus = write_jsonl(tmp_path / "a.jsonl", texts_of(3000, words=400))
    arguments = ["shards", str(corpus), "--tokenizer", str(trained), "--shard-bytes", "50k", "--processes", "2"]
    killed = tmp_path / "killed"
    command = [sys.executable, "-m", "data_prep.cli", *arguments, "--output", str(killed)]
    rng, num_done = random.Random(), 0
    for _ in range(3):
        process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.DEVNULL)
        goal = num_done + rng.randint(1, 8)
        while process.poll() is None and len(list(killed.glob("units/*.json"))) < goal:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.02)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "finished before it could be killed"
        num_done = len(list(killed.glob("units/*.json")))
        assert not (killed / "train" / "manifest.json").exists()
    kept = {p: p.stat().st_mtime_ns for p in killed.glob("units/*.json")}
    assert len(kept) >= 3
    last = sorted(kept)[0]
    last.write_text("{")  # half a report counts as none
    assert subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL).returncode == 0
    assert slm_data(*arguments[:-1], "1", "--output", tmp_path / "whole")[0] == 0
    assert contents(killed) == contents(tmp_path / "whole")
    assert not list(killed.rglob("*.tmp"))


@pytest.mark.parametrize(("stop", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_workers_end_with_their_parent(tmp_path, trained, stop, code):
    """No worker is left behind, waiting for ever, when the main process is killed or hears Ctrl-C."""
    corpus = write_jsonl(tmp_path / "a.jsonl", texts_of(3000, words=400))
    command = [sys.executable, "-m", "data_prep.cli", "shards", corpus, "--tokenizer", trained, "--shard-bytes", "30k"]
    process = subprocess.Popen(
        [*map(str, command), "--processes", "2", "--output", str(tmp_path / "o")],
        cwd=REPOSITORY,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # a shell that runs the tests with & has it ignored
    )
    while process.poll() is None and not list(tmp_path.glob("o/units/*.json")):
        time.sleep(0.005)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert workers
    process.send_signal(stop)
    assert process.wait(timeout=30) == code
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive


def test_complete_is_said_and_another_job_refused(tmp_path, slm_data, trained):
    """The same command again does nothing; another input, tokenizer or option is refused and named."""
    corpus = write_jsonl(tmp_path / "a.jsonl", texts_of(60))
    other = write_jsonl(tmp_path / "b.jsonl", texts_of(60, seed=1))
    out = tmp_path / "out"
    base = ("--tokenizer", trained, "--output", out, "--processes", 1)
    assert slm_data("shards", corpus, *base)[0] == 0
    before = contents(out)
    code, printed, _ = slm_data("shards", corpus, *base, "--max-bad-fraction", 0.5)
    assert (code, "complete already" in printed) == (0, True)
    for arguments, named in [
        ((corpus, other, *base), "b.jsonl is new"),
        ((corpus, *base, "--validation-fraction", 0.5), "validation fraction: 0.02 there, 0.5 now"),
        ((corpus, *base, "--text-key", "id"), "text key: 'text' there, 'id' now"),
    ]:
        code, _, error = slm_data("shards", *arguments)
        assert code == 2
        assert named in error
        assert "choose another --output" in error
    code, _, error = slm_data("shards", corpus, "--tokenizer", _bytes_only(tmp_path), *base[2:])
    assert code == 2
    assert "another tokenizer fingerprint" in error
    write_jsonl(corpus, texts_of(61))
    assert "has changed since" in slm_data("shards", corpus, *base)[2]
    assert contents(out) == before
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    assert slm_data("shards", corpus, "--tokenizer", trained, "--output", foreign)[0] == 2
    assert contents(foreign) == {"thesis.txt": b"mine"}


def _bytes_only(folder):
    from slm.tokenizer import SLMTokenizer

    SLMTokenizer().save_pretrained(folder / "bytes")
    return folder / "bytes"


# --- bad input -----------------------------------------------------------------------------------------------

BAD_LINES = [
    (b'{"text": "abc', "broken JSON"),
    (b'{"text": "ab\xff"}', "not UTF-8"),
    (b'{"other": "abc"}', "no such field"),
    (b'{"text": null}', "field is not a string"),
    (b'{"text": 3}', "field is not a string"),
    (b'{"text": "\\ud800"}', "lone surrogate"),
    (b'{"text": ""}', "empty document"),
    (b'{"text": "  \\n"}', "empty document"),
    (b'["abc"]', "not a JSON object"),
]


@pytest.mark.parametrize("processes", [1, 2])
def test_bad_lines_are_counted_and_named_and_the_others_kept(tmp_path, slm_data, trained, processes):
    """Each kind of bad line: its reason, its file:line (also behind a cut), and not one good document lost."""
    texts = texts_of(300)
    lines = [json.dumps({"text": text}).encode() for text in texts]
    for i, (line, _) in enumerate(BAD_LINES):
        lines.insert(20 + 30 * i, line)
    lines.insert(5, b"")
    corpus = tmp_path / "a.jsonl"
    corpus.write_bytes(b"\n".join(lines) + b'\n{"text": "the last line is cut o')
    base = ("shards", corpus, "--tokenizer", trained, "--output", tmp_path / "out", "--processes", processes)
    base += ("--shard-bytes", "3k", "--validation-fraction", 0)
    code, _, error = slm_data(*base)
    assert code == 2
    assert "10 of 310 documents cannot be used" in error
    assert not list(tmp_path.rglob("manifest.json"))
    code, out, _ = slm_data(*base, "--max-bad-fraction", 0.1)
    assert code == 0
    for i, (_, reason) in enumerate(BAD_LINES):
        assert f"{corpus}:{20 + 30 * i + 2}: {reason}" in out
    assert f"{corpus}:311: broken JSON" in out
    assert documents(tmp_path / "out" / "train", trained) == texts
    rejected = TokenDataset(tmp_path / "out" / "train").manifest["rejected"]
    assert sum(rejected["bad"].values()) == 10
    assert rejected["harmless"] == {"blank line": 1}


def test_who_mends_the_input_gives_the_same_command_again(tmp_path, slm_data, trained):
    """Unfinished work on a file that has changed since is begun anew; another option is told, as unfinished work."""
    texts = texts_of(50)
    corpus = write_jsonl(tmp_path / "a.jsonl", texts)
    whole = corpus.read_bytes()
    corpus.write_bytes(whole + b'{"text": "caf\xe9"}\n')
    base = ("shards", corpus, "--tokenizer", trained, "--output", tmp_path / "out", "--processes", 1)
    code, _, error = slm_data(*base, "--validation-fraction", 0)
    assert code == 2
    assert "mend the input" in error
    code, _, error = slm_data(*base, "--validation-fraction", 0.5)
    assert code == 2
    assert "the unfinished work of another validation fraction" in error
    corpus.write_bytes(whole)
    assert slm_data(*base, "--validation-fraction", 0)[0] == 0
    assert documents(tmp_path / "out" / "train", trained) == texts


def test_odd_files_in_folders_are_weighed_by_bytes(tmp_path, slm_data, trained):
    """A few small files that are not UTF-8 are told and do not stop a source tree; half its bytes do."""
    tree = tmp_path / "tree"
    tree.mkdir()
    for i, text in enumerate(texts_of(30, words=300)):
        (tree / f"{i}.py").write_text(text)
    (tree / "latin.py").write_bytes(b"# caf\xe9")
    (tree / "nul.dat").write_bytes(b"a\0b\xff")
    base = ("shards", tree, "--tokenizer", trained, "--processes", 1, "--output")
    code, out, _ = slm_data(*base, tmp_path / "out")
    assert code == 0
    assert f"{tree / 'latin.py'}: not UTF-8" in out
    assert "1 binary file" in out
    (tree / "large.py").write_bytes(b"\xe9" * 50000)
    code, _, error = slm_data(*base, tmp_path / "out2")
    assert code == 2
    assert "2 not UTF-8" in error


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("absent.jsonl", None, "does not exist"),
        ("empty.jsonl", b"", "are empty"),
        ("blank.jsonl", b"\n\n", "no documents"),
        ("array.json", b'[{"text": "a"}]', "one JSON array"),
        ("a.jsonl.gz", b"\x1f\x8b", "compressed data broken"),
        ("a.jsonl.xz", b"\xfd7z", "unpack"),
        ("latin.txt", b"caf\xe9", "1 not UTF-8"),
        ("empty.txt", b" ", "1 empty document"),
    ],
)
def test_an_unusable_corpus_is_a_message(tmp_path, slm_data, trained, name, data, message):
    """A missing, empty or foreign input: exit code 2 and what is wrong, from both commands."""
    if data is not None:
        (tmp_path / name).write_bytes(data)
    arguments = ("shards", tmp_path / name, "--tokenizer", trained, "--processes", 1)
    code, _, error = slm_data(*arguments, "--output", tmp_path / "out")
    assert code == 2
    assert message in error
    assert not list(tmp_path.rglob("manifest.json"))
    code, _, error = slm_data("tokenizer", tmp_path / name, "--output", tmp_path / "t", "--vocab-size", 300)
    assert code == 2
    assert error.startswith("Error: ")
    assert not (tmp_path / "t").exists()


def test_wrong_options_are_messages(tmp_path, slm_data, trained):
    """Empty folder, nonsense numbers, all in validation, a tokenizer that is none."""
    (tmp_path / "none").mkdir()
    corpus = write_jsonl(tmp_path / "a.jsonl", ["only one"])
    good = ("shards", corpus, "--tokenizer", trained, "--output", tmp_path / "out", "--processes", 1)
    for arguments, message in [
        (("shards", tmp_path / "none", *good[2:]), "no text files"),
        ((*good, "--validation-fraction", 1), "--validation-fraction is 1"),
        ((*good, "--max-bad-fraction", 2), "--max-bad-fraction is 2"),
        ((*good[:-1], 0), "--processes is 0"),
        ((*good, "--shard-bytes", "lots"), "--shard-bytes"),
        ((*good, "--validation-fraction", 0.99), "fell into validation"),
        ((*good[:3], tmp_path / "none", *good[4:]), "none"),
        ((*good[:5], corpus, *good[6:]), "it is a file"),
        (("tokenizer", corpus, "--output", corpus, "--vocab-size", 300), "it is a file"),
    ]:
        code, _, error = slm_data(*arguments)
        assert code == 2
        assert message in error


def test_a_wrong_text_key_is_told_early(tmp_path, slm_data, trained):
    """When a whole unit has no document, the rest is not tried; the message names the option."""
    corpus = write_jsonl(tmp_path / "a.jsonl", texts_of(3000, words=3), key="content")
    options = ("--tokenizer", trained, "--output", tmp_path / "out", "--processes", 1, "--shard-bytes", "60k")
    code, _, error = slm_data("shards", corpus, *options)
    assert code == 2
    assert "--text-key" in error
    assert "in one part" in error  # of 60 kB, not of the whole
    assert slm_data("shards", corpus, *options, "--text-key", "content")[0] == 0  # the same folder, corrected


def test_one_long_text_file_is_several_documents(tmp_path, slm_data, trained):
    """A corpus in one named .txt file is cut at blank lines, so that a part of it can be held out; nothing is lost."""
    paragraphs = [f"Paragraph {n}. " + "words and more words. " * (n % 40 + 5) for n in range(400)]
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(paragraphs))
    options = ("--tokenizer", trained, "--output", tmp_path / "out", "--validation-fraction", 0.3)
    assert slm_data("shards", path, *options)[0] == 0
    train, validation = (documents(tmp_path / "out" / s, trained) for s in ("train", "validation"))
    assert len(train) + len(validation) > 5
    assert validation
    assert sorted("".join(train + validation)) == sorted("\n\n".join(paragraphs))


def test_nothing_held_out_is_said_and_can_be_corrected_in_place(tmp_path, slm_data, trained):
    """Two documents and 1 %: refused with a fraction that would do; the same folder serves the corrected command."""
    corpus = write_jsonl(tmp_path / "a.jsonl", ["one document", "another document"])
    options = ("--tokenizer", trained, "--output", tmp_path / "out", "--validation-fraction")
    code, _, error = slm_data("shards", corpus, *options, 0.000001)
    assert code == 2
    assert "nothing to evaluate on" in error
    assert slm_data("shards", corpus, *options, 0)[0] == 0


def test_users_own_tokenizer(tmp_path, slm_data, monkeypatch):
    """module:Class from the current folder encodes, also in workers; no EOS or ids beyond its len are messages."""
    (tmp_path / "mine.py").write_text(
        "class Good:\n"
        "    bos_token_id, eos_token_id = 256, 257\n"
        "    def encode(self, text): return list(text.encode())\n"
        "    def decode(self, ids): return bytes(i for i in ids if i < 256).decode()\n"
        "    def __len__(self): return 258\n"
        "class NoEnd(Good):\n    eos_token_id = None\n"
        "class Short(Good):\n    def __len__(self): return 100\n"
    )
    monkeypatch.chdir(tmp_path)
    corpus = write_jsonl(tmp_path / "a.jsonl", texts_of(50))
    options = ("--output", tmp_path / "out", "--processes", 2, "--shard-bytes", "2k", "--validation-fraction", 0)
    assert slm_data("shards", corpus, "--tokenizer", "mine:Good", *options)[0] == 0
    assert documents(tmp_path / "out" / "train", "mine:Good") == texts_of(50)
    for name, message in [("NoEnd", "no end-of-text token"), ("Short", "its length is 100")]:
        out = ("--output", tmp_path / name, "--processes", 1)
        code, _, error = slm_data("shards", corpus, "--tokenizer", f"mine:{name}", *out)
        assert code == 2
        assert message in error


# --- the other commands --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
def test_tokenizer_command(tmp_path, slm_data, kind):
    """Both kinds give back every text; again says complete; another size is refused; part of a corpus is enough."""
    corpus = write_jsonl(tmp_path / "a.jsonl", texts_of(500))
    arguments = ("tokenizer", corpus, "--output", tmp_path / "t", "--kind", kind, "--vocab-size")
    code, out, _ = slm_data(*arguments, 320)
    assert code == 0
    assert "learned from" in out
    tokenizer = load_tokenizer(tmp_path / "t")
    assert len(tokenizer) <= 320
    assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in texts_of(20, seed=5))
    code, out, _ = slm_data(*arguments, 320)
    assert (code, "complete already" in out) == (0, True)
    code, _, error = slm_data(*arguments, 330)
    assert code == 2
    assert "vocab size: 320 there, 330 now" in error
    bad = write_jsonl(tmp_path / "b.jsonl", texts_of(50), key="content")
    code, _, error = slm_data("tokenizer", bad, "--output", tmp_path / "u", "--kind", kind, "--vocab-size", 300)
    assert code == 2
    assert "50 of 50 documents cannot be used" in error
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / ".gitkeep").touch()
    code, _, error = slm_data("tokenizer", corpus, "--output", tmp_path / "v", "--kind", kind, "--vocab-size", 300)
    assert code == 2  # before the long part, not after it
    assert "hidden files" in error


def test_verify_finds_a_flipped_bit_and_a_cut_file_anywhere(tmp_path, slm_data, trained):
    """One line a dataset; a flipped bit in any file and a truncated file give exit code 4."""
    corpus = write_jsonl(tmp_path / "a.jsonl", texts_of(200))
    out = tmp_path / "out"
    assert slm_data("shards", corpus, "--tokenizer", trained, "--output", out, "--processes", 1)[0] == 0
    code, printed, _ = slm_data("verify", out)
    assert code == 0
    assert len(printed.splitlines()) == 2
    assert printed.count(": whole: ") == 2
    rng = np.random.default_rng(0)
    for path in sorted((out / "train").iterdir()):
        data = path.read_bytes()
        # Not in the JSON's own spaces, which carry nothing.
        at = data.index(b'"num_tokens": ') + 14 if path.suffix == ".json" else int(rng.integers(len(data)))
        for broken in (data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :], data[:-3]):
            path.write_bytes(broken)
            code, printed, error = slm_data("verify", out)
            assert code == 4, path
            assert printed.count(": whole: ") == 1
            assert "Corrupt file: 1 of" in error
        path.unlink()
        assert slm_data("verify", out / "train")[0] == (2 if path.suffix == ".json" else 4)
        path.write_bytes(data)
    assert slm_data("verify", out)[0] == 0
    assert slm_data("verify", tmp_path / "absent")[0] == 2
