"""The page of `slm report` in a real Chromium, at the widths of a phone and a desk, light and dark; of runs made here."""

import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import yaml

from slm.distill.build import build
from slm.recipe import load_recipe
from slm.report.page import SECTIONS, UNREADABLE, write_page
from slm.train import train
from tests.browser import CHROMIUM, Browser
from tests.e2e.test_eval import ROOT, folder
from tests.unit.test_report import HOSTILE

__all__ = ["folder"]
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium here (tests/run.sh installs it where it can)")


@pytest.fixture(scope="module")
def runs(folder, tmp_path_factory, one_rank):
    """Two real runs: two phases with pass keys, and a student of it that learns from a cache."""
    root = tmp_path_factory.mktemp("runs")
    phase = {"tokens": 4 * 256, "batch_tokens": 256}
    recall = {"lengths": [128, 256], "keys": [1, 2], "depths": 3, "samples": 1, "every_steps": 4}
    tree = {
        "name": "taught",
        "output": str(root / "taught"),
        "model": {"preset": "cpu-tiny", "vocab_size": 512},
        "tokenizer": str(folder / "tokenizer"),
        "data": {
            "sources": {"code": str(folder / "tokens/train")},
            "validation": {"code": str(folder / "tokens/validation")},
        },
        "phases": [{**phase, "name": "short", "seq_len": 128}, {**phase, "name": "long", "seq_len": 256}],
        "eval": {"every_steps": 2, "max_sequences": 4, "recall": recall},
        "log": {"every_steps": 1},
    }
    student = {
        **tree,
        "name": "student",
        "output": str(root / "student"),
        "phases": [{**tree["phases"][0], "loss": {"type": "distill"}}],
        "eval": {"every_steps": 2, "max_sequences": 4},
        "teacher": {"model": tree["output"], "cache": {"kind": "top_k", "k": 8, "folder": str(root / "cache")}},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        for one in (tree, student):
            (root / "r.yaml").write_text(yaml.safe_dump(one))
            recipe = load_recipe(root / "r.yaml")
            assert recipe.teacher == {} or build(recipe) == 0
            assert train(recipe) == 0
    return root / "taught", root / "student"


@pytest.fixture
def browser(tmp_path):
    with Browser(tmp_path) as browser:
        yield browser


def check(browser, page, width, scheme):
    """Nothing is asked for but the page; the console and the page's policy are silent; nothing is wider than the screen; every
    section is there and has a height; each chart's curve has one, too."""
    browser.open(page, width=width, scheme=scheme)
    assert browser.requests == [page.resolve().as_uri()]
    assert browser.complaints == []
    assert browser.run("document.scrollingElement.scrollWidth") <= width
    heights = browser.run(
        "[...document.querySelectorAll('section')].map(s => [s.id, s.getBoundingClientRect().height])"
    )
    assert [name for name, _ in heights] == [anchor for anchor, _, _ in SECTIONS]
    assert min(height for _, height in heights) > 40
    areas = browser.run("[...document.querySelectorAll('.area')].map(a => [a.clientWidth, a.clientHeight])")
    assert areas
    assert min(width for width, _ in areas) > 200
    assert min(height for _, height in areas) > 150
    # Letters are as large as anywhere else, however narrow the chart is.
    sizes = browser.run("[...document.querySelectorAll('.x span')].map(s => parseFloat(getComputedStyle(s).fontSize))")
    assert min(sizes) >= 11
    assert UNREADABLE not in browser.run("document.body.innerText")


def test_real_runs_on_a_phone_and_on_a_desk(runs, browser, tmp_path):
    """Alone and over each other; light and dark differ; both have the numbers of metrics.jsonl under the mouse."""
    run, student = runs
    pages = [tmp_path / "one.html", tmp_path / "student.html", tmp_path / "both.html"]
    for folders, page in zip(([run], [student], [run, student]), pages, strict=True):
        write_page(folders, page)
        seen = {}
        for width in (360, 1280):
            for scheme in ("light", "dark"):
                check(browser, page, width, scheme)
                seen[width, scheme] = browser.screenshot()
        assert len(set(seen.values())) == 4
        paper = browser.run("getComputedStyle(document.body).backgroundColor")
        assert paper == "rgb(15, 19, 24)"  # of the last, dark
    browser.open(pages[0], width=1280)
    titles = browser.run("[...document.querySelectorAll('figcaption')].map(f => f.firstChild.textContent.trim())")
    for title in ("Loss", "Gradient norm", "Learning rate", "Throughput", "Loss by position: code"):
        assert title in titles
    assert [t for t in titles if t.startswith("Recall, 1 of 2 keys")]
    phases = browser.run("[...document.querySelectorAll('#loss figure:first-of-type .phase')].map(p => p.title)")
    assert phases == ["short", "long"]
    shares = browser.run("[...document.querySelectorAll('#recall .heat td')].map(d => d.textContent)")
    assert len(shares) >= 2 * 4 * 2  # two numbers of keys, three depths and all of them, two lengths
    browser.open(pages[1], width=1280)
    teacher = browser.run("document.querySelector('#teacher').innerText")
    assert "top_k" in teacher
    assert "Cross-entropy on the same tokens" in teacher
    assert browser.run("document.querySelector('#data').innerText.includes('times through')")
    assert "torch" in browser.run("document.querySelector('#environment').innerText")


def test_under_the_mouse_is_what_was_logged(runs, browser, tmp_path):
    """At the middle of the page's first chart: the step there, its phase, and its loss, as in metrics.jsonl."""
    page = tmp_path / "page.html"
    write_page(runs[:1], page)
    logged = [json.loads(line) for line in (runs[0] / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: (row["phase"], row["loss"]) for row in logged if "loss" in row}
    browser.open(page, width=1280)
    box = browser.run(
        "(({x, y, width, height}) => [x, y, width, height])(document.querySelector('.area').getBoundingClientRect())"
    )
    for step in (2, 5, 8):
        place = (step / max(losses) + 0.015) / 1.03
        browser.point_at(box[0] + place * box[2], box[1] + box[3] / 2)
        told = browser.run("document.querySelector('.tip').innerText").split("\n")
        assert told[0] == f"step {step}, {losses[step][0]}"
        assert told[1] == f"training {float(f'{losses[step][1]:.5g}'):g}"
    # The curve is drawn where those numbers say, as the browser itself measures it.
    path = "document.querySelector('#loss path.curve')"
    drawn = browser.run(f"(p => [p.getPointAtLength(0).x, p.getPointAtLength(p.getTotalLength()).x])({path})")
    np.testing.assert_allclose(drawn, [1000 * (1 / 8 + 0.015) / 1.03, 1000 * 1.015 / 1.03], atol=0.2)


def test_what_gets_past_the_escaping_would_not_run(runs, browser, tmp_path):
    """A run whose name and reason are markup runs nothing. And were a script in the page all the same, its policy would not let
    it run, nor anything load: put there by hand, the browser says so."""
    run = tmp_path / "hostile"
    shutil.copytree(runs[0], run, ignore=shutil.ignore_patterns("checkpoints"))
    tree = yaml.safe_load((run / "recipe.yaml").read_text()) | {"name": HOSTILE}
    (run / "recipe.yaml").write_text(yaml.safe_dump(tree))
    (run / "exit.json").write_text(json.dumps({"code": 5, "meaning": "crashed", "reason": HOSTILE}))
    page = tmp_path / "page.html"
    write_page([run], page)
    check(browser, page, 360, "light")
    assert browser.run("document.querySelector('h1').textContent") == HOSTILE
    text = page.read_text()
    policy = re.search('<meta http-equiv="Content-Security-Policy"[^>]*>', text)[0]
    with Listener() as listener:
        smuggled = f"<script>document.title = 'taken'</script><img src='http://127.0.0.1:{listener.port}/x.png'>"
        with_it = text.replace("<footer>", f"<footer>{smuggled}")
        page.write_text(with_it)
        browser.open(page, width=360)
        assert browser.run("document.title") == HOSTILE
        assert listener.asked == []
        assert len([told for told in browser.complaints if "Content Security Policy" in told]) == 2
        page.write_text(with_it.replace(policy, ""))  # without the policy both happen
        browser.open(page, width=360)
        assert browser.run("document.title") == "taken"
        assert listener.asked == ["/x.png"]


class Listener:
    """A web server on this machine that notes what it is asked for."""

    def __enter__(self):
        asked = self.asked = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):  # the name is http.server's
                asked.append(self.path)
                self.send_error(404)

            def log_message(self, *words):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()
