"""What ends a run on several ranks: said once, and nothing is left of what had not begun."""

import yaml

from slm import SLMTokenizer
from tests.distributed.ranks import train_many
from tests.shards import make_dataset


def test_two_ranks_say_it_once_and_leave_no_folder(tmp_path):
    """A refusal before the start removes the folder that rank 0 made, while the other rank is about to end too; a gate that
    falls short is one error."""
    tokenizer = SLMTokenizer()
    make_dataset(tmp_path / "tokens", vocab_size=259, fingerprint=tokenizer.fingerprint)
    make_dataset(tmp_path / "held-out", seed=5, vocab_size=259, fingerprint=tokenizer.fingerprint)
    phase = {"name": "a", "tokens": 512, "seq_len": 64, "batch_tokens": 256, "micro_batch": 2}
    tree = {
        "name": "t",
        "output": str(tmp_path / "run"),
        "model": {"preset": "cpu-tiny", "vocab_size": 264},
        "data": {"sources": {"a": str(tmp_path / "tokens")}, "validation": {"a": str(tmp_path / "held-out")}},
        "phases": [{**phase, "gate": {"short_loss_rise": 0, "short_seq_len": 64, "short_loss_before": 1.5}}],
    }
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(tree))
    refused = [f"output={tmp_path}/refused", "phases.a.micro_batch=4"]
    done = train_many([(path, refused, "", 2), (path, [], "", 78)], 2)
    assert done.stdout.count("which 2 ranks x micro_batch 4 do not divide") == 1
    assert not (tmp_path / "refused").exists()
    assert done.stdout.count("Gate not passed: phase a does not pass its gate at step 2, after no repetition") == 1
    assert done.stdout.count("Traceback") == 0
    assert "ERROR phases.a: a step has" in done.stdout  # and not "ERROR Error: phases.a …"
    assert (tmp_path / "run" / "exit.json").exists()
