"""`slm eval` on two real gloo ranks of each launcher finds what one process finds: on shards, on a text, and on benchmarks; one
table, and mistakes said once."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from slm import SLMForCausalLM, SLMTokenizer, findings
from slm.loading import evaluate_model
from slm.model.config import ModelConfig
from slm.text_loss import evaluate_text
from tests.distributed.ranks import ROOT
from tests.e2e.test_eval import folder

__all__ = ["folder"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "slm"]
DEEPSPEED = [ROOT / "launchers/launch.py", "--ranks", "2", "--module", "slm.cli"]
MPIRUN = Path(sys.executable).with_name("mpirun")


@pytest.fixture(scope="module")
def model(folder, tmp_path_factory):
    """Random weights, far from uniform, and the tokenizer of the shards."""
    path = tmp_path_factory.mktemp("ranks") / "model"
    config = ModelConfig.preset("cpu-tiny", vocab_size=512, initializer_range=0.2)
    SLMForCausalLM(config).init_weights(seed=0).save_pretrained(
        path, SLMTokenizer.from_pretrained(folder / "tokenizer")
    )
    return path


def launched(*command, code=0):
    """What rank 0 prints; stderr with it if the code is not 0. In a session of its own, killed as a whole on a timeout."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    env = {k: v for k, v in os.environ.items() if k not in names}
    env |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    done = subprocess.run(
        ["timeout", "--kill-after=5", "200", *map(str, command)], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code == 0 else done.stdout + done.stderr


def test_shards_under_torchrun(model, folder):
    """Loss by source and position, and recall, sample by sample: 21 sequences, no multiple of the ranks' batches."""
    held_out, recall = folder / "tokens/validation", {"lengths": ["96", "160"], "depths": 2, "samples": 2}
    found, per_byte = evaluate_model(str(model), [str(held_out)], 128, 2, 21, recall=recall)
    words = ["eval", model, held_out, "--seq-len", 128, "--micro-batch", 2, "--max-sequences", 21, "--json"]
    words += ["--recall", "--lengths", "96,160", "--depths", 2, "--samples", 2]
    told = json.loads(launched(sys.executable, *TORCHRUN, *words))  # one JSON: rank 0's
    row = told["loss"]["128"][held_out.as_posix()]
    assert row["targets"] == found.main["all"].num_targets
    assert row["loss"] == pytest.approx(found.main["all"].loss, rel=1e-6)
    alone = [(bucket.up_to, pytest.approx(bucket.loss, rel=1e-5)) for bucket in found.main["all"].by_position]
    assert [(bucket["up_to"], bucket["loss"]) for bucket in row["by_position"]] == alone
    for one, other in zip(told["recall"], findings.as_dict(found, per_byte)["recall"], strict=True):
        assert one == {**other, "answer_loss": pytest.approx(other["answer_loss"], rel=1e-5)}


def test_a_text_under_deepspeed(model, tmp_path):
    """README.md and a file of one short document, of which only one rank has a window."""
    (tmp_path / "short.jsonl").write_text(json.dumps({"text": "def main():"}) + "\n")
    files = [ROOT / "README.md", tmp_path / "short.jsonl"]
    alone = evaluate_text(str(model), files, seq_len=96, stride=40)
    words = ["eval", model, "--text", *files, "--seq-len", 96, "--stride", 40, "--json"]
    printed = launched(sys.executable, *DEEPSPEED, *words)
    for row, one in zip(json.loads(printed[printed.index("[\n") :]), alone, strict=True):
        assert row == one.as_dict() | {
            key: pytest.approx(getattr(one, key), rel=1e-6) for key in row if isinstance(row[key], float)
        }


def test_benchmarks_under_mpirun(model, tmp_path):
    """A local task: scores of one process; both ranks have answered."""
    suite = pytest.importorskip("slm.suite")
    if not MPIRUN.exists():
        pytest.skip("no mpirun beside this Python")
    docs = [{"q": f"x = {i}\n", "c": ["def", "return self", " + 1"], "g": i % 3} for i in range(9)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    (tmp_path / "t.yaml").write_text(
        f"task: t\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/data.jsonl}}}}\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: '{{c}}'\ndoc_to_target: '{{g}}'\nnum_fewshot: 0\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    alone = suite.evaluate_suite(str(model), ["t"], task_folders=[tmp_path])
    words = ["eval", model, "--suite", "t", "--tasks", tmp_path, "--output", tmp_path / "out", "--json"]
    mpirun = [MPIRUN, "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable, "-m", "slm"]
    told = json.loads(launched(*mpirun, *words))
    assert told["results"] == alone["results"]
    counts = [len((tmp_path / f"out/answers/answers-{rank}.jsonl").read_text().splitlines()) for rank in (0, 1)]
    assert sum(counts) == 27
    assert min(counts) == 13


def test_mistakes_are_said_once(model, folder, tmp_path):
    """By rank 0, with the code of a mistake from both: what is wrong with the options, with a file, with the shards."""
    (tmp_path / "empty.txt").write_text("")
    for words, message in [
        (["--text", tmp_path / "empty.txt"], "empty.txt holds no text"),
        ([folder / "tokens/validation", "--seq-len", 9999], "--seq-len is 9999, beyond the model's context"),
        ([folder / "absent"], "the token dataset"),
        (["--limit", 3], "--limit has no effect on the loss on shards"),
    ]:
        told = launched(sys.executable, *DEEPSPEED, "eval", model, *words, code=2)
        assert len(re.findall(r"^Error: ", told, re.MULTILINE)) == 1, told
        assert told.count(message) == 2, told  # the launcher repeats it as the reason
        assert "Traceback" not in told
