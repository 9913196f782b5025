"""Text to token shards: this project, one process and two, with either engine, against datatrove; and its memory.

    python benchmarks/data_prep.py --json results.json       # 400 MB of this machine's own text, about 15 minutes
    python benchmarks/data_prep.py --megabytes 20            # a trial of the script, not a result

The corpus is what text lies on this machine (Python's library and packages, headers, documentation; --text FOLDER takes
another), each document once: duplicates and documents that spell a special token (which datatrove would make real ones of)
are left out, so nothing repeats but what documents share. It is written once as JSON lines for all arms.

One tokenizer for all: byte-level BPE trained here on a part of it, saved as tokenizer.json, which datatrove reads with
Hugging Face's tokenizers; each document ends in EOS and has no BOS. The token files are compared, all ids in order, before
any ratio is printed. Times are of whole processes, start-up and imports among them. Memory: the largest resident size of
any one process of an arm, sampled every 50 ms.
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
from pathlib import Path
from typing import Any

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
# name: (processes, engine); `apart` is two single-process jobs over the two halves at once
ARMS = {
    "slm tiktoken": (1, "reference"),
    "slm tiktoken, 2 processes": (2, "reference"),
    "slm gigatoken": (1, "gigatoken"),
    "slm gigatoken, 2 processes": (2, "gigatoken"),
}


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


def write_corpus(path: Path, folders: list[Path], num_bytes: int) -> tuple[int, int]:
    """JSON lines of about num_bytes of text; (documents, bytes)."""
    docs = total = 0
    with open(path, "w") as file:
        for text in texts_of(folders):
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            docs, total = docs + 1, total + len(text.encode())
            if total >= num_bytes:
                break
    return docs, total


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


DATATROVE = """
import sys
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer
corpus, tokenizer, output = sys.argv[1:]
import os
pipeline = [JsonlReader(os.path.dirname(corpus), glob_pattern=os.path.basename(corpus)),
            DocumentTokenizer(output, tokenizer_name_or_path=tokenizer + "/tokenizer.json", eos_token="<|end_of_text|>",
                              shuffle_documents=False)]
if __name__ == "__main__":
    LocalPipelineExecutor(pipeline, tasks=1, workers=1, logging_dir=output + "-logs").run()
"""


def stream_hash(output: Path) -> str:
    """SHA-256 of all token bytes, in order."""
    digest = hashlib.sha256()
    for path in sorted([*output.glob("train/*.bin"), *output.glob("*.ds")]):
        with open(path, "rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()


def run_all(work: Path, corpus: Path, tokenizer: Path, rounds: int, peers: bool) -> dict[str, list[dict[str, float]]]:
    script = work / "datatrove_arm.py"
    script.write_text(DATATROVE)
    parts = halves(corpus, work)
    names = [*ARMS, "two jobs apart (gigatoken)", *(["datatrove"] if peers else [])]
    results: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    hashes: dict[str, str] = {}
    for turn in range(rounds):
        for name in names if turn % 2 == 0 else reversed(names):
            if name == "datatrove" and turn:  # slow, and its time varies little
                continue
            output = work / "out"
            if name == "datatrove":
                commands = [[sys.executable, script, corpus, tokenizer, output]]
            elif name in ARMS:
                commands = [ours(corpus, tokenizer, output, *ARMS[name])]
            else:
                commands = [ours(part, tokenizer, work / f"out{i}", 1, "gigatoken") for i, part in enumerate(parts)]
            results[name].append(measured(commands, work / "log"))
            if output.exists():
                hashes[name] = stream_hash(output)
            for path in work.glob("out*"):
                shutil.rmtree(path)
            print(f"round {turn + 1}: {name}: {results[name][-1]['seconds']:.1f} s", file=sys.stderr, flush=True)
    if len(set(hashes.values())) != 1:
        raise SystemExit(f"No ratios: the arms did not write the same tokens: {hashes}")
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


def show(console: Console, results: dict[str, list[dict[str, float]]], num_bytes: int) -> None:
    table = Table(title="Each arm (median over the rounds, least–most)", title_justify="left")
    for column in ("arm", "wall, s", "MB/s", "CPU, s", "peak MB of a process"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    for name, rounds in results.items():
        seconds = Spread.of([r["seconds"] for r in rounds])
        peak = Spread.of([r["peak_bytes"] / 1e6 for r in rounds]).median
        cpu = Spread.of([r["cpu_seconds"] for r in rounds]).median
        table.add_row(name, seconds.show(1), f"{num_bytes / seconds.median / 1e6:.1f}", f"{cpu:.1f}", f"{peak:.0f}")
    console.print(table)


def ratios(results: dict[str, list[dict[str, float]]]) -> list[tuple[str, float, float]]:
    """(what, ours / peer in speed, aim); medians, as the peer runs once."""

    def seconds(name: str) -> float:
        return Spread.of([r["seconds"] for r in results[name]]).median

    rows = []
    if "datatrove" in results:
        rows += [("slm tiktoken / datatrove", seconds("datatrove") / seconds("slm tiktoken"), 4.0),
                 ("slm gigatoken / datatrove", seconds("datatrove") / seconds("slm gigatoken"), 25.0)]  # fmt: skip
    together = seconds("two jobs apart (gigatoken)") / seconds("slm gigatoken, 2 processes")
    return [*rows, ("2 processes of one job / two jobs apart", together, 0.95)]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vocab-size", type=int, default=32_000)
    parser.add_argument("--text", type=Path, action="append", help="folder of text; default: what this machine has")
    parser.add_argument("--flat", default="80,2000", help="megabytes of input to compare the memory of; empty for none")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    job = parser.parse_args()
    paths = sysconfig.get_paths()
    here = [
        Path(p) for p in dict.fromkeys([paths["stdlib"], paths["purelib"], "/usr/share", "/usr/lib", "/usr/include"])
    ]
    console = Console(width=None if sys.stdout.isatty() else 120)
    try:
        import datatrove  # noqa: F401

        peers = True
    except ImportError:
        peers = False
    with tempfile.TemporaryDirectory(prefix="data_prep-") as folder:
        work = Path(folder)
        corpus, tokenizer = work / "corpus.jsonl", work / "tokenizer"
        docs, num_bytes = write_corpus(corpus, job.text or here, job.megabytes * 1_000_000)
        console.print(
            f"[bold]{machine()}[/bold]\n{docs:,} distinct documents, {num_bytes / 1e6:.0f} MB of text (none repeats), "
            f"vocabulary {job.vocab_size:,}",
            highlight=False,
        )
        if num_bytes < job.megabytes * 900_000:
            console.print(f"Only {num_bytes / 1e6:.0f} MB of text were found: a trial, not a result.")
        make_tokenizer(corpus, tokenizer, job.vocab_size)
        results = run_all(work, corpus, tokenizer, job.rounds, peers)
        show(console, results, num_bytes)
        table = Table("ours / peer, MB/s", "ratio", "aim")
        for what, ratio, aim in ratios(results):
            table.add_row(what, f"{ratio:.2f}", f">= {aim:g}: {'met' if ratio >= aim else 'not met'}")
        console.print(table)
        sizes = [int(float(x) * 1e6) for x in job.flat.split(",") if x]
        flat = flatness(work, corpus, tokenizer, sizes)
        for size, peak in flat:
            console.print(f"input of {size / 1e6:,.0f} MB: at most {peak / 1e6:.0f} MB a process", highlight=False)
    if job.json:
        job.json.write_text(
            json.dumps({"machine": machine(), "bytes": num_bytes, "runs": results, "flat": flat}, indent=1)
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
