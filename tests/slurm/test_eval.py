"""`slm eval` as one step of a real SLURM, a task on each of two nodes."""

import json
import sys

import pytest

from slm import SLMForCausalLM, SLMTokenizer
from slm.model.config import ModelConfig
from slm.text_loss import evaluate_text
from tests.distributed.ranks import ROOT


def test_a_text_under_srun(cluster, tmp_path):
    """Two tasks find what one process finds; one of them says it."""
    text = (ROOT / "README.md").read_text()
    tokenizer = SLMTokenizer(vocab_size=300).train([text])
    config = ModelConfig.preset("cpu-tiny", vocab_size=len(tokenizer), initializer_range=0.2)
    SLMForCausalLM(config).init_weights(seed=0).save_pretrained(tmp_path / "model", tokenizer)
    (tmp_path / "a.txt").write_text(text)
    [alone] = evaluate_text(str(tmp_path / "model"), [tmp_path / "a.txt"], seq_len=64)
    # Without the ranks that this process has told itself of (runtime.discover_ranks).
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    step = [
        "env",
        *(f"--unset={name}" for name in names),
        "MASTER_ADDR=127.0.0.1",
    ]  # its nodes' names mean nothing to DNS
    step += ["srun", "--nodes=2", "--ntasks-per-node=1", "--mpi=none", "--export=ALL", sys.executable, "-m", "slm"]
    environment = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    words = ["eval", str(tmp_path / "model"), "--text", str(tmp_path / "a.txt"), "--seq-len", "64", "--json"]
    done = cluster.run(*step, *words, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    [told] = json.loads(done.stdout)
    assert told["num_tokens"] == alone.num_tokens
    assert told["loss_sum"] == pytest.approx(alone.loss_sum, rel=1e-6)
