"""Steps that go wrong on one rank of two: all ranks skip the same step, go back together, and find who differs or is slow."""

import json
from pathlib import Path

import pytest
import yaml

from slm import checkpoint
from slm.data.batches import PhaseData
from slm.data.tokens import TokenDataset
from slm.ledger import goodput, read_events
from slm.parallel import Share
from tests.distributed.ranks import run_ranks
from tests.faults.digest import tensors
from tests.shards import make_dataset

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("wrong_steps.py")
STEPS = 44


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wrong-steps") / "tokens"
    make_dataset(folder)
    return folder


NAME = "model.layers.1.mlp.down_proj.weight"
# name: (ZeRO stage, faults, changes to the recipe)
RUNS = {
    **{f"bad-{stage}": (stage, {"nan": [1, [2]], "infinite": [0, [3]], "spike": [1, [40]]}, {}) for stage in range(4)},
    "untouched": (2, {"spike": [0, [STEPS]]}, {"checkpoint": {"every_steps": 1, "keep_last": 99}}),
    "back": (1, {"nan": [1, [10, 11, 12]]}, {"safety": {"skips_before_rollback": 3, "rollbacks": 1}}),
    "window": (
        2,
        {"nan": [0, [10, 11, 12, 13]]},
        {"safety": {"skips_before_rollback": 4}, "checkpoint": {"every_steps": 1, "keep_last": 2}},
    ),
    "again": (0, {"nan": [0, list(range(2, 99))]}, {"safety": {"skips_before_rollback": 2, "rollbacks": 2}}),
    # At stage 1 the next update would bring the owner's weights again.
    **{
        f"flip-{stage}": (
            stage,
            {"flip": [1, 6, NAME]},
            {"safety": {"check_replicas_every_steps": 3}, "checkpoint": {"every_steps": 5}},
        )
        for stage in (0, 1)
    },
    "slow": (0, {"slow": [1, 0.2]}, {"log": {"every_steps": 10}}),
    **{f"unreadable-{stage}": (stage, {"unreadable": [1]}, {}) for stage in (1, 3)},  # begins from `untouched`
}


@pytest.fixture(scope="module")
def runs(tokens, tmp_path_factory):
    """All of them, one after the other in one group of 2 ranks: (folder of the runs, what was printed)."""
    folder = tmp_path_factory.mktemp("runs")
    jobs = []
    for name, (stage, faults, changes) in RUNS.items():
        tree = {
            "name": name,
            "output": str(folder / name),
            "model": "cpu-tiny",
            "data": {"sources": {"a": str(tokens)}},
            "phases": [
                {
                    "name": "main",
                    "tokens": STEPS * 128,
                    "seq_len": 32,
                    "batch_tokens": 128,
                    "micro_batch": 2,
                    "schedule": {"type": "constant"},
                    "deepspeed": str(ROOT / f"ds_configs/zero{stage}.json"),
                }
            ],
            "checkpoint": {"every_steps": 4},
            "log": {"every_steps": 1},
            **changes,
        }
        if "unreadable" in faults:
            tree["init_from"] = {"path": str(folder / "untouched"), "optimizer": True}
        recipe = folder / f"{name}.yaml"
        recipe.write_text(yaml.safe_dump(tree))
        jobs.append([str(recipe), faults])
    return folder, run_ranks(SCRIPT, [json.dumps(jobs)], 2).stdout


def ended(run_dir):
    """(exit code, reason)"""
    record = json.loads((run_dir / "exit.json").read_text())
    return record["code"], record["reason"]


def of_kind(run_dir, kind):
    return [event for event in read_events(run_dir) if event["kind"] == kind]


def losses(run_dir):
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def same_state(one, other):
    return tensors(checkpoint.Reader(one)) == tensors(checkpoint.Reader(other))


@pytest.mark.parametrize("stage", range(4))
def test_a_bad_step_on_one_rank_is_skipped_by_all(runs, stage):
    """NaN, an infinite gradient and a spike, each on one rank: the same steps are skipped on both, Adam has not counted them,
    and the events say why and which data it was."""
    run_dir = runs[0] / f"bad-{stage}"
    assert ended(run_dir)[0] == 0
    skips = of_kind(run_dir, "skip")
    assert [(event["step"], event["data_step"]) for event in skips] == [(2, 1), (3, 2), (40, 39)]
    assert [event["reason"].split()[0] for event in skips] == ["gradient", "gradient", "loss"]
    state = checkpoint.Reader(run_dir / "latest").state
    assert state["optimizer_steps"] == STEPS - 3
    assert len(state["losses"]) == STEPS - 3


def test_weights_are_untouched_by_a_skipped_step(runs):
    """A spike at the last step, after which a phase is saved: the checkpoints of the step before and of this one hold the same
    weights and moments, bit by bit; those of the two steps before do not."""
    run_dir = runs[0] / "untouched"
    assert [event["step"] for event in of_kind(run_dir, "skip")] == [STEPS]
    folders = {step: run_dir / "checkpoints" / f"main-{step:08d}" for step in range(STEPS - 2, STEPS + 1)}
    assert same_state(folders[STEPS - 1], folders[STEPS])
    assert not same_state(folders[STEPS - 2], folders[STEPS - 1])


def test_many_in_a_row_go_back_and_leave_the_data_out(runs, tokens):
    """Three bad steps in a row go back to the checkpoint before them and pass over the data up to there: the steps that are
    trained again are of the data that follows."""
    run_dir = runs[0] / "back"
    assert ended(run_dir)[0] == 0
    (back,) = of_kind(run_dir, "rollback")
    assert (back["from_step"], back["to_step"], back["steps_left_out"]) == (12, 8, 4)
    position = checkpoint.Reader(run_dir / "latest").state["position"]
    assert (position["step"], position["steps_left_out"], position["rollbacks"]) == (STEPS, 4, 1)
    assert sorted(losses(run_dir)) == list(range(1, STEPS + 1))  # no step twice in the log
    found = goodput(read_events(run_dir))
    assert (found["steps_lost"], found["rollbacks"], found["skipped"]) == (4, 1, 3)
    # Document tokens are counted of what was trained on, which tells the data of the steps.
    data = PhaseData({"a": TokenDataset(tokens)}, None, seq_len=32, seed=1234, phase_name="main")

    def tokens_of(step):
        return sum(batch.num_tokens for batch in data.step_batches(step, global_batch=4, micro_batch=4, share=Share()))

    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    seen = [row["tokens"] for row in rows if "loss" in row]
    trained = [b - a for a, b in zip([0, *seen], seen, strict=False)]
    assert trained == [tokens_of(step + (4 if step >= 8 else 0)) for step in range(STEPS)]


def test_the_checkpoint_before_the_bad_steps_is_still_there(runs):
    """With a save after each step and two of them kept: nothing is saved while steps are skipped, so it goes back to step 9."""
    run_dir = runs[0] / "window"
    assert ended(run_dir)[0] == 0
    (back,) = of_kind(run_dir, "rollback")
    assert (back["from_step"], back["to_step"], back["steps_left_out"]) == (13, 9, 4)


def test_bad_steps_that_do_not_end_end_the_run(runs):
    """Two rollbacks to the beginning, as there is no checkpoint yet, and then exit code 76 with what to do."""
    run_dir = runs[0] / "again"
    code, reason = ended(run_dir)
    assert code == 76
    assert [(e["from_step"], e["to_step"]) for e in of_kind(run_dir, "rollback")] == [(3, 0), (2, 0)]
    assert "steps in a row were skipped" in reason
    assert "lower optim.lr" in reason


@pytest.mark.parametrize("stage", [0, 1])
def test_a_weight_that_changes_on_one_rank_is_found(runs, stage):
    """1e-3 added to one element of one weight of rank 1: the run ends with code 80 before the next save, naming the tensor;
    what was saved before is whole."""
    run_dir = runs[0] / f"flip-{stage}"
    code, reason = ended(run_dir)
    assert code == 80
    assert f"{NAME} (no majority: ranks 0, 1)" in reason
    assert "after step 6" in reason
    assert checkpoint.choose(run_dir).name == "main-00000005"


@pytest.mark.parametrize("stage", [1, 3])
def test_what_one_rank_cannot_read_ends_all_at_once(runs, stage):
    """A checkpoint that rank 1 finds broken while it fills its engine: rank 0, which would wait for its weights, leaves with the
    same error and code, and not because the other has gone."""
    run_dir = runs[0] / f"unreadable-{stage}"
    assert ended(run_dir) == (4, "rank 1 finds a piece of it broken")
    for rank in (0, 1):
        log = (run_dir / "logs" / f"rank-{rank}.log").read_text()
        assert "ERROR slm: Corrupt file: rank 1 finds a piece of it broken" in log
        assert "has gone" not in log


def test_most_ranks_agreeing_names_the_others():
    """On 4 ranks: who is in the minority is named, one or several; two against two is nobody's majority; equal is equal. All
    ranks say the same."""
    cases = {"-": "the same", "2": "weight of rank 2", "0": "weight of rank 0", "1,2,3": "weight of rank 0",
             "2,3": "weight (no majority: ranks 0, 1, 2, 3)"}  # fmt: skip
    printed = run_ranks(Path(__file__).with_name("odd_replica.py"), [*cases], 4).stdout
    said = dict(line.removeprefix("case ").split(": ", 1) for line in printed.splitlines() if line.startswith("case "))
    assert list(said) == list(cases)
    for case, words in cases.items():
        assert said[case].endswith(words), said


def test_a_slow_rank_is_named(runs):
    """A rank that takes 200 ms longer is named within 20 steps."""
    found = of_kind(runs[0] / "slow", "straggler")
    assert found
    assert found[0]["step"] <= 20
    assert {event["rank"] for event in found} == {1}
    assert "rank 1 is slow" in runs[1]
