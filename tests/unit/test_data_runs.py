"""slm-data shards by many processes, begun anew, and by different engines."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from data_prep import shards
from data_prep.claims import take
from data_prep.corpus import cut, find_files
from data_prep.reading import Reading
from data_prep.shards import _first_texts
from data_prep.units import UNITS
from slm.errors import UserError
from slm.tokenizer import SLMTokenizer, load_tokenizer
from tests.unit.test_data_inputs import manifest
from tests.unit.test_data_prep import REPOSITORY, contents, documents, slm_data, texts_of, trained, write_jsonl

__all__ = ["slm_data", "trained"]  # fixtures


# --- many processes ------------------------------------------------------------------------------------------


def command(corpus, trained, output, *more):
    arguments = ["shards", corpus, "--tokenizer", trained, "--output", output, "--shard-bytes", "30k", *more]
    return [sys.executable, "-m", "data_prep.cli", *map(str, arguments)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_jsonl(
        tmp_path_factory.mktemp("corpus") / "a.jsonl", [*texts_of(1500, words=300), *texts_of(200, words=300)]
    )


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


def test_who_begins_anew_does_not_take_away_others_work(tmp_path, slm_data, trained, monkeypatch):
    """The input has changed: while a process is still at work nothing is removed; of several that begin anew one removes, and
    all share the new work."""
    corpus, out = write_jsonl(tmp_path / "a.jsonl", texts_of(200)), tmp_path / "out"
    whole = corpus.read_bytes()
    corpus.write_bytes(whole + b"{" * 50)
    base = ("shards", corpus, "--tokenizer", trained, "--output", out, "--processes", 1, "--shard-bytes", "2k")
    assert slm_data(*base, "--max-bad-fraction", 0)[0] == 2
    begun = contents(out)
    corpus.write_bytes(whole)
    monkeypatch.setattr(shards, "_SECONDS_FOR_OTHERS", 0.5)
    with take(out / shards.LOCK, shared=True):
        code, _, error = slm_data(*base)
    assert code == 2
    assert "other processes are still at work" in error
    assert contents(out) == begun
    command = [sys.executable, "-m", "data_prep.cli", *map(str, base)]
    processes = [subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL) for _ in range(3)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0, 0]
    assert sorted(sum((documents(out / s, trained) for s in ("train", "validation")), [])) == sorted(texts_of(200))
    assert not (out / shards.LOCK).exists()


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
    base = (
        "shards",
        path,
        "--tokenizer",
        trained,
        "--processes",
        1,
        "--validation-fraction",
        0,
        "--output",
        tmp_path / "out",
    )
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
    """gigatoken's letters are not all tiktoken's. Which differ is found out for each character before its first text; the texts
    of all are encoded alike, in neighbourhoods where it shows."""
    from slm.tokenizer_engines import RanksEngine
    from slm.tokenizer_fast import FastEncoder, characters_that_differ, probe_ranks

    engine = RanksEngine(probe_ranks())
    characters = [chr(c) for c in [*range(0x40000), *range(0xE0000, 0xE1000)] if not 0xD800 <= c < 0xE000]
    assert characters_that_differ(engine.encode_batch, engine.encode_batch, characters) == ""

    def letters_unknown(texts):  # as an older Unicode would see two letters
        return engine.encode_batch([text.replace("é", "\ue000").replace("漢", "\ue000") for text in texts])

    assert characters_that_differ(letters_unknown, engine.encode_batch, characters) == "é漢"
    tokenizer = load_tokenizer(trained)
    assert tokenizer.use_fast_engine()

    def around(character):
        return f'x = [None, "{character}", 1{character}2, {character}{character} \'{character}s\n]'

    differing = characters_that_differ(FastEncoder(engine)._encode_probes, engine.encode_batch, characters)
    assert differing  # so that the test tests something
    for character in (*differing[:40], *differing[-40:], "é", "漢"):
        assert tokenizer.encode_batch([around(character)])[0].tolist() == tokenizer.encode(around(character))
    texts = ["".join(map(around, characters[i : i + 256])) for i in range(0, len(characters), 256)]
    for fast, reference in zip(tokenizer.encode_batch(texts), tokenizer._engine.encode_batch(texts), strict=True):
        assert np.array_equal(fast, reference)


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


def test_one_process_alone_never_waits(corpus, trained, tmp_path, monkeypatch):
    """It sleeps only where other processes hold all that is left: two fifths of a second for every two units would be most
    of the time."""
    slept = []
    monkeypatch.setattr("data_prep.shards.time.sleep", slept.append)
    shards.make_shards([corpus], str(trained), tmp_path / "out", processes=1, shard_bytes=20_000)
    assert len(list((tmp_path / "out" / "train").glob("*.bin"))) > 3
    assert not slept


def test_the_threads_of_one_process_end_together(corpus, trained, tmp_path, monkeypatch):
    """Two threads write what one writes; when one fails the other leaves its unit, and the same command goes on."""
    monkeypatch.setattr(shards, "_cores", lambda: 2)
    encode, num_calls = SLMTokenizer.encode_batch, 0
    other_has_begun = threading.Event()

    def failing(self, texts):
        nonlocal num_calls
        num_calls += 1
        if num_calls == 4:
            assert other_has_begun.wait(timeout=30)
            raise OSError("as a failing disk")
        if num_calls > 4:
            other_has_begun.set()
            time.sleep(0.1)
        return encode(self, texts)

    with monkeypatch.context() as patched:
        patched.setattr(SLMTokenizer, "encode_batch", failing)
        with pytest.raises(OSError, match="failing disk"):
            shards.make_shards([corpus], str(trained), tmp_path / "out", processes=1, shard_bytes=20_000)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("units")]
    assert not list((tmp_path / "out").rglob("*.tmp"))
    shards.make_shards([corpus], str(trained), tmp_path / "out", processes=1, shard_bytes=20_000)
    monkeypatch.setattr(shards, "_cores", lambda: 1)
    shards.make_shards([corpus], str(trained), tmp_path / "alone", processes=1, shard_bytes=20_000)
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")
