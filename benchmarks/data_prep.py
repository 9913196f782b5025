"""Text to token shards: this project, one process and two, with either engine, against datatrove and Megatron; and its memory.

    python benchmarks/data_prep.py --megatron /path/to/Megatron-LM --json results.json    # 400 MB of this machine's own text
    python benchmarks/data_prep.py --megabytes 20 --peer-mb 4 --flat 5,20 --rounds 1      # a trial of the script, not a result

The corpus is what text lies on this machine (Python's library and packages, headers, documentation; --text FOLDER takes
another), each document once: duplicates and documents that spell a special token (which the peers would make real ones of)
are left out. What share of its lines stood before is printed. It is written once as JSON lines for all arms.

One tokenizer for all: byte-level BPE trained here on a part of it, saved as tokenizer.json, which the peers read with
Hugging Face's tokenizers or gigatoken; each document ends in EOS and has no BOS. Every arm's documents, and the files of
tokens and of documents' ends byte for byte, are compared with ours before any ratio is printed (data_prep_peers.py).
Megatron is a checkout of the user's, its tools run by megatron_shim.py, so that they need nothing that only training needs.

Times are of whole processes, start-up and imports among them. datatrove and Megatron's standard tool, at 1 to 2 MB/s, read the
first --peer-mb of the corpus and a quarter of that, once: their rate is that of the larger part or that between the two, which
has no start-up in it, whichever is better for them. All other arms read the whole corpus in every round. Memory: the largest
resident size of any one process of an arm, sampled every 50 ms.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep_peers import SLOW, Written, peer_command, peers_at_hand
from rich.console import Console
from rich.table import Table
from side_by_side import REPOSITORY, Spread, machine

SUFFIXES = {
    ".py",
    ".h",
    ".hpp",
    ".c",
    ".txt",
    ".md",
    ".rst",
    ".pyi",
    ".cuh",
    ".html",
    ".js",
    ".json",
    ".pl",
    ".pm",
    ".tcl",
}
SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>", "<|pad|>")
MOST_BYTES = 2_000_000  # of one document
# name: (processes, engine); APART is two single-process jobs over the two halves at once
ARMS = {
    "slm tiktoken": (1, "reference"),
    "slm tiktoken, 2 processes": (2, "reference"),
    "slm gigatoken": (1, "gigatoken"),
    "slm gigatoken, 2 processes": (2, "gigatoken"),
}
APART = "two jobs apart (gigatoken)"
# (ours, peer, least ratio in MB/s; None: no aim)
AIMS = [
    ("slm tiktoken", "datatrove", 4.0),
    ("slm gigatoken", "datatrove", 25.0),
    ("slm tiktoken", "Megatron, 1 worker", 4.0),
    ("slm gigatoken", "Megatron, 1 worker", 40.0),
    ("slm tiktoken, 2 processes", "Megatron, 2 workers", 4.0),
    ("slm gigatoken, 2 processes", "Megatron, 2 workers", 40.0),
    ("slm gigatoken", "Megatron fast, a thread a core", 1.5),
    ("slm gigatoken", "Megatron fast, 1 thread", None),
    ("slm gigatoken, 2 processes", "Megatron fast, a thread a core", None),
    ("slm gigatoken, 2 processes", APART, 0.95),
]
MOST_MEMORY = 300e6  # of a process
Results = dict[str, list[dict[str, float]]]  # arm -> its runs


# --- the corpus ----------------------------------------------------------------------------------------------


def texts_of(folders: list[Path]) -> Iterator[str]:
    """Distinct documents under the folders."""
    seen: set[bytes] = set()
    for folder in folders:
        for at, names, files in os.walk(folder):
            names.sort()
            for name in sorted(files):
                path = Path(at, name)
                if path.suffix not in SUFFIXES or not path.is_file() or path.stat().st_size > MOST_BYTES:
                    continue
                try:
                    text = path.read_text(encoding="utf-8")
                except (OSError, UnicodeDecodeError):
                    continue
                digest = hashlib.sha256(text.encode()).digest()[:16]
                if text.strip() and digest not in seen and not any(token in text for token in SPECIAL):
                    seen.add(digest)
                    yield text


@dataclass(frozen=True)
class Corpus:
    """JSON lines, and how many documents and bytes of text they hold."""

    path: Path
    docs: int
    num_bytes: int


def write_corpus(path: Path, folders: list[Path], num_bytes: int) -> Corpus:
    """Of about num_bytes of text."""
    return _write(path, texts_of(folders), num_bytes)


def first_part(corpus: Corpus, path: Path, num_bytes: int) -> Corpus:
    with open(corpus.path) as lines:
        return _write(path, (json.loads(line)["text"] for line in lines), num_bytes)


def _write(path: Path, texts: Iterator[str], num_bytes: int) -> Corpus:
    docs = total = 0
    with open(path, "w") as file:
        for text in texts:
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            docs, total = docs + 1, total + len(text.encode())
            if total >= num_bytes:
                break
    return Corpus(path, docs, total)


def repeating_share(corpus: Corpus) -> float:
    """Of the text in lines of 20 characters or more, the share in lines that stood before; one line in eight is looked at."""
    seen: set[int] = set()
    total = repeats = 0
    with open(corpus.path) as rows:
        for row in rows:
            for line in json.loads(row)["text"].splitlines():
                if len(line) >= 20 and (mark := hash(line)) % 8 == 0:
                    total += len(line)
                    repeats += len(line) if mark in seen else 0
                    seen.add(mark)
    return repeats / max(total, 1)


def halves(corpus: Path, folder: Path) -> list[Path]:
    size, parts = corpus.stat().st_size, [folder / "first.jsonl", folder / "second.jsonl"]
    with open(corpus, "rb") as file, open(parts[0], "wb") as first, open(parts[1], "wb") as second:
        for line in file:
            (first if file.tell() < size // 2 else second).write(line)
    return parts


def make_tokenizer(corpus: Path, folder: Path, vocab_size: int) -> None:
    """No BOS, as datatrove adds none."""
    command = [
        sys.executable,
        "-m",
        "data_prep.cli",
        "tokenizer",
        corpus,
        "--output",
        folder,
        "--vocab-size",
        vocab_size,
    ]
    subprocess.run([*map(str, command), "--max-bytes", "40M"], check=True, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {"bos_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    content = json.loads((folder / "tokenizer.json").read_text()) | {"post_processor": None}
    (folder / "tokenizer.json").write_text(json.dumps(content))


# --- the arms ------------------------------------------------------------------------------------------------


def measured(commands: list[list[Any]], log: Path) -> dict[str, float]:
    """Runs the commands at once: wall seconds until the last ends, CPU seconds, and the largest process's peak bytes."""
    import psutil

    before = os.times()
    began = time.perf_counter()
    with open(log, "w") as stream:
        running = [subprocess.Popen([*map(str, c)], cwd=REPOSITORY, stdout=stream, stderr=stream) for c in commands]
    peak = 0
    while any(process.poll() is None for process in running):
        for process in running:
            try:
                tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
                peak = max(peak, *(one.memory_info().rss for one in tree))
            except psutil.Error:
                pass
        time.sleep(0.05)
    seconds, after = time.perf_counter() - began, os.times()
    if any(process.returncode for process in running):
        raise SystemExit(f"an arm failed:\n{log.read_text()[-3000:]}")
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {"seconds": seconds, "cpu_seconds": cpu, "peak_bytes": float(peak)}


def ours(corpus: Path, tokenizer: Path, output: Path, processes: int, engine: str) -> list[Any]:
    return [sys.executable, "-m", "data_prep.cli", "shards", corpus, "--tokenizer", tokenizer, "--output", output,
            "--validation-fraction", 0, "--processes", processes, "--engine", engine]  # fmt: skip


def stream_hash(outputs: list[Path]) -> str:
    """SHA-256 of all token bytes that we wrote, in order."""
    digest = hashlib.sha256()
    for path in (path for output in outputs for path in sorted(output.glob("train/*.bin"))):
        with open(path, "rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()


def run_all(
    work: Path, corpus: Corpus, tokenizer: Path, rounds: int, peers: list[str], job: argparse.Namespace
) -> Results:
    """Every arm in turn. What each wrote is compared; SystemExit on a difference. Prints what was compared."""
    slices = [first_part(corpus, work / f"part{n}.jsonl", job.peer_mb * n * 250_000) for n in (1, 4)]
    parts, outputs, kept = halves(corpus.path, work), [work / "out0", work / "out1"], work / "kept"
    names = [*ARMS, APART, *peers]
    results: Results = {name: [] for name in names}
    hashes: dict[str, str] = {}
    compared: dict[str, str] = {}
    for turn in range(rounds):
        for name in names if turn % 2 == 0 else reversed(names):
            if name in SLOW and turn:  # their times vary little
                continue
            for given in slices if name in SLOW else [corpus]:
                if name in peers:
                    commands = [peer_command(name, job.megatron, given.path, tokenizer, outputs[0])]
                elif name in ARMS:
                    commands = [ours(given.path, tokenizer, outputs[0], *ARMS[name])]
                else:
                    commands = [ours(p, tokenizer, o, 1, "gigatoken") for p, o in zip(parts, outputs, strict=True)]
                run = measured(commands, work / "log") | {"bytes": float(given.num_bytes)}
                results[name].append(run)
                print(f"round {turn + 1}: {name}: {run['seconds']:.1f} s", file=sys.stderr, flush=True)
                if name in peers:
                    told = Written.of(kept / "train").compare(name, outputs[0], given.docs, corpus.path, tokenizer)
                    compared[name] = told
                else:
                    hashes[name] = stream_hash(outputs)
                    if not kept.exists():
                        outputs[0].rename(kept)
                for path in work.glob("out*"):
                    shutil.rmtree(path)
    if len(set(hashes.values())) != 1:
        raise SystemExit(f"No ratios: the arms did not write the same tokens: {hashes}")
    print(f"slm: the same token bytes in all {len(hashes)} arms", *compared.values(), sep="\n")
    return results


def flatness(work: Path, corpus: Path, tokenizer: Path, sizes: list[int]) -> list[tuple[int, float]]:
    """(bytes of input, peak bytes of the largest process) of our own arm; larger inputs repeat the corpus, each document
    with its number in front."""
    found = []
    for size in sizes:
        path, written, turn = work / "flat.jsonl", 0, 0
        with open(path, "w") as file:
            while written < size:
                with open(corpus) as source:
                    for line in source:
                        row = line if turn == 0 else json.dumps({"text": f"{turn} " + json.loads(line)["text"]}) + "\n"
                        written += file.write(row)
                        if written >= size:
                            break
                turn += 1
        result = measured([ours(path, tokenizer, work / "out", 1, "gigatoken")], work / "log")
        found.append((path.stat().st_size, result["peak_bytes"]))
        shutil.rmtree(work / "out")
        path.unlink()
    return found


def rate(runs: list[dict[str, float]]) -> float:
    """MB of text a second, in the median. Of runs over two sizes: of the larger, or between the two if that is more."""
    small, large = (pick([r["bytes"] for r in runs]) for pick in (min, max))
    seconds = {size: Spread.of([r["seconds"] for r in runs if r["bytes"] == size]).median for size in (small, large)}
    gross = large / seconds[large] / 1e6
    if seconds[large] <= seconds[small]:
        return gross
    return max(gross, (large - small) / (seconds[large] - seconds[small]) / 1e6)


def show(console: Console, results: Results) -> None:
    table = Table(title="Each arm (median over the rounds, least–most)", title_justify="left")
    for column in ("arm", "MB of text", "wall, s", "MB/s", "CPU, s", "peak MB of a process"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    for name, runs in results.items():
        most = max(r["bytes"] for r in runs)
        runs_of_most = [r for r in runs if r["bytes"] == most]
        seconds = Spread.of([r["seconds"] for r in runs_of_most])
        peak = Spread.of([r["peak_bytes"] / 1e6 for r in runs_of_most]).median
        cpu = Spread.of([r["cpu_seconds"] for r in runs_of_most]).median
        table.add_row(name, f"{most / 1e6:.0f}", seconds.show(1), f"{rate(runs):.1f}", f"{cpu:.1f}", f"{peak:.0f}")
    console.print(table)
    table = Table("ours / peer, MB/s", "ratio", "aim")
    for arm, peer, aim in AIMS:
        if peer in results:
            ratio = rate(results[arm]) / rate(results[peer])
            table.add_row(f"{arm} / {peer}", f"{ratio:.2f}", f">= {aim:g}: {_met(ratio >= aim)}" if aim else "none")
    console.print(table)


def show_memory(console: Console, flat: list[tuple[int, float]]) -> None:
    for size, peak in flat:
        verdict = f"aim <= {MOST_MEMORY / 1e6:.0f}: {_met(peak <= MOST_MEMORY)}"
        console.print(
            f"input of {size / 1e6:,.0f} MB: at most {peak / 1e6:.0f} MB a process ({verdict})", highlight=False
        )
    if len(flat) > 1:
        console.print(f"largest input's / smallest input's memory: {flat[-1][1] / flat[0][1]:.2f}", highlight=False)


def _met(met: bool) -> str:
    return "met" if met else "not met"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vocab-size", type=int, default=32_000)
    parser.add_argument("--text", type=Path, action="append", help="folder of text; default: what this machine has")
    parser.add_argument("--flat", default="80,2000", help="megabytes of input to compare the memory of; empty for none")
    parser.add_argument("--megatron", type=Path, help="a checkout of Megatron-LM, for its arms")
    parser.add_argument(
        "--peer-mb", type=int, default=40, help="megabytes that datatrove and Megatron's standard tool read"
    )
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    job = parser.parse_args()
    paths = sysconfig.get_paths()
    here = [
        Path(p) for p in dict.fromkeys([paths["stdlib"], paths["purelib"], "/usr/share", "/usr/lib", "/usr/include"])
    ]
    console = Console(width=None if sys.stdout.isatty() else 120)
    if job.megatron and not (job.megatron / "tools" / "preprocess_data_fast.py").is_file():
        parser.error(
            f"--megatron {job.megatron}: there is no tools/preprocess_data_fast.py; give a checkout of Megatron-LM"
        )
    peers = peers_at_hand(job.megatron)
    with tempfile.TemporaryDirectory(prefix="data_prep-") as folder:
        work = Path(folder)
        tokenizer = work / "tokenizer"
        corpus = write_corpus(work / "corpus.jsonl", job.text or here, job.megabytes * 1_000_000)
        console.print(
            f"[bold]{machine()}[/bold]\n{corpus.docs:,} documents, {corpus.num_bytes / 1e6:.0f} MB of text, vocabulary "
            f"{job.vocab_size:,}. No document stands twice; {repeating_share(corpus):.1%} of the text is in lines (20 characters "
            "or more) that stood before",
            highlight=False,
        )
        if corpus.num_bytes < job.megabytes * 900_000:
            console.print(f"Only {corpus.num_bytes / 1e6:.0f} MB of text were found: a trial, not a result.")
        make_tokenizer(corpus.path, tokenizer, job.vocab_size)
        results = run_all(work, corpus, tokenizer, job.rounds, peers, job)
        show(console, results)
        flat = flatness(work, corpus.path, tokenizer, [int(float(x) * 1e6) for x in job.flat.split(",") if x])
        show_memory(console, flat)
    if job.json:
        done = {"machine": machine(), "bytes": corpus.num_bytes, "runs": results, "flat": flat}
        job.json.write_text(json.dumps(done, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
