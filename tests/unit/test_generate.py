"""Generation: cached, uncached and batched give the same tokens, draws are transformers', text comes whole."""

import io

import pytest
import sentencepiece
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from slm import SLMForCausalLM, SLMTokenizer
from slm.completion import TextStream, continuations, generate_text
from slm.errors import UserError
from slm.generate import filter_logits, generate, sample

PROMPTS = [[5, 17, 300, 2, 9, 44, 8], [7], [11, 12, 13, 14], [100, 200, 300, 400, 500, 1, 2, 3, 4, 6, 8]]
PAD = 511


@pytest.fixture(scope="module")
def model(tiny_config):
    """Large weights and a head of its own give varied greedy text; else a random model repeats its last token."""
    varied = {"initializer_range": 0.2, "tie_word_embeddings": False}
    return SLMForCausalLM(tiny_config.model_copy(update=varied), seed=1)


def run(model, rows, side="right", **options):
    """generate with rows padded by PAD; returns the ids as lists, without any PAD."""
    width = max(map(len, rows))
    pads = [[PAD] * (width - len(row)) for row in rows]
    padded = [p + r if side == "left" else r + p for p, r in zip(pads, rows, strict=True)]
    options = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": PAD} | options
    out = generate(model, torch.tensor(padded), **options)
    return [[token for token in row if token != PAD] for row in out.tolist()]


@pytest.fixture(scope="module")
def alone(model):
    """Each prompt's greedy continuation by itself, without a cache."""
    return [run(model, [prompt], use_cache=False)[0] for prompt in PROMPTS]


# --- the same tokens whatever the way --------------------------------------------------------------------


def test_greedy_is_transformers(hf_twin):
    """Our tokens are those of transformers' generate with the same weights."""
    ours, theirs = hf_twin
    ids = torch.tensor([PROMPTS[0]])
    want = theirs.eval().generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20)
    assert torch.equal(ours.generate(ids, do_sample=False, max_new_tokens=20), want)


def test_the_test_texts_vary(alone):
    """A model that only repeats itself would pass the others for nothing."""
    assert all(len(set(row[-12:])) >= 6 for row in alone)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_equals_each_prompt_alone(model, alone, side, use_cache):
    """Four lengths padded on either side, with and without the cache, in one and in several prefill chunks."""
    assert run(model, PROMPTS, side, use_cache=use_cache) == alone


def test_a_long_prompt_is_read_in_pieces(model, alone, monkeypatch):
    """Chunks of 16 tokens, with rows that end in the first, at a boundary, and in the last."""
    monkeypatch.setattr("slm.generate.PREFILL_TOKENS", 1)
    rows = [PROMPTS[0], (PROMPTS[3] * 4)[:16], (PROMPTS[3] * 4)[:17], PROMPTS[3] * 4]
    want = [run(model, [row], use_cache=False)[0] for row in rows]
    assert run(model, rows) == want
    assert want[0] == alone[0]


def test_sampled_tokens_do_not_depend_on_the_cache(model):
    """The same seed draws the same tokens; another seed others; torch's own generator counts without one."""
    options = {"do_sample": True, "temperature": 1.3, "top_k": 50, "top_p": 0.9, "max_new_tokens": 30}
    cached = run(model, PROMPTS, seed=4, **options)
    assert cached == run(model, PROMPTS, seed=4, use_cache=False, **options)
    assert cached != run(model, PROMPTS, seed=5, **options)
    torch.manual_seed(0)
    first = run(model, PROMPTS, **options)
    assert run(model, PROMPTS, **options) != first
    torch.manual_seed(0)
    assert run(model, PROMPTS, **options) == first


def test_bfloat16_generates(tiny_config):
    """The cache takes the weights' type."""
    half = SLMForCausalLM(tiny_config, seed=1).to(torch.bfloat16)
    assert len(run(half, PROMPTS[:1])[0]) == len(PROMPTS[0]) + 12


def test_a_model_in_training_is_left_so(model):
    """Mode and gradients: generating in the middle of training changes neither."""
    model.train()
    run(model, PROMPTS[:1])
    assert model.training
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("do_sample", [False, True])
def test_a_model_without_probabilities_says_so(tiny_config, do_sample):
    """NaN weights once gave token 0 for ever; so did a temperature at which all is infinite."""
    broken = SLMForCausalLM(tiny_config, seed=1)
    with torch.no_grad():
        broken.model.norm.weight[3] = torch.nan
    with pytest.raises(UserError, match="row 0, token 1: no next token has a probability"):
        generate(broken, torch.tensor([[7], [9]]), do_sample=do_sample)


def test_a_temperature_that_is_all_but_zero(model):
    with pytest.raises(UserError, match="give --temperature 0"):
        generate(model, torch.tensor(PROMPTS[:1]), temperature=1e-42)


# --- where it ends ---------------------------------------------------------------------------------------


def test_stop_ids_end_their_own_row(model, alone):
    """The first of several stop ids stays in its row, what follows is padding, and other rows go on."""
    first, second = alone[0][len(PROMPTS[0]) + 3], alone[3][len(PROMPTS[3]) + 5]

    def cut(prompt, row):
        new = row[len(prompt) :]
        ends = [new.index(stop) + 1 for stop in (first, second) if stop in new]
        return row[: len(prompt) + min([*ends, len(new)])]

    want = [cut(p, row) for p, row in zip(PROMPTS, alone, strict=True)]
    assert run(model, PROMPTS, eos_token_id=[first, second]) == want
    assert len({len(w) - len(p) for w, p in zip(want, PROMPTS, strict=True)}) > 1
    alone_out = generate(model, torch.tensor(PROMPTS[:1]), max_new_tokens=12, do_sample=False, eos_token_id=first)
    assert alone_out.shape[1] == len(want[0])  # not filled up to the limit


def test_max_length_counts_the_prompt(model, alone):
    """Each right-padded row ends at max_length; padding on the left counts too, as in transformers."""
    assert run(model, PROMPTS, max_new_tokens=None, max_length=13) == [
        (row + [None])[: min(13, len(row))] if len(row) >= 13 else run(model, [p], max_new_tokens=13 - len(p))[0]
        for p, row in zip(PROMPTS, alone, strict=True)
    ]
    padded = torch.tensor([[PAD, PAD, 7], [11, 12, 13]])
    out = generate(model, padded, max_length=8, do_sample=False, pad_token_id=PAD)
    assert out.shape == (2, 8)
    assert out[0, :2].tolist() == [PAD, PAD]
    assert out[0, 2:].tolist() == alone[1][:6]


def test_the_layout_of_the_result(model, alone):
    """New tokens follow the prompt directly, the rest of a row is pad; left padding stays where it was."""
    rows = [PROMPTS[0], PROMPTS[1]]
    stop = alone[1][4]
    right = generate(
        model,
        torch.tensor([rows[0], rows[1] + [0] * 6]),
        attention_mask=torch.tensor([[1] * 7, [1] + [0] * 6]),
        eos_token_id=stop,
        pad_token_id=PAD,
        max_new_tokens=12,
        do_sample=False,
    )
    assert right[1].tolist() == alone[1][:5] + [PAD] * (right.shape[1] - 5)
    left = generate(
        model, torch.tensor([rows[0], [PAD] * 6 + rows[1]]), pad_token_id=PAD, max_new_tokens=12, do_sample=False
    )
    assert [row[7:] for row in left.tolist()] == [alone[0][7:], alone[1][1:]]


def test_a_pad_id_inside_a_prompt_or_equal_to_a_stop_id_is_the_prompts_own(model, caplog):
    """Only the edges are padding, and not if the id may be the model's BOS and EOS too; that is said."""
    inside = [9, PAD, 8]
    want = generate(model, torch.tensor([inside]), max_new_tokens=5, do_sample=False)
    assert torch.equal(
        generate(model, torch.tensor([inside]), max_new_tokens=5, do_sample=False, pad_token_id=PAD), want
    )
    edge = torch.tensor([[9, 8, PAD]])
    want = generate(model, edge, max_new_tokens=5, do_sample=False, eos_token_id=PAD)
    assert torch.equal(
        generate(model, edge, max_new_tokens=5, do_sample=False, eos_token_id=PAD, pad_token_id=PAD), want
    )
    assert "ends in pad_token_id" in caplog.text


def test_on_tokens_gets_every_new_token(model, alone):
    """One id per row and step, None once a row has ended."""
    seen = []
    stop = alone[1][4]
    out = run(model, PROMPTS, eos_token_id=stop, on_tokens=seen.append)
    for row, (prompt, ids) in enumerate(zip(PROMPTS, out, strict=True)):
        column = [step[row] for step in seen]
        new = ids[len(prompt) :]
        assert column == new + [None] * (len(seen) - len(new))


def test_ids_from_num_tokens_on_are_never_chosen(model, alone):
    """Rows that only fill up the embedding have no text."""
    limit = max(alone[0][7:])
    assert limit < PAD
    assert max(run(model, PROMPTS[:1], num_tokens=limit)[0][7:]) < limit


# --- what is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0, "do_sample": True}, "temperature is 0.0"),
        ({"temperature": float("nan"), "do_sample": True}, "temperature is nan"),
        ({"top_p": 0.0, "do_sample": True}, "top_p is 0.0"),
        ({"top_p": 1.01, "do_sample": True}, "top_p is 1.01"),
        ({"top_k": -1, "do_sample": True}, "top_k is -1"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_length": 7}, "max_length is 7, but prompt 0 has 7 tokens"),
        ({"max_new_tokens": 250}, "could grow to 257 tokens, but the model's context is 256"),
        ({"max_new_tokens": None, "max_length": 257}, "could grow to 257 tokens, but the model's context is 256"),
        ({"attention_mask": torch.ones(1, 3)}, r"attention_mask has shape \[1, 3\]"),
        ({"attention_mask": torch.tensor([[1, 1, 0, 1, 1, 1, 1]])}, "zeros inside a prompt"),
        ({"attention_mask": torch.zeros(1, 7)}, "prompt 0 is empty"),
    ],
)
def test_bad_options_are_refused(model, options, message):
    """Each with its value and what it would do."""
    with pytest.raises(UserError, match=message):
        run(model, PROMPTS[:1], **options)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(1, 0, dtype=torch.long), "prompt 0 is empty"),
        (torch.tensor([[5], [PAD]]), "prompt 1 is empty"),
        (torch.tensor([[3, 512]]), "input_ids holds 512, but the vocabulary is 0 to 511"),
        (torch.tensor([[-1]]), "input_ids holds -1"),
        (torch.tensor([3, 4]), r"shape \[2\]"),
        (torch.tensor([[0.5]]), "torch.float32"),
    ],
)
def test_bad_prompts_are_refused(model, ids, message):
    """Before anything is computed."""
    with pytest.raises(UserError, match=message):
        generate(model, ids, pad_token_id=PAD)


def test_the_context_can_be_filled_to_the_last_token(model):
    """256 tokens are allowed, and without any limit a full prompt gets what has room."""
    ids = torch.arange(250)[None]
    assert generate(model, ids, max_length=256, do_sample=False).shape == (1, 256)
    assert generate(model, ids, do_sample=False).shape == (1, 256)
    with pytest.raises(UserError, match="could grow to 257"):
        generate(model, torch.arange(256)[None])


# --- draws -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [0, 1, 7, 1000])
@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.93, 1.0])
def test_filtered_logits_are_transformers(temperature, top_k, top_p):
    """Equal to its three warpers in its order, ties included."""
    from transformers.generation import logits_process as warpers

    logits = torch.randn(6, 200, generator=torch.Generator().manual_seed(0)) * 3
    logits[3:] = logits[3:].round()  # ties
    want = warpers.TemperatureLogitsWarper(temperature)(None, logits) if temperature != 1 else logits
    want = warpers.TopKLogitsWarper(top_k)(None, want) if top_k else want
    want = warpers.TopPLogitsWarper(top_p)(None, want) if top_p < 1 else want
    assert torch.equal(filter_logits(logits, temperature, top_k, top_p), want)


def test_draws_follow_the_softmax():
    """200,000 draws of the filtered softmax: every frequency within 5 standard deviations, none outside of it."""
    logits = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0, -6.0]])
    n = 200_000
    _, ids = sample(logits.expand(n, -1), 1.5, 5, 0.93, torch.Generator().manual_seed(0))
    p = filter_logits(logits, 1.5, 5, 0.93).softmax(-1)[0]
    counts = ids.bincount(minlength=6)
    assert ((counts - n * p).abs() <= 5 * (n * p * (1 - p)).sqrt()).all()
    assert counts[4:].tolist() == [0, 0]


# --- text ------------------------------------------------------------------------------------------------

TEXT = "Grüße, 世界! 👩‍🚀🙂 — naïve  café\n\tdef f(x):  return  x  # ¼"


class Bytes:
    """A user's own tokenizer: bytes, then EOS."""

    bos_token_id, eos_token_id = None, 256

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def __len__(self):
        return 257


def byte_level_bpe():
    """Trained on ASCII only, so every other character is spread over several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["def f(x): return x"] * 20, trainer)
    return (lambda text: tokenizer.encode(text).ids), tokenizer.decode


def sentence_pieces():
    """With byte fallback; its decoder drops the space in front of the first piece that it sees."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["def f(x): return x", "the quick brown fox jumps"] * 20),
        model_writer=written,
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
    return processor.encode, processor.decode


@pytest.mark.parametrize("tokenizer", [lambda: (Bytes().encode, Bytes().decode), byte_level_bpe, sentence_pieces])
@pytest.mark.parametrize("cut", [0, 1, 3, 20])
def test_streamed_text_is_the_text(tokenizer, cut):
    """Piece by piece it is what decoding at once gives, spaces included, and never shows half a character."""
    encode, decode = tokenizer()
    prompt, new = encode(TEXT[:cut]), encode(TEXT[cut:])
    stream = TextStream(decode, prompt)
    pieces = [stream.add(token) for token in new] + [stream.finish()]
    assert all("\ufffd" not in piece for piece in pieces)
    assert "".join(pieces) == decode(prompt + new)[len(decode(prompt)) :]
    assert sum(map(bool, pieces)) > 20  # it does stream


def test_bytes_that_are_no_character_are_shown_at_last():
    """A lone lead byte shows when the next character proves it wrong, or at the end."""
    stream = TextStream(Bytes().decode, [65])
    assert [stream.add(b) for b in (0xC3, 66, 0xE4, 0xB8)] == ["", "\ufffdB", "", ""]
    assert stream.finish() == "\ufffd"


def test_generate_text_streams_what_it_returns(model, capsys):
    """One prompt goes to the terminal piece by piece; several are returned, each as if alone."""
    prompts = ["Grüße", "a", "def f(x):"]
    options = {"max_new_tokens": 30, "do_sample": False}
    texts = [generate_text(model, Bytes(), [p], **options)[0] for p in prompts]
    assert capsys.readouterr().out == ""
    assert generate_text(model, Bytes(), prompts, **options) == texts
    assert generate_text(model, Bytes(), prompts[:1], stream=True, **options) == texts[:1]
    assert capsys.readouterr().out == texts[0] + "\n"
    ids = generate(model, torch.tensor([Bytes().encode("Grüße")]), num_tokens=257, eos_token_id=256, **options)
    assert texts[0] == Bytes().decode(ids[0].tolist())[len("Grüße") :]
    with pytest.raises(UserError, match="stream is on for 3 prompts"):
        generate_text(model, Bytes(), prompts, stream=True, **options)


def test_bos_goes_first_and_eos_ends(model):
    """Without BOS an empty text is refused; with it, it is a prompt. The stop id is not part of the text."""

    class WithBOS(Bytes):
        bos_token_id = 255

    options = {"max_new_tokens": 30, "do_sample": False}
    with pytest.raises(UserError, match="prompt 0 is empty"):
        generate_text(model, Bytes(), [""], **options)
    new = generate(model, torch.tensor([[255]]), num_tokens=257, **options)[0, 1:].tolist()
    stop = new[5]
    [text] = generate_text(model, WithBOS(), [""], stop_ids=[stop], **options)
    assert text == Bytes().decode(new[: new.index(stop)])


@pytest.mark.parametrize("kind", ["bytes", "bpe", "sentencepiece"])
def test_with_the_projects_own_tokenizer(model, kind):
    """BOS first, only ids that it has, and its special tokens are no text."""
    tokenizer = SLMTokenizer(vocab_size=512)
    if kind != "bytes":
        tokenizer.train(["def f(x): return x", "the quick brown fox jumps"] * 20, vocab_size=300, kind=kind)
    prompt = "the fox"
    options = {"max_new_tokens": 40, "seed": 0, "temperature": 2.0}
    ids = [tokenizer.bos_token_id, *tokenizer.encode(prompt)]
    stops = {"num_tokens": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    out = generate(model, torch.tensor([ids]), **stops, **options)[0].tolist()
    assert out[: len(ids)] == ids
    assert max(out) < len(tokenizer) < model.config.vocab_size
    [told] = continuations(model, tokenizer, [ids], **options)
    assert told.text == tokenizer.decode(out)[len(prompt) :]
    assert told.num_tokens == len(out) - len(ids)
    assert told.finished == (out[-1] == tokenizer.eos_token_id)
    assert generate_text(model, tokenizer, [prompt], **options) == [told.text]
