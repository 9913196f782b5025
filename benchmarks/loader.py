"""Assembling batches against a plain cast-copy of the same bytes, and packing against the textbook's best-fit-decreasing.

    python benchmarks/loader.py                     # about two minutes, one core
    python benchmarks/loader.py --tokens 10000000   # a trial

Everything runs in one process on one thread, in turn, several rounds; the ratios are taken round by round.

Loading: windows of 8,192 tokens from a memory-mapped shard in random order, as a phase reads them. What a step needs are
input tokens, labels (the next token) and positions, int64. The floor is a plain numpy copy, with the cast, of the tokens and
of the labels (shifted by one) into preallocated arrays (of two steps, as ours), and for positions of a ready row: the same bytes
read and written, and no bookkeeping.

Ours: PhaseData.sequences, over documents of exactly one window, and over documents of natural length
(log-normal, median 400 tokens), packed, with their boundaries. First the tokens of both are compared.

Packing: best_fit() over 50,000 documents of such lengths at 8K, against best-fit-decreasing by its definition (every open bin
is looked at for every document, in numpy); the number of bins must be the same.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
import numpy as np  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from side_by_side import Spread, machine  # noqa: E402

WINDOW, BATCH, STEP = 8192, 8, 64  # tokens; sequences of a micro-batch, and of a step of this rank


def make_dataset(folder: Path, lengths: np.ndarray, vocab_size: int) -> Any:
    from slm.data.tokens import ShardWriter, TokenDataset, write_manifest

    rng = np.random.default_rng(0)
    with ShardWriter(folder, "shard-00000", vocab_size=vocab_size) as shard:
        for length in lengths.tolist():
            shard.add(rng.integers(0, vocab_size, length))
    tokenizer = {"fingerprint": "benchmark", "vocab_size": vocab_size, "bos_id": None, "eos_id": None}
    write_manifest(folder, shards=[shard.entry], tokenizer=tokenizer)
    return TokenDataset(folder)


def natural_lengths(num_docs: int) -> np.ndarray:
    return np.random.default_rng(1).lognormal(6, 1.2, num_docs).astype(np.int64) + 2


def phase_of(dataset: Any) -> Any:
    from slm.data.batches import PhaseData

    return PhaseData({"a": dataset}, None, seq_len=WINDOW, seed=0, phase_name="benchmark")


class CastCopy:
    """The floor: the tokens of the same windows, by plain slices, into arrays that exist already."""

    def __init__(self, dataset: Any, starts: np.ndarray) -> None:
        self.source, self.starts = dataset.shards[0].tokens, starts
        # Of two steps, as ours: one is trained on while the next is filled.
        self.tokens, self.labels, self.positions = (np.empty((2 * STEP, WINDOW), np.int64) for _ in range(3))
        self.row = np.arange(WINDOW)

    def step(self, step: int) -> None:
        for row, start in enumerate(self.starts[step * STEP : (step + 1) * STEP].tolist(), step % 2 * STEP):
            self.tokens[row] = self.source[start : start + WINDOW]
            labels = self.source[start + 1 : start + WINDOW + 1]
            self.labels[row, : len(labels)] = labels
            self.positions[row] = self.row


def interleaved(arms: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(rounds + 1):
        for name in arms if turn % 2 == 0 else reversed(arms):
            began = time.perf_counter()
            arms[name]()
            if turn:  # the first warms the page cache
                seconds[name].append(time.perf_counter() - began)
    return seconds


def textbook(lengths: np.ndarray, capacity: int) -> int:
    """Best-fit-decreasing by its definition: longest first, of all open bins the one with the least room that is enough,
    found by looking at each (vectorised); else a new one. Number of bins."""
    rooms = np.zeros(len(lengths), dtype=np.int64)
    num_bins = 0
    for length in np.sort(lengths)[::-1].tolist():
        left = rooms[:num_bins] - length
        at = int(np.where(left >= 0, left, capacity).argmin()) if num_bins else 0
        if num_bins and left[at] >= 0:
            rooms[at] -= length
        else:
            rooms[num_bins] = capacity - length
            num_bins += 1
    return num_bins


def loading(console: Console, folder: Path, num_tokens: int, rounds: int) -> bool:
    num_windows = num_tokens // WINDOW // STEP * STEP
    whole = make_dataset(folder / "whole", np.full(num_windows, WINDOW), 50_000)
    lengths = natural_lengths(max(100, num_tokens // 820))
    packed = make_dataset(folder / "packed", lengths, 50_000)
    phases = {"whole": phase_of(whole), "packed": phase_of(packed)}
    source = phases["whole"]._sources[0]
    starts = np.array([source.plan.piece_start[source.plan.sequence_offsets[phases["whole"].order.locate(k)[1]]]
                       for k in range(num_windows)])  # fmt: skip
    floor = CastCopy(whole, starts)
    floor.step(0)
    if not np.array_equal(phases["whole"]._make(0, STEP, BATCH, 0, 1)[0].tokens_BT.numpy(), floor.tokens[:BATCH]):
        console.print("No ratios: the two did not load the same tokens.", style="red")
        return False
    counts = {"plain cast-copy": num_windows, "whole": num_windows,
              "packed": phases["packed"].num_sequences // STEP * STEP}  # fmt: skip

    def ours(name: str) -> Callable[[], None]:
        def run() -> None:
            for step in range(counts[name] // STEP):
                phases[name]._make(step, STEP, BATCH, 0, 1)  # what the prefetching thread runs

        return run

    def plain() -> None:
        for step in range(num_windows // STEP):
            floor.step(step)

    seconds = interleaved({"plain cast-copy": plain, "whole": ours("whole"), "packed": ours("packed")}, rounds)
    rates = {name: [counts[name] * WINDOW / s for s in times] for name, times in seconds.items()}
    table = Table(
        title=f"Loading {WINDOW:,}-token windows, {num_windows * WINDOW / 1e6:.0f} M tokens", title_justify="left"
    )
    for column in ("what", "M tokens/s (least–most)", "/ plain cast-copy", "aim"):
        table.add_column(column)
    titles = {"whole": "ours, one document a window", "packed": "ours, packed documents with boundaries"}
    for name, aim in (("plain cast-copy", None), ("whole", 1.0), ("packed", 0.8)):
        rate = Spread.of([r / 1e6 for r in rates[name]])
        ratio = Spread.of([a / b for a, b in zip(rates[name], rates["plain cast-copy"], strict=True)])
        verdict = "-" if aim is None else f">= {aim}: {'met' if ratio.median >= aim else 'not met'}"
        table.add_row(titles.get(name, name), rate.show(0), ratio.show(), verdict)
    console.print(table)
    return True


def packing(console: Console, num_docs: int, rounds: int) -> bool:
    from slm.data.packing import best_fit, pack

    lengths = natural_lengths(num_docs)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    pieces = np.concatenate([np.full(int((lengths // WINDOW).sum()), WINDOW), lengths[lengths % WINDOW > 0] % WINDOW])
    plan = pack([offsets], WINDOW)
    peers: dict[str, Callable[[np.ndarray, int], int]] = {"textbook best-fit-decreasing": textbook}
    bins = {name: peer(pieces, WINDOW) for name, peer in peers.items()}
    ours = len(best_fit(pieces, WINDOW)[1])
    if any(count != ours for count in bins.values()):
        console.print(f"No ratios: {ours} bins here, {bins} there.", style="red")
        return False
    arms: dict[str, Callable[[], Any]] = {"ours": lambda: best_fit(pieces, WINDOW)}
    arms |= {name: (lambda peer=peer: peer(pieces, WINDOW)) for name, peer in peers.items()}
    seconds = interleaved(arms, rounds)
    table = Table(
        title=f"Packing {num_docs:,} documents at {WINDOW:,}: {ours:,} bins in all arms", title_justify="left"
    )
    for column in ("what", "1000 documents/s", "ours / it", "aim"):
        table.add_column(column)
    for name, times in seconds.items():
        rate = Spread.of([num_docs / s / 1000 for s in times])
        ratio = Spread.of([b / a for a, b in zip(seconds["ours"], times, strict=True)])
        aim = "-" if name == "ours" else f">= 8: {'met' if ratio.median >= 8 else 'not met'}"
        table.add_row(name, rate.show(0), "-" if name == "ours" else ratio.show(1), aim)
    console.print(table)
    used = plan.num_tokens / (plan.num_sequences * WINDOW)
    # A document is cut only where it is longer than a window: pieces = sum of ceil(length / window).
    avoidable = len(plan.piece_length) + plan.num_dropped - int((-(-lengths // WINDOW)).sum())
    console.print(f"utilisation {used:.4f} (aim 0.999), avoidable cuts {avoidable}", highlight=False)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=100_000_000, help="of each dataset")
    parser.add_argument("--docs", type=int, default=50_000, help="to pack")
    parser.add_argument("--rounds", type=int, default=5)
    job = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(f"[bold]{machine()}[/bold], numpy {np.__version__}", highlight=False)
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="loader-") as folder:
        good = loading(console, Path(folder), job.tokens, job.rounds)
    return 0 if packing(console, job.docs, job.rounds) and good else 1


if __name__ == "__main__":
    sys.exit(main())
