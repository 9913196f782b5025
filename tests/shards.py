"""Makes tiny token datasets for tests, through the real writer, and the tree of a recipe for them."""

import numpy as np

from slm.data.tokens import ShardWriter, TokenDataset, write_manifest


def make_dataset(folder, lengths=None, *, num_shards=2, vocab_size=512, seed=0, fingerprint="test", rule=99):
    """Documents of `lengths` tokens (BOS 0 … EOS 1 included), learnable: each token follows from the one before by `rule`."""
    rng = np.random.default_rng(seed)
    lengths = list(rng.integers(2, 200, 160) if lengths is None else lengths)
    step = np.random.default_rng(rule).integers(2, vocab_size, vocab_size)
    entries = []
    for shard in range(num_shards):
        with ShardWriter(folder, f"t-{shard:05d}", vocab_size=vocab_size) as writer:
            for length in lengths[shard::num_shards]:
                ids = [0]
                while len(ids) < length - 1:
                    last = ids[-1] or int(rng.integers(2, vocab_size))
                    ids.append(int(step[last]) if rng.random() < 0.8 else int(rng.integers(2, vocab_size)))
                writer.add(np.array([*ids, 1][:length]))
        entries.append(writer.entry)
    tokenizer = {"fingerprint": fingerprint, "vocab_size": vocab_size, "bos_id": 0, "eos_id": 1}
    write_manifest(folder, shards=entries, tokenizer=tokenizer)
    return TokenDataset(folder)


def recipe_tree(data, output, **changes):
    """12 steps of 4 sequences, 2 of them at a time, on data/a; data/val is held out."""
    return {
        "name": "t",
        "output": str(output),
        "model": "cpu-tiny",
        "data": {"sources": {"a": str(data / "a")}, "validation": {"val": str(data / "val")}},
        "optim": {"lr": 3e-3},
        "phases": [{"name": "main", "tokens": 12 * 256, "seq_len": 64, "batch_tokens": 256, "micro_batch": 2}],
        **changes,
    }
