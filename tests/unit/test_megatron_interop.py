"""Token shards against Megatron's own reader and writer (megatron/core/datasets/indexed_dataset.py), in both directions.

megatron-core (of the `dev` extra) brings that module; SLM_MEGATRON=/path/to/Megatron-LM takes a checkout's instead.
"""

import importlib.util
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from slm.data.tokens import ShardWriter, TokenDataset, token_dtype, write_manifest
from slm.tokenizer import load_tokenizer
from tests.unit.test_data_prep import documents, slm_data, texts_of, trained, write_jsonl

__all__ = ["slm_data", "trained"]  # fixtures

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def megatron():
    """Megatron's module; what it made of sys.modules is undone, as other packages look there for Megatron."""
    if "SLM_MEGATRON" in os.environ:
        root = Path(os.environ["SLM_MEGATRON"])
    else:
        found = importlib.util.find_spec("megatron")
        if found is None or not found.submodule_search_locations:
            pytest.skip("no Megatron: pip install --no-deps megatron-core, or SLM_MEGATRON=/path/to/Megatron-LM")
        root = Path(next(iter(found.submodule_search_locations))).parent
    before = dict(sys.modules)
    sys.path.append(str(BENCHMARKS))
    try:
        from megatron_shim import indexed_dataset

        yield indexed_dataset(root)
    finally:
        sys.path.remove(str(BENCHMARKS))
        for name in [n for n in sys.modules if n.split(".")[0] == "megatron"]:
            del sys.modules[name]
        sys.modules.update({n: m for n, m in before.items() if n.split(".")[0] == "megatron"})


def random_docs(vocab_size, count=50):
    rng = np.random.default_rng(vocab_size)
    docs = [rng.integers(0, vocab_size, rng.integers(1, 200)).tolist() for _ in range(count)]
    return [*docs, [vocab_size - 1], [0]]


def write_theirs(megatron, prefix, documents_of_sequences, dtype):
    """A document is a list of sequences."""
    builder = megatron.IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for sequences in documents_of_sequences:
        builder.add_document([token for one in sequences for token in one], [len(one) for one in sequences])
    builder.finalize(f"{prefix}.idx")


def read_theirs(megatron, prefix, mmap=True):
    dataset = megatron.IndexedDataset(str(prefix), mmap=mmap)
    bounds = dataset.document_indices
    return [
        [token for i in range(first, last) for token in dataset[i].tolist()]
        for first, last in zip(bounds[:-1], bounds[1:], strict=True)
    ]


@pytest.mark.parametrize("vocab_size", [300, 65499, 65500, 65501, 128256])
def test_same_documents_same_bytes(megatron, tmp_path, vocab_size):
    """Ours and theirs are equal byte for byte, the width of an id included; each reads the other's."""
    docs = random_docs(vocab_size)
    with ShardWriter(tmp_path, "ours", vocab_size=vocab_size) as shard:
        for ids in docs:
            shard.add(np.array(ids))
    dtype = megatron.DType.optimal_dtype(vocab_size)
    assert token_dtype(vocab_size) == dtype
    write_theirs(megatron, tmp_path / "theirs", [[ids] for ids in docs], dtype)
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"ours.{suffix}").read_bytes() == (tmp_path / f"theirs.{suffix}").read_bytes()
    assert read_theirs(megatron, tmp_path / "ours") == read_theirs(megatron, tmp_path / "ours", mmap=False) == docs
    entry = {**shard.entry, "name": "theirs"}
    info = {"fingerprint": "f", "vocab_size": vocab_size, "bos_id": None, "eos_id": 1}
    write_manifest(tmp_path, shards=[entry], tokenizer=info)
    (read,) = TokenDataset(tmp_path).shards
    assert [ids.tolist() for ids in np.split(read.tokens, read.doc_offsets[1:-1])] == docs


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_import_of_what_megatron_wrote(megatron, tmp_path, slm_data, trained, dtype):
    """Same documents and .bin; with one sequence a document, as preprocess_data.py writes, the same .idx too. A document of
    several sequences (--split-sentences) becomes one of one; an empty one stays."""
    tokenizer = load_tokenizer(trained)
    texts = texts_of(40)
    rows = [[tokenizer.bos_token_id, *tokenizer.encode(text), tokenizer.eos_token_id] for text in texts]
    (tmp_path / "plain").mkdir()
    (tmp_path / "split").mkdir()
    split = [[ids[:3], ids[3:]] for ids in rows] + [[]]
    write_theirs(megatron, tmp_path / "plain" / "x", [[ids] for ids in rows], dtype)
    write_theirs(megatron, tmp_path / "split" / "x", split, dtype)
    for kind in ("plain", "split"):
        ours = tmp_path / f"ours-{kind}"
        arguments = ("--format", "megatron", "--tokenizer", trained, "--output", ours)
        code, _, error = slm_data("import", tmp_path / kind, *arguments)
        assert code == 0, error
        assert slm_data("verify", ours)[0] == 0
        assert (ours / "shard-00000.bin").read_bytes() == (tmp_path / kind / "x.bin").read_bytes()
        assert read_theirs(megatron, ours / "shard-00000") == read_theirs(megatron, tmp_path / kind / "x")
    assert documents(tmp_path / "ours-plain", trained) == texts
    assert (tmp_path / "ours-plain" / "shard-00000.idx").read_bytes() == (tmp_path / "plain" / "x.idx").read_bytes()


def test_megatron_reads_and_merges_what_slm_data_wrote(megatron, tmp_path, slm_data, trained):
    """From text, over several shards; its add_index joins them to one."""
    texts, tokenizer = texts_of(200), load_tokenizer(trained)
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    options = ("--tokenizer", trained, "--validation-fraction", 0, "--shard-bytes", "4k", "--processes", 1)
    code, _, error = slm_data("shards", path, *options, "--output", tmp_path / "out")
    assert code == 0, error
    prefixes = [p.with_suffix("") for p in sorted((tmp_path / "out" / "train").glob("*.bin"))]
    assert len(prefixes) > 1
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "all.bin"), dtype=np.uint16)
    for prefix in prefixes:
        builder.add_index(str(prefix))
    builder.finalize(str(tmp_path / "all.idx"))
    read = read_theirs(megatron, tmp_path / "all")
    assert read == [ids for prefix in prefixes for ids in read_theirs(megatron, prefix)]
    assert [tokenizer.decode(ids[1:-1]) for ids in read] == texts
