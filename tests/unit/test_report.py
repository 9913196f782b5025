"""The page of `slm report`: what is read of a run's folder, what is drawn of it, and that nothing in it is markup."""

import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from slm.errors import EnvironmentProblem, UserError
from slm.ledger import how_it_ended
from slm.metrics import MetricsLogger
from slm.report.charts import Axis, Band, Line, Mark, axis, line_chart, number, smooth, thinned
from slm.report.curves import View
from slm.report.page import SECTIONS, UNREADABLE, build_page, write_page
from slm.report.record import Column, Record, Span, read_metrics, read_record

ROOT = Path(__file__).parents[2]
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&<!--"


class Page(HTMLParser):
    """Elements by name, text outside of style and script, and the charts' values; fails where tags do not match."""

    EMPTY = frozenset({"meta", "link", "br", "img", "path", "rect"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open, self.elements, self.text, self.scripts = [], [], [], []
        self.feed(page)
        self.close()
        assert not self.open
        self.unreadable = page.count(UNREADABLE)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.EMPTY:  # of SVG: <path></path> around a title
            assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif self.open and self.open[-1] != "style":
            self.text.append(data)

    def charts(self):
        """{series: [[x, y], …]} of each chart."""
        return [{s["label"]: s["points"] for s in json.loads(script)["series"]} for script in self.scripts[:-1]]


@pytest.fixture
def run(tmp_path):
    """A function: rows of metrics and events -> a run's folder, written as a run writes it."""

    def write(rows, events=(), recipe=None, name="run", **files):
        folder = tmp_path / name
        open_metrics = dict(tensorboard=False, wandb=None, run_name="t", config={}, rank=0)
        metrics = MetricsLogger(folder, start_step=0, **open_metrics)
        metrics.event("start", world_size=1, precision="float32", step=0, age=1.0)
        for step, values in rows:
            metrics.log(step, values)
        for kind, fields in events:
            metrics.event(kind, **fields)
        metrics.close()
        tree = {
            "name": name,
            "phases": [{"name": "main", "tokens": 1000, "seq_len": 10, "batch_tokens": 20}],
            **(recipe or {}),
        }
        (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
        for path, text in files.items():
            (folder / path.replace("__", "/")).parent.mkdir(exist_ok=True)
            (folder / path.replace("__", "/")).write_text(text)
        return folder

    return write


def row(step, loss, phase="main", **more):
    return step, {"phase": phase, "loss": loss, "lr": 1e-3, "tokens": 20 * step, "grad_norm": 1.0, **more}


# ----------------------------------------------------------------------------------------------- reading
def test_of_steps_that_were_computed_again_the_newest_counts(tmp_path):
    """Killed after step 4, gone on from 2 (which a run cleans up, and a copy of its file may not have), in two calls a step."""
    lines = [
        {"step": 1, "phase": "a", "loss": 5.0}, {"step": 2, "phase": "a", "loss": 4.0}, {"step": 2, "eval/x/loss": 4.5},
        {"step": 3, "phase": "b", "loss": 9.0}, {"step": 4, "phase": "b", "loss": 9.5}, {"step": 4, "eval/x/loss": 9.7},
        {"step": 3, "phase": "a", "loss": 3.0}, {"step": 4, "phase": "b", "loss": None}, {"step": 5, "phase": "b", "loss": 2.0},
    ]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    columns, spans, damaged = read_metrics(tmp_path / "metrics.jsonl")
    np.testing.assert_array_equal(columns["loss"].steps, [1, 2, 3, 4, 5])
    np.testing.assert_array_equal(columns["loss"].values, [5, 4, 3, math.nan, 2])
    np.testing.assert_array_equal(columns["eval/x/loss"].steps, [2])
    assert spans == [Span("a", 0, 3), Span("b", 3, 5)]
    assert damaged == 0


def test_damaged_lines_are_passed_over_and_counted(tmp_path):
    """Cut short, no object, no step, a step that is none, bytes that are no text; what is between them stays."""
    good = [json.dumps({"step": step, "phase": "p", "loss": float(step)}).encode() for step in (1, 2, 3)]
    bad = [
        b'{"step": 2, "lo',
        b"[1]",
        b'{"loss": 3.0}',
        b'{"step": true, "loss": 1.0}',
        b'{"step": -4}',
        b"\xff\xfe\x00",
        b"null",
    ]
    (tmp_path / "metrics.jsonl").write_bytes(
        b"\n".join([good[0], *bad[:4], good[1], *bad[4:], b"", good[2], b'{"step": 4, "loss"'])
    )
    columns, spans, damaged = read_metrics(tmp_path / "metrics.jsonl")
    np.testing.assert_array_equal(columns["loss"].values, [1, 2, 3])
    assert spans == [Span("p", 0, 3)]
    assert damaged == len(bad) + 1


def test_a_rollback_as_the_logger_writes_it(run, tmp_path):
    """MetricsLogger.go_back itself: its file has each step once; the page marks where training went back."""
    folder = run([row(1, 5.0), row(2, 4.0)])
    metrics = MetricsLogger(folder, tensorboard=False, wandb=None, run_name="t", config={}, rank=0, start_step=2)
    for step, loss in ((3, 3.9), (4, 90.0)):
        metrics.log(step, row(step, loss)[1])
    metrics.event("skip", step=4, reason="a spike", phase="main", data_step=3)
    metrics.event("rollback", from_step=4, to_step=2, steps_left_out=2)
    metrics.go_back(2)
    for step, loss in ((3, 3.5), (4, 3.0), (5, 2.5)):
        metrics.log(step, row(step, loss)[1])
    metrics.close()
    record = read_record(folder)
    np.testing.assert_array_equal(record.columns["loss"].values, [5.0, 4.0, 3.5, 3.0, 2.5])
    assert [(mark.x, mark.kind) for mark in View.of([record], "steps").marks()] == [(4, "bad"), (4, "bad")]
    assert "gone back from step 4 to 2" in build_page([record])


def test_events_that_are_none(run):
    """Lines of events.jsonl that hold no event do not stop goodput, the text of slm report, or the page."""
    folder = run([row(1, 5.0)])
    with open(folder / "events.jsonl", "a") as file:
        file.write('null\n[]\n{"a":1}\n{"kind": "skip"}\n{"time": 1.0}\n{"kind": 3, "time": 1.0}\n')
        file.write('{"kind": "start", "time": 1}\n{"kind": "start", "time": 1, "step": 0, "age": "x"}\n')
        file.write(
            '{"kind": "seconds", "time": 1, "step": 1}\n{"kind": "seconds", "time": 1, "step": 1, "seconds": [1]}\n'
        )
        file.write(
            '{"kind": "seconds", "time": 1, "step": 1, "seconds": {"step": null}}\n{"kind": "rollback", "time": 1}\n'
        )
        file.write('{"kind": "hang", "time": 1, "seconds": "long"}\n{"kind": "done", "time": NaN}\n{cut')
    for ended in ("[]", '{"code": 0, "reason": "done", "time": 1e300}'):
        (folder / "exit.json").write_text(ended)
        assert "is damaged" in how_it_ended(folder)
    assert [event["kind"] for event in read_record(folder).events] == ["start"]


# --------------------------------------------------------------------------------------------- arithmetic
values = st.lists(st.one_of(st.floats(-1e6, 1e6), st.just(math.nan)), min_size=1, max_size=300)


@given(values, st.integers(1, 40))
def test_thinning_keeps_every_buckets_extremes(y, buckets):
    """All finite values lie within the kept ones of their bucket; what is kept was there, in its order."""
    y = np.array(y)
    x = np.arange(len(y), dtype=float)
    kept_x, kept_y = thinned(x, y, buckets)
    assert len(kept_x) <= max(2 * buckets, min(len(x), 2 * buckets))
    assert (np.diff(kept_x) > 0).all()
    np.testing.assert_array_equal(y[kept_x.astype(int)], kept_y)
    if np.isfinite(y).any():
        assert np.nanmin(kept_y) == np.nanmin(y)
        assert np.nanmax(kept_y) == np.nanmax(y)


@given(values, st.integers(0, 20))
def test_smoothing_is_the_mean_of_a_window(y, half):
    """Against the mean of each window, one by one; the window is as wide before as after, also at the ends."""
    y = np.array(y)
    for i, found in enumerate(smooth(y, half)):
        width = min(half, i, len(y) - 1 - i)
        window = y[i - width : i + width + 1]
        if math.isnan(y[i]):
            assert math.isnan(found)
        else:
            assert found == pytest.approx(window[np.isfinite(window)].mean(), rel=1e-6, abs=1e-4)


@settings(max_examples=200)
@given(st.floats(1e-9, 1e12), st.floats(1.0001, 1e9), st.booleans())
def test_ticks_are_round_and_within_the_axis(low, ratio, log):
    """Not too many, in order, none outside, and each is written differently from the others."""
    scale = Axis(low, low * ratio, log)
    ticks = scale.ticks()
    assert len(ticks) <= 13
    assert ticks == sorted(set(ticks))
    for tick in ticks:
        assert -1e-6 <= float(scale.places(np.array(tick))) <= 1 + 1e-6
    assert len({label for _, label in scale.labels()}) == len(ticks)
    if not log or ratio >= 8:
        assert len(ticks) >= 1


def test_places_on_an_axis():
    """Linear and logarithmic; what a logarithmic one cannot show is a gap."""
    np.testing.assert_allclose(Axis(10, 20).places(np.array([10, 15, 20])), [0, 0.5, 1])
    np.testing.assert_allclose(Axis(1, 10_000, log=True).places(np.array([1, 100, 10_000])), [0, 0.5, 1])
    assert np.isnan(Axis(1, 10, log=True).places(np.array([0.0, -1.0, math.nan]))).all()
    assert axis([np.array([math.nan])]) is None
    assert axis([np.array([-1.0, 0.0])], log=True) is None
    flat = axis([np.array([3.0, 3.0])])
    assert flat.low < 3 < flat.high


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0"), (1234, "1,234"), (12_345, "12.35k"), (3_301_304, "3.301M"), (1.2e9, "1.2B"), (0.0015, "0.0015"), (3e-6, "3e-06"),
     (-2.5, "-2.5"), (math.nan, "-"), (math.inf, "-")],
)  # fmt: skip
def test_numbers_are_short(value, shown):
    """As on axes and tiles."""
    assert number(value) == shown


def test_a_curve_is_where_its_values_are():
    """The path's points, taken back through the axes, are the values; a gap begins a new stretch."""
    x, y = np.array([0.0, 10, 20, 30, 40]), np.array([1.0, 10.0, math.nan, 100.0, 31.6227766])
    chart = line_chart("t", [Line("l", x, y)], x_label="step", log_y=True)
    path = re.search(r'<path class="curve c0" d="([^"]*)"', chart)[1]
    assert path.count("M") == 2
    points = np.array(re.findall(r"[ML]([-\d.]+) ([-\d.]+)", path), dtype=float)
    edge = 0.015 * 40
    np.testing.assert_allclose(points[:, 0] / 1000 * (40 + 2 * edge) - edge, [0, 10, 30, 40], atol=0.01)
    top, bottom = 100 * 100**0.05, 1 / 100**0.05
    np.testing.assert_allclose(
        bottom * (top / bottom) ** (1 - points[:, 1] / 1000), [1, 10, 100, 31.6227766], rtol=1e-3
    )


def test_a_spike_does_not_press_the_curve_flat():
    """One value of 1e6 among a hundred of about 1: the faint line may leave the picture, the axis stays."""
    y = 1 + 0.1 * np.sin(np.arange(200.0))
    raw = y.copy()
    raw[100] = 1e6
    chart = line_chart("t", [Line("l", np.arange(200.0), y, raw=raw)], x_label="step")
    labels = [float(t) for t in re.findall(r'<span style="top:[\d.]+%">([-\d.]+)</span>', chart)]
    assert max(labels) < 2


def test_nothing_to_show_is_no_chart():
    """Only gaps; nothing positive on a logarithmic axis."""
    x = np.array([1.0, 2.0])
    assert line_chart("t", [Line("l", x, np.array([math.nan, math.nan]))], x_label="step") == ""
    assert line_chart("t", [Line("l", x, np.array([0.0, -1.0]))], x_label="step", log_y=True) == ""
    assert line_chart("t", [], x_label="step") == ""


# ------------------------------------------------------------------------------------------------ the page
def test_hostile_text_stays_text_and_secrets_are_not_in_it(run, monkeypatch):
    """Names of run, phase, source, metric, task, event and reasons that are markup; a password in an event and in the recipe.
    In the page there are no scripts and images but its own, and each string is there as text."""
    monkeypatch.setenv("MY_API_TOKEN", "s3cr3t-s3cr3t-value")
    names = {"teacher": "T" + HOSTILE, "source": "S" + HOSTILE, "phase": "P" + HOSTILE}
    rows = [
        row(
            step,
            5.0 - step,
            names["phase"] + str(step // 3),
            **{f"teacher/{names['teacher']}/loss": 2.0, "loss/ce": 3.0},
        )
        for step in (1, 2, 3, 4)
    ]
    rows += [(4, {f"eval/{names['source']}/loss": 3.0, f"eval/K{HOSTILE}/8/mean": 0.5})]
    told = {"phases": {names["phase"]: {names["source"]: dict(share=1.0, documents=1, sequences=2, tokens=20)}}}
    events = [
        ("data", told),
        ("skip", dict(step=2, reason=HOSTILE + "s3cr3t-s3cr3t-value")),
        (HOSTILE, dict(step=3, **{HOSTILE: [HOSTILE, {HOSTILE: HOSTILE}]})),
    ]
    recipe = {
        "name": "N" + HOSTILE,
        "phases": [
            {
                "name": names["phase"],
                "tokens": 100,
                "seq_len": 10,
                "batch_tokens": 20,
                "mixture": {names["source"]: 1.0},
            }
        ],
        "data": {"sources": {names["source"]: "http://user:hunter2hunter2@host/x"}, "validation": {}},
        "secret": "s3cr3t-s3cr3t-value",
    }
    evaluation = {
        "seq_len": 8,
        "loss": {
            "8": {names["source"]: {"loss": 3.0, "by_position": [{"up_to": 1, "loss": 3.0}, {"up_to": 8, "loss": 2.0}]}}
        },
        "recall": [{"task": HOSTILE, "keys": 1, "length": 8, "depth_percent": 0, "samples": HOSTILE, "accuracy": 1.0}],
    }
    stopped = {"code": 5, "meaning": "M" + HOSTILE, "reason": "R" + HOSTILE}
    files = {"eval__x-00000001.json": json.dumps(evaluation), "exit.json": json.dumps(stopped)}
    one = run(rows, events, recipe, **files)
    page = build_page([read_record(one)])
    found = Page(page)
    assert not found.unreadable
    scripts = [attributes for tag, attributes in found.elements if tag == "script"]
    assert [s for s in scripts if s.get("type") != "application/json"] == [{}]  # ours
    assert not [tag for tag, _ in found.elements if tag == "img"]
    assert not [name for _, attributes in found.elements for name in attributes if name.startswith("on")]
    told = "\n".join(found.text)
    for text in ("N" + HOSTILE, "M" + HOSTILE, "R" + HOSTILE, HOSTILE + "***", "S" + HOSTILE, "teacher"):
        assert text in told, text
    for secret in ("s3cr3t-s3cr3t-value", "hunter2hunter2"):
        assert secret not in page
    series = {label for chart in found.charts() for label in chart}
    assert {"P" + HOSTILE + "0"} <= {band[0] for script in found.scripts[:-1] for band in json.loads(script)["bands"]}
    assert any("8 tokens" in label for label in series)


@pytest.mark.parametrize("rows", [[], [row(1, 5.0)], [row(1, math.nan), row(2, math.nan)]], ids=["none", "one", "nan"])
def test_runs_with_little_to_tell(run, rows):
    """Begun and nothing logged; one step; nothing but numbers that are none. Every section is there; how it stands, too."""
    folder = run(rows)
    found = Page(build_page([read_record(folder)]))
    assert not found.unreadable
    assert [a["id"] for tag, a in found.elements if tag == "section"] == [anchor for anchor, _, _ in SECTIONS]
    assert "going on, or killed" in found.text


@pytest.mark.parametrize(
    "files",
    [
        {"recipe.yaml": "{ not: [yaml", "exit.json": "{", "eval__main-00000001.json": "[]"},
        {
            "recipe.yaml": "- a\n- b\n",
            "exit.json": "[1]",
            "eval__main-00000001.json": '{"loss": {"8": 3}, "seq_len": 8}',
        },
        {
            "recipe.yaml": "phases: {a: 1}\ndata: 3\nteacher: [x]\n",
            "eval__x.json": "{}",
            "eval__y-1.json": '{"loss": {}}',
        },
        {"recipe.yaml": "phases: [1, {name: main, mixture: 4, filters: 5, tokens: x}]\n"},
        {
            "exit.json": '{"code": "x"}',
            "eval__main-1.json": '{"loss": {}, "recall": [1, {"keys": 1}], "seq_len": null}',
        },
    ],
)
def test_damaged_files_never_keep_the_page_from_being_made(run, files):
    """Beside the metrics, whatever they hold: at most a section says that it cannot be shown."""
    folder = run([row(step, 5.0) for step in (1, 2, 3)], **files)
    found = Page(build_page([read_record(folder)]))
    assert any("training" in chart for chart in found.charts())
    assert found.unreadable <= 2


def test_the_charts_hold_what_was_logged(run):
    """Losses, rates and held-out losses of a short run, to five digits, and the phases; a held-out loss before the first step
    of a phase belongs to that phase."""
    rows = [
        row(s, 7 / s + 1e-3, "one" if s <= 10 else "two", tokens_per_second=1000.0 + s, rss_bytes=s << 30)
        for s in range(1, 21)
    ]
    rows[10:10] = [(10, {"eval/a/loss": 2.0, "eval/all/loss": 2.0}), (10, {"start/a/loss": 2.5, "start/all/loss": 2.5})]
    rows += [(20, {"eval/a/loss": 1.5, "eval/all/loss": 1.5})]
    record = read_record(run(rows))
    charts = Page(build_page([record])).charts()
    assert [y for _, y in charts[0]["training"]] == [pytest.approx(7 / s + 1e-3, rel=1e-4) for s in range(1, 21)]
    assert charts[0]["held out"] == [[10, 2.0], [10, 2.5], [20, 1.5]]
    (line,) = View.of([record], "steps").evaluated(record, "/a/loss", "a", 0, gaps=True)
    np.testing.assert_array_equal(line.y, [2.0, math.nan, 2.5, 1.5])
    assert {"process": [[s, float(s)] for s in range(1, 21)]} in charts
    assert View.of([record], "steps").bands() == [Band("one", 0, 10), Band("two", 10, 20)]
    assert View.of([record], "tokens").bands() == [Band("one", 0, 200), Band("two", 200, 400)]


def test_several_runs_lie_over_each_other_by_tokens(run):
    """Runs of other batches: lines of both in each chart, over tokens; what differs in the recipes is listed, and nothing else.
    Runs of one name are told apart by their folders; the same run twice is refused."""
    rows = [row(step, 6.0 / step, tokens=100 * step) for step in (1, 2, 3)]
    a = run(rows, recipe={"name": "x", "optim": {"lr": 1e-3, "eps": 1e-8}}, name="a")
    b = run([row(1, 4.0), row(2, 2.0)], recipe={"name": "x", "optim": {"lr": 2e-3, "eps": 1e-8}}, name="b")
    found = Page(build_page([read_record(a), read_record(b)]))
    labels = [f"x ({folder})" for folder in (a, b)]
    assert found.charts()[0] == {labels[0]: [[100, 6], [200, 3], [300, 2]], labels[1]: [[20, 4], [40, 2]]}
    assert "optim.lr" in found.text
    assert "optim.eps" not in found.text
    with pytest.raises(UserError, match="given twice"):
        View.of([read_record(a), read_record(a)], "steps")


def test_over_tokens_a_run_that_has_not_told_them_has_no_curve(run):
    """The other run's stay; the values under the mouse are JSON, which has no nan."""
    a = run([row(1, 6.0), row(2, 3.0)], name="a")
    b = run([(1, {"phase": "main", "loss": 5.0}), (2, {"phase": "main", "loss": math.inf})], name="b")
    found = Page(build_page([read_record(a), read_record(b)]))
    assert not found.unreadable
    assert found.charts()[0] == {"a": [[20, 6.0], [40, 3.0]]}
    assert Page(build_page([read_record(a), read_record(b)], "steps")).charts()[0]["b"] == [[1, 5.0]]


def test_a_run_of_a_million_steps_is_a_small_page(tmp_path):
    """Every step logged, in every column that a run has: less than two million characters."""
    n = 1_000_000
    steps, rng = np.arange(1, n + 1), np.random.default_rng(0)
    names = ["loss", "lr", "grad_norm", "tokens", "tokens_per_second", "rss_bytes", "peak_rss_bytes", "flops_per_second/full",
             "flops_per_second/causal", "loss/ce", "loss/distill", "teacher/a/loss", "seconds/forward", "seconds/backward",
             "seconds/optimizer", "eval/a/loss", "eval/b/loss", "eval/all/loss", "cuda_peak_allocated_bytes"]  # fmt: skip
    columns = {name: Column(steps, rng.random(n) + 1) for name in names}
    events = [
        {"time": float(i), "kind": kind, "step": i} for i in range(5000) for kind in ("skip", "saved", "straggler")
    ]
    page = build_page([Record(tmp_path, columns, [Span("a", 0, n // 2), Span("b", n // 2, n)], events=events)])
    Page(page)
    assert len(page) < 2_000_000
    assert "more" in page


def test_marks_and_bands_are_told_of_in_the_chart():
    """Their names reach the page's script and the reader of the SVG."""
    x = np.arange(5.0)
    chart = line_chart(
        "t",
        [Line("l", x, x)],
        x_label="step",
        bands=[Band("a", 0, 2), Band("b", 2, 4)],
        marks=[Mark(3, "skipped", "bad")],
    )
    assert "<title>skipped</title>" in chart
    assert chart.count('class="phase"') == 2


# ---------------------------------------------------------------------------------------------- the command
def slm_report(*words, code=0):
    done = subprocess.run(
        [sys.executable, "-m", "slm", "report", *map(str, words)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def test_the_command(run, tmp_path):
    """One run: its text as before, and the page beside it; --no-page and --json leave no page. Several want --output. What
    does not fit together, or cannot be written, is one message."""
    seconds = [("seconds", dict(step=2, seconds={"init": 1.0, "step": 3.0}))]
    a, b = (run([row(1, 5.0), row(2, 4.0)], seconds, name=name) for name in ("a", "b"))
    assert "goodput 75.0%" in slm_report(a, "--no-page")
    assert json.loads(slm_report(a, "--json"))["goodput"] == 0.75
    assert not (a / "report.html").exists()
    assert f"wrote {a / 'report.html'}" in slm_report(a)
    Page((a / "report.html").read_text())
    assert set(json.loads(slm_report(a, b, "--json"))) == {str(a), str(b)}
    assert "give --output" in slm_report(a, b, code=2)
    slm_report(a, b, "--output", tmp_path / "both.html", "--over", "steps")
    assert found_in(tmp_path / "both.html") == {"a": [[1, 5.0], [2, 4.0]], "b": [[1, 5.0], [2, 4.0]]}
    assert "--over is 'days'" in slm_report(a, "--over", "days", code=2)
    assert "--output has no effect" in slm_report(a, "--json", "--output", "x.html", code=2)
    assert "no run that has begun" in slm_report(tmp_path, code=2)
    assert "cannot be written" in slm_report(a, "--output", tmp_path / "absent" / "x.html", code=3)
    with pytest.raises(EnvironmentProblem):
        write_page([a], tmp_path)


def found_in(path):
    return Page(path.read_text()).charts()[0]


def test_no_torch_for_a_run_without_teachers(run):
    """The page comes at once on a login node."""
    folder = run([row(1, 5.0)])
    code = f"import sys; from pathlib import Path; from slm.report.page import write_page; p = Path({str(folder)!r}); "
    code += (
        "write_page([p], p / 'x.html'); print([m for m in ('torch', 'deepspeed', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
