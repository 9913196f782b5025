"""A phase's gate as a user meets it: it holds, it stops the run, it repeats the phase; and what it cannot be asked."""

import json

import pytest
import yaml

from slm import SLMTokenizer
from slm.errors import UserError
from slm.gate import parts
from slm.gate import verdicts as judge
from slm.loading import evaluate_model
from slm.plan import describe
from slm.recipe import load_recipe
from slm.train import train
from tests.shards import make_dataset


@pytest.fixture
def recipe(tmp_path, one_rank):
    """A function: the second phase's gate, and changes of the tree -> the recipe's path."""
    tokenizer = SLMTokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    for name, seed in (("tokens", 0), ("held-out", 5)):
        lengths = [300, 90, 260, 40] * (2 if name == "held-out" else 12)
        make_dataset(tmp_path / name, seed=seed, lengths=lengths, vocab_size=259, fingerprint=tokenizer.fingerprint)
    phase = {"tokens": 6 * 256, "batch_tokens": 256, "micro_batch": 2, "schedule": {"warmup_steps": 2}}
    scaling = {"rope_type": "yarn", "factor": 2, "original_max_position_embeddings": 64}
    tree = {
        "name": "t",
        "output": str(tmp_path / "run"),
        "model": {"preset": "cpu-tiny", "vocab_size": 264},
        "tokenizer": str(tmp_path / "tokenizer"),
        "data": {"sources": {"a": str(tmp_path / "tokens")}, "validation": {"a": str(tmp_path / "held-out")}},
        "optim": {"lr": 1e-3},
        "phases": [
            {**phase, "name": "short", "seq_len": 64},
            {**phase, "name": "long", "seq_len": 128, "rope_scaling": scaling},
            {**phase, "name": "after", "seq_len": 128},
        ],
        "eval": {
            "seq_lens": [64],
            "recall": {
                "lengths": [64, 128], "depths": 2, "samples": 2, "needle": "<{name}{value}>", "query": "<{name}",
                "names": [128, 191], "name_length": 1, "values": [192, 255], "value_length": 1,
            },
        },
    }  # fmt: skip

    def write(gate, **changes):
        tree["phases"][1]["gate"] = gate
        path = tmp_path / "r.yaml"
        path.write_text(yaml.safe_dump({**tree, **changes}))
        return path

    return write


def steps_of(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["phase"], line["lr"]) for line in lines if "phase" in line and "lr" in line]


def verdicts(run):
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [event for event in events if event["kind"] == "gate"]


def test_a_gate_that_holds_lets_the_run_go_on(recipe, tmp_path):
    """Each number of the verdict is that of the evaluations of the two phases' ends."""
    gate = {"short_loss_rise": 5.0, "passkey": 0.0, "position_rise": 5.0}
    assert train(load_recipe(recipe(gate))) == 0
    (verdict,) = verdicts(tmp_path / "run")
    assert verdict["passed"]
    before, after = (
        json.loads((tmp_path / "run" / "eval" / f"{p}-00000006.json").read_text()) for p in ("short", "long")
    )
    then, now = (found["loss"]["64"]["a"]["loss"] for found in (before, after))
    assert f"{now:.4f}, before the phase {then:.4f}: {now - then:+.4f} nats" in verdict["held"][0]
    assert [name for name, _ in steps_of(tmp_path / "run")] == ["short"] * 6 + ["long"] * 6 + ["after"] * 6
    assert train(load_recipe(recipe(gate))) == 0  # nothing is left
    assert len(steps_of(tmp_path / "run")) == 18


def test_a_gate_that_fails_stops_the_run_until_less_is_asked_or_more_is_trained(recipe, tmp_path, caplog):
    """Exit code 78 with the numbers, again by the same command without a step; a looser gate goes on from the stored
    numbers; a longer phase trains on."""
    run = tmp_path / "run"
    assert train(load_recipe(recipe({"passkey": 1.0}))) == 78
    assert "pass key: worst 0.0% (64 tokens, depth 0 %" in caplog.text
    assert ": 100.0 points are missing" in caplog.text
    assert "does not pass its gate at step 6, after no repetition\n" in caplog.text
    assert "the same command" in caplog.text
    assert json.loads((run / "exit.json").read_text())["code"] == 78
    assert len(steps_of(run)) == 12
    assert train(load_recipe(recipe({"passkey": 1.0}))) == 78
    assert len(steps_of(run)) == 12
    longer = load_recipe(recipe({"passkey": 1.0}), ["phases.long.tokens=2048"])
    assert train(longer) == 78
    assert len(steps_of(run)) == 14
    assert train(load_recipe(recipe({"passkey": 0.0}), ["phases.long.tokens=2048"])) == 0
    assert [name for name, _ in steps_of(run)][-6:] == ["after"] * 6


def test_a_phase_is_repeated_as_the_recipe_says(recipe, tmp_path, caplog):
    """For repeat_tokens, twice, each time with the schedule from its beginning and other data; then the run stops. Stopped
    in the middle of a repetition, it goes on there."""
    gate = {"passkey": 1.0, "repeat_tokens": 700, "repeats": 2}
    loaded = load_recipe(recipe(gate))
    assert [list(part) for part in parts(loaded.phases[1])] == [[0, 1, 2, 3, 4, 5], [6, 7, 8], [9, 10, 11]]
    assert "else up to 2 repetitions of 3 steps = 768 tokens (repeat_tokens 700, rounded up)" in describe(loaded, 1)
    assert train(loaded) == 78
    assert "at step 12, after 2 of 2 repetitions" in caplog.text
    found = [lr for name, lr in steps_of(tmp_path / "run") if name == "long"]
    assert len(found) == 12
    assert found[6:9] == found[9:12] != found[:3]
    assert found[6] == pytest.approx(5e-4)  # the first of two warm-up steps
    assert [v["passed"] for v in verdicts(tmp_path / "run")] == [False] * 3
    # The same from a checkpoint in the middle of the first repetition.
    import shutil

    checkpoints = tmp_path / "run" / "checkpoints"
    shutil.rmtree(checkpoints / "long-00000012")
    shutil.rmtree(checkpoints / "long-00000009")
    (tmp_path / "run" / "latest").unlink()
    assert train(load_recipe(recipe({**gate, "passkey": 0.0}))) == 0  # by the numbers of step 6
    assert [name for name, _ in steps_of(tmp_path / "run")][-6:] == ["after"] * 6


def test_after_a_repetition_the_gate_may_be_dropped_or_loosened(recipe, tmp_path):
    """Also without repeat_tokens: what was trained stays, and is judged by its own evaluation. And a run whose phase is being
    trained has nothing to do until the end of an earlier one."""
    gate = {"passkey": 1.0, "repeat_tokens": 512}
    assert train(load_recipe(recipe(gate))) == 78
    assert len(steps_of(tmp_path / "run")) == 14
    assert train(load_recipe(recipe({"passkey": 1.0}))) == 78
    assert train(load_recipe(recipe({"passkey": 0.0})), until="long") == 0
    assert train(load_recipe(recipe(None)), until="short") == 0
    assert len(steps_of(tmp_path / "run")) == 14
    assert train(load_recipe(recipe(None))) == 0
    assert [name for name, _ in steps_of(tmp_path / "run")][14:] == ["after"] * 6


def test_a_gate_that_came_after_its_phase_is_measured_then(recipe, tmp_path, caplog):
    """At the phase's last checkpoint, to the numbers of a run that measured them in the loop; without a step, and for the
    gate of the phase after it too. What only the phase before could tell is said with the way out."""
    gate = {"short_loss_rise": 5.0, "passkey": 1.0}
    for name, settings in (("whole", {}), ("run", {"eval": {}})):
        path = recipe(gate if name == "whole" else None, **settings)
        assert train(load_recipe(path, [f"output={tmp_path / name}"]), until="long") == (78 if name == "whole" else 0)
    assert not (tmp_path / "run" / "eval" / "long-00000006.json").read_text().count('recall": [{')
    assert train(load_recipe(recipe({"passkey": 1.0}))) == 78
    assert "not all that it asks for was measured at step 6, so it is evaluated again" in caplog.text
    found = [json.loads((tmp_path / r / "eval" / "long-00000006.json").read_text()) for r in ("whole", "run")]
    assert found[0]["recall"] == found[1]["recall"]
    assert found[0]["loss"] == found[1]["loss"]
    short = load_recipe(recipe({"short_loss_rise": 5.0, "short_seq_len": 32}, eval={"seq_lens": [32]}))
    assert train(short) == 78
    assert "slm eval of that checkpoint with --seq-len 32 does; give short_loss_before" in caplog.text
    assert len(steps_of(tmp_path / "run")) == 12
    loose = load_recipe(recipe({"passkey": 0.0}), ['phases.after.gate={"short_loss_rise": 5.0, "short_seq_len": 64}'])
    assert train(loose) == 0
    assert [v["passed"] for v in verdicts(tmp_path / "run")] == [False, False, True, True]


def test_what_is_over_stays_as_it_was(recipe, tmp_path, caplog):
    """A phase that is over keeps its tokens in RUN/recipe.yaml and in checkpoints whatever the recipe says now, at every
    attempt; a phase to come does not."""
    assert train(load_recipe(recipe(None)), until="long") == 0
    changed = load_recipe(recipe(None), ["phases.short.tokens=2560", "phases.after.tokens=2048"])
    for until in ("long", ""):
        caplog.clear()
        assert train(changed, until=until) == 0
        told = "phases that are over stay as they were, so this has no effect: phases.short.tokens was 1536, is 2560\n"
        assert told in caplog.text
    written = load_recipe(tmp_path / "run" / "recipe.yaml")
    assert [phase.tokens for phase in written.phases] == [1536, 1536, 2048]
    # Where what was cannot stand in the recipe any more, the recipe's own stays.
    gone = [f"data.sources={{b: {tmp_path}/tokens}}", "phases.after.tokens=2560"]
    assert train(load_recipe(recipe(None), gone)) == 0
    assert [phase.tokens for phase in load_recipe(tmp_path / "run" / "recipe.yaml").phases] == [1536, 1536, 2560]


def test_the_short_loss_is_of_the_same_text_at_both_ends(recipe, tmp_path):
    """With a limit on sequences too."""
    loaded = load_recipe(recipe({"short_loss_rise": 5.0}), ["eval.max_sequences=3"])
    assert train(loaded) == 0
    found = [json.loads((tmp_path / "run" / "eval" / f"{p}-00000006.json").read_text()) for p in ("short", "long")]
    assert len({f["loss"]["64"]["a"]["targets"] for f in found}) == 1


@pytest.mark.parametrize(
    ("gate", "changes", "message"),
    [
        ({}, {}, "asks for nothing"),
        ({"passkey": 0.9}, {"eval": {}}, "no evaluation measures it: give eval.recall with 1 among"),
        ({"multi_key": 0.9}, {}, "give eval.recall with more than 1 among its keys"),
        ({"short_loss_rise": 0.1}, {"eval": {}}, "add 64 to eval.seq_lens"),
        ({"short_loss_rise": 0.1, "short_seq_len": 32}, {}, "add 32 to eval.seq_lens"),
        ({"position_rise": 0.0}, {"data": None}, "data.validation is empty"),
        ({"position_rise": 0.0, "position_early": 65}, {}, "give a smaller position_early"),
        ({"passkey": 2}, {}, "gate.passkey is 2, and has to be 1 or less"),
        ({"short_loss_rise": 0.1, "short_seq_len": 100}, {"eval": {"seq_lens": [100]}}, "give at most 64"),
        ({"passkey": 0.9, "repeat_tokens": 256}, {}, "would never reach its peak in a repetition"),
        ({"passkey": 0.9}, {"recall_lengths": [32]}, "none in the upper half of seq_len 128"),
        ({"short_loss_rise": 0.1, "short_seq_len": 256}, {}, "longer than the phase's own seq_len 128"),
        ({"short_loss_rise": 0.1, "short_seq_len": 32}, {}, "not measured at the end of this phase and phase short"),
        ({"passkey": 0.9, "repeats": 3}, {}, "repeats is 3, which has no effect without repeat_tokens: remove it"),
        ({"passkey": 0.9, "short_seq_len": 64}, {}, "short_seq_len is 64, which has no effect without short_loss_rise"),
        ({"passkey": 0.9, "short_loss_before": 2}, {}, "short_loss_before is 2, which has no effect without short_loss"),
        ({"passkey": 0.9, "position_early": 16}, {}, "position_early is 16, which has no effect without position_rise"),
        ({"position_rise": 0, "position_early": 16, "short_seq_len": 64}, {}, "no effect beside position_early"),
    ],
)  # fmt: skip
def test_a_gate_without_its_evaluation_is_refused(recipe, tmp_path, gate, changes, message):
    if lengths := changes.pop("recall_lengths", None):
        tree = yaml.safe_load(recipe(gate).read_text())
        changes = {"eval": {"recall": {**tree["eval"]["recall"], "lengths": lengths}}}
    if "data" in changes:
        changes = {"data": {"sources": {"a": str(tmp_path / "tokens")}}, "eval": {}}
    with pytest.raises(UserError) as caught:
        load_recipe(recipe(gate, **changes))
    assert message in str(caught.value)


def test_a_gate_of_the_first_phase_needs_a_number_to_compare_with(recipe):
    path = recipe({"short_loss_rise": 0.1})
    tree = yaml.safe_load(path.read_text())
    tree["phases"] = tree["phases"][1:2]
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError, match="would say short_seq_len and short_loss_before: give both, the loss from"):
        load_recipe(path)
    tree["phases"][0]["gate"] |= {"short_seq_len": 64}
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(
        UserError, match="would say short_loss_before: give it, the loss from slm eval MODEL --seq-len 64"
    ):
        load_recipe(path)
    tree["phases"][0]["gate"] |= {"short_seq_len": 64, "short_loss_before": 5.5}
    path.write_text(yaml.safe_dump(tree))
    phase = load_recipe(path).phases[0]
    found = {"loss": {"64": {"a": {"loss": 5.55, "targets": 9}}, "128": {"a": {"loss": 5.0, "targets": 9}}}}
    assert [holds for holds, _ in judge(phase, [], found, None)] == [True]
    found["loss"]["64"]["a"]["loss"] = 5.7
    told = "held-out loss at 64 tokens 5.7000, before the phase 5.5000: +0.2000 nats, at most +0.1 is allowed: 0.1000 too much"
    assert judge(phase, [], found, None) == [(False, told)]
    found["loss"]["64"]["a"]["loss"] = None  # as JSON has what is not finite
    assert judge(phase, [], found, None) == [(False, "held-out loss at 64 tokens is not a number now")]


def test_an_extension_without_long_documents_is_refused(recipe, tmp_path, caplog):
    """And a gate on positions that no held-out document reaches."""
    path = recipe({"passkey": 0.0})
    filters = {"a": {"max_doc_tokens": 100}}
    assert train(load_recipe(path, [f"phases.long.filters={json.dumps(filters)}"])) == 2
    assert "phases.long.seq_len is 128, and its longest document has 90 tokens" in caplog.text
    # Documents of a source that is not drawn do not help.
    fingerprint = SLMTokenizer().fingerprint
    make_dataset(tmp_path / "brief", lengths=[70, 40] * 30, vocab_size=259, fingerprint=fingerprint)
    brief = [f"data.sources.b={tmp_path / 'brief'}", "phases.long.mixture={a: 0, b: 1}"]
    assert train(load_recipe(path, brief)) == 2
    assert "phases.long.seq_len is 128, and its longest document has 70 tokens" in caplog.text
    make_dataset(
        tmp_path / "held-out", seed=5, lengths=[90, 40] * 12, vocab_size=259,
        fingerprint=SLMTokenizer().fingerprint,
    )  # fmt: skip
    assert train(load_recipe(recipe({"position_rise": 0.0}))) == 2
    assert "the longest of data.validation has 90" in caplog.text


def test_phase_by_phase_as_separate_jobs(recipe, tmp_path, caplog):
    """--until leaves at a phase's end; what later phases need does not matter yet, and what earlier ones needed no more. The
    steps are those of one job."""
    path = recipe({"passkey": 0.0})
    assert train(load_recipe(path, [f"output={tmp_path}/whole"])) == 0
    beyond = ["phases.after.sequence_parallel=2"]  # of a job with more ranks
    assert train(load_recipe(path, beyond), until="short") == 0
    assert "phase short is over (--until)" in caplog.text
    found, _ = evaluate_model(str(tmp_path / "run"), [], 0, 4, 4)  # at the length of its own phase, not of the last one
    assert found.seq_len == 64
    assert train(load_recipe(path, ["phases.short.sequence_parallel=2", *beyond]), until="long") == 0
    over = ["phases.short.sequence_parallel=2", "phases.long.sequence_parallel=2"]  # its gate holds
    assert train(load_recipe(path, over)) == 0
    assert steps_of(tmp_path / "run") == steps_of(tmp_path / "whole")
    losses = [[e["loss"] for e in map(json.loads, (tmp_path / r / "metrics.jsonl").read_text().splitlines()) if "loss" in e]
              for r in ("run", "whole")]  # fmt: skip
    assert losses[0] == losses[1]
    assert train(load_recipe(path), until="nowhere") == 2
    assert "no phase of the recipe (short, long, after)" in caplog.text
