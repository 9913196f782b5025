"""Perplexity of any text against transformers' own recipe of strided windows, and the counts beside it."""

import json
import math

import pytest
import torch

from slm import SLMForCausalLM, SLMTokenizer
from slm.errors import UserError
from slm.model.config import ModelConfig
from slm.text_loss import detokenised_wikitext, evaluate_text, read_documents, windows

TEXT = "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. The quick brown fox jumps.\n" * 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    tokenizer = SLMTokenizer(vocab_size=300).train([TEXT])
    config = ModelConfig.preset(
        "cpu-tiny", vocab_size=len(tokenizer), max_position_embeddings=64, initializer_range=0.2
    )
    SLMForCausalLM(config).init_weights(seed=0).save_pretrained(folder / "model", tokenizer)
    (folder / "a.txt").write_text(TEXT)
    return folder


def recipe_of_transformers(folder, text, max_length, stride):
    """The loop of huggingface.co/docs/transformers/perplexity, with transformers' model and tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    encodings = AutoTokenizer.from_pretrained(folder / "model")(text, return_tensors="pt")
    seq_len = encodings.input_ids.size(1)
    nll_sum, n_tokens, prev_end_loc = 0.0, 0, 0
    for begin_loc in range(0, seq_len, stride):
        end_loc = min(begin_loc + max_length, seq_len)
        trg_len = end_loc - prev_end_loc
        input_ids = encodings.input_ids[:, begin_loc:end_loc]
        target_ids = input_ids.clone()
        target_ids[:, :-trg_len] = -100
        with torch.no_grad():
            neg_log_likelihood = model(input_ids, labels=target_ids).loss
        num_valid_tokens = (target_ids != -100).sum().item()
        # The first label of the first window has no context; those of later windows have it.
        num_loss_tokens = (target_ids[:, 1:] != -100).sum().item()
        assert num_valid_tokens - num_loss_tokens == (begin_loc == 0)
        nll_sum += float(neg_log_likelihood) * num_loss_tokens
        n_tokens += num_loss_tokens
        prev_end_loc = end_loc
        if end_loc == seq_len:
            break
    return nll_sum, n_tokens


@pytest.mark.parametrize(("seq_len", "stride"), [(64, 32), (64, 63), (33, 7), (8, 1)])
def test_strided_perplexity_is_that_of_transformers(folder, seq_len, stride):
    """Sum and count, at strides that do and do not divide the window; batched with 3 rows of windows."""
    [found] = evaluate_text(str(folder / "model"), [folder / "a.txt"], seq_len=seq_len, stride=stride, rows=3)
    nll_sum, n_tokens = recipe_of_transformers(folder, TEXT, seq_len, stride)
    assert found.num_tokens == n_tokens
    assert found.loss_sum == pytest.approx(nll_sum, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(nll_sum / n_tokens), rel=1e-4)
    assert found.bits_per_byte == pytest.approx(nll_sum / math.log(2) / len(TEXT.encode()), rel=1e-5)
    assert found.bits_per_character == pytest.approx(nll_sum / math.log(2) / len(TEXT), rel=1e-5)
    assert found.bits_per_character > found.bits_per_byte  # umlauts have two bytes


def test_each_token_is_counted_once():
    """Windows over every length: the counted parts follow on one another, from the second token to the last."""
    for length in range(1, 40):
        for seq_len, stride in ((8, 4), (8, 7), (5, 1), (40, 20)):
            parts = [(first, end) for _, end, first in windows(length, seq_len, stride)]
            assert [t for first, end in parts for t in range(first, end)] == list(range(1, length))
            assert all(end - begin <= seq_len for begin, end, _ in windows(length, seq_len, stride))


def test_documents_of_jsonl_begin_anew(folder, tmp_path):
    """As if each were a file of its own: sums add up, and so do bytes."""
    texts = [TEXT[:200], "x", TEXT[100:460]]
    lines = tmp_path / "pile.jsonl"
    lines.write_text("".join(json.dumps({"text": t, "meta": {}}) + "\n" for t in texts))
    for i, t in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(t)
    [joint] = evaluate_text(str(folder / "model"), [lines], seq_len=48)
    each = evaluate_text(str(folder / "model"), [tmp_path / f"{i}.txt" for i in range(3)], seq_len=48)
    assert joint.loss_sum == pytest.approx(sum(m.loss_sum for m in each), rel=1e-6)
    assert joint.num_tokens == sum(m.num_tokens for m in each)
    assert joint.num_bytes == sum(len(t.encode()) for t in texts)


WIKI = """ = Robert Boulter = \n Robert Boulter is an English film , television and theatre actor . He had a role in " Craig " in
 the episode " Teddy 's Story " ( 2000 @-@ 2002 ) . Fans ' wishes ; 1 @,@ 234 [ sic ] : 3 @.@ 5 ° F ! Why ? A ' quote ' { b } = =
 = = Career = = \n the dogs ' bones N times \n"""


def test_wikitext_is_detokenised_as_the_harness_does(folder, tmp_path):
    """Character by character; words and bytes are those of the file."""
    preprocess = pytest.importorskip("lm_eval.tasks.wikitext.preprocess_wikitext")
    assert detokenised_wikitext(WIKI) == preprocess.wikitext_detokenizer({"page": WIKI})
    assert "2000-2002)" in detokenised_wikitext(WIKI)
    (tmp_path / "w.txt").write_text(WIKI)
    raw, clean = (evaluate_text(str(folder / "model"), [tmp_path / "w.txt"], detokenise=d)[0] for d in ("", "wikitext"))
    assert (raw.num_bytes, raw.num_words) == (clean.num_bytes, clean.num_words)
    assert clean.num_tokens < raw.num_tokens
    assert preprocess.process_results({"page": WIKI}, [-clean.loss_sum])["word_perplexity"][1] == clean.num_words


def test_bad_input_says_what_to_do(folder, tmp_path):
    """No text, no UTF-8, broken lines, windows that cannot be."""
    model = str(folder / "model")
    for name, content, message in (
        ("empty.txt", b"", "holds no text"),
        ("packed.txt", b"\x1f\x8b\x08\x00\xff", "a compressed file"),
        ("bad.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', "line 2 is no"),
        ("bad2.jsonl", b'{"text": 3}\n', "line 1 is no"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            read_documents(tmp_path / name)
    for options, message in (
        ({"seq_len": 65}, "the model's context 64"),
        ({"seq_len": 32, "stride": 32}, "would have nothing before it"),
        ({"detokenise": "ptb"}, "wikitext"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate_text(model, [folder / "a.txt"], **options)
    with pytest.raises(UserError, match="has no file"):
        evaluate_text(model, [])
    with pytest.raises(UserError, match="cannot be read"):
        evaluate_text(model, [tmp_path / "absent.txt"])
