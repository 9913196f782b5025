"""The Python front door, each snippet as a user would type it, on a small shape. Real DeepSpeed, one process."""

import json
import os

import pytest
import torch

from slm.errors import UserError

TEXTS = [f"The {a} {b} over the {c} dog. " * n for n, (a, b, c) in enumerate(
    [("quick", "jumps", "lazy"), ("slow", "hops", "eager"), ("brown", "flies", "sleepy"), ("tiny", "runs", "big")] * 6, 1
)]  # fmt: skip

SMALL = dict(
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=128,
    max_position_embeddings=256,
    sequence_length=64,
    batch_size=4,
    warmup_steps=2,
    learning_rate=3e-3,
)


def test_defaults_are_llama_3_2_1b():
    """SLMConfig() is the 1B shape with the documented training defaults."""
    from slm import SLMConfig

    config = SLMConfig()
    assert config.num_parameters() == 1_235_814_400
    assert (config.vocab_size, config.rope_theta, config.max_position_embeddings) == (128256, 500000, 131072)
    assert config.rope_scaling.rope_type == "llama3"
    assert (config.learning_rate, config.batch_size, config.sequence_length, config.warmup_steps) == (
        1e-3,
        64,
        8192,
        2000,
    )
    assert (config.gradient_clip_norm, config.use_distillation) == (1.0, False)
    assert (config.distillation_alpha, config.distillation_temperature) == (0.5, 3.0)


def test_basic_training_then_inference_from_best_model(tmp_path):
    """Train, resume further, load best_model in ours and in transformers, generate."""
    from slm import SLMConfig, SLMForCausalLM, SLMTokenizer, SLMTrainer, TextDataset

    tokenizer = SLMTokenizer(vocab_size=300).train(TEXTS)
    config = SLMConfig(vocab_size=len(tokenizer), **SMALL)
    model = SLMForCausalLM(config)
    trainer = SLMTrainer(
        config=config,
        model=model,
        tokenizer=tokenizer,
        train_dataset=TextDataset(TEXTS, tokenizer, max_length=64),
        eval_dataset=TextDataset(TEXTS[:4], tokenizer, max_length=64, stride=32),
        output_dir=tmp_path / "out",
    )
    first = trainer.train(num_epochs=2)
    assert first["loss"] < 5.0
    with pytest.raises(UserError, match="resume_from_checkpoint=True"):
        trainer.train(num_epochs=4)
    last = trainer.train(num_epochs=6, resume_from_checkpoint=True)
    assert last["step"] > first["step"]
    assert last["eval/all/loss"] < first["eval/all/loss"]
    steps = [json.loads(x)["step"] for x in (tmp_path / "out/metrics.jsonl").read_text().splitlines() if '"loss"' in x]
    assert steps == list(range(1, last["step"] + 1))

    best = SLMForCausalLM.from_pretrained(tmp_path / "out/best_model")
    tokenizer = SLMTokenizer.from_pretrained(tmp_path / "out/best_model")
    assert all(torch.equal(a, b) for a, b in zip(best.parameters(), model.parameters(), strict=True))
    prompt = torch.tensor([tokenizer.encode("The quick jumps", add_bos=True)])
    out = best.generate(prompt, max_length=24, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    assert "over the" in tokenizer.decode(out[0].tolist())
    sampled = best.generate(prompt, max_length=24, temperature=0.8, top_k=5, top_p=0.9, do_sample=True)
    assert sampled.shape[1] <= 24

    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out/best_model", dtype=torch.float32)
    torch.testing.assert_close(theirs(prompt).logits, best(prompt), rtol=1e-5, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "out/best_model").decode(prompt[0, 1:]) == "The quick jumps"
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    for found in (theirs.config, theirs.generation_config):  # so that their generate ends where a text ends
        assert (found.bos_token_id, found.eos_token_id, found.pad_token_id) == special

    # A run that has all the steps already is taken over as it is.
    other = SLMTrainer(
        config=config,
        model=SLMForCausalLM(config, seed=9),
        tokenizer=tokenizer,
        train_dataset=TextDataset(TEXTS, tokenizer, max_length=64),
        output_dir=tmp_path / "other",
    )
    other.train(num_epochs=6, resume_from_checkpoint=tmp_path / "out" / "latest")
    assert all(torch.equal(a, b) for a, b in zip(other.model.parameters(), model.parameters(), strict=True))
    assert (tmp_path / "other/best_model/config.json").exists()


class Letters:
    """A user's own tokenizer: any object with encode, decode and len."""

    alphabet = " .abcdefghijklmnopqrstuvwxyzT"

    def encode(self, text):
        return [self.alphabet.index(c) for c in text]

    def decode(self, ids):
        return "".join(self.alphabet[i] for i in ids)

    def __len__(self):
        return len(self.alphabet)


def small_setup(**fields):
    from slm import SLMConfig, SLMForCausalLM, TextDataset

    tokenizer = Letters()
    config = SLMConfig(vocab_size=len(tokenizer), **{**SMALL, **fields})
    return config, SLMForCausalLM(config), tokenizer, TextDataset(TEXTS, tokenizer, max_length=64)


def test_custom_tokenizer(tmp_path):
    """An object with encode, decode and __len__ trains without more."""
    from slm import SLMTrainer

    config, model, tokenizer, dataset = small_setup()
    trainer = SLMTrainer(config=config, model=model, tokenizer=tokenizer, train_dataset=dataset, output_dir=tmp_path)
    before = dict(os.environ)
    assert trainer.train(num_epochs=2)["loss"] < 3.0
    assert dict(os.environ) == before  # a command started from the notebook inherits no rank
    assert (tmp_path / "best_model/model.safetensors").exists()


def test_teacher_in_memory_pulls_the_student_to_it(tmp_path):
    """With alpha 0 the student learns the teacher, packed documents and all; ours and a transformers teacher agree."""
    from transformers import AutoModelForCausalLM

    from slm import SLMForCausalLM, SLMTrainer

    config, _, tokenizer, dataset = small_setup(
        use_distillation=True, distillation_alpha=0.0, distillation_temperature=2.0
    )
    teacher = SLMForCausalLM(config, seed=7)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(3.0)  # a random teacher with something to say
    teacher.save_pretrained(tmp_path / "teacher")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher", dtype=torch.float32)
    last = []
    for name, model in (("ours", teacher), ("theirs", theirs)):
        trainer = SLMTrainer(
            config=config,
            model=SLMForCausalLM(config),
            tokenizer=tokenizer,
            train_dataset=dataset,
            teacher_model=model,
            output_dir=tmp_path / name,
        )
        last.append(trainer.train(num_epochs=3)["loss"])
        first = json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0])["loss"]
        assert last[-1] < 0.7 * first
    assert last[0] == pytest.approx(last[1], abs=1e-4)


def test_custom_distillation_loss_is_honoured(tmp_path):
    """A subclass with its own forward is what is minimised."""
    from slm import DistillationLoss, SLMForCausalLM, SLMTrainer

    class Squared(DistillationLoss):
        def forward(self, student_logits, teacher_logits, labels):
            return ((student_logits - teacher_logits) ** 2)[labels != -100].mean()

    config, model, tokenizer, dataset = small_setup(use_distillation=True)
    teacher = SLMForCausalLM(config, seed=1)
    trainer = SLMTrainer(
        config=config, model=model, tokenizer=tokenizer, train_dataset=dataset, teacher_model=teacher,
        distillation_loss=Squared(), output_dir=tmp_path,
    )  # fmt: skip
    trainer.train(num_epochs=1)
    batch = dataset.batch(range(4))
    first = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["loss"]
    untrained = SLMForCausalLM(config)
    with torch.no_grad():
        arguments = (batch.tokens_BT, batch.positions_BT, batch.piece_bounds)
        expected = Squared()(untrained(*arguments), teacher(*arguments), batch.labels_BT)
    assert first == pytest.approx(float(expected), rel=0.3)  # another batch, the same quantity


def test_distillation_loss_against_float64():
    """alpha * CE + (1 - alpha) * T^2 * KL and its gradient, written out in float64; T = 1 and 3, ignored labels."""
    from slm import DistillationLoss

    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 5, 11, generator=generator) for _ in range(2))
    labels = torch.randint(0, 11, (2, 5), generator=generator)
    labels[0, 1] = -100
    for alpha, temperature in ((0.5, 3.0), (0.0, 1.0), (1.0, 2.0)):
        s, s64 = student.clone().requires_grad_(), student.double().requires_grad_()
        loss = DistillationLoss(alpha, temperature)(s, teacher, labels)
        p, q = (x.double().div(temperature).softmax(-1)[labels != -100] for x in (teacher, s64))
        hard = -s64.log_softmax(-1)[labels != -100].gather(1, labels[labels != -100][:, None]).mean()
        want = alpha * hard + (1 - alpha) * temperature**2 * (p * (p / q).log()).sum(-1).mean()
        loss.backward()
        want.backward()
        torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(s.grad.double(), s64.grad, rtol=1e-5, atol=1e-6)
    larger = torch.cat([student, torch.zeros(2, 5, 3)], -1)  # tokens that the teacher does not have
    assert torch.isfinite(DistillationLoss(0.0, 2.0)(larger, teacher, labels))
    with pytest.raises(UserError, match="do not share a tokenizer"):
        DistillationLoss()(student, larger, labels)


@pytest.mark.parametrize(("max_length", "stride"), [(16, None), (16, 16), (16, 10), (7, 1), (1000, None)])
def test_text_dataset_counts_every_token_once(max_length, stride):
    """Each (text, position) is a label exactly once, whatever the windows overlap."""
    from slm import TextDataset

    class Numbered:
        """Every token of every text is another number, so that labels can be told apart."""

        def __init__(self):
            self.next = 0

        def encode(self, text):
            ids = list(range(self.next, self.next + len(text)))
            self.next += len(text)
            return ids

    texts = ["a" * n for n in (1, 2, 15, 16, 17, 33, 100)]
    dataset = TextDataset(texts, Numbered(), max_length=max_length, stride=stride)
    batch = dataset.batch(range(len(dataset)))
    labels = batch.labels_BT[batch.labels_BT >= 0]
    firsts = torch.tensor([sum(map(len, texts[:i])) for i in range(len(texts))])
    expected = torch.tensor([i for i in range(sum(map(len, texts))) if i not in firsts])
    assert torch.equal(labels.sort().values, expected)
    assert batch.num_targets == len(expected)
    follows = batch.tokens_BT[batch.labels_BT >= 0] + 1
    assert torch.equal(follows, labels)


def test_mistakes_in_the_notebook_are_explained():
    """Values that cannot work say which, and what to do."""
    from slm import SLMConfig, SLMTrainer, TextDataset

    config, model, tokenizer, dataset = small_setup()
    with pytest.raises(UserError, match="not a list of strings"):
        TextDataset("one string", tokenizer)
    with pytest.raises(UserError, match="stride is 0"):
        TextDataset(["a"], tokenizer, max_length=4, stride=0)

    class TooShort(Letters):
        def __len__(self):
            return 5

    with pytest.raises(UserError, match="but its len.. is 5"):
        TextDataset(["abcdef"], TooShort(), max_length=4)
    good = dict(config=config, model=model, tokenizer=tokenizer, train_dataset=dataset)
    trainer = SLMTrainer(**good)
    for epochs in (0, "x", None, True):
        with pytest.raises(UserError, match=f"num_epochs is {epochs}"):
            trainer.train(num_epochs=epochs)
    for name, value in (
        ("config", {}),
        ("model", "x"),
        ("train_dataset", [1]),
        ("tokenizer", None),
        ("output_dir", None),
    ):
        with pytest.raises(UserError, match=f"{name} is a {type(value).__name__}"):
            SLMTrainer(**{**good, name: value})
    for arguments in ((None, 4), (tokenizer, "32"), (tokenizer, 0)):
        with pytest.raises(UserError, match="TextDataset: "):
            TextDataset(["abc"], arguments[0], max_length=arguments[1])
    with pytest.raises(ValueError, match="at least one token"):
        model.resize_token_embeddings(-1)
    with pytest.raises(ValueError, match="not divisible by num_key_value_heads"):
        SLMConfig(num_attention_heads=32, num_key_value_heads=5)
    big = SLMConfig(vocab_size=len(tokenizer), **{**SMALL, "batch_size": 10**6, "use_distillation": True})
    with pytest.raises(UserError) as caught:
        SLMTrainer(config=big, model=model, tokenizer=tokenizer, train_dataset=dataset)
    assert "fewer than batch_size 1000000" in str(caught.value)
    assert "there is no teacher_model" in str(caught.value)
