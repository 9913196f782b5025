"""SLMTokenizer against tiktoken, Hugging Face tokenizers, transformers and SentencePiece; and against bad input."""

import base64
import json
import logging
import random
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import sentencepiece as spm
import tiktoken
import tokenizers
from tiktoken.load import load_tiktoken_bpe

from slm.errors import CorruptArtefact, UserError
from slm.tokenizer import BOS, EOS, PAD, PATTERN, SLMTokenizer, as_tokenizer, load_tokenizer, special_tokens_of

HARD = [
    "",
    " ",
    "a",
    "\n",
    "\r\n\r\n",
    "  leading and trailing  ",
    "\t\ttabs\t \t",
    " " * 1000 + "x" + "\n" * 300,
    "NUL \0 in \0\0 the middle",
    "\x01\x1b\x7f\x85\u2028\u2029",
    "é e\u0301 ﬁ Å ½ ① ｆｕｌｌ",
    "日本語 한국어 العربية עברית हिन्दी ไทย",
    "🎉👩‍👩‍👧‍👦🏳️‍🌈 \U0010ffff \ufffd \ufeff",
    "\u2581 the ▁ SentencePiece ▁▁space\u2581",
    "\u00a0nbsp\u3000wide\u200bzero",
    f"{BOS}{EOS} {PAD}<s></s><unk><0x41><|eot_id|>",
    "I'll we'RE 1234567 3.14 x==y+=1;;; }}}) // --- ###",
]


@pytest.fixture(scope="module")
def texts():
    """A few hundred kilobytes of real code and prose."""
    root = Path(sysconfig.get_path("stdlib"))
    found = [path.read_text(encoding="utf-8") for path in sorted(root.glob("*.py"))[:40]]
    assert sum(map(len, found)) > 200_000
    return found


@pytest.fixture(scope="module")
def bpe(texts):
    return SLMTokenizer(vocab_size=1500).train([*texts, *HARD])


@pytest.fixture(scope="module")
def sentencepiece(texts):
    return SLMTokenizer().train([*texts, *HARD], vocab_size=1500, kind="sentencepiece")


@pytest.fixture(scope="module")
def gpt2_like(texts, tmp_path_factory):
    """A tokenizer.json of a kind that tiktoken cannot stand in for: one merge a token, NFC, a prefix space."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken("<|endoftext|>", special=True)]
    trainer = trainers.BpeTrainer(vocab_size=800, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    path = tmp_path_factory.mktemp("gpt2") / "tokenizer.json"
    tokenizer.save(str(path))
    return path, tokenizer


def random_text(seed, length=200):
    """Any Unicode but surrogates, with runs of what splits words."""
    rng = random.Random(seed)
    kinds = (
        lambda: chr(rng.randrange(0xD800)),
        lambda: chr(rng.randrange(0xE000, 0x110000)),
        lambda: chr(rng.randrange(128)),
    )
    return "".join(rng.choice([*kinds, lambda: rng.choice(" \n\t\r'") * rng.randrange(1, 5)])() for _ in range(length))


def test_bytes_without_a_file(caplog):
    """Without a file it is bytes and three special tokens, has a true length, and says so."""
    with caplog.at_level(logging.WARNING, "slm"):
        tokenizer = SLMTokenizer(vocab_size=32000)
    assert "259 tokens" in caplog.text
    assert len(tokenizer) == tokenizer.vocab_size == 259
    assert tokenizer.encode("héy") == list("héy".encode())
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (256, 257, 258)
    for text in HARD:
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("name", ["bpe", "sentencepiece"])
def test_round_trip(name, request):
    """decode(encode(x)) == x for hard and random strings, and encode_batch gives what encode gives."""
    tokenizer = request.getfixturevalue(name)
    assert len(tokenizer) == 1500
    samples = HARD + [random_text(seed) for seed in range(200)]
    for text, ids in zip(samples, tokenizer.encode_batch(samples), strict=True):
        assert ids.dtype == np.int32
        assert ids.tolist() == tokenizer.encode(text)
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("name", ["bpe", "sentencepiece"])
def test_special_text_stays_text(name, request):
    """Special-token text is text, unless allow_special; decoding leaves special tokens out, unless asked."""
    tokenizer = request.getfixturevalue(name)
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    text = f"a{EOS}b {BOS}"
    assert not special & set(tokenizer.encode(text))
    ids = tokenizer.encode(text, allow_special=True)
    assert ids.count(tokenizer.eos_token_id) == 1
    assert ids[-1] == tokenizer.bos_token_id
    assert tokenizer.decode(ids) == "ab "
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    framed = tokenizer.encode("x", add_bos=True, add_eos=True)
    assert framed == [tokenizer.bos_token_id, *tokenizer.encode("x"), tokenizer.eos_token_id]
    assert tokenizer.decode(framed) == "x"
    assert tokenizer.decode([*framed, 10**6]) == "x\ufffd"


@pytest.mark.parametrize("name", ["bpe", "sentencepiece"])
def test_save_and_load(name, request, tmp_path):
    """Saved and loaded, by folder and by file: same ids, length, special tokens and fingerprint, added tokens too."""
    original = request.getfixturevalue(name)
    original.save_pretrained(tmp_path / "plain")
    tokenizer = load_tokenizer(tmp_path / "plain")
    assert tokenizer.fingerprint == original.fingerprint
    assert tokenizer.add_tokens(["<think>", "<think>x", "<think>", EOS, ""]) == 2
    assert tokenizer.add_tokens(["<|tool|>"], special=True) == 1
    assert len(tokenizer) == 1503
    assert tokenizer.fingerprint != original.fingerprint
    tokenizer.save_pretrained(tmp_path / "more")
    again = SLMTokenizer.from_pretrained(tmp_path / "more")
    assert again.fingerprint == tokenizer.fingerprint
    assert again.info() == tokenizer.info()
    for text in [*HARD, "a<think>xy<think><|tool|>b"]:
        assert again.encode(text) == tokenizer.encode(text) == again.encode_batch([text])[0].tolist()
        assert again.decode(again.encode(text)) == text
    assert 1500 in again.encode("<think>")
    assert again.encode("<think>x") == [1501]
    assert 1502 not in again.encode("<|tool|>")
    assert again.encode("<|tool|>", allow_special=True) == [1502]
    file = next(path for path in (tmp_path / "plain").iterdir() if path.name != "tokenizer_config.json")
    file.rename(tmp_path / "any.name")  # told apart by content
    assert load_tokenizer(tmp_path / "any.name").fingerprint == original.fingerprint


def test_training_is_deterministic(texts, bpe, sentencepiece):
    """The same texts give the same tokenizer."""
    assert SLMTokenizer().train([*texts, *HARD], vocab_size=1500).fingerprint == bpe.fingerprint
    again = SLMTokenizer().train([*texts, *HARD], vocab_size=1500, kind="sentencepiece")
    assert again.fingerprint == sentencepiece.fingerprint


def test_same_ids_as_hugging_face(bpe, tmp_path):
    """The saved tokenizer.json gives the same ids in tokenizers and in transformers, over real and random text."""
    bpe.save_pretrained(tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    theirs.encode_special_tokens = True
    root = Path(sysconfig.get_path("stdlib"))
    samples = HARD + [random_text(seed) for seed in range(500)]
    samples += [path.read_text(encoding="utf-8") for path in sorted(root.glob("*/*.py"))[:100]]
    for text, ids in zip(samples, bpe.encode_batch(samples), strict=True):
        assert theirs.encode(text, add_special_tokens=False).ids == ids.tolist(), text[:80]
        assert theirs.decode(ids.tolist()) == text
    import transformers

    auto = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert auto("x = 1")["input_ids"] == bpe.encode("x = 1", add_bos=True)
    assert (auto.bos_token, auto.eos_token, auto.pad_token) == (BOS, EOS, PAD)
    assert len(auto) == len(bpe)


def test_tiktoken_file_as_tiktoken(bpe, tmp_path):
    """A rank file gives the ids of tiktoken itself with Llama 3's regex; our special tokens follow its ranks."""
    ranks = {bpe._engine._bytes[i]: i for i in range(len(bpe) - 3)}
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()))
    tokenizer = load_tokenizer(tmp_path)
    loaded = load_tiktoken_bpe(str(path))
    special = {BOS: len(ranks), EOS: len(ranks) + 1, PAD: len(ranks) + 2}
    theirs = tiktoken.Encoding("t", pat_str=PATTERN, mergeable_ranks=loaded, special_tokens=special)
    for text in HARD + [random_text(seed) for seed in range(200)]:
        assert tokenizer.encode(text) == theirs.encode_ordinary(text)
        assert tokenizer.encode(text, allow_special=True) == theirs.encode(text, allowed_special="all")
    assert tokenizer.fingerprint == bpe.fingerprint


def test_llama3_file(tmp_path):
    """128,000 ranks mean Llama 3: its 256 special tokens at their known ids, and 128,256 tokens."""
    tokens = [bytes([byte]) for byte in range(256)] + [b"%06d" % i for i in range(128_000 - 256)]
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)]
    (tmp_path / "tokenizer.model").write_bytes(b"".join(lines))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.model")
    assert len(tokenizer) == 128_256
    assert tokenizer.bos_token_id == 128_000
    assert tokenizer.eos_token_id == 128_001
    assert tokenizer.pad_token_id == 128_004
    names = special_tokens_of(128_000)
    assert sorted(names.values()) == list(range(128_000, 128_256))
    known = {"<|start_header_id|>": 6, "<|end_header_id|>": 7, "<|eom_id|>": 8, "<|eot_id|>": 9, "<|python_tag|>": 10}
    known |= {"<|reserved_special_token_0|>": 2, "<|reserved_special_token_2|>": 5, "<|reserved_special_token_3|>": 11}
    known |= {"<|reserved_special_token_247|>": 255}
    assert {name: names[name] - 128_000 for name in known} == known
    text = "<|eot_id|>é"
    assert tokenizer.encode(text, allow_special=True) == [128_009, *"é".encode()]
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_other_tokenizer_json(gpt2_like, tmp_path):
    """A tokenizer.json that tiktoken cannot stand in for runs on Hugging Face's engine, with its own special token."""
    path, theirs = gpt2_like
    tokenizer = load_tokenizer(path)
    assert tokenizer.kind == "huggingface"
    eos = theirs.token_to_id("<|endoftext|>")
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == tokenizer.pad_token_id == eos
    for text in HARD:
        assert tokenizer.encode(text, allow_special=True) == theirs.encode(text).ids
        assert tokenizer.encode_batch([text])[0].tolist() == tokenizer.encode(text)
    assert eos not in tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.encode("a<|endoftext|>b", allow_special=True).count(eos) == 1
    assert tokenizer.add_tokens(["<think>", "a"]) == 1
    assert tokenizer.encode("<think>")[-1] == len(tokenizer) - 1
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint


def test_foreign_sentencepiece(texts, tmp_path):
    """A model with SentencePiece's usual settings is used as it is: the ids of the library itself."""
    options = {"model_type": "unigram", "vocab_size": 300, "minloglevel": 2}
    lines = [line for text in texts[:5] for line in text.splitlines()]
    spm.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_prefix=str(tmp_path / "m"), **options)
    tokenizer = load_tokenizer(tmp_path)
    theirs = spm.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    for text in ["hello world", "  two  spaces ▁ ", "x" * 50]:
        assert tokenizer.encode(text) == theirs.encode(text)
        assert tokenizer.decode(theirs.encode(text)) == theirs.decode(theirs.encode(text))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (theirs.bos_id(), theirs.eos_id())


def test_long_runs():
    """Text that breaks naive engines: long runs of one character, spaces by the million among them."""
    tokenizer = SLMTokenizer()
    for text in ("a" * 300_000, "^" * 300_000, "\n" * 300_000, "x" + " " * 2_500_000 + "y", "日" * 100_000):
        assert tokenizer.decode(tokenizer.encode_batch([text])[0]) == text


CUSTOM = """
class Words:
    eos_token_id = 1
    def encode(self, text): return [2 + ord(c) for c in text if ord(c) < 100]
    def decode(self, ids): return "".join(chr(i - 2) for i in ids if i > 1)
    def __len__(self): return 102
class Wrong(Words):
    def __len__(self): return 50
class Lacking:
    def encode(self, text): return []
class Needing(Words):
    def __init__(self, path): pass
"""


def test_custom_class(tmp_path, monkeypatch):
    """A user's class by module:Class, found from the current folder, serves as SLMTokenizer does."""
    (tmp_path / "my_words.py").write_text(CUSTOM)
    monkeypatch.chdir(tmp_path)
    tokenizer = load_tokenizer("my_words:Words")
    assert tokenizer.encode_batch(["ab"])[0].tolist() == tokenizer.encode("ab") == [99, 100]
    assert tokenizer.decode([99, 100]) == "ab"
    assert (len(tokenizer), tokenizer.eos_token_id, tokenizer.bos_token_id) == (102, 1, None)
    assert tokenizer.fingerprint == load_tokenizer("my_words:Words").fingerprint
    assert tokenizer.encode("a", add_eos=True) == [99, 1]
    assert as_tokenizer(tokenizer) is tokenizer
    with pytest.raises(UserError, match="no BOS token"):
        tokenizer.encode("a", add_bos=True)
    with pytest.raises(UserError, match="gave the id 99"):
        load_tokenizer("my_words:Wrong").encode("a")
    tokenizer.save_pretrained(tmp_path / "saved")
    with pytest.raises(UserError, match="give my_words:Words itself"):
        load_tokenizer(tmp_path / "saved")
    for spec, message in [
        ("my_words:Lacking", "has no decode, __len__"),
        ("my_words:Needing", "without arguments"),
        ("my_words:Nothing", "my_words has no Nothing"),
        ("no_such_module:X", "no module 'no_such_module'"),
    ]:
        with pytest.raises(UserError, match=message):
            load_tokenizer(spec)


def test_bad_input(tmp_path, bpe):
    """Lone surrogates, missing, empty, foreign and broken files: each a clear error."""
    for method in (bpe.encode, lambda text: bpe.encode_batch([text]), lambda text: bpe.train([text], vocab_size=300)):
        with pytest.raises(UserError, match=r"U\+D800 at character 2"):
            method("ab\ud800c")
    with pytest.raises(UserError, match="does not exist"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    file = tmp_path / "tokenizer.json"
    for content, kind, message in [
        (b"", UserError, "is empty"),
        (b"\x89PNG....", UserError, "is no tokenizer"),
        (b"{ broken", CorruptArtefact, "not a readable tokenizer.json"),
        (b'{"model": {}}', CorruptArtefact, "not a readable tokenizer.json"),
        (b"\x0a\x05junk", CorruptArtefact, "not a readable SentencePiece"),
        (b"YQ== 0\nYg== 2\n", CorruptArtefact, "no token for the byte 0"),
        (b"YQ== 0\nYg==\n", CorruptArtefact, "line 2"),
    ]:
        file.write_bytes(content)
        with pytest.raises(kind, match=message):
            load_tokenizer(tmp_path)
    for arguments, message in [
        ({"texts": [], "vocab_size": 300}, "no text to train"),
        ({"texts": ["", ""], "vocab_size": 300}, "no text to train"),
        ({"texts": ["x"], "vocab_size": 100}, "too small"),
        ({"texts": ["x"]}, "not given"),
        ({"texts": ["x"], "vocab_size": 300, "kind": "words"}, "kind is 'words'"),
        ({"texts": ["xyz"], "vocab_size": 10, "kind": "sentencepiece"}, "cannot make 10 tokens"),
        ({"texts": [], "vocab_size": 300, "kind": "sentencepiece"}, "no text to train"),
    ]:
        with pytest.raises(UserError, match=message):
            SLMTokenizer().train(**arguments)
    with pytest.raises(ValueError, match="one string"):
        SLMTokenizer().train("text", vocab_size=300)
    with pytest.raises(UserError, match="is a file"):
        bpe.save_pretrained(file)


def test_config_names_the_roles(bpe, tmp_path):
    """tokenizer_config.json decides which tokens are BOS, EOS and PAD."""
    bpe.save_pretrained(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"eos_token": {"content": PAD}, "bos_token": BOS}))
    assert load_tokenizer(tmp_path).eos_token_id == bpe.pad_token_id
    config.write_text(json.dumps({"bos_token": None, "eos_token": "not in the vocabulary"}))
    loaded = load_tokenizer(tmp_path)
    assert (loaded.bos_token_id, loaded.eos_token_id) == (None, bpe.eos_token_id)
    for content in ("{", "[]", '{"eos_token": 5}', '{"eos_token": {}}', '{"added_tokens_decoder": {"x": "y"}}'):
        config.write_text(content)
        with pytest.raises(CorruptArtefact, match="tokenizer_config"):
            load_tokenizer(tmp_path)


def test_roles_without_our_names(texts, tmp_path):
    """Tokens of any name serve by special_tokens_map.json; a role that nothing names stays empty through a save."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    theirs = Tokenizer(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<START>", "<STOP>"], show_progress=False)
    theirs.train_from_iterator(texts[:3], trainer)
    theirs.save(str(tmp_path / "tokenizer.json"))
    plain = load_tokenizer(tmp_path)
    assert (plain.bos_token_id, plain.eos_token_id, plain.pad_token_id) == (None, None, None)
    assert plain.decode([plain.encode("x")[-1], 10**12, -1]) == "x\ufffd\ufffd"
    plain.add_tokens(["<s>"], special=True)  # a well-known name, but this tokenizer never had a BOS
    plain.save_pretrained(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").fingerprint == plain.fingerprint
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": {"content": "<START>"}, "eos_token": "<STOP>"}')
    named = load_tokenizer(tmp_path)
    assert (named.bos_token_id, named.eos_token_id, named.pad_token_id) == (0, 1, 1)
    assert named.encode("a", add_bos=True, add_eos=True) == [0, *named.encode("a"), 1]


def test_ids_that_clash(bpe, tmp_path):
    """A tokenizer.json in which two tokens share an id, or one has none, is corrupt, not silently wrong."""
    bpe.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    for break_it in (
        lambda content: content["model"]["vocab"].update(zzz=5),
        lambda content: content["added_tokens"][0].update(id=5),
        lambda content: content["added_tokens"][0].pop("id"),
    ):
        content = json.loads(file.read_text())
        break_it(content)
        (tmp_path / "broken").write_text(json.dumps(content))
        with pytest.raises(CorruptArtefact, match="not a readable tokenizer.json"):
            load_tokenizer(tmp_path / "broken")


class Counted(str):
    """A text that counts how many of its kind are held at once."""

    alive = most = 0

    def __init__(self, text):
        Counted.alive += 1
        Counted.most = max(Counted.most, Counted.alive)

    def __del__(self):
        Counted.alive -= 1


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
def test_training_reads_lazily(kind, capfd):
    """Texts are read one after another, never all held; a bar is shown on request only, and never on stdout."""
    Counted.alive = Counted.most = 0
    SLMTokenizer().train((Counted(f"text {i} of many") for i in range(3000)), vocab_size=300, kind=kind)
    assert 0 < Counted.most < 1000
    assert capfd.readouterr() == ("", "")
    SLMTokenizer().train([f"text {i} of many" for i in range(300)], vocab_size=300, kind=kind, show_progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "reading texts" in err


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
def test_training_tells_what_the_reader_raised(kind):
    """An error while the texts are read comes out as it is, not as the trainer's complaint."""

    def texts(bad):
        yield "abc " * 50
        yield bad() if callable(bad) else bad

    def fail():
        raise OSError("disk gone")

    for bad, error, message in [(fail, OSError, "disk gone"), ("\ud800", UserError, "lone surrogate")]:
        with pytest.raises(error, match=message):
            SLMTokenizer().train(texts(bad), vocab_size=300, kind=kind)
