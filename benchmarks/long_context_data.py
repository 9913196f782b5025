"""Token shards for benchmarks/long_context.py and recipes/long-context-toy.yaml: text, needles in text, and repetition.

    python benchmarks/long_context_data.py artifacts/long-context-toy        # half a minute

Tokens are bytes. Names and values of needles are bytes 192 to 255, which no text here holds. Every document but those of
`text` is 33, 65, 129, 257 or 1,025 tokens long (BOS and EOS included), so that it fills a sequence of 32, 64, 128, 256 or 1,024
with all labels; a phase chooses its lengths by `filters`. A tenth of the files, and nothing made from them, is `held-out`.

`text`     files of the Python standard library of this interpreter
`needle`   one needle somewhere, and a question at the end: what recall measures
`many`     needles, and questions about them, as many as fit in 85 % of the document
`echo`     a string of such bytes somewhere in text, and once more further on
`records`  short strings of such bytes, again and again in another order, 0 to 3 bytes of text after each
`loops`    one string of such bytes, again and again
`chains`   such bytes, of which each decides which one comes two places on

To find again what followed a byte, two layers must learn two things that are worth nothing alone: to look one place back, and
to look for what the first found. AdamW sees no slope for long. `chains` is solved by the first alone, and so is learned at once;
`loops` then asks for the second. In both a byte may as well be read off the place after it, which fails at the last byte of a
needle; the text after each string of `records` is against it (benchmarks/README.md).
"""

from __future__ import annotations

import argparse
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import numpy as np

from slm.data.tokens import ShardWriter, TokenDataset, write_manifest
from slm.recall.samples import Filler, Form, build_sample
from slm.recall.settings import Recall
from slm.tokenizer import SLMTokenizer

RECALL = Recall(
    needle="\nThe key is «{name}{value}»\n", query="\nThe key is «{name}", names=(196, 255), name_length=1,
    values=(196, 255), value_length=4,
)  # fmt: skip
# length of the documents, EOS not counted: how many of each of KINDS, in its order
COUNTS = {
    32: (0, 0, 0, 0, 8000, 8000),
    64: (2000, 4000, 3000, 4000, 0, 0),
    128: (5000, 8000, 4000, 0, 0, 0),
    256: (1000, 1000, 400, 0, 0, 0),
    1024: (300, 300, 100, 0, 0, 0),
}
MOST_NEEDLES = 12  # of 5 different bytes out of 60
NEXT = 192 + np.random.default_rng(64).permutation(64)  # of `chains`: the same in all documents and for all seeds
_SKIPPED = {"test", "tests", "idle_test", "encodings", "pydoc_data", "site-packages", "__pycache__"}


def texts(held_out: bool) -> list[bytes]:
    """Files of pure ASCII, every tenth of them held out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [p for p in sorted(root.rglob("*.py")) if not _SKIPPED & set(p.relative_to(root).parts)]
    contents = [data for p in paths if len(data := p.read_bytes()) > 200 and data.isascii()]
    return [data for i, data in enumerate(contents) if (i % 10 == 9) == held_out]


def many(form: Form, filler: Filler, length: int, rng: np.random.Generator) -> np.ndarray:
    """[BOS] text with needles, then questions about them, as many as fit: int64 [length]. The fewer needles, the more often
    each is asked for, a second time only after all the others."""
    one = form.needles(1, rng)[0]
    answered, room = len(one.query) + len(one.answer), int(0.85 * length)
    keys = int(rng.integers(1, 1 + min(MOST_NEEDLES, room // (len(one.needle) + answered))))
    needles = form.needles(keys, rng)
    num_asked = min(MOST_NEEDLES, (room - keys * len(one.needle)) // answered)
    order = np.concatenate([rng.permutation(keys) for _ in range(1 + num_asked // keys)])[:num_asked]
    asked = [x for i in order for x in (*needles[i].query, *needles[i].answer)]
    bos = [] if filler.bos_id is None else [filler.bos_id]
    text = filler.take(length - len(bos) - len(asked) - sum(len(n.needle) for n in needles), rng)
    cuts = np.sort(rng.integers(len(text) + 1, size=keys))
    parts = [x for part, n in zip(np.split(text, cuts), needles, strict=False) for x in (part, np.array(n.needle))]
    return np.concatenate([np.array(bos, np.int64), *parts, text[cuts[-1] :], np.array(asked)])


def records(form: Form, filler: Filler, length: int, rng: np.random.Generator) -> np.ndarray:
    """[BOS] strings, each time in another order and with other text between them: int64 [length]."""
    symbols = rng.permutation(np.arange(192, 256))
    size, gap = int(rng.integers(2, 6)), 3
    keys = int(rng.integers(1, 1 + min(64, length // 2) // (size + gap)))
    strings, text = symbols[: keys * size].reshape(keys, size), filler.take(gap * length, rng)
    parts, num = [np.array([] if filler.bos_id is None else [filler.bos_id], np.int64)], 0
    while num < length:
        for i in rng.permutation(keys):
            between, text = np.split(text, [int(rng.integers(gap + 1))])
            parts += [strings[i], between]
            num += size + len(between)
    return np.concatenate(parts)[:length]


def loops(form: Form, filler: Filler, length: int, rng: np.random.Generator) -> np.ndarray:
    """[BOS] one string until it is full: int64 [length]."""
    string = rng.permutation(np.arange(192, 256))[: int(rng.integers(3, min(64, length // 2)))]
    bos = [] if filler.bos_id is None else [filler.bos_id]
    return np.concatenate([np.array(bos, np.int64), np.resize(string, length - len(bos))])


def chains(form: Form, filler: Filler, length: int, rng: np.random.Generator) -> np.ndarray:
    """[BOS] two bytes, and then what NEXT has for the one two places back, or by chance (a tenth) any: int64 [length]."""
    bos = [] if filler.bos_id is None else [filler.bos_id]
    tokens, is_any = rng.integers(192, 256, size=length - len(bos)), rng.random(length) < 0.1
    for i in range(2, len(tokens)):
        if not is_any[i]:
            tokens[i] = NEXT[tokens[i - 2] - 192]
    return np.concatenate([np.array(bos, np.int64), tokens])


def echo(form: Form, filler: Filler, length: int, rng: np.random.Generator) -> np.ndarray:
    """[BOS] text with a string of other bytes that comes again further on: int64 [length]."""
    string = rng.permutation(np.arange(192, 256))[: int(rng.integers(8, 1 + min(64, length // 3)))]
    bos = [] if filler.bos_id is None else [filler.bos_id]
    text = filler.take(length - len(bos) - 2 * len(string), rng)
    before, between, after = np.split(text, np.sort(rng.integers(len(text) + 1, size=2)))
    return np.concatenate([np.array(bos, np.int64), before, string, between, string, after])


def needle(form: Form, filler: Filler, length: int, rng: np.random.Generator) -> np.ndarray:
    return build_sample(form, filler, length=length, keys=1, depth=rng.random(), rng=rng).tokens


KINDS: dict[str, Callable[[Form, Filler, int, np.random.Generator], np.ndarray]] = {
    "needle": needle,
    "many": many,
    "echo": echo,
    "records": records,
    "loops": loops,
    "chains": chains,
}


def write(folder: Path, documents: list[np.ndarray], tokenizer: SLMTokenizer) -> None:
    """One shard of documents [BOS] …, to which EOS is added."""
    with ShardWriter(folder, "part-00000", vocab_size=len(tokenizer)) as shard:
        for document in documents:
            shard.add(np.append(document, tokenizer.eos_token_id))
    told = {"fingerprint": tokenizer.fingerprint, "vocab_size": len(tokenizer),
            "bos_id": tokenizer.bos_token_id, "eos_id": tokenizer.eos_token_id}  # fmt: skip
    write_manifest(folder, shards=[shard.entry], tokenizer=told)


def make_data(root: Path, seed: int = 0, counts: dict[int, tuple[int, ...]] | None = None) -> None:
    """ROOT/tokenizer and ROOT/{text,held-out,needle,many,echo,records,loops,chains}; what is there stays."""
    tokenizer = SLMTokenizer()
    tokenizer.save_pretrained(root / "tokenizer")
    for name, held_out in (("text", False), ("held-out", True)):
        if not (root / name / "manifest.json").is_file():
            bos = np.array([tokenizer.bos_token_id])
            write(root / name, [np.append(bos, np.frombuffer(t, np.uint8)) for t in texts(held_out)], tokenizer)
    form, filler = Form(RECALL, tokenizer.encode), Filler([TokenDataset(root / "text")])
    for kind, (name, make) in enumerate(KINDS.items()):
        if (root / name / "manifest.json").is_file():
            continue
        documents = []
        for length, of_kinds in (counts or COUNTS).items():
            rng = np.random.default_rng([seed, kind, length])
            documents += [make(form, filler, length, rng) for _ in range(of_kinds[kind])]
        write(root / name, documents, tokenizer)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("artifacts/long-context-toy"))
    make_data(parser.parse_args().folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
