"""Recall: what a sample is made of, where its needle stands, who is asked; and that the score is greedy decoding's."""

import numpy as np
import pytest
import torch

from slm import SLMForCausalLM, SLMTokenizer
from slm.errors import UserError
from slm.generate import generate
from slm.loading import ModelScorer
from slm.losses import IGNORE
from slm.model.config import ModelConfig
from slm.parallel import Share
from slm.recall.samples import Filler, Form, Grid, build_sample
from slm.recall.score import RecallBatches, answers, find
from slm.recall.settings import Recall
from tests.shards import make_dataset

CPU = torch.device("cpu")
TOY = {
    "needle": "\nThe key is {name}{value}\n",
    "query": "\nThe key is {name}",
    "names": [192, 255],
    "name_length": 1,
    "values": [192, 255],
    "value_length": 4,
}


def as_bytes(text):
    return list(text.encode())


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """Documents of two folders, in which every token is one of 2 to 191: none is a toy's name or value."""
    folder = tmp_path_factory.mktemp("held-out")
    return [make_dataset(folder / str(seed), vocab_size=192, seed=seed) for seed in (1, 2)]


@pytest.fixture
def filler(held_out):
    found = Filler(held_out)
    found.vocab_size = 256  # as if the tokenizer had more than these documents use
    return found


class Induction:
    """A reader without weights: it predicts what followed the longest earlier place that reads like the newest tokens, as
    far back as `window` tokens. Its logits are 1 on that token; without such a place, on token 0."""

    def __init__(self, window=10**9, vocab_size=256):
        self.window, self.vocab_size = window, vocab_size

    def next_token(self, tokens):
        best, token = 0, 0
        for at in range(max(1, len(tokens) - self.window), len(tokens)):
            same = 0
            while same < at and tokens[at - 1 - same] == tokens[-1 - same]:
                same += 1
            if same > best:
                best, token = same, tokens[at]
        return token

    def visit_logits(self, batch, visit):
        bounds = sorted(set(batch.piece_bounds.tolist()))
        tokens, labels = batch.tokens_BT.flatten().tolist(), batch.labels_BT.flatten().tolist()
        logits = torch.zeros(len(tokens), self.vocab_size)
        for start, end in zip(bounds, bounds[1:], strict=False):
            for at in range(start, end):
                if labels[at] != IGNORE:
                    logits[at, self.next_token(tokens[start : at + 1])] = 1
        for first in range(0, len(tokens), 100):  # in chunks, as the head gives them
            visit(first, logits[first : first + 100])


# --- samples -------------------------------------------------------------------------------------------------


def test_a_sample_is_held_out_text_with_a_needle_and_a_question(filler, held_out):
    """Token by token: BOS, documents in their order without BOS and EOS, the needle in it, the question, the answer."""
    form = Form(Recall(**TOY), as_bytes)
    text = [t for d in held_out for s in d.shards for t in s.tokens.tolist() if t not in (0, 1)]
    twice = bytes(text + text)  # after the last document comes the first
    for seed in range(20):
        sample = build_sample(form, filler, length=300, keys=1, depth=seed / 20, rng=np.random.default_rng(seed))
        tokens = sample.tokens.tolist()
        assert len(tokens) == 300
        assert tokens[0] == 0
        needle = tokens[sample.needle_start : sample.needle_start + sample.needle_length]
        name, value = needle[12], needle[13:17]
        assert needle == [*b"\nThe key is ", name, *value, 10]
        assert len({name, *value}) == 5
        assert min(name, *value) >= 192
        assert tokens[sample.answer_start - 13 :] == [*b"\nThe key is ", name, *value]
        rest = tokens[1 : sample.needle_start] + tokens[sample.needle_start + sample.needle_length : -17]
        assert bytes(rest) in twice
        assert sample.needle_start == 1 + int(seed / 20 * len(rest))


def test_every_document_serves(filler, held_out):
    """Long texts wrap around, a short one starts anywhere, and none is asked for more than there is."""
    total = sum(int(np.isin(s.tokens, (0, 1), invert=True).sum()) for d in held_out for s in d.shards)
    assert filler.num_tokens <= total
    rng = np.random.default_rng(0)
    assert len(filler.take(filler.num_tokens, rng)) == filler.num_tokens
    starts = {tuple(filler.take(20, rng)) for _ in range(50)}
    assert len(starts) > 45
    with pytest.raises(ValueError, match="and there are"):
        filler.take(filler.num_tokens + 1, rng)


def test_keys_differ_and_one_of_them_is_asked_for(filler):
    """All needles stand whole in the text; the question names the one at the depth that was asked for."""
    form = Form(Recall(**TOY, keys=4), as_bytes)
    for seed in range(20):
        sample = build_sample(form, filler, length=400, keys=4, depth=0.3, rng=np.random.default_rng(seed))
        text = bytes(sample.tokens.tolist())
        parts = text.split(b"\nThe key is ")[1:]
        assert len(parts) == 5
        needles = [part[:6] for part in parts[:4]]
        assert all(needle.endswith(b"\n") for needle in needles)
        symbols = [byte for needle in needles for byte in needle[:5]]
        assert len(set(symbols)) == 20
        assert parts[4] in [needle[:5] for needle in needles]
        assert text[sample.needle_start : sample.needle_start + 17] == b"\nThe key is " + parts[4]


def test_text_needles_with_a_real_tokenizer(tmp_path, filler):
    """The answer is what follows the question when both are encoded together, and stands so in the needle; for a BPE
    tokenizer that joins a space with what follows, and for bytes."""
    trained = SLMTokenizer(vocab_size=400).train(["The pass key of the house is 17 and 1734. Remember it.\n"] * 200)
    for tokenizer in (SLMTokenizer(), trained):
        for query in ("\nThe pass key of {name} is ", "\nThe pass key of {name} is"):
            form = Form(Recall(query=query), tokenizer.encode)
            for needle in form.needles(3, np.random.default_rng(5)):
                text = tokenizer.decode(needle.query + needle.answer)
                assert text.startswith("\nThe pass key of ")
                value = text.split(" is")[1].strip()
                if not query.endswith(" "):
                    value = tokenizer.decode(needle.answer)
                assert len(value) == 5
                assert value.isdigit()
                assert f"is {value}. Remember it.\n" in tokenizer.decode(needle.needle) or not query.endswith(" ")
                if query.endswith(" "):
                    count = len(needle.answer)
                    runs = [needle.needle[i : i + count] for i in range(len(needle.needle))]
                    assert needle.answer in runs


def test_the_same_samples_again(filler):
    """A sample is a function of its cell and number: not of the rest of the grid, nor of the lengths beside it."""
    grid = Grid(Form(Recall(**TOY, lengths=[64, 128], samples=3), as_bytes), filler, 128)
    again = Grid(Form(Recall(**TOY, lengths=[128], samples=2), as_bytes), filler, 128)
    assert grid.num_samples == 60
    samples = [grid.sample(i).tokens.tolist() for i in range(60)]
    assert samples == [grid.sample(i).tokens.tolist() for i in range(60)]
    assert len({tuple(s) for s in samples}) == 60
    for cell in range(10):
        for index in range(2):
            assert again.sample(2 * cell + index).tokens.tolist() == samples[3 * (cell + 10) + index]
    other = Grid(Form(Recall(**TOY, lengths=[64, 128], samples=3, seed=1), as_bytes), filler, 128)
    assert other.sample(0).tokens.tolist() != samples[0]


def test_needles_stand_where_their_cell_says(filler):
    """In the tenth of the text that the cell is of, spread over it."""
    grid = Grid(Form(Recall(**TOY, lengths=[256], samples=20), as_bytes), filler, 256)
    num_text = 256 - 1 - 18 - 17
    for i, cell in enumerate(grid.cells):
        shares = [(grid.sample(20 * i + n).needle_start - 1) / num_text for n in range(20)]
        assert cell.depth / 10 - 1 / num_text <= min(shares)
        assert max(shares) < (cell.depth + 1) / 10
        assert len(set(shares)) > 8


# --- the score -----------------------------------------------------------------------------------------------


def test_a_reader_that_copies_finds_all_and_a_short_sighted_one_the_near_ones(filler):
    """100 % everywhere with one key and with several; with half of the length in view, none of the first half."""
    form = Form(Recall(**TOY, lengths=[96, 192], samples=2, keys=[1, 3]), as_bytes)
    grid = Grid(form, filler, 192)
    assert len(grid.cells) == 2 * 2 * 10
    found = find(Induction().visit_logits, RecallBatches(grid, 3), CPU)
    assert [f.cell for f in found] == grid.cells
    assert all((f.num_samples, f.num_exact, f.num_tokens) == (2, 2, 8) for f in found)
    assert found[0].loss == pytest.approx(np.log(np.e + 255) - 1)
    near = find(Induction(window=96).visit_logits, RecallBatches(grid, 3), CPU)
    by_cell = {(f.cell.keys, f.cell.length, f.cell.depth): f.accuracy for f in near}
    assert all(by_cell[1, 96, depth] == 1 for depth in range(10))
    assert [by_cell[1, 192, depth] for depth in range(10)] == [0, 0, 0, 0, 0, by_cell[1, 192, 5], 1, 1, 1, 1]


def test_a_random_model_finds_nothing(filler):
    model = SLMForCausalLM(ModelConfig.preset("cpu-tiny", vocab_size=256), seed=0)
    grid = Grid(Form(Recall(**TOY, lengths=[64], samples=5), as_bytes), filler, 64)
    found = find(ModelScorer(model).visit_logits, RecallBatches(grid, 4), CPU)
    assert sum(f.num_exact for f in found) == 0
    assert 5 < found[0].loss < 6.5  # about log 256


@pytest.mark.parametrize("value_length", [1, 2])
def test_exact_answers_are_those_of_greedy_decoding(filler, value_length):
    """Sample by sample, on a model of few tokens, which is sometimes right by chance: by teacher forcing and by `generate`.
    Rows of the vocabulary that are no tokens are likeliest, and never chosen."""
    filler.vocab_size = 8
    filler._docs = [(tokens % 4 + 2, bounds, []) for tokens, bounds, _ in filler._docs]
    config = ModelConfig.preset("cpu-tiny", vocab_size=12, initializer_range=0.4, tie_word_embeddings=False)
    model = SLMForCausalLM(config, seed=3)
    form = dict(needle="k{name}{value}", query="k{name}", names=[0, 3], values=[4, 7], name_length=1)
    settings = Recall(**form, value_length=value_length, lengths=[24, 40], depths=4, samples=40)
    grid = Grid(Form(settings, lambda text: [0] * len(text)), filler, 40)
    found = find(ModelScorer(model).visit_logits, RecallBatches(grid, 5), CPU)
    right, partly = np.zeros(len(grid.cells), int), 0
    for number in range(grid.num_samples):
        sample = grid.sample(number)
        prompt = torch.from_numpy(sample.tokens[None, : sample.answer_start])
        row = generate(model, prompt, max_new_tokens=value_length, do_sample=False, num_tokens=8)[0]
        same = row.numpy()[sample.answer_start :] == sample.tokens[sample.answer_start :]
        right[number // 40] += same.all()
        partly += same.any() and not same.all()
    assert [f.num_exact for f in found] == right.tolist()
    assert 0.02 < right.sum() / grid.num_samples < 0.6  # some are right and some are wrong
    assert (partly > 0) == (value_length > 1)
    with torch.no_grad():
        for b in RecallBatches(grid, 5):  # and the losses are the model's own
            loss_BT, _ = answers(ModelScorer(model).visit_logits, b.batch, 8)
            own_BT = model(b.batch.tokens_BT, b.batch.positions_BT, b.batch.piece_bounds, b.batch.labels_BT, each=True)
            assert torch.allclose(loss_BT, own_BT, atol=1e-5)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("micro_batch", [1, 4])
def test_ranks_share_the_samples(filler, world, micro_batch):
    """Every rank has equally many batches of one shape; together they hold each sample once, short ones side by side."""
    grid = Grid(Form(Recall(**TOY, lengths=[48, 100], samples=1, depths=7), as_bytes), filler, 100)
    by_rank = [list(RecallBatches(grid, micro_batch, Share(rank, world))) for rank in range(world)]
    assert {len(batches) for batches in by_rank} == {-(-(4 + 7) // (micro_batch * world))}
    assert len({(b.batch.tokens_BT.shape, b.batch.piece_bounds.shape) for batches in by_rank for b in batches}) == 1
    tokens_of = {}
    for b in [b for batches in by_rank for b in batches]:
        is_answer_BT = b.batch.labels_BT != IGNORE
        for number in b.sample_BT[is_answer_BT].unique().tolist():
            assert number not in tokens_of
            tokens_of[number] = b.batch.labels_BT[is_answer_BT & (b.sample_BT == number)].tolist()
    assert sorted(tokens_of) == list(range(14))
    for number, answer in tokens_of.items():
        sample = grid.sample(number)
        assert sample.tokens[sample.answer_start :].tolist() == answer


# --- what is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"query": "the key {value}"}, "the answer stands in the question"),
        ({"needle": "nothing"}, "so there is nothing to find"),
        ({"needle": "{value}{colour}"}, "names the {colour}"),
        ({"keys": [1, 4], "query": "\nThe pass key is "}, "nobody could tell which one is asked for"),
        ({"keys": [2, 2]}, "names one twice"),
        ({"keys": 20, "names": [0, 9], "name_length": 1}, "20 needles take 20 different tokens of 0 to 9"),
        ({"keys": 13, **TOY}, "13 needles take 65 different tokens of 192 to 255, and there are 64"),
        ({"keys": 27, "name_length": 1}, "27 needles take 27 different names, and there are 26"),
        ({"values": [9, 3]}, "no range of token ids"),
        ({"depths": 0}, "greater than or equal to 1"),
    ],
)
def test_settings_that_could_not_be_meant(change, words):
    with pytest.raises(ValueError, match=r".") as caught:
        Recall(**change)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (Recall(**TOY, lengths=[47]), "less than a quarter would be left for the text around them"),
        (Recall(**TOY, lengths=[128], keys=[1, 8]), "8 needles and the question, which take about 162 tokens"),
        (Recall(**TOY, lengths=[10**5]), "and the held-out documents have"),
        (Recall(**{**TOY, "values": [192, 300]}), "eval.recall.values is [192, 300]"),
    ],
)
def test_samples_that_could_not_be_made(filler, settings, words):
    with pytest.raises(UserError) as caught:
        Grid(Form(settings, as_bytes), filler, 10**6)
    assert words in str(caught.value)
    assert "Fix:" in str(caught.value)
    if settings.lengths:  # as the command says them that asks
        with pytest.raises(UserError, match=f"^--lengths has {settings.lengths[0]}|^eval.recall.values"):
            Grid(Form(settings, as_bytes), filler, 10**6, "--lengths")


def test_lengths_of_nobodys_choice_are_those_that_fit(filler):
    """By default seq_len, its half and its quarter, but not those that the needles would fill; seq_len itself must do."""
    form = Form(Recall(**TOY), as_bytes)
    assert Grid(form, filler, 512).lengths == [128, 256, 512]
    assert Grid(form, filler, 160).lengths == [80, 160]
    with pytest.raises(
        UserError, match="eval.recall.lengths is not given, so it is seq_len 40, too short for 1 needle"
    ):
        Grid(form, filler, 40, "eval.recall.lengths")
    assert Grid(Form(Recall(**TOY, lengths=[512]), as_bytes), filler, 128).cells == []  # measured in a longer phase
