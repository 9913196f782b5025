"""`slm eval` and the evaluations of a run as a user meets them: text, tokenizer, shards, recipe, tables, files."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from slm import SLMTokenizer
from slm.errors import UserError
from slm.metrics import offline_records
from slm.recipe import load_recipe
from slm.train import train
from tests.shards import make_dataset

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The text of this project behind a small BPE tokenizer, by the commands that the README names."""
    from data_prep.cli import main

    folder = tmp_path_factory.mktemp("eval")
    before = os.getcwd(), sys.argv
    os.chdir(folder)
    try:
        for words in (
            ["tokenizer", str(ROOT / "slm"), "--vocab-size", "512", "--output", "tokenizer"],
            [
                "shards",
                str(ROOT / "slm"),
                "--tokenizer",
                "tokenizer",
                "--validation-fraction",
                "0.3",
                "--output",
                "tokens",
            ],
        ):
            sys.argv = ["slm-data", *words]
            with pytest.raises(SystemExit) as end:
                main()
            assert not end.value.code
    finally:
        os.chdir(before[0])
        sys.argv = before[1]
    return folder


@pytest.fixture
def write(folder, tmp_path, monkeypatch, one_rank):
    """A function: changes -> path of a recipe of two short phases, with recall, in tmp_path/run."""
    monkeypatch.chdir(ROOT)

    def recipe(**changes):
        phase = {"tokens": 4 * 256, "batch_tokens": 256}
        tree = {
            "name": "t",
            "output": str(tmp_path / "run"),
            "model": {"preset": "cpu-tiny", "vocab_size": 512},
            "tokenizer": str(folder / "tokenizer"),
            "data": {
                "sources": {"code": str(folder / "tokens/train")},
                "validation": {"code": str(folder / "tokens/validation")},
            },
            "phases": [{**phase, "name": "short", "seq_len": 128}, {**phase, "name": "long", "seq_len": 256}],
            "eval": {
                "every_steps": 2,
                "max_sequences": 4,
                "seq_lens": [128],
                "recall": {"lengths": [128, 256], "keys": [1, 2], "depths": 3, "samples": 1, "every_steps": 4},
            },
            **changes,
        }
        path = tmp_path / "r.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    return recipe


def slm(*words, code=0):
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")}
    env |= {"OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    result = subprocess.run(
        [sys.executable, "-m", "slm", *map(str, words)], capture_output=True, text=True, cwd=ROOT, env=env, timeout=120
    )
    assert result.returncode == code, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    return result.stdout if code == 0 else result.stderr


def test_a_run_measures_and_slm_eval_measures_the_same(write, tmp_path, caplog):
    """Each phase the lengths that it reaches, on its steps; metrics, log and files agree with one another, and with what the
    command says of the run's last checkpoint."""
    assert train(load_recipe(write())) == 0
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    rows = {}
    for line in lines:
        rows.setdefault(line["step"], {}).update(line)
    assert [step for step, row in rows.items() if "eval/code/loss" in row] == [2, 4, 6, 8]
    assert [step for step, row in rows.items() if "eval/passkey/128/mean" in row] == [4, 8]
    assert "eval/passkey/256/mean" not in rows[4]
    assert rows[8].keys() >= {"eval/recall2/256/67", "eval@128/code/loss", "eval/code/position/256"}
    assert "eval@128/code/loss" not in rows[4]
    files = {path.name for path in (tmp_path / "run/eval").iterdir()}
    assert files == {
        "short-00000002.json", "short-00000004.json", "short-00000004.png",
        "long-00000002.json", "long-00000004.json", "long-00000004.png",
    }  # fmt: skip
    assert "pass key: 128 tokens 0% (worst depth 0%), 256 tokens" in caplog.text
    assert "held-out loss at 128 tokens: code" in caplog.text

    last = tmp_path / "run/latest"
    said = slm("eval", last, "--max-sequences", 4, "--recall", "--json")
    written = json.loads((tmp_path / "run/eval/long-00000004.json").read_text())
    found = json.loads(said)
    assert found["loss"]["256"]["code"]["loss"] == pytest.approx(written["loss"]["256"]["code"]["loss"], abs=1e-5)
    for one, other in zip(found["recall"], written["recall"], strict=True):
        assert one == {**other, "answer_loss": pytest.approx(other["answer_loss"], abs=1e-5)}
    assert found["loss"]["256"]["code"]["bits_per_byte"] > 1


def test_tables_and_picture_of_the_command(write, folder, tmp_path):
    """What is asked for beside the loss, other grids, a model that is a Hugging Face folder, and mistakes."""
    assert train(load_recipe(write(), ["phases.short.tokens=256", "phases.long.tokens=256"])) == 0
    run, held_out = tmp_path / "run", folder / "tokens/validation"
    table = slm("eval", run, "--max-sequences", 2)
    assert "perplexity" in table
    assert "up to" not in table
    options = ["--recall", "--lengths", "160,192", "--keys", 3, "--depths", 2, "--samples", 2]
    text = slm("eval", run, "--max-sequences", 2, "--by-position", *options, "--plot", tmp_path / "x.png")
    for part in ("up to", "full", "1 of 3 keys: exact answers of 2", "160", "192", "50 - 100 %", "nats a token"):
        assert part in text, text
    assert (tmp_path / "x.png").stat().st_size > 10_000
    slm("export", run, tmp_path / "hf")
    text = slm("eval", tmp_path / "hf", held_out, "--seq-len", 128, "--max-sequences", 2, "--recall", "--samples", 1)
    assert "pass key" in text
    for words, message in [
        (["--recall", "--lengths", "64,1Ki"], "--lengths has 1024, beyond the model's context of 256"),
        (["--recall", "--lengths", "20"], "less than a quarter would be left"),
        (["--recall", "--lengths", "many"], "'many' is not a count"),
        (["--keys", "2"], "--keys has no effect without --recall"),
        (["--recall", "--keys", "0"], "recall: keys.0 is '0', and has to be 1 or more"),
        (["--plot", tmp_path / "absent/x.png"], "is no picture that could be written"),
        (["--recall", "--tokenizer", "absent"], "absent"),
    ]:
        assert message in slm("eval", run, *words, code=2), words
    SLMTokenizer().save_pretrained(tmp_path / "bytes")
    assert "is not the one" in slm("eval", run, "--recall", "--tokenizer", tmp_path / "bytes", code=2)


def test_what_a_recipe_cannot_measure_is_refused_at_once(write, tmp_path):
    """By the recipe alone; all of it in one message."""
    good = yaml.safe_load(write().read_text())["eval"]

    def refused(recall=None, **changes):
        evaluation = {**good, **changes.pop("eval", {}), "recall": {**good["recall"], **(recall or {})}}
        with pytest.raises(UserError) as caught:
            load_recipe(write(eval=evaluation, **changes))
        return str(caught.value)

    assert "eval.recall.lengths has 512, longer than the longest seq_len of a phase (256)" in refused(
        {"lengths": [512]}
    )
    assert "eval.recall.every_steps is 3, no multiple of eval.every_steps (2)" in refused({"every_steps": 3})
    assert "eval.recall.filler is 'web', which is not among data.validation (code)" in refused({"filler": "web"})
    assert "eval.seq_lens has 256, no shorter than" in refused(eval={"seq_lens": [256]})
    assert "eval.recall.samples" in refused({"samples": 0})
    both = refused({"lengths": [512]}, tokenizer="", data={"sources": {"a": "x"}})
    for part in ("data.validation is empty", "the recipe names no tokenizer", "lengths has 512"):
        assert part in both


def test_what_the_data_cannot_give_is_refused_before_the_first_step(write, folder, tmp_path, caplog):
    """Held-out text that is too short for the longest length."""
    manifest = json.loads((folder / "tokens/train/manifest.json").read_text())["tokenizer"]
    make_dataset(tmp_path / "tiny", [60, 70], vocab_size=512, fingerprint=manifest["fingerprint"])
    data = {"sources": {"code": str(folder / "tokens/train")}, "validation": {"code": str(tmp_path / "tiny")}}
    assert train(load_recipe(write(data=data))) == 2
    message = caplog.records[-1].getMessage()
    assert "recall.lengths has 128, and the held-out documents have 126 tokens" in message
    assert not (tmp_path / "run/checkpoints").exists()


def test_the_model_card_of_a_run(write, tmp_path, monkeypatch):
    """What was trained, on what, and how well, from the run's own files, as a picture and without matplotlib as a table; a
    benchmark's scores are in the run's log, its folder and the card; secrets are in none of it."""
    from slm import model_card
    from slm.errors import EnvironmentProblem
    from slm.loading import export_model

    monkeypatch.setenv("HUB_TOKEN", "hf_abcdefghijklmnop")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    changes = [
        "phases.long.tokens=512",
        "eval.recall.every_steps=2",
        "name=hf_abcdefghijklmnop",
        "log.tensorboard=true",
    ]
    recipe = load_recipe(write(), [*changes, "log.wandb={project: t, mode: offline}"])
    assert train(recipe) == 0
    run = tmp_path / "run"
    _text(run, tmp_path)
    has_harness = _benchmark(run, tmp_path)
    _page(run, has_harness)
    export_model(str(run / "latest"), tmp_path / "a")
    card = (tmp_path / "a/README.md").read_text()
    assert "![training and held-out loss by step](loss.png)" in card
    assert (tmp_path / "a/loss.png").stat().st_size > 5_000
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["library_name"] == "transformers"
    assert "license" not in front
    told = yaml.safe_load(card.split("```yaml\n")[1].split("\n```")[0])
    assert [phase["name"] for phase in told["phases"]] == ["short", "long"]
    written = json.loads((run / "eval/long-00000002.json").read_text())
    assert (
        f"| 256 | code | {written['loss']['256']['code']['targets']:,} | {written['loss']['256']['code']['loss']:.4f}"
        in card
    )
    assert "| keys hidden |" in card
    from slm.data.tokens import TokenDataset

    for source in told["data"]["sources"], told["data"]["validation"]:
        assert TokenDataset(source["code"]).fingerprint in card
    assert "hf_abcdef" not in card
    if has_harness:
        assert "| t | acc |" in card
    assert re.search(r"\| a\.txt \| [\d,]+ \| [\d.]+ \| [\d.]+ \|", card)

    def missing(path):
        raise EnvironmentProblem("no matplotlib")

    monkeypatch.setattr(model_card, "check_picture", missing)
    export_model(str(run / "latest"), tmp_path / "b")
    assert "| step | loss |\n|---|---|\n| 1 | " in (tmp_path / "b/README.md").read_text()
    assert not (tmp_path / "b/loss.png").exists()


def _text(run, tmp_path):
    """A text of two checkpoints: each its own file; rows of the run's log, of which an earlier checkpoint's stands at the end
    too; TensorBoard at the checkpoint's step; W&B's summary."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from slm.cli_models import evaluate

    (tmp_path / "a.txt").write_text("def main():\n    return 1\n" * 40)
    found = {}
    for checkpoint, step in (("long-00000002", 6), ("short-00000002", 2)):
        evaluate(str(run / "checkpoints" / checkpoint), data=[tmp_path / "a.txt"], text=True, seq_len=64)
        written = json.loads((run / f"eval/text-{checkpoint}.json").read_text())
        found[step] = written["results"][str(tmp_path / "a.txt")]["perplexity"]
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert {"step": 6, "text/step": step, "text/a.txt/perplexity": found[step]}.items() <= rows[-1].items()
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    drawn = {event.step: event.value for event in events.Scalars("text/a.txt/perplexity")}
    assert drawn == {step: pytest.approx(value, rel=1e-6) for step, value in found.items()}
    assert len(events.Scalars("loss")) == 6
    last = sorted(run.glob("wandb/offline-run-*/*.wandb"))[-1]  # by the time in its name
    assert _summary(last)["text/a.txt/perplexity"] == pytest.approx(found[2])


def _summary(path):
    """What W&B's local file holds for the summary."""
    updates = [item for record in offline_records(path) for item in record.summary.update]
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in updates}


def _page(run, has_harness):
    """Both checkpoints of the text, and the benchmark, on the page."""
    from slm.report.page import build_page
    from slm.report.record import read_record

    section = build_page([read_record(run)]).split('id="benchmarks"')[1].split("</section>")[0]
    words = re.sub("<[^>]*>", " ", section)
    for part in ("short, step 2", "long, step 2", "a.txt", "bits a byte"):
        assert part in words
    if has_harness:
        for part in ("lm-evaluation-harness", " t ", " acc "):
            assert part in words


def _benchmark(run, tmp_path):
    """One local task on the run, through the command's own function; whether lm-evaluation-harness is here."""
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        return False
    from slm.cli_models import _suite

    (tmp_path / "data.jsonl").write_text(json.dumps({"q": "def", "c": [" main", " x"], "g": 0}) + "\n")
    (tmp_path / "tasks").mkdir()
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "data.jsonl")}}}
    task = {"task": "t", **data, "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{q}}"}
    task |= {"doc_to_choice": "{{c}}", "doc_to_target": "{{g}}", "num_fewshot": 0}
    task["metric_list"] = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
    (tmp_path / "tasks/t.yaml").write_text(yaml.safe_dump(task))
    _suite(str(run / "latest"), ["t"], None, False, task_folders=[tmp_path / "tasks"])
    found = json.loads((run / "eval/suite-long-00000002.json").read_text())
    score = found["results"]["t"]["scores"]["acc,none"]
    assert score in (0.0, 1.0)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {"step": 6, "suite/step": 6, "suite/t/acc": score}.items() <= rows[-1].items()
    assert len((run / "eval/answers/answers-0.jsonl").read_text().splitlines()) == 2
    return True
