"""One document of a dataset, decoded, and where it came from.

Owns the way back from a token to a line: shard -> NAME.src -> file and place in it.

    print(show(Path("data/mine/train"), 12345))
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.corpus import HUB, open_hub
from data_prep.reading import place
from slm.data.tokens import TokenDataset, TokenShard
from slm.errors import CorruptArtefact, UserError


def show(folder: Path, doc: int, tokenizer: str = "") -> str:
    """What is known of document `doc` (counted from 0 over the shards), then its text. Raises UserError."""
    from slm.tokenizer import load_tokenizer

    dataset = TokenDataset(folder)
    if not 0 <= doc < dataset.num_docs:
        raise UserError(
            f"--doc is {doc}, but {folder} has {dataset.num_docs:,} documents", fix=f"give 0 to {dataset.num_docs - 1}"
        )
    spec = tokenizer or dataset.manifest["tokenizer"].get("spec", "")
    loaded = load_tokenizer(spec, said_by=None if tokenizer else folder)
    if loaded.fingerprint != dataset.tokenizer_fingerprint:
        raise UserError(
            f"{spec} is another tokenizer than the one that {folder} was made with: its text would be nonsense",
            fix="give the right one with --tokenizer",
        )
    shard, entry, number = _find(dataset, doc)
    start, end = int(shard.doc_offsets[number]), int(shard.doc_offsets[number + 1])
    text = loaded.decode(shard.tokens[start:end].tolist())
    lines = [
        f"document {doc} of {folder}: {end - start:,} tokens, {shard.name} from token {start:,}",
        f"from {_origin(dataset, shard, entry, number)}",
    ]
    return "\n".join([*lines, "", text])


def _find(dataset: TokenDataset, doc: int) -> tuple[TokenShard, dict[str, Any], int]:
    for shard, entry in zip(dataset.shards, dataset.manifest["shards"], strict=True):
        if doc < shard.num_docs:
            return shard, entry, doc
        doc -= shard.num_docs
    raise AssertionError("the shards have fewer documents than the manifest says")


def _origin(dataset: TokenDataset, shard: TokenShard, entry: dict[str, Any], number: int) -> str:
    """File and line (or row, or byte) of a document, in words."""
    if "src_bytes" not in entry:
        return "an import, which does not say where documents came from"
    origins = np.fromfile(dataset.path / f"{shard.name}.src", "<i8")
    if len(origins) != 2 * shard.num_docs:
        raise CorruptArtefact(
            f"{dataset.path / shard.name}.src has {len(origins) // 2} origins for {shard.num_docs} documents"
        )
    piece, at = origins.reshape(-1, 2)[number].tolist()
    source = entry["sources"][piece]
    path, since = source["path"], _since(source)
    where = place(path, source["kind"], source.get("compression", ""), source["start"], at, as_it_was=not since)
    if since:
        return f"{path}, which {since}; it was {where or 'the file'} then, and may be another document or none now"
    return f"{path}, {where}" if where else path


def _since(source: dict[str, Any]) -> str:
    """What has become of a source since it was read, in words; "" if it is as it was, as a commit of the hub always is."""
    path = source["path"]
    try:
        if source["kind"] == "hub":
            on_this_machine = os.path.isdir(path.removeprefix(HUB).partition("?")[0])
            now = open_hub(path)[1].mtime_ns if on_this_machine else source.get("mtime_ns")
            return "" if now == source.get("mtime_ns") else "has changed since"
        stat = os.stat(path)
    except (OSError, UserError):
        return "is not there now"
    there = source.get("size"), source.get("mtime_ns")
    return "" if there in ((None, None), (stat.st_size, stat.st_mtime_ns)) else "has changed since"
