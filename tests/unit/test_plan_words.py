"""What `slm plan --gpu` says and refuses: bounds, totals, host memory, units, widths, the number of GPUs, reasons."""

import dataclasses
import json
import re
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from slm import budget_text
from slm.budget import Assumptions, budget, check_fits, fewest_gpus, span
from slm.choose import choose
from slm.cli import app
from slm.distill.beside import cache_bytes_per_token
from slm.distill.cache import CacheSpec
from slm.distill.settings import TeacherCache
from slm.errors import UserError
from slm.forecast import GPUs
from slm.hardware import GPUS, find_gpu
from slm.recipe import load_recipe

ROOT = Path(__file__).parents[2]
RECIPE, TINY = ROOT / "recipes/llama3.2-1b.yaml", ROOT / "recipes/demo.yaml"


def plan(*arguments, recipe=RECIPE):
    return CliRunner().invoke(app, ["plan", str(recipe), *map(str, arguments)])


def planned(*overrides, gpu="h100", gpus=8, **assumed):
    return budget(load_recipe(RECIPE, list(overrides)), find_gpu(gpu), GPUs(gpus), Assumptions(**assumed))


@pytest.mark.parametrize("option", ["mtbf-hours", "save-stall-seconds", "price-per-gpu-hour"])
@pytest.mark.parametrize("value", ["inf", "nan", "1e308", "1e9", "-1"])
def test_numbers_that_mean_nothing_are_refused(option, value):
    found = plan("--gpus", 8, "--gpu", "h100", f"--{option}", value, "--json")
    assert isinstance(found.exception, UserError)
    assert f"--{option} is {float(value):g}" in str(found.exception)


@pytest.mark.parametrize("options", [("mtbf-hours", 1), ("mtbf-hours", 1e7), ("save-stall-seconds", 3600)])
def test_what_is_within_the_bounds_is_planned(options):
    """No more than all of the time is ever lost."""
    found = plan("--gpus", 8, "--gpu", "h100", f"--{options[0]}", options[1])
    assert found.exception is None
    assert max(map(float, re.findall(r"([\d.]+)% lost", found.stdout)), default=0) <= 100


def test_the_total_is_the_sum_and_says_what_it_leaves_out():
    found = json.loads(plan("--gpus", 8, "--gpu", "h100", "--price-per-gpu-hour", 2, "--json").stdout)["budget"]
    own = [phase["own"] for phase in found["phases"]]
    for name in ("days", "gpu_hours", "cost"):
        assert found["total"][name] == pytest.approx(sum(row[name] for row in own))
    left = "; ".join(found["total_leaves_out"])
    assert "gate of extend_32k may ask for (up to 477 steps" in left
    assert "evaluation and recall" in left
    assert "its caches (940 GB" in left  # 47 bytes a token, as the recipe's own comment says


@pytest.mark.parametrize("kind", ["top_k", "sampled"])
@pytest.mark.parametrize(
    ("k", "vocab", "temperatures"), [(12, 128256, [1.0]), (50, 300, [1.0, 2.0]), (64, 65537, [3.0])]
)
def test_a_caches_bytes_are_those_of_its_format(kind, k, vocab, temperatures):
    spec = CacheSpec(
        kind, k, tuple(temperatures), vocab, num_tokens=1, piece_length=1, block_tokens=1, seed=0, teacher={}, tokenizer="",
        shard={},
    )  # fmt: skip
    cache = TeacherCache(kind=kind, k=k, temperatures=temperatures)
    assert cache_bytes_per_token(cache, vocab) == spec.bytes_per_token


def test_what_needs_more_host_memory_than_servers_have_comes_last_and_is_said():
    found = planned("phases.pretrain.activation_checkpointing=selective")
    rows = found.phases[0].rows
    best = choose(rows)
    much = [dataclasses.replace(row, host_bytes_per_node=int(8e12)) for row in rows]
    swapped = [big if row is best else row for row, big in zip(rows, much, strict=True)]
    assert choose(tuple(swapped)).overrides != best.overrides
    last = choose(tuple(much))
    assert last.overrides == best.overrides  # where nothing else is left
    part = dataclasses.replace(found.phases[0], own=dataclasses.replace(much[0], fits=False), best=last)
    whole = dataclasses.replace(found, phases=(part,))
    with pytest.raises(UserError, match=r"more than servers have \(taken as 2 TB") as refused:
        check_fits(whole)
    assert "fits with none of the settings looked at that a server's memory allows" in refused.value.fix
    assert any(
        "warning (recipe)" in line and "more than servers have" in line for line in budget_text._lines(whole, part)
    )


def test_each_gpu_says_where_its_speed_comes_from():
    """Kinds of which benchmarks/published_speeds.py has no run do not claim one."""
    for name in GPUS:
        line = next(line for line in plan("--gpus", 16, "--gpu", name).stdout.splitlines() if "of peak" in line)
        assert ("no runs on this kind were at hand" in line) == (name in ("b200", "l40s", "rtx4090"))
        assert ("published runs reached" in line) == (name not in ("b200", "l40s", "rtx4090"))


def test_a_tiny_recipe_has_no_forecast_and_sensible_units():
    said = plan("--gpus", 1, "--gpu", "b200", recipe=TINY).stdout
    assert "no forecast of speed" in said
    assert "all phases: no total (main has no forecast)" in said
    for nonsense in (r"\de-\d", "save every", "= ;", " 0 GB", "0.00 GB"):
        assert not re.search(nonsense, said.split("\non ")[1]), nonsense
    found = json.loads(plan("--gpus", 1, "--gpu", "b200", "--json", recipe=TINY).stdout)["budget"]
    assert found["total"] is None
    assert found["phases"][0]["own"]["tokens_per_second"] is None


def test_spans():
    times = [0, 2e-6, 0.35, 14.7, 3352, 70000, 350000, 2e7]
    assert [span(t) for t in times] == [
        "0 s",
        "2 µs",
        "350 ms",
        "14.7 s",
        "55.9 min",
        "19.4 h",
        "4.05 days",
        "231 days",
    ]


@pytest.mark.parametrize("columns", [60, 90, 300])
@pytest.mark.parametrize("on_terminal", [True, False])
def test_no_name_in_a_table_is_cut(columns, on_terminal, monkeypatch, capsys):
    """On a terminal of any width, and piped."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: on_terminal)
    monkeypatch.setenv("COLUMNS", str(columns))
    budget_text.draw(planned(), all_rows=True)
    printed = capsys.readouterr().out
    assert "…" not in printed
    for name in ("selective", "zero3_offload", "checkpoints", "micro-batch"):
        assert name in printed


def test_without_a_number_the_fewest_that_hold_the_recipe_are_taken():
    """On 40 GB cards the recipe's 36.8 GiB at 8 GPUs are too much; each smaller number that divides the work is too."""
    recipe, gpu = load_recipe(RECIPE), find_gpu("a100-40")
    count, words = fewest_gpus(recipe, gpu, 8)
    assert count == 16
    for fewer in (4, 8):
        assert not all(part.own.fits for part in budget(recipe, gpu, GPUs(fewer), Assumptions()).phases)
    assert all(part.own.fits for part in budget(recipe, gpu, GPUs(count), Assumptions()).phases)
    assert words in plan("--gpu", "a100-40").stdout
    assert json.loads(plan("--gpu", "a100-40", "--json").stdout)["ranks"] == 16
    none, words = fewest_gpus(recipe, find_gpu("rtx4090"), 8)
    assert none == 64
    assert "none holds the recipe as it is" in words


@pytest.mark.parametrize(
    ("arguments", "said"), [(["--gpus", 8, "--gpu", ""], "--gpu is ''"), (["--gpus", 8, "--ranks", 4], "--ranks 4")]
)
def test_what_contradicts_itself_or_is_empty_is_refused(arguments, said):
    found = plan(*arguments)
    assert isinstance(found.exception, UserError)
    assert said in str(found.exception)


def test_it_says_why_the_fastest_row_is_not_taken():
    found = plan("--gpus", 8, "--gpu", "h100").stdout
    assert "not the fastest row (zero3, recomputation none, micro-batch 8): its 0.7% more are less than the 2%" in found
