"""What is in a dataset, in numbers and drawn: documents, tokens by source, lengths, bytes per token, what was left out.

Owns the counting over manifests and indices (tokens are not read) and the drawing on the terminal.

    draw(stats(Path("data/mine/train")))
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.corpus import HUB, human_bytes
from slm.data.tokens import TokenDataset

_SOURCES_SHOWN = 12
_BAR = 40  # characters


def stats(folder: Path) -> dict[str, Any]:
    """Numbers of one dataset, for programs and for `draw`. by_source: {file or folder: [documents, tokens]}."""
    dataset = TokenDataset(folder)
    manifest = dataset.manifest
    by_source: dict[str, list[int]] = {}
    lengths: list[np.ndarray] = []
    for shard, entry in zip(dataset.shards, manifest["shards"], strict=True):
        doc_tokens = np.diff(shard.doc_offsets)
        lengths.append(doc_tokens)
        if "src_bytes" in entry:
            pieces = np.fromfile(folder / f"{shard.name}.src", "<i8").reshape(-1, 2)[:, 0]
            docs = np.bincount(pieces, minlength=len(entry["sources"]))
            tokens = np.bincount(pieces, weights=doc_tokens, minlength=len(entry["sources"]))
            for source, num_docs, num_tokens in zip(entry["sources"], docs.tolist(), tokens.tolist(), strict=True):
                row = by_source.setdefault(source["path"], [0, 0])
                row[0] += num_docs
                row[1] += int(num_tokens)
    all_lengths = np.concatenate([np.zeros(0, np.int64), *lengths])
    exponents = np.maximum(all_lengths, 1).astype(np.float64)
    buckets = Counter((1 << np.floor(np.log2(exponents)).astype(np.int64)).tolist())
    histogram = {
        str(low): {"docs": docs, "tokens": int(all_lengths[(all_lengths >= low) & (all_lengths < 2 * low)].sum())}
        for low, docs in sorted(buckets.items())
    }
    text_bytes = manifest.get("text_bytes", 0)
    return {
        "path": str(folder),
        "docs": dataset.num_docs,
        "tokens": dataset.num_tokens,
        "shards": len(dataset.shards),
        "vocab_size": dataset.vocab_size,
        "text_bytes": text_bytes,
        "bytes_per_token": text_bytes / dataset.num_tokens if text_bytes and dataset.num_tokens else None,
        "median_doc_tokens": float(np.median(all_lengths)) if len(all_lengths) else 0.0,
        "longest_doc_tokens": int(all_lengths.max(initial=0)),
        "by_source": by_source,
        "histogram": histogram,
        "documents": manifest.get("documents", {}),
    }


def draw(found: dict[str, Any]) -> None:
    """On the terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    per_token = f"{found['bytes_per_token']:.2f} bytes per token" if found["bytes_per_token"] else "no record of bytes"
    rest = (
        f": {found['docs']:,} documents, {found['tokens']:,} tokens in {found['shards']} shards; "
        f"{human_bytes(found['text_bytes'])} of text, {per_token}; median document {found['median_doc_tokens']:,.0f} tokens, "
        f"longest {found['longest_doc_tokens']:,}"
    )
    console.print(Text.assemble((found["path"], "bold"), rest))  # Text: square brackets in a path are no markup
    if found["documents"]:
        counts = found["documents"]
        rest = ", ".join(f"{counts[k]:,} {k}" for k in ("rejected", "filtered", "duplicates"))
        console.print(
            f"of {counts['read']:,} records read (both splits): {counts['kept']:,} kept, {rest}", highlight=False
        )
    table = Table(
        "tokens of a document", "documents", "tokens", "share of the tokens", title="lengths", title_justify="left"
    )
    for low, row in found["histogram"].items():
        share = row["tokens"] / max(1, found["tokens"])
        bar = "█" * round(share * _BAR) or ("▏" if row["tokens"] else "")
        table.add_row(
            f"{int(low):,} – {2 * int(low) - 1:,}", f"{row['docs']:,}", f"{row['tokens']:,}", f"{bar} {share:.1%}"
        )
    console.print(table)
    sources = _grouped(found["by_source"])
    if len(sources) > 1:
        table = Table("source", "documents", "tokens", "share", title="sources", title_justify="left")
        for name, (docs, tokens) in sources:
            table.add_row(Text(name), f"{docs:,}", f"{tokens:,}", f"{tokens / max(1, found['tokens']):.1%}")
        console.print(table)


def _grouped(by_source: dict[str, list[int]]) -> list[tuple[str, tuple[int, int]]]:
    """Files as they are if they are few, else by folder below their common one; the smallest ones together."""
    rows = {path: (docs, tokens) for path, (docs, tokens) in by_source.items()}
    if len(rows) > _SOURCES_SHOWN:
        local = [path for path in rows if not path.startswith(HUB)]
        common = os.path.commonpath(local) if local else ""
        folders: dict[str, tuple[int, int]] = {}
        for path, (docs, tokens) in rows.items():
            if path.startswith(HUB):
                folders[path] = (docs, tokens)
                continue
            first = os.path.relpath(path, common).split(os.sep)
            name = os.path.join(common, first[0], "") if len(first) > 1 else f"{common} (files)"
            before = folders.get(name, (0, 0))
            folders[name] = (before[0] + docs, before[1] + tokens)
        rows = folders
    ordered = sorted(rows.items(), key=lambda item: -item[1][1])
    rest = ordered[_SOURCES_SHOWN:]
    if rest:
        total = (sum(r[1][0] for r in rest), sum(r[1][1] for r in rest))
        ordered = [*ordered[:_SOURCES_SHOWN], (f"{len(rest)} others", total)]
    return ordered
