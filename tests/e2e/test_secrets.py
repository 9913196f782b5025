"""Secrets of the environment reach no file, no command line and no screen; names with a shell's signs are not run."""

import json
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from slm import SLMForCausalLM
from slm.model.config import ModelConfig
from slm.redact import redact_record, redacted
from tests.shards import make_dataset

ROOT = Path(__file__).parents[2]
SECRETS = {
    "WANDB_API_KEY": "canary0123456789abcdef0123456789abcdef01",
    "HF_TOKEN": "hf_canaryHuggingFaceToken",
    "AWS_SECRET_ACCESS_KEY": "canary/AWS+secret/0123456789",
    "OPENAI_API_KEY": "sk-canary-openai",
    "https_proxy": "http://someone:canary-password@127.0.0.1:9",
}
SIGNS = "$(touch pwned) `touch pwned`; touch pwned & 'x' \"y\" é"


def environment():
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    env = {name: value for name, value in os.environ.items() if name not in ranks}
    more = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHON": sys.executable, "DS_ACCELERATOR": "cpu"}
    return {**env, **more, **SECRETS}


class Watched:
    """Runs commands in a folder, keeping what they print and every command line of a process that they start."""

    def __init__(self, folder):
        self.folder, self.printed, self.lines = folder, "", set()

    def run(self, *command, code=0):
        out = self.folder / "printed"
        with open(out, "wb") as stream:
            process = subprocess.Popen(
                [str(word) for word in command], cwd=self.folder, env=environment(), stdout=stream, stderr=stream
            )
            over = threading.Event()
            watcher = threading.Thread(target=self._watch, args=(process.pid, over))
            watcher.start()
            try:
                returned = process.wait(timeout=280)
            finally:
                process.kill()
                over.set()
                watcher.join()
        printed = out.read_text(errors="replace")
        self.printed += printed
        assert returned == code, printed[-3000:]
        return printed

    def slm(self, *words, code=0):
        return self.run(sys.executable, "-m", "slm", *words, code=code)

    def _watch(self, pid, over):
        while not over.wait(0.05):
            try:
                started = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
            except psutil.Error:
                continue
            for process in started:
                try:
                    self.lines.add(" ".join(process.cmdline()))
                except psutil.Error:
                    pass

    def check(self):
        """No part of a secret in any file (binary ones too), in what was printed or in a command line."""
        found = [name for name in SECRETS if SECRETS[name] in self.printed]
        parts = [part.encode() for part in (*SECRETS.values(), "canary", "someone:")]
        read = 0
        for path in self.folder.rglob("*"):
            if path.is_file() and ".git" not in path.relative_to(self.folder).parts:
                data = path.read_bytes()
                read += 1
                found += [f"{path}: {part.decode()}" for part in parts if part in data]
        found += [line for line in self.lines for part in parts if part.decode() in line]
        assert not found
        assert read > 3
        assert self.lines
        assert not list(self.folder.rglob("pwned"))


@pytest.fixture
def watched(tmp_path):
    """A folder with tokens, a teacher and a class that gives its secret away, in a git clone whose remote has a password."""
    make_dataset(tmp_path / "a", lengths=[90, 40, 130, 64, 65, 7, 2, 200, 33, 71] * 3)
    SLMForCausalLM(ModelConfig.preset("cpu-tiny"), seed=7).save_pretrained(tmp_path / "teacher")
    (tmp_path / "leaky.py").write_text(
        "import os\nclass Leaky:\n    def __init__(self):\n"
        "        raise RuntimeError(f\"{os.environ['HF_TOKEN']} was refused by {os.environ['https_proxy']}\")\n"
    )
    watched = Watched(tmp_path)

    def write(**changes):
        phase = {"name": "main", "tokens": "2Ki", "seq_len": 64, "batch_tokens": 256, "micro_batch": 2}
        phase["deepspeed"] = str(ROOT / "ds_configs/zero1.json")
        tree = {
            "name": "t",
            "output": f"runs/{SIGNS}",
            "model": "cpu-tiny",
            "data": {"sources": {"a": "a"}, "validation": {"v": "a"}},
            "phases": [phase | changes.pop("phase", {})],
            **changes,
        }
        (tmp_path / "r.yaml").write_text(json.dumps(tree))
        return "r.yaml"

    watched.write = write
    return watched


def test_a_crash_that_speaks_of_a_secret_is_told_without_it(watched):
    """A class of the user's raises with the token and the proxy's password: traceback, log and exit.json have neither."""
    printed = watched.slm("train", watched.write(tokenizer="leaky:Leaky", output="runs/x"), code=5)
    assert "RuntimeError: *** was refused by" in printed
    assert "RuntimeError: *** was refused by" in (watched.folder / "runs/x/logs/rank-0.log").read_text()
    assert "*** was refused by" in json.loads((watched.folder / "runs/x/exit.json").read_text())["reason"]
    printed = watched.slm("generate", "teacher", "x", "--tokenizer", "leaky:Leaky", code=1)  # a bug, by its traceback
    assert "RuntimeError: *** was refused by" in printed
    watched.check()


def test_what_is_a_secret(monkeypatch):
    for name in list(os.environ):
        if name not in ("PATH", "HOME"):
            monkeypatch.delenv(name)
    for name, value in {**SECRETS, "DB_PASSWORD": "hunter2hunter2", "TOKENIZERS_PARALLELISM": "something"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/home/me/key.json")  # the place of one is none
    monkeypatch.setenv("API_KEY", "short")  # as ordinary words are
    text = " ".join(
        [*SECRETS.values(), "hunter2hunter2", "something", "/home/me/key.json", "short", "git@host:x", "a://b:c@d"]
    )
    assert redacted(text) == (
        "*** *** *** *** http://***@127.0.0.1:9 *** something /home/me/key.json short git@host:x a://***@d"
    )
    record = logging.LogRecord("slm", logging.ERROR, "f", 1, "%s of %d", (SECRETS["HF_TOKEN"], 3), None)
    assert redact_record(record)
    assert record.getMessage() == "*** of 3"


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_no_secret_leaves_the_environment_and_no_name_is_run(watched, tmp_path):
    """Two ranks by the launcher with W&B and TensorBoard, a teacher's cache, evaluation, export, generation, running out of
    memory; the folders' names hold what a shell would run."""
    clone = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["remote", "add", "origin", "https://canary-token@host/x.git"], ["add", "leaky.py"],
                  ["commit", "-q", "-m", "x"]):  # fmt: skip
        subprocess.run([*clone, *words], cwd=tmp_path, check=True)
    run = f"runs/{SIGNS}"
    cache = {"kind": "top_k", "k": 8, "folder": f"cache {SIGNS}"}
    recipe = watched.write(
        log={"tensorboard": True, "wandb": {"project": "p $(touch pwned)", "mode": "offline"}},
        teacher={"model": "teacher", "cache": cache, "batch_tokens": 512},
        phase={"loss": {"type": "distill", "alpha": 0.1}},
    )
    watched.slm("teacher", recipe)
    launcher = ROOT / "launchers/local.sh"
    watched.run("bash", launcher, recipe, "2", "seed=5")
    assert (tmp_path / run / "checkpoints").is_dir()
    assert list((tmp_path / run).glob("wandb/offline-run-*"))
    # What a name may not be is a message of the same launcher, and nothing is run either.
    printed = watched.run("bash", launcher, recipe, "2", f"name={SIGNS}", code=2)
    assert "is no name" in printed
    watched.slm("eval", run)
    watched.slm("export", run, f"export {SIGNS}")
    assert (tmp_path / f"export {SIGNS}" / "model.safetensors").is_file()
    SLMForCausalLM.from_pretrained(tmp_path / f"export {SIGNS}")
    watched.slm("generate", run, "x", code=2)  # the recipe names no tokenizer
    make_dataset(tmp_path / "big", lengths=[256] * 200)
    watched.write(
        output="runs/memory", data={"sources": {"a": "big"}},
        model={"preset": "cpu-tiny", "hidden_size": 256, "intermediate_size": 2048},
        phase={"tokens": "64Ki", "batch_tokens": "32Ki", "seq_len": 256, "micro_batch": 128},
    )  # fmt: skip
    watched.run(sys.executable, ROOT / "tests/little_memory.py", "r.yaml", code=77)
    assert (tmp_path / "runs/memory/memory/rank-0.txt").is_file()
    watched.check()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_wandb_out_of_reach_costs_no_run_and_tells_no_secret(watched, monkeypatch):
    """Online through a proxy that is not there: the run goes on offline, under the same id, and is done."""
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "15")
    printed = watched.slm("train", watched.write(output="runs/x", log={"wandb": {"project": "p", "mode": "online"}}))
    assert "W&B cannot be reached" in printed
    assert list((watched.folder / "runs/x").glob("wandb/offline-run-*"))
    watched.check()
