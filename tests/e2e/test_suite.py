"""lm-evaluation-harness for real, on tasks of our own with local data: one of every request type, and our scores against those
of the harness's own `hf` model on the exported folder; kept answers; ranks; programs that are run; what is refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from slm import SLMForCausalLM, SLMTokenizer
from slm.errors import EnvironmentProblem, UserError
from slm.model.config import ModelConfig
from tests.distributed.ranks import ROOT, run_ranks

pytest.importorskip("lm_eval")

WORDS = "the quick brown fox jumps over a lazy dog and runs far into the deep dark wood where nobody lives".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that repeats what it has memorised (trained here, so that likely and greedy answers exist), a tokenizer, four
    tasks and their data."""
    folder = tmp_path_factory.mktemp("suite")
    text = " ".join(WORDS)
    tokenizer = SLMTokenizer(vocab_size=300).train([text * 20])
    config = ModelConfig.preset("cpu-tiny", vocab_size=len(tokenizer), max_position_embeddings=64)
    model = SLMForCausalLM(config).init_weights(seed=0)
    ids = torch.tensor([tokenizer.encode(f"{text} {text}", add_bos=True)[:64]])
    labels = torch.cat([ids[:, 1:], torch.full((1, 1), -100)], 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        loss, count = model(ids, labels_BT=labels)
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / "model", tokenizer)

    docs = [
        {
            "context": " ".join(WORDS[i : i + 3 + i % 4]),
            "answer": WORDS[i + 3 + i % 4],
            "choices": [WORDS[i + 3 + i % 4], "zebra", WORDS[(i + 9) % 19], "the the the"],
            "gold": 0,
            "page": " ".join(WORDS[j % len(WORDS)] for j in range(i, i + 10 + 9 * i)),  # beyond the context at the end
        }
        for i in range(11)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "data.jsonl")}}}
    data |= {"test_split": "test", "num_fewshot": 0}
    mean = {"aggregation": "mean", "higher_is_better": True}
    tasks = {
        "t_likelihood": {
            "output_type": "loglikelihood", "doc_to_text": "{{context}}", "doc_to_target": "{{answer}}",
            "metric_list": [{"metric": "perplexity"}, {"metric": "acc", **mean}],
        },
        "t_rolling": {
            "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{page}}",
            "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
        },
        "t_choice": {
            "output_type": "multiple_choice", "doc_to_text": "{{context}}", "doc_to_target": "{{gold}}",
            "doc_to_choice": "{{choices}}", "metric_list": [{"metric": "acc", **mean}, {"metric": "acc_norm", **mean}],
        },
        "t_generate": {
            "output_type": "generate_until", "doc_to_text": "{{context}}", "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["zebra", "dog"], "max_gen_toks": 12, "do_sample": False},
            "filter_list": [{
                "name": "first-word",
                "filter": [{"function": "regex", "regex_pattern": r"(\w+)"}, {"function": "take_first"}],
            }],
            "metric_list": [{"metric": "exact_match", **mean}],
        },
    }  # fmt: skip
    (folder / "tasks").mkdir()
    for name, fields in tasks.items():
        (folder / "tasks" / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **data, **fields}))
    group = {"group": "t_all", "task": list(tasks)}
    (folder / "tasks/group.yaml").write_text(yaml.safe_dump(group))
    return folder


def scores(found):
    return {name: row["scores"] for name, row in found["results"].items()}


@pytest.fixture(scope="module")
def ours(folder):
    from slm.suite import evaluate_suite

    return evaluate_suite(str(folder / "model"), ["t_all"], task_folders=[folder / "tasks"], rows=3)


def test_scores_of_every_request_type_equal_those_of_the_hf_model(folder, ours):
    """The harness's own model, through transformers: every metric to 1e-5, and some answers right and some wrong."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    theirs = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder / "model"), "dtype": "float32"},
        tasks=["t_all"],
        batch_size=2,
        device="cpu",
        task_manager=TaskManager(include_path=str(folder / "tasks"), include_defaults=False),
        bootstrap_iters=0,
    )
    compared = 0
    for task, found in scores(ours).items():
        for key, value in found.items():
            if "_stderr" not in key and isinstance(value, float):
                assert value == pytest.approx(theirs["results"][task][key], rel=1e-5), (task, key)
                compared += 1
    assert compared >= 8
    assert 0 < scores(ours)["t_choice"]["acc,none"] <= 1
    assert scores(ours)["t_generate"]["exact_match,first-word"] > 0
    assert ours["results"]["t_choice"]["documents"] == 11


def test_answers_are_kept_and_not_computed_again(folder, ours, tmp_path, monkeypatch):
    """With the answers of a killed evaluation (the last line cut short) only the missing ones are computed; none of another
    model's are taken."""
    from slm import harness, suite

    options = dict(task_folders=[folder / "tasks"], rows=3, answers=tmp_path)
    first = suite.evaluate_suite(str(folder / "model"), ["t_choice", "t_generate"], **options)
    assert scores(first)["t_choice"] == {k: v for k, v in scores(ours)["t_choice"].items()}
    file = tmp_path / "answers-0.jsonl"
    lines = file.read_text().splitlines()
    assert len(lines) == 11 * 4 + 11
    file.write_text("\n".join(lines[:-5]) + "\n" + lines[-5][:20])
    asked = []
    together = harness.HarnessModel._together
    monkeypatch.setattr(
        harness.HarnessModel, "_together", lambda self, task: asked.append(len(task[1])) or together(self, task)
    )
    again = suite.evaluate_suite(str(folder / "model"), ["t_choice", "t_generate"], **options)
    assert sum(asked) == 5
    assert scores(again) == scores(first)
    other = SLMForCausalLM.from_pretrained(folder / "model").init_weights(seed=4)
    other.save_pretrained(tmp_path / "other", SLMTokenizer.from_pretrained(folder / "model"))
    asked.clear()
    suite.evaluate_suite(str(tmp_path / "other"), ["t_choice"], **options)
    assert sum(asked) == 11 * 4


def test_two_ranks_find_the_same(folder, ours, tmp_path):
    """Requests shared by two processes under torchrun; each keeps its own answers; one table."""
    command = ["-m", "slm", "eval", folder / "model", "--suite", "t_all", "--tasks", folder / "tasks"]
    done = run_ranks(command[0], [*command[1:], "--micro-batch", 3, "--output", tmp_path], 2)
    [path] = tmp_path.glob("suite-*.json")
    found = json.loads(path.read_text())
    for task, expected in scores(ours).items():
        for key, value in expected.items():
            if "_stderr" not in key:
                assert scores(found)[task][key] == pytest.approx(value, rel=1e-5), (task, key)
    counts = [len((tmp_path / f"answers/answers-{r}.jsonl").read_text().splitlines()) for r in (0, 1)]
    assert sum(counts) == 11 * 7
    assert min(counts) > 30
    assert done.stdout.count("│ t_choice ") == 2  # rows of one table: acc and acc_norm


def test_a_mistake_is_said_once(folder, tmp_path):
    """By rank 0, and the other one leaves."""
    words = ["slm", "eval", folder / "model", "--suite", "t_alls", "--tasks", folder / "tasks"]
    refused = run_ranks("-m", words, 2, check=False)
    assert refused.returncode != 0
    assert refused.stdout.count("there is no benchmark 't_alls'") == 1
    fields = yaml.safe_load((folder / "tasks/t_generate.yaml").read_text()) | {"task": "t_long"}
    fields["generation_kwargs"] = {"until": ["zebra"], "max_gen_toks": 64}
    (tmp_path / "t_long.yaml").write_text(yaml.safe_dump(fields))
    refused = run_ranks(
        "-m", ["slm", "eval", folder / "model", "--suite", "t_long", "--tasks", tmp_path], 2, check=False
    )
    assert refused.returncode != 0
    assert (
        refused.stdout.count("Error: the benchmark asks for up to 64 new tokens") == 1
    )  # found by both while they answer
    assert "Traceback (most" not in refused.stdout.split("Error: the benchmark")[0]


def test_the_command(folder, tmp_path, capsys, monkeypatch):
    """The table, and what the options say when they do not belong together."""
    from slm.cli_models import evaluate

    monkeypatch.setenv("COLUMNS", "120")
    model, tasks = str(folder / "model"), [folder / "tasks"]
    evaluate(model, suite="t_choice,t_rolling", tasks=tasks, limit=4, output=tmp_path)
    table = capsys.readouterr().out
    for part in ("t_choice", "acc_norm", "bits_per_byte", "no score to compare"):
        assert part in table
    for options in ({"suite": "t_choice", "stride": 3}, {"limit": 3}, {"text": True, "suite": ""} | {"recall": True}):
        with pytest.raises(UserError, match="has no effect on"):
            evaluate(model, **options)


PROGRAM = """
import json, multiprocessing, os, resource

def _child(queue, source):
    names = {}
    exec(source, names)
    limits = [resource.getrlimit(w)[0] for w in (resource.RLIMIT_FSIZE, resource.RLIMIT_CPU, resource.RLIMIT_CORE)]
    try:
        bytearray(16 << 30)
        memory = "all that was asked for"
    except MemoryError:
        memory = "limited"
    queue.put([names["x"], limits, memory, dict(os.environ)])

def ran(references, predictions):
    queue = multiprocessing.get_context("fork").SimpleQueue()
    process = multiprocessing.get_context("fork").Process(target=_child, args=(queue, "x = 6 * 7"))
    process.start(); found = queue.get(); process.join()
    open(os.path.join(os.path.dirname(__file__), "ran.json"), "w").write(json.dumps(found))
    return 1.0
"""


def test_programs_run_only_when_asked_for_by_name_and_with_limits(folder, tmp_path, monkeypatch):
    """A task marked unsafe: neither alone nor inside a group, nor is its module imported, without --allow-code-execution; with
    it each process has the limits that are said, and no secret in its environment."""
    from lm_eval.tasks import TaskManager

    from slm import suite

    tasks = tmp_path / "tasks"
    tasks.mkdir()
    base = yaml.safe_load((folder / "tasks/t_generate.yaml").read_text())
    base |= {"task": "t_code", "unsafe_code": True, "filter_list": None, "metric_list": []}
    text = yaml.safe_dump({k: v for k, v in base.items() if v is not None and k != "metric_list"})
    text += "metric_list:\n  - metric: !function program.ran\n    aggregation: mean\n    higher_is_better: true\n"
    (tasks / "t_code.yaml").write_text(text)
    (tasks / "program.py").write_text("open(__file__ + '.imported', 'w')\n" + PROGRAM)
    (tasks / "g.yaml").write_text(yaml.safe_dump({"group": "t_group", "task": ["t_code"]}))
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnop")
    manager = TaskManager(include_path=str(tasks))
    for name, allow in (("t_code", False), ("t_group", False), ("t_group", True)):
        with pytest.raises(UserError, match="programs that the model writes.*seconds of processor time"):
            suite._check_code(manager, [name], allow)
    for real in ("humaneval", "mbpp"):  # the harness's own
        with pytest.raises(UserError, match=f"--suite {real} --allow-code-execution"):
            suite._check_code(manager, [real], False)
    assert not list(tasks.glob("*.imported"))
    command = [sys.executable, "-m", "slm", "eval", folder / "model", "--suite", "t_code", "--tasks", tasks]
    done = subprocess.run(  # a process of its own: the limits stay for all later children
        [*map(str, command), "--limit", "1", "--allow-code-execution"],
        cwd=ROOT, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    value, limits, memory, environment = json.loads((tasks / "ran.json").read_text())
    assert value == 42
    assert limits == [suite.CODE_FILE_BYTES, suite.CODE_CPU_SECONDS, 0]
    assert memory == "limited"
    assert "HF_TOKEN" not in environment


def test_a_benchmark_whose_data_is_not_here(folder, monkeypatch):
    """The real hellaswag without a network, an unknown name, and one too long for the model."""
    from slm.suite import evaluate_suite

    with pytest.raises(EnvironmentProblem, match="hellaswag.*HF_HUB_OFFLINE=1") as caught:
        evaluate_suite(str(folder / "model"), ["hellaswag"])
    assert "load_dataset" in str(caught.value)
    with pytest.raises(UserError, match="near it: .*hellaswag"):
        evaluate_suite(str(folder / "model"), ["hellaswa"])
    path = folder / "tasks/t_long.yaml"
    fields = yaml.safe_load((folder / "tasks/t_generate.yaml").read_text()) | {"task": "t_long"}
    fields["generation_kwargs"]["max_gen_toks"] = 64
    path.write_text(yaml.safe_dump(fields))
    try:
        with pytest.raises(UserError, match="up to 64 new tokens, and the model sees 64"):
            evaluate_suite(str(folder / "model"), ["t_long"], task_folders=[folder / "tasks"])
    finally:
        Path(path).unlink()
