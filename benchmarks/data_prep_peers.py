"""The peers of data_prep.py: how they are started, and whether they wrote what we wrote.

Owns their commands, their files' names and the comparison; knows nothing of times. Each reads the same JSON lines with the
same tokenizer.json and ends a document with EOS; each is one input of a number of documents, the first of our own input.

    ours = Written.of(output / "train")
    print(ours.compare("datatrove", output, num_docs, corpus, tokenizer))   # or SystemExit: no ratios
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from side_by_side import REPOSITORY  # also makes slm importable

from slm.data.tokens import TokenDataset, decode_index, encode_index

SHIM = REPOSITORY / "benchmarks" / "megatron_shim.py"
# name: options of tools/preprocess_data.py
MEGATRON = {"Megatron, 1 worker": ("--workers", 1), "Megatron, 2 workers": ("--workers", 2)}
# name: environment of tools/preprocess_data_fast.py, which is one process with a thread a core
MEGATRON_FAST = {"Megatron fast, a thread a core": (), "Megatron fast, 1 thread": ("RAYON_NUM_THREADS=1",)}
SLOW = ("datatrove", *MEGATRON)  # 1 to 2 MB/s: they read the first part of the corpus only

DATATROVE = """
import os, sys
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer
corpus, tokenizer, output = sys.argv[1:]
pipeline = [JsonlReader(os.path.dirname(corpus), glob_pattern=os.path.basename(corpus)),
            DocumentTokenizer(output, tokenizer_name_or_path=tokenizer + "/tokenizer.json", eos_token="<|end_of_text|>",
                              shuffle_documents=False)]
if __name__ == "__main__":
    LocalPipelineExecutor(pipeline, tasks=1, workers=1, logging_dir=output + "-logs").run()
"""


def peer_command(name: str, megatron: Path | None, corpus: Path, tokenizer: Path, output: Path) -> list[Any]:
    """The peer over the corpus; it writes into the folder `output`."""
    if name == "datatrove":
        script = output.with_name("datatrove_arm.py")
        script.write_text(DATATROVE)
        return [sys.executable, script, corpus, tokenizer, output]
    output.mkdir()
    fast = name in MEGATRON_FAST
    tool = "tools/preprocess_data_fast.py" if fast else "tools/preprocess_data.py"
    options = ["--use-gigatoken"] if fast else MEGATRON[name]
    return ["env", *MEGATRON_FAST.get(name, ()), sys.executable, SHIM, megatron, tool, "--input", corpus,
            "--output-prefix", output / "x", "--append-eod", "--tokenizer-type", "HuggingFaceTokenizer",
            "--tokenizer-model", tokenizer, *options]  # fmt: skip


def peers_at_hand(megatron: Path | None) -> list[str]:
    """The arms that can run here."""
    try:
        import datatrove  # noqa: F401

        found = ["datatrove"]
    except ImportError:
        found = []
    return [*found, *MEGATRON, *MEGATRON_FAST] if megatron else found


@dataclass(frozen=True)
class Written:
    """What we wrote. ids: uint16 or int32 [tokens]. ends: int64 [documents + 1], of the documents in tokens, from 0."""

    ids: np.ndarray
    ends: np.ndarray

    @classmethod
    def of(cls, train: Path) -> Written:
        """All shards of a dataset, as one."""
        shards = TokenDataset(train).shards
        lengths = np.concatenate([np.diff(shard.doc_offsets) for shard in shards])
        return cls(np.concatenate([shard.tokens for shard in shards]), np.concatenate([[0], np.cumsum(lengths)]))

    def compare(self, peer: str, output: Path, num_docs: int, corpus: Path, tokenizer: Path) -> str:
        """Says what equals what. SystemExit if the peer wrote anything else than our first num_docs documents.

        One difference is let pass, and counted: documents in which we wrote what Hugging Face's tokenizers, the reference,
        makes of the text, and the peer did not.
        """
        (payload,) = [*output.glob("*.bin"), *output.glob("*.ds")]
        ids = np.fromfile(payload, self.ids.dtype)
        if payload.suffix == ".bin":
            index, equal_index = payload.with_suffix(".idx").read_bytes(), ".idx"
            ends, dtype = decode_index(index, payload)
            ours = encode_index(np.diff(self.ends[: num_docs + 1]), self.ids.dtype)
            if dtype != self.ids.dtype:
                raise SystemExit(f"No ratios: {peer} wrote {dtype}, we {self.ids.dtype}")
        else:
            index, equal_index = payload.with_name(payload.name + ".index").read_bytes(), ".index"
            ends = np.concatenate([[0], np.frombuffer(index, "<u8").astype(np.int64)])
            ours = self.ends[1 : num_docs + 1].astype("<u8").tobytes()
        if len(ends) != num_docs + 1:
            raise SystemExit(f"No ratios: {peer} wrote {len(ends) - 1} documents of {num_docs}")
        if index == ours and np.array_equal(ids, self.ids[: self.ends[num_docs]]):
            same = f"{payload.suffix} and {equal_index} equal ours byte for byte"
            return f"{peer}: {num_docs:,} documents, {len(ids):,} tokens; {same}"
        differ = self._differing(ids, ends, corpus, tokenizer, peer)
        return f"{peer}: {num_docs - differ:,} documents equal ours; in {differ:,} it departs from the reference, we do not"

    def _differing(self, ids: np.ndarray, ends: np.ndarray, corpus: Path, tokenizer: Path, peer: str) -> int:
        from tokenizers import Tokenizer

        reference, found = Tokenizer.from_file(str(tokenizer / "tokenizer.json")), 0
        eos = reference.token_to_id("<|end_of_text|>")
        with open(corpus) as lines:
            for number, line in enumerate(islice(lines, len(ends) - 1)):
                ours = self.ids[self.ends[number] : self.ends[number + 1]]
                theirs = ids[ends[number] : ends[number + 1]]
                if np.array_equal(ours, theirs):
                    continue
                found += 1
                wanted = [*reference.encode(json.loads(line)["text"], add_special_tokens=False).ids, eos]
                if ours.tolist() != wanted:
                    raise SystemExit(f"No ratios: document {number} differs from {peer}'s and from the reference")
        return found
