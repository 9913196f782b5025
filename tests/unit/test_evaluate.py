"""Held-out loss by position against a plain loop, and what becomes of it: names, JSON, tables, the picture."""

import json
import math

import numpy as np
import pytest
import torch

from slm import SLMForCausalLM
from slm.data.batches import EvaluationBatches, assemble
from slm.errors import UserError
from slm.evaluate import ALL, Bucket, Findings, HeldOut, Result, bucket_of, evaluate, examine
from slm.findings import as_dict, draw, metrics_rows, percent, plot, sentences
from slm.loading import ModelScorer
from slm.model.config import ModelConfig
from slm.pictures import check_picture
from slm.recall.samples import Cell
from slm.recall.score import Found
from tests.shards import make_dataset

CPU = torch.device("cpu")


def test_buckets_are_powers_of_two_of_the_tokens_seen():
    """Position 0 has seen 1 token; bucket b takes more than 2^(b-1) and at most 2^b."""
    positions = torch.arange(3000)
    expected = [math.ceil(math.log2(position + 1)) for position in range(3000)]
    assert bucket_of(positions).tolist() == expected
    assert bucket_of(torch.tensor([[2**20 - 1, 2**20]])).tolist() == [[20, 21]]


@pytest.mark.parametrize("seq_len", [64, 50])
def test_loss_by_position_is_a_plain_loop(tmp_path, seq_len):
    """Every label's loss, put into its bucket one by one in numpy; sources apart and together; full pieces apart."""
    torch.manual_seed(0)
    sources = {
        name: EvaluationBatches(make_dataset(tmp_path / name, seed=seed), seq_len, 3, max_sequences=20)
        for name, seed in (("a", 1), ("b", 2))
    }
    kept = {name: list(batches) for name, batches in sources.items()}
    losses = {id(batch): torch.rand(3, seq_len) * (batch.labels_BT >= 0) for b in kept.values() for batch in b}
    found = evaluate(lambda batch: losses[id(batch)], kept, CPU)
    assert list(found) == ["a", "b", ALL]
    for name, result in found.items():
        every, full = np.zeros((20, 2)), np.zeros((20, 2))
        for batch in [x for n, b in kept.items() if name in (n, ALL) for x in b]:
            bounds = sorted(set(batch.piece_bounds.tolist()))
            loss, label = losses[id(batch)].flatten(), batch.labels_BT.flatten()
            for start, end in zip(bounds, bounds[1:], strict=False):
                for at in range(start, end):
                    if label[at] >= 0:
                        row = [float(loss[at]), 1]
                        every[math.ceil(math.log2(at - start + 1))] += row
                        full[math.ceil(math.log2(at - start + 1))] += [x * (end - start == seq_len) for x in row]
        for wanted, got in ((every, result.by_position), (full, result.by_position_full)):
            assert [b.up_to for b in got] == [2**i for i, row in enumerate(wanted) if row[1]]
            assert [b.num_targets for b in got] == [row[1] for row in wanted if row[1]]
            assert [b.loss_sum for b in got] == pytest.approx([row[0] for row in wanted if row[1]], abs=1e-9)
        assert result.by_position_full
        assert result.num_targets == every[:, 1].sum()
        assert result.loss_sum == pytest.approx(every[:, 0].sum(), abs=1e-9)


def test_an_evaluation_of_nothing(tmp_path):
    """No source, or one without a document: no targets, no bucket, and nothing breaks."""
    empty = EvaluationBatches(make_dataset(tmp_path, lengths=[]), 16, 2)
    for sources in ({}, {"a": empty}):
        found = Findings(16, {16: evaluate(lambda batch: batch.tokens_BT, sources, CPU)}, [])
        assert found.main[ALL] == Result(0, 0)
        assert sentences(found) == []
        assert found.lower_than(None) is None
        assert as_dict(found)["recall"] == []
        assert [k for k in metrics_rows(found) if "position" in k] == []


def test_the_scorer_of_a_model_and_other_lengths(tmp_path):
    """A model's own mean loss comes out, at each length that is asked for."""
    model = SLMForCausalLM(ModelConfig.preset("cpu-tiny"), seed=1).requires_grad_(False)
    dataset = make_dataset(tmp_path, lengths=[64] * 4)
    by_length = {n: EvaluationBatches(dataset, n, 2) for n in (64, 16)}
    found = examine(ModelScorer(model), HeldOut(64, {"a": by_length[64]}, {16: {"a": by_length[16]}}), CPU)
    for n in (64, 16):
        sums = [
            model(b.tokens_BT, b.positions_BT, b.piece_bounds, b.labels_BT) for b in EvaluationBatches(dataset, n, 2)
        ]
        expected = sum(float(s) for s, _ in sums) / sum(int(c) for _, c in sums)
        assert found.losses[n]["a"].loss == pytest.approx(expected, abs=1e-5)
    assert found.losses[16]["a"].loss > 0
    rows = metrics_rows(found)
    assert rows["eval/a/loss"] == found.main["a"].loss
    assert found.lower_than(None) == found.lower_than(100.0) == found.main[ALL].loss
    assert found.lower_than(found.main[ALL].loss) is None
    assert rows["eval@16/a/loss"] == found.losses[16]["a"].loss
    assert len(sentences(found)) == 2


@pytest.fixture
def findings():
    """Two sources, one other length, a grid of two lengths, three depths, 1 and 4 keys; one loss is not a number."""

    def result(*losses):
        buckets = tuple(Bucket(2**b, loss * 10, 10) for b, loss in enumerate(losses))
        return Result(sum(b.loss_sum for b in buckets), 10 * len(losses), buckets, buckets[:0])

    recall = [
        Found(Cell(keys, length, depth, 3), 4, (depth + 2) if length == 32 else 4 - depth, 8.0, 20)
        for length in (32, 64)
        for keys in (1, 4)
        for depth in range(3)
    ]
    losses = {"a": result(5, 4, 3), "b": result(6, float("nan"), 4), ALL: result(5.5, 4.5, 3.5)}
    return Findings(64, {64: losses, 32: {"a": result(5, 4), ALL: result(5, 4)}}, recall)


def test_names_in_the_log(findings):
    rows = metrics_rows(findings)
    assert rows["eval/a/position/4"] == 3
    assert rows["eval@32/a/loss"] == 4.5
    grid = {k.removeprefix("eval/passkey/64/"): v for k, v in rows.items() if k.startswith("eval/passkey/64/")}
    assert grid == {"0": 1.0, "33": 0.75, "67": 0.5, "mean": 0.75, "worst": 0.5, "answer_loss": 0.4}
    assert rows["eval/recall4/32/67"] == 1.0
    assert sentences(findings)[2] == "pass key: 32 tokens 75% (worst depth 50%), 64 tokens 75% (worst depth 50%)"


def test_results_for_programs_are_json(findings):
    """Also where a loss is not a number."""
    read = json.loads(json.dumps(as_dict(findings, {"a": 4.0}), allow_nan=False))
    assert read["loss"]["64"]["a"]["by_position"][2] == {"up_to": 4, "targets": 10, "loss": 3.0}
    assert read["loss"]["64"]["a"]["bits_per_byte"] == pytest.approx(4 / math.log(2) / 4)
    assert read["loss"]["64"]["b"]["bits_per_byte"] is None
    assert read["loss"]["64"]["b"]["by_position"][1]["loss"] is None
    assert list(read["loss"]["32"]) == ["a"]  # the sum over one source is that source
    cell = next(c for c in read["recall"] if (c["keys"], c["length"], c["depth_percent"]) == (4, 64, 67))
    assert cell | {"answer_loss": 0} == {
        "task": "recall4", "keys": 4, "length": 64, "depth_percent": 67, "samples": 4, "exact": 2, "accuracy": 0.5,
        "answer_loss": 0,
    }  # fmt: skip


def test_tables_and_picture(findings, tmp_path, capsys):
    """Drawn on the terminal and as a file; what cannot be drawn is said before."""
    draw(findings, {"a": 4.0}, by_position=True)
    text = capsys.readouterr().out
    for part in ("pass key", "1 of 4 keys", "33 - 67 %", "100%", "nan", "up to", "bits per byte", "1.4427"):
        assert part in text, text
    for what in (findings, Findings(64, findings.losses, []), Findings(64, {64: {ALL: Result(0, 0)}}, [])):
        plot(what, tmp_path / "x.png")
        assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
    for path in (tmp_path / "absent" / "x.png", tmp_path / "x.jpeg2000"):
        with pytest.raises(UserError, match=r"--plot .* is no picture"):
            check_picture(path)


def test_percentages_do_not_round_failures_away():
    assert [percent(x) for x in (0, 0.004, 0.5, 0.996, 1)] == ["0%", "0.4%", "50%", "99.6%", "100%"]


def test_an_empty_row_is_no_full_piece():
    """Rows that only fill up a batch hold padding from position 0 on: they have no targets."""
    batch = assemble([[(np.arange(8), None)], []], 8, 0, 1)
    found = evaluate(lambda b: (b.labels_BT >= 0).float(), {"a": [batch]}, CPU)
    assert sum(b.num_targets for b in found["a"].by_position_full) == 7
