"""Recipes: what is accepted, what is refused and how it is said; the plan's arithmetic; schedules."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from slm import SLMTokenizer
from slm.activations import activation_memory, kept_bytes_per_token
from slm.data.selection import selected_documents
from slm.data.tokens import TokenDataset
from slm.errors import UserError
from slm.fields import parse_count
from slm.layout import check_ranks, fitting_ranks, gradient_accumulation
from slm.model.config import ModelConfig
from slm.optim import learning_rate, parameter_groups
from slm.plan import check_what_is_here, describe, flops_per_token, plan_phase
from slm.recipe import Optim, Schedule, dump_recipe, json_schema, load_recipe
from slm.strategy import deepspeed_problems
from tests.shards import make_dataset

ROOT = Path(__file__).parents[2]
GOOD = {
    "name": "t",
    "model": "cpu-tiny",
    "data": {"sources": {"a": "x"}},
    "phases": [{"name": "main", "tokens": "64Ki", "seq_len": 64, "batch_tokens": 512, "micro_batch": 2}],
}


def write(tmp_path, tree, name="r.yaml"):
    path = tmp_path / name
    path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree))
    return path


@pytest.mark.parametrize("path", sorted(ROOT.glob("recipes/*.yaml")), ids=lambda p: p.name)
def test_every_recipe_loads_plans_and_round_trips(path, monkeypatch):
    """Every shipped recipe is valid, its plan can be printed, and its resolved form reads back the same."""
    monkeypatch.chdir(ROOT)
    recipe = load_recipe(path)
    assert recipe.name in describe(recipe, world_size=max(phase.sequence_parallel for phase in recipe.phases))
    again = yaml.safe_load(dump_recipe(recipe))
    assert type(recipe).model_validate(again) == recipe


def test_the_schema_file_is_current():
    """recipes/recipe.schema.json is what `slm schema` prints."""
    assert json.loads((ROOT / "recipes/recipe.schema.json").read_text()) == json_schema()


def test_human_numbers():
    """Counts as people write them."""
    assert [parse_count(x) for x in ("100B", "4M", "8Ki", "1.5k", "1e3", "2_000", 7)] == [
        100 * 10**9, 4 * 10**6, 8192, 1500, 1000, 2000, 7,
    ]  # fmt: skip
    for bad in ("ten", "4 apples", "1.5", "-3"):
        with pytest.raises(ValueError, match="count|whole"):
            parse_count(bad)


def test_all_problems_are_listed_at_once(tmp_path):
    """Unknown fields, wrong types and contradictions in one message, each with its field."""
    tree = json.loads(json.dumps(GOOD))
    tree |= {"speling": 1, "optim": {"lr": -1}, "precision": "float8"}
    tree["phases"][0] |= {"seq_len": "long"}
    with pytest.raises(UserError) as caught:
        load_recipe(write(tmp_path, tree))
    message = str(caught.value)
    for part in ("4 problems", "speling", "optim.lr is -1", "float8", "phases.main.seq_len", "'long'"):
        assert part in message, message


def test_fields_contradictions_duplicates_and_deepspeed_in_one_message(tmp_path):
    """Problems of four kinds do not hide one another."""
    text = yaml.safe_dump({**GOOD, "optim": {"lr": -1}}) + "seed: 1\nseed: 2\n"
    text = text.replace("batch_tokens: 512", "batch_tokens: 500").replace(
        "  name: main", "  name: main\n  deepspeed: no.json"
    )
    with pytest.raises(UserError) as caught:
        load_recipe(write(tmp_path, text))
    for part in (
        "4 problems",
        "'seed' stands there twice",
        "optim.lr is -1",
        "batch_tokens is 500",
        "no.json does not exist",
    ):
        assert part in str(caught.value), str(caught.value)


LONG = {**GOOD["phases"][0], "name": "long", "seq_len": 128, "filters": {"a": {"exclude_seen": ["main"]}}}
RECALL = {"lengths": [64, 128], "keys": [1, 4]}
TWO_PHASES = {
    **GOOD,
    "tokenizer": "bytes",
    "data": {"sources": {"a": "x"}, "validation": {"v": "y"}},
    "phases": [GOOD["phases"][0], {**LONG, "gate": {"short_loss_rise": 0.1, "passkey": 0.9, "multi_key": 0.5}}],
    "eval": {"seq_lens": [64], "recall": RECALL},
}


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        ("phases.1.lr=-1", "phases.long.lr"),  # eval.seq_lens and lengths are of its seq_len
        ("phases.0.lr=-1", "phases.main.lr"),  # the second excludes what it saw, and compares its loss
        ("phases.1.gate.repeats=0", "phases.long.gate.repeats"),
        ("phases.1.seq_len=long", "phases.long.seq_len"),
        ("phases.0.name=.main", "phases.0.name"),
        ("eval.recall.keys=[4, 4]", "eval.recall"),  # the gate asks for both
        ("eval.seq_lens=[short]", "eval.seq_lens.0"),
        ("data.validation={all: y}", "data.validation"),
        ("model.max_position_embeddings=0", "model.max_position_embeddings"),
        ("tokenizer=[3]", "tokenizer"),
        ("evall={seq_lens: [64]}", "evall"),
        ("phases.1.rope_scalin={rope_type: yarn}", "phases.long.rope_scalin"),
    ],
)
def test_a_bad_value_is_the_only_problem(tmp_path, bad, field):
    """What was left out with it brings no false problem: nothing that reads it is judged."""
    path = write(tmp_path, TWO_PHASES)
    load_recipe(path)
    with pytest.raises(UserError) as caught:
        load_recipe(path, [bad])
    lines = str(caught.value).splitlines()
    assert "1 problem" in lines[0], caught.value
    assert lines[1].startswith(f"  - {field}"), caught.value
    # An unknown section may be a known one whose name is misspelt.
    if bad.startswith("evall"):
        without = {key: value for key, value in TWO_PHASES.items() if key != "eval"}
        with pytest.raises(UserError, match="1 problem\n  - evall is not a field"):
            load_recipe(write(tmp_path, without), [bad])


def test_what_a_bad_value_does_not_touch_is_still_checked(tmp_path):
    """In the same phase's neighbours, before and after it, and in sections of its own."""
    path = write(tmp_path, TWO_PHASES)
    with pytest.raises(UserError) as caught:
        load_recipe(path, ["phases.main.lr=-1", "phases.long.batch_tokens=500", "phases.long.mixture={b: 1}"])
    for part in ("3 problems", "phases.main.lr is -1", "batch_tokens is 500, not a multiple", "mixture names 'b'"):
        assert part in str(caught.value)


def test_rope_scaling_carries_on_to_later_phases(tmp_path, monkeypatch):
    """null keeps what was: the scaling of the last phase that gave one."""
    monkeypatch.chdir(ROOT)
    scaled = {"rope_type": "llama3", "factor": 2.0, "original_max_position_embeddings": 64}
    phases = [{**GOOD["phases"][0], "name": name} for name in "abc"]
    phases[1]["rope_scaling"] = scaled
    recipe = load_recipe(write(tmp_path, {**GOOD, "phases": phases}))
    kinds = [recipe.model_of(phase).rope_scaling for phase in recipe.phases]
    assert kinds[0] is None
    assert kinds[1] == kinds[2]
    assert kinds[1].factor == 2.0


@pytest.mark.parametrize(
    ("model", "scalings", "message"),
    [
        (
            {},
            [{"rope_type": "yarn", "factor": 2, "original_max_position_embeddings": 64}, None],
            "phases.b.seq_len is 256, but phases.a.rope_scaling says factor 2 x original_max_position_embeddings 64 = 128 "
            "tokens: .*; give a factor of at least 4, or a length of at most 128",
        ),
        (
            {},
            [None, {"rope_type": "linear", "factor": 1.5, "original_max_position_embeddings": 128}],
            "phases.b.seq_len is 256, .* 192 tokens",
        ),
        (
            {},
            [None, {"rope_type": "llama3", "factor": 8}],
            "phases.b.rope_scaling.original_max_position_embeddings is 8192, longer than the model's .* 256",
        ),
        (
            {},
            [None, {"rope_type": "longrope", "factor": 4, "original_max_position_embeddings": 64,
                    "short_factor": [1.0] * 4, "long_factor": [2.0] * 8}],
            "phases.b.rope_scaling.short_factor has 4 numbers, but head_dim 16 has 8 pairs",
        ),
        ({}, [None, {"rope_type": "theta"}], "phases.b.rope_scaling: rope_theta is missing"),
        ({}, [None, {"rope_type": "ntk", "factor": 4, "truncate": False}], "truncate is False, which has no effect"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2, "original_max_position_embeddings": 64}},
            [None, None],
            "model.max_position_embeddings is 256, but model.rope_scaling says factor 2 x "
            "original_max_position_embeddings 64 = 128 tokens",
        ),
        ({"max_position_embeddings": 128}, [None, None], "phases.b.seq_len is 256, longer than model.max_position_embeddings"),
    ],
)  # fmt: skip
def test_factor_and_length_that_contradict_each_other(tmp_path, model, scalings, message):
    """Refused before anything starts: with value, field, consequence and fix."""
    phases = [
        {**GOOD["phases"][0], "name": name, "seq_len": seq_len, "rope_scaling": scaling}
        for name, seq_len, scaling in zip("ab", (64, 256), scalings, strict=True)
    ]
    with pytest.raises(UserError, match=message):
        load_recipe(write(tmp_path, {**GOOD, "model": {"preset": "cpu-tiny", **model}, "phases": phases}))


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "theta", "rope_theta": 1e4}, "rope_theta is 10000, which is model.rope_theta.*2θ rule: 20000"),
        ({"rope_type": "linear", "factor": 1}, "factor is 1, with which rope_type linear changes nothing"),
        ({"rope_type": "ntk", "factor": 1}, "factor is 1"),
        ({"rope_type": "yarn", "factor": 1}, "factor is 1"),
        ({"rope_type": "llama3", "factor": 1}, "factor is 1"),
        ({"rope_type": "longrope", "factor": 1, "short_factor": [1] * 8, "long_factor": [1] * 8}, "factor is 1"),
        ({"rope_type": "theta", "rope_theta": 2e4}, None),
        ({"rope_type": "yarn", "factor": 1, "attention_factor": 1.2}, None),
        ({"rope_type": "longrope", "factor": 1, "short_factor": [1] * 8, "long_factor": [2] * 8}, None),
        ({"rope_type": "dynamic"}, None),
        ({"rope_type": "default"}, None),
    ],
)
def test_a_scaling_that_changes_nothing_is_refused(tmp_path, scaling, message):
    """In a phase and in the model; alone, without a word of how far it does not reach. What does change something is taken."""
    if "factor" in scaling or scaling["rope_type"] == "dynamic":
        scaling = {**scaling, "original_max_position_embeddings": 256}
    phases = [{**GOOD["phases"][0], "rope_scaling": scaling}]
    for tree in ({**GOOD, "phases": phases}, {**GOOD, "model": {"preset": "cpu-tiny", "rope_scaling": scaling}}):
        path = write(tmp_path, tree)
        if message is None:
            load_recipe(path)
            continue
        with pytest.raises(UserError, match=f"1 problem\n.*rope_scaling.{message}"):
            load_recipe(path)


def test_the_plan_says_base_and_scaling_of_each_phase(tmp_path):
    """As they are in the phase, and since when."""
    yarn = {"rope_type": "yarn", "factor": 2, "original_max_position_embeddings": 64}
    scalings = [None, yarn, None, {"rope_type": "theta", "rope_theta": 2e4}, {**yarn, "rope_type": "ntk"}]
    phases = [{**GOOD["phases"][0], "name": name, "rope_scaling": s} for name, s in zip("abcde", scalings, strict=True)]
    told = describe(load_recipe(write(tmp_path, {**GOOD, "phases": phases})), 1)
    assert [line.strip() for line in told.splitlines() if "rotary" in line] == [
        "rotary embedding: base 10,000, no scaling (the model's own)",
        "rotary embedding: base 10,000, yarn, factor 2 over 64, reaches 128 tokens (from here on)",
        "rotary embedding: base 10,000, yarn, factor 2 over 64, reaches 128 tokens (since phase b)",
        "rotary embedding: base 20,000, theta (from here on)",
        f"rotary embedding: base {10_000 * 2 ** (16 / 14):,.10g}, ntk, factor 2 over 64, reaches 128 tokens (from here on)",
    ]


def test_a_phase_reaches_as_far_as_its_scaling(tmp_path, monkeypatch):
    """The model of a phase has the context of its own scaling, so that what is exported of it says no more; without a
    factor it is the whole one."""
    monkeypatch.chdir(ROOT)
    yarn = {"rope_type": "yarn", "original_max_position_embeddings": 64}
    scalings = [None, {**yarn, "factor": 2}, {**yarn, "factor": 8}, {"rope_type": "theta", "rope_theta": "2e4"}]
    phases = [{**GOOD["phases"][0], "name": f"p{i}", "rope_scaling": scaling} for i, scaling in enumerate(scalings)]
    recipe = load_recipe(write(tmp_path, {**GOOD, "phases": phases}))
    assert [recipe.model_of(phase).max_position_embeddings for phase in recipe.phases] == [256, 128, 256, 256]
    assert recipe.model_of(recipe.phases[3]).rope_scaling.rope_theta == 20000.0


def test_filters_that_leave_nothing(tmp_path):
    """Of a pair of lengths without data; of the documents themselves as soon as they are here, for `slm plan` too."""
    make_dataset(tmp_path / "x", lengths=[40, 90, 300])
    tree = {**GOOD, "data": {"sources": {"a": str(tmp_path / "x"), "b": str(tmp_path / "absent")}}}
    path = write(tmp_path, tree)
    with pytest.raises(
        UserError, match="phases.main.filters.a: min_doc_tokens is 300, above max_doc_tokens 100: no document"
    ):
        load_recipe(path, ["phases.main.filters={a: {min_doc_tokens: 300, max_doc_tokens: 100}}"])
    check_what_is_here(load_recipe(path, ["phases.main.filters={a: {min_doc_tokens: 300}, b: {min_doc_tokens: 9Ki}}"]))
    longer = load_recipe(path, ["phases.main.filters={a: {min_doc_tokens: 301}}"])
    with pytest.raises(UserError) as caught:
        check_what_is_here(longer)
    assert caught.value.problem == (
        f"phases.main.filters.a (min_doc_tokens 301) leaves no document of {tmp_path}/x: its 3 documents have 40 to 300 tokens"
    )
    with pytest.raises(UserError, match="leaves no document"):
        selected_documents(longer, longer.phases[0], "a", TokenDataset(tmp_path / "x"))  # as `slm train` does
    check_what_is_here(  # a source that is not drawn needs none
        load_recipe(path, ["phases.main.filters={a: {min_doc_tokens: 301}}", "phases.main.mixture={a: 0, b: 1}"])
    )


def test_lengths_of_recall_that_needles_do_not_fit_in(tmp_path):
    """Named as the recipe names them, as soon as the tokenizer is here: the needles of the default templates are 74 bytes."""
    SLMTokenizer().save_pretrained(tmp_path / "bytes")
    path = write(tmp_path, {**TWO_PHASES, "tokenizer": str(tmp_path / "absent")})
    check_what_is_here(load_recipe(path))
    here = [f"tokenizer={tmp_path}/bytes"]
    with pytest.raises(UserError) as caught:
        check_what_is_here(load_recipe(path, here))
    assert "eval.recall.lengths has 64, too short for 4 needles and the question, which take about 20" in str(
        caught.value
    )
    assert "--lengths" not in str(caught.value)
    one = [*here, "eval.recall.keys=1", "phases.long.gate={passkey: 0.9}"]
    with pytest.raises(UserError, match="give eval.recall.lengths of 99 or more"):
        check_what_is_here(load_recipe(path, one))
    check_what_is_here(load_recipe(path, [*one, "eval.recall.lengths=[99]"]))
    with pytest.raises(UserError, match="eval.recall.lengths is not given, so it is seq_len 64, too short"):
        check_what_is_here(load_recipe(path, [*one, "eval.recall.lengths=[]"]))


def test_contradictions_name_both_sides(tmp_path):
    """Cross-checks say the numbers of both fields and what to write instead."""
    tree = json.loads(json.dumps(GOOD))
    tree["phases"][0] |= {"batch_tokens": 500, "mixture": {"b": 1}, "schedule": {"warmup_steps": 10**6}}
    tree["phases"].append({**GOOD["phases"][0], "seq_len": 2**20, "batch_tokens": 2**20})
    with pytest.raises(UserError) as caught:
        load_recipe(write(tmp_path, tree))
    message = str(caught.value)
    for part in ("not a multiple of seq_len 64; try 448", "names 'b'", "used twice", "max_position_embeddings 256"):
        assert part.replace("64; try", "64: a step could not be made of whole sequences; try") in message, message
    assert "never reach its peak" in message


def test_duplicate_key_is_an_error_with_its_line(tmp_path):
    """YAML itself would silently keep the last."""
    with pytest.raises(UserError, match=r"line 3: the key 'name' stands there twice \(first on line 1\)"):
        load_recipe(write(tmp_path, "name: a\nseed: 1\nname: b\n"))


@pytest.mark.parametrize(
    ("text", "message"),
    [("- 1\n- 2\n", "no mapping"), ("a: [1\n", "not valid YAML"), ("", "no mapping")],
)
def test_files_that_are_no_recipe(tmp_path, text, message):
    """Said in one line, no traceback from the YAML library."""
    with pytest.raises(UserError, match=message):
        load_recipe(write(tmp_path, text))
    with pytest.raises(UserError, match="does not exist"):
        load_recipe(tmp_path / "absent.yaml")
    with pytest.raises(UserError) as error:
        load_recipe(tmp_path)
    assert error.value.problem == f"{tmp_path} is a folder, and a recipe is a file"
    assert error.value.fix.endswith(".yaml")


def test_overrides(tmp_path, monkeypatch):
    """Dotted overrides win over the file; a phase goes by name or number; nonsense is refused."""
    monkeypatch.chdir(ROOT)
    path = write(tmp_path, GOOD)
    recipe = load_recipe(
        path, ["optim.lr=1e-3", "phases.main.tokens=1M", "phases.0.seq_len=128", "model.vocab_size=600"]
    )
    assert (recipe.optim.lr, recipe.phases[0].tokens, recipe.phases[0].seq_len) == (1e-3, 10**6, 128)
    assert recipe.model == ModelConfig.preset("cpu-tiny", vocab_size=600)
    for bad, message in [
        ("optim.lr", "no value"),
        ("phases.x.tokens=1", "neither a position"),
        ("seed.x=1", "no field"),
        ("optim.rl=1", "not a field"),
    ]:
        with pytest.raises(UserError, match=message):
            load_recipe(path, ["seed=3", bad])


@pytest.mark.parametrize("path", sorted(ROOT.glob("ds_configs/*.json")), ids=lambda p: p.name)
def test_every_deepspeed_json_is_accepted(path, tmp_path):
    """Each shipped strategy sets nothing that the recipe owns, and DeepSpeed itself parses it."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    tree = json.loads(json.dumps(GOOD))
    tree["phases"][0]["deepspeed"] = str(path)
    load_recipe(write(tmp_path, tree))
    DeepSpeedZeroConfig(**json.loads(path.read_text())["zero_optimization"])


def test_deepspeed_json_that_sets_what_the_recipe_owns(tmp_path):
    """A second home for batch size or precision is refused, naming the recipe's field."""
    (tmp_path / "ds.json").write_text(
        json.dumps({"zero_optimization": {"stage": 1}, "bf16": {}, "train_batch_size": 8})
    )
    tree = json.loads(json.dumps(GOOD))
    tree["phases"][0]["deepspeed"] = str(tmp_path / "ds.json")
    with pytest.raises(UserError) as caught:
        load_recipe(write(tmp_path, tree))
    assert "sets train_batch_size, but the recipe owns that: remove it there and use phases[].batch_tokens" in str(
        caught.value
    )
    assert "sets bf16" in str(caught.value)


def test_deepspeed_json_with_a_malformed_section(tmp_path):
    """null or a word in place of {"device": …} is said, not crashed on."""
    for value in (None, "cpu"):
        path = tmp_path / "odd.json"
        path.write_text(json.dumps({"zero_optimization": {"stage": 1, "offload_optimizer": value}}))
        (problem,) = deepspeed_problems(str(path))
        assert "offload_optimizer" in problem
        assert '{"device": "cpu"}' in problem


def test_values_that_only_look_like_numbers(tmp_path, monkeypatch):
    """true is no count, a seed has 63 bits, an override counts once, a key of a DeepSpeed JSON too."""
    monkeypatch.chdir(ROOT)
    path = write(tmp_path, GOOD)
    for overrides, message in (
        (["phases.main.micro_batch=true"], "True is not a count"),
        (["seed=99999999999999999999"], "seed"),
        (["optim.lr=1e-3", "optim.lr=2e-3"], "optim.lr is given twice"),
    ):
        with pytest.raises(UserError, match=message):
            load_recipe(path, overrides)
    twice = tmp_path / "twice.json"
    twice.write_text('{"zero_optimization": {"stage": 1}, "zero_optimization": {"stage": 3}}')
    assert "'zero_optimization' stands there twice" in deepspeed_problems(str(twice))[0]


def test_merge_keys_and_duplicates(tmp_path):
    """`<<` puts in a mapping that stands elsewhere; what is given beside it counts; a key given twice is still told."""
    text = (
        "name: t\nmodel: cpu-tiny\ndata: {sources: {a: x}}\nphases:\n"
        "- &base {name: a, tokens: 4Ki, seq_len: 64, batch_tokens: 1Ki, micro_batch: 4}\n- {<<: *base, name: b}\n"
    )
    path = tmp_path / "r.yaml"
    path.write_text(text)
    first, second = load_recipe(path).phases
    assert (second.name, second.tokens, second.micro_batch) == ("b", first.tokens, first.micro_batch)
    path.write_text(text + "- {<<: *base, name: c, name: d}\n")
    with pytest.raises(UserError, match="'name' stands there twice"):
        load_recipe(path)


def test_phase_names_are_visible_folders(tmp_path):
    """Checkpoints of a phase `.main` would lie in hidden folders, which a resume does not look into."""
    path = tmp_path / "r.yaml"
    path.write_text(
        "name: t\nmodel: cpu-tiny\ndata: {sources: {a: x}}\n"
        "phases: [{name: .main, tokens: 4Ki, seq_len: 64, batch_tokens: 1Ki}]\n"
    )
    with pytest.raises(UserError, match=r"phases.0.name"):
        load_recipe(path)


def test_world_that_does_not_divide_the_batch(tmp_path, monkeypatch):
    """The message says which numbers of ranks fit."""
    monkeypatch.chdir(ROOT)
    recipe = load_recipe(write(tmp_path, GOOD))
    assert gradient_accumulation(recipe.phases[0], 2) == 2
    with pytest.raises(UserError, match="use 1, 2, 4 ranks, another micro_batch, or batch_tokens = a multiple of 384"):
        gradient_accumulation(recipe.phases[0], 3)


def test_ranks_that_fit_all_phases_that_are_to_run(tmp_path, monkeypatch):
    """One number for all, if there is one; else each phase is a job of its own, and the plan is of its fewest ranks."""
    monkeypatch.chdir(ROOT)
    tree = {
        **GOOD,
        "phases": [GOOD["phases"][0], LONG, {**LONG, "name": "longer", "seq_len": 256, "batch_tokens": 1536}],
    }
    recipe = load_recipe(write(tmp_path, tree))  # 8 sequences, 4 and 6; of each 2 at a time
    assert [fitting_ranks([phase]) for phase in recipe.phases] == [[1, 2, 4], [1, 2], [1, 3]]
    check_ranks(recipe.phases[:2], 2)
    with pytest.raises(UserError) as caught:
        check_ranks(recipe.phases[:2], 4)
    assert "phases.main" not in caught.value.problem  # it fits 4
    assert "use 1, 2 ranks, which fit all phases that are to run (main, long); or --until PHASE" in caught.value.fix
    shared = ["phases.main.sequence_parallel=2", "phases.longer.micro_batch=1", "phases.longer.tokens=64Ki"]
    recipe = load_recipe(tmp_path / "r.yaml", [*shared, "phases.long.batch_tokens=384", "phases.long.micro_batch=3"])
    assert [fitting_ranks([phase]) for phase in recipe.phases] == [[2, 4, 8], [1], [1, 2, 3, 6]]
    with pytest.raises(UserError) as caught:
        check_ranks(recipe.phases, 2)
    jobs = "--until main with 2, 4, 8 ranks; --until long with 1 rank; --until longer with 1, 2, 3, 6 ranks"
    assert (
        caught.value.fix == f"no number of ranks fits all phases that are to run, so give each a job of its own: {jobs}"
    )
    told = describe(recipe, None)
    assert "8 sequences of 64 = 2 ranks / 2 that share a sequence x micro-batch 2 x 4 accumulated" in told
    assert "3 sequences of 128 = 1 ranks" in told


def test_flops_of_the_1b_shape_by_hand():
    """7.414e9 + 393,216 S (full) and + 196,608 S (causal), counted by hand from the shape."""
    config = ModelConfig.preset("llama3.2-1b")
    assert flops_per_token(config, 8192, causal=False) == 6 * 1_235_746_816 + 393_216 * 8192
    assert flops_per_token(config, 8192, causal=True) == 6 * 1_235_746_816 + 196_608 * 8193


def test_plan_needs_no_torch():
    """`slm plan` answers on a machine without torch, so it never imports it."""
    code = "import sys; sys.modules['torch'] = None; import slm.plan, slm.recipe, slm.data.order, slm.cli, slm; print('ok')"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "ok\n"


def test_activation_memory_of_the_1b_shape():
    """The Llama 3.2 1B shape by hand: 128K tokens, 16 bits; tiles and offloading make less."""
    config = ModelConfig.preset("llama3.2-1b")
    per_token = {
        policy: 16 * kept_bytes_per_token(config, policy, tiled=False, value_bytes=2)
        for policy in ("full", "selective")
    }
    assert per_token == {"full": 64 * 1024, "selective": 130 * 1024}
    m = activation_memory(config, 2**17, "selective")
    assert m.kept_bytes == 130 * 1024 * 2**17
    tiles = activation_memory(config, 2**17, "selective", tile_tokens=8192)
    away = activation_memory(config, 2**17, "selective", tile_tokens=8192, offload=True)
    assert (tiles.kept_bytes, away.host_bytes, away.kept_bytes) == (m.kept_bytes, m.kept_bytes, m.kept_bytes // 8)
    assert m.peak_bytes - tiles.peak_bytes > 2**32
    assert tiles.peak_bytes - away.peak_bytes > 2**33


def test_offloading_nothing_is_refused(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match="there are no checkpoints to move"):
        load_recipe("recipes/quickstart.yaml", ["phases.main.offload_activations=true"])
    phase = load_recipe(
        "recipes/quickstart.yaml",
        [
            "phases.main.activation_checkpointing=full",
            "phases.main.offload_activations=true",
            "phases.main.mlp_tile_tokens=8Ki",
        ],
    ).phases[0]
    assert (phase.offload_activations, phase.mlp_tile_tokens) == (True, 8192)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "optim.gradclip=1",
            "optim.gradclip is not a field of a recipe, so it would have no effect: did you mean grad_clip?",
        ),
        ("model.hidden_sise=8", "did you mean hidden_size?"),
        ("phases.main.schedule.warmup=8", "did you mean warmup_steps?"),
        ("phases.main.loss.tipe=ce", "did you mean type?"),
        ("model.rope_scaling.factr=8", "did you mean factor?"),
        ("lr=1", "did you mean optim.lr or phases.NAME.lr?"),
        ("seqlen=1", "did you mean phases.NAME.seq_len?"),
        ("zzz=1", "remove it or mend its name"),
        (
            "precision=bf16",
            "precision is 'bf16', which is none of auto, float32, bfloat16, float16: did you mean bfloat16?",
        ),
        ("optim.lr=-1", "optim.lr is -1, and has to be above 0"),
        ("optim.betas=[0.9, 1.5]", "optim.betas.1 is 1.5, and has to be below 1"),
        ("optim.weight_decay=heavy", "optim.weight_decay is 'heavy', which is no number"),
        ("optim.weight_decay=[1]", "optim.weight_decay is [1], which is no number"),
        ("checkpoint.keep_last=1.5", "checkpoint.keep_last is 1.5, which is no whole number"),
        ("deterministic=often", "deterministic is 'often', which is neither true nor false"),
        ("compile=perhaps", "compile is 'perhaps', which is neither true nor false, which is none of auto"),
        ("data.sources=[a]", "data.sources is ['a'], which is no mapping"),
        ("eval.seq_lens=3", "eval.seq_lens is 3, which is no list"),
        ("log=true", "log is True, which is no mapping of fields"),
    ],
)
def test_bad_fields_are_told_in_our_words(tmp_path, monkeypatch, override, said):
    """The value, why it cannot be, and what was perhaps meant; nothing of pydantic's."""
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError) as caught:
        load_recipe(write(tmp_path, GOOD), [override])
    assert said in str(caught.value)
    assert "Input should" not in str(caught.value)


def test_a_quantised_model_is_no_start_and_no_teacher_before_anything_starts(tmp_path, monkeypatch):
    """By its config.json alone, as `slm train --check`, `slm plan` and the launchers ask."""
    monkeypatch.chdir(ROOT)
    (tmp_path / "q").mkdir()
    (tmp_path / "q/config.json").write_text(json.dumps({"model_type": "slm_quantized_llama"}))
    for field in "init_from.path", "teacher.model":
        with pytest.raises(UserError, match=r"q is a quantised model.*no start, no teacher"):
            check_what_is_here(load_recipe(write(tmp_path, GOOD), [f"{field}={tmp_path}/q"]))


def test_plan_holds_weights_to_start_from_against_the_model(tmp_path, monkeypatch):
    """A Hugging Face folder, a run and a checkpoint of another shape are refused; where there is none that is said."""
    monkeypatch.chdir(ROOT)
    recipe = load_recipe(write(tmp_path, {**GOOD, "init_from": {"path": str(tmp_path / "w")}}))
    check_what_is_here(recipe)
    assert f"weights: from {tmp_path}/w (not here: nothing of it was looked at)" in describe(recipe, None)
    (tmp_path / "w").mkdir()
    same = recipe.model.model_dump(mode="json")
    other = {**same, "num_hidden_layers": 9}
    for name, text in (("recipe.yaml", {"model": other}), ("state.json", {"model": other}), ("config.json", other)):
        (tmp_path / "w" / name).write_text(json.dumps(text))
        with pytest.raises(UserError, match="has num_hidden_layers 9 .the recipe's model 2.: its weights do not fit"):
            check_what_is_here(recipe)
    (tmp_path / "w" / "config.json").write_text(json.dumps(same))
    check_what_is_here(recipe)
    assert f"weights: from {tmp_path}/w\n" in describe(recipe, None)


def test_plan_counts(tmp_path, monkeypatch):
    """Steps round up; accumulation makes up for few ranks."""
    monkeypatch.chdir(ROOT)
    recipe = load_recipe(write(tmp_path, GOOD), ["phases.main.tokens=1000"])
    plan = plan_phase(recipe, recipe.phases[0], world_size=1)
    assert (plan.steps, plan.tokens, plan.global_batch, plan.gradient_accumulation) == (2, 1024, 8, 4)


def test_schedules_by_hand():
    """The values at the corners of every schedule."""
    rates = [learning_rate(Schedule(type="cosine", warmup_steps=4, min_ratio=0.1), 1.0, s, 14) for s in range(14)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[8] == pytest.approx(0.55)
    assert rates[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(rates[3:], rates[4:], strict=False))
    linear = [learning_rate(Schedule(type="linear", min_ratio=0.0), 2.0, s, 4) for s in range(4)]
    assert linear == [1.5, 1.0, 0.5, 0.0]
    wsd = [
        learning_rate(Schedule(type="wsd", warmup_steps=2, min_ratio=0, decay_fraction=0.4), 1.0, s, 10)
        for s in range(10)
    ]
    assert wsd == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0.0])
    assert learning_rate(Schedule(type="constant"), 3.0, 9, 10) == 3.0


def test_decay_groups():
    """Matrices decay, norm weights do not, the tied embedding stands in one group once."""
    from slm import SLMForCausalLM

    model = SLMForCausalLM(ModelConfig.preset("cpu-tiny"))
    decayed, kept = parameter_groups(model, Optim(weight_decay=0.3))
    assert decayed["weight_decay"] == 0.3
    assert kept["weight_decay"] == 0.0
    assert {p.dim() for p in decayed["params"]} == {2}
    assert len(kept["params"]) == 2 * 2 + 1
    assert len(decayed["params"]) + len(kept["params"]) == len(list(model.parameters()))


def test_no_held_out_source_is_called_as_the_sum_over_all(tmp_path):
    tree = json.loads(json.dumps(GOOD))
    tree["data"]["validation"] = {"all": "x"}
    with pytest.raises(UserError, match="a source named 'all'"):
        load_recipe(write(tmp_path, tree))
