"""Checking datasets byte for byte: hashes, indices, token ids, ends of documents.

Owns finding the datasets under a folder and showing what is wrong; the checks are slm/data/tokens.py's.

    for line, whole in verify(Path("data/mine")):
        print(line)
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data_prep.corpus import human_bytes
from data_prep.progress import byte_progress
from slm.data.tokens import MANIFEST, TokenDataset
from slm.errors import CorruptArtefact, UserError


def find_datasets(folder: Path) -> list[Path]:
    """The folder itself, or the datasets below it. Raises UserError if there are none."""
    if (folder / MANIFEST).is_file():
        return [folder]
    found = sorted(path.parent for path in folder.rglob(MANIFEST)) if folder.is_dir() else []
    if not found:
        what = "holds no manifest.json: no dataset was completed there" if folder.is_dir() else "does not exist"
        raise UserError(f"{folder} {what}", fix="make a dataset with: slm-data shards INPUT --tokenizer T --output DIR")
    return found


def verify(folder: Path) -> Iterator[tuple[str, bool]]:
    """One line for each dataset (and one for each further problem), and whether it is whole."""
    for path in find_datasets(folder):
        try:
            dataset = TokenDataset(path)
            num_bytes = sum(shard["bin_bytes"] + shard["idx_bytes"] for shard in dataset.manifest["shards"])
            with byte_progress(f"reading {path}", num_bytes) as advance:
                problems = dataset.verify(advance)
        except CorruptArtefact as error:
            problems = [error.problem]
        except (KeyError, TypeError, ValueError) as error:  # a manifest that is JSON, but not a manifest
            problems = [f"{path / MANIFEST} lacks what a manifest has ({error!r})"]
        if problems:
            yield f"{path}: NOT WHOLE: " + "; ".join(problems), False
        else:
            yield (
                (
                    f"{path}: whole: {len(dataset.shards)} shards, {dataset.num_docs:,} documents, "
                    f"{dataset.num_tokens:,} tokens, {human_bytes(num_bytes)}"
                ),
                True,
            )
