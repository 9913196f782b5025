"""Nothing that comes from elsewhere runs, and nothing in it reaches out of its folder: code, pickles, YAML, names, paths."""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from data_prep.corpus import find_files, open_hub
from data_prep.show import show
from slm import SLMForCausalLM, strict_yaml
from slm.data.tokens import TokenDataset, _manifest_sha256
from slm.distill.models import describe_teacher, load_teacher
from slm.errors import CorruptArtefact, UserError
from slm.inputs import check_init_from
from slm.loading import load_model
from slm.model.config import ModelConfig
from slm.names import file_inside
from slm.recipe import load_recipe
from slm.redact import redacted
from slm.strategy import deepspeed_problems
from slm.tokenizer import SLMTokenizer, load_tokenizer
from tests.shards import make_dataset

ROOT = Path(__file__).parents[2]
SOURCES = sorted(
    p for folder in ("slm", "data_prep", "launchers", "benchmarks") for p in ROOT.glob(f"{folder}/**/*.py")
)


# --- the source ----------------------------------------------------------------------------------------------


def unsafe(source):
    """What a source does that could run somebody else's program."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found += [
                n for n in names if n.split(".")[0] in ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve")
            ]
            found += [n for n in names if n.split(".")[0] == "marshal"]
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {word.arg: ast.unparse(word.value) for word in node.keywords}
        if name in (
            "eval",
            "exec",
            "os.system",
            "os.popen",
            "torch.load",
            "yaml.load",
            "yaml.full_load",
            "yaml.unsafe_load",
        ):
            found.append(name)
        if name.rpartition(".")[2] in ("read_pickle", "unpickle"):
            found.append(name)
        if given.get("shell", "False") != "False" or given.get("trust_remote_code", "False") != "False":
            found.append(f"{name}({given})")
        if given.get("allow_pickle", "False") != "False" or given.get("weights_only") == "False":
            found.append(f"{name}({given})")
        if name.endswith("Auto") or (name.startswith("Auto") and name.endswith(".from_pretrained")):
            if given.get("trust_remote_code") != "False" or given.get("use_safetensors") != "True":
                found.append(f"{name} without trust_remote_code=False and use_safetensors=True")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_source_runs_what_it_reads(path):
    assert unsafe(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from dill import loads",
        "torch.load(f)",
        "np.load(f, allow_pickle=True)",
        "yaml.load(f, yaml.Loader)",
        "eval(text)",
        "subprocess.run(text, shell=True)",
        "os.system(text)",
        "AutoModelForCausalLM.from_pretrained(path, trust_remote_code=flag, use_safetensors=True)",
        "AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False)",
        "x.load(path, trust_remote_code=True)",
        "pd.read_pickle(f)",
    ],
)
def test_the_check_of_the_source_finds_each(source):
    assert unsafe(source)


@pytest.mark.parametrize("path", sorted(ROOT.glob("launchers/*.sh")), ids=lambda p: p.name)
def test_no_launcher_runs_a_string(path):
    text = "\n".join(line.partition("# ")[0] for line in path.read_text().splitlines())
    assert not re.search(r"(^|[;&|({]|\$\()\s*(eval|xargs|ssh|su|sudo)(?=\s)|bash -c", text, re.MULTILINE)


# --- names ---------------------------------------------------------------------------------------------------

BAD_NAMES = [
    "; touch pwned", "$(touch pwned)", "`touch pwned`", "a\nb", "a b", "'a'", '"a"', "naïve", "-rf", "..", "../x", "a/b", "",
    "a\\b", "a|b", "a\x00b", "a\u2028b", "\udcff", "x" * 101, "~root", "*", "a=b",
]  # fmt: skip


def tree(**changes):
    phase = {"name": "main", "tokens": "64Ki", "seq_len": 64, "batch_tokens": 512, "micro_batch": 2}
    return {"name": "t", "model": "cpu-tiny", "data": {"sources": {"a": "x"}}, "phases": [phase], **changes}


def refusal(tmp_path, content, *overrides):
    path = tmp_path / "r.yaml"
    path.write_text(content if isinstance(content, str) else json.dumps(content))  # which is YAML
    with pytest.raises(UserError) as caught:
        load_recipe(path, list(overrides))
    text = str(caught.value)
    text.encode()  # also a name that is no UTF-8 can be told
    return text


@pytest.mark.parametrize("name", BAD_NAMES, ids=ascii)
def test_a_name_that_a_shell_or_a_path_could_read_is_refused_everywhere(tmp_path, monkeypatch, name):
    monkeypatch.chdir(ROOT)
    phase = tree()["phases"][0] | {"name": name}
    cases = {
        "name": tree(name=name),
        "phases.0.name": tree(phases=[phase]),
        "data.sources": tree(data={"sources": {name: "x"}}),
        "data.validation": tree(data={"sources": {"a": "x"}, "validation": {name: "x"}}),
        "teacher": tree(teacher={name: {"model": "x"}}),
    }
    for field, content in cases.items():
        text = refusal(tmp_path, content)
        assert f"- {field}" in text, text
        assert "is no name, as it also names folders" in text or "begin with" in text or "has a -" in text, text
        assert len(text.splitlines()) < 5, text  # what is in it forges no further line


def test_names_in_use_are_allowed(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    path = tmp_path / "r.yaml"
    for name in ("llama3.2-1b", "_x", "8K", "a.b_c-d", "x" * 100):
        path.write_text(json.dumps(tree(name=name, data={"sources": {name: "x y/é $(z)"}})))
        assert load_recipe(path).name == name


@pytest.mark.parametrize("path", ["a\nb", "a\x1b[2Jb", "-rf", "\udcff", "a\u2028b"], ids=ascii)
def test_an_output_folder_that_breaks_lines_or_reads_as_an_option_is_refused(tmp_path, monkeypatch, path):
    monkeypatch.chdir(ROOT)
    assert "output: " in refusal(tmp_path, tree(output=path))
    if path != "-rf":
        assert "init_from.path: " in refusal(tmp_path, tree(init_from={"path": path}))
        assert "data.sources.a: " in refusal(tmp_path, tree(data={"sources": {"a": path}}))


@pytest.mark.parametrize(
    "corpus", ["/tmp/$(touch pwned)", "/tmp/`touch pwned`/", "/tmp/a\nb; touch pwned", "/tmp/é 'x'", "/"]
)
def test_the_quickstart_makes_a_plain_name_of_any_corpus(tmp_path, corpus):
    """The very lines of the script: its folders stand unquoted in later commands."""
    script = (ROOT / "launchers/quickstart.sh").read_text()
    start, end = script.index("\nname=quickstart"), script.index("\nwork=artifacts")
    done = subprocess.run(
        ["bash", "-euc", script[start:end] + '\nprintf "%s" "$name"'],
        env={"PATH": os.environ["PATH"], "CORPUS": corpus}, cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.isascii()
    assert done.stdout.replace("-", "").replace("_", "").isalnum()
    assert os.listdir(tmp_path) == []


# --- YAML and JSON -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("name: !!python/object/apply:os.system ['touch pwned']", "could not determine a constructor"),
        ("name: !!python/name:os.system", "could not determine a constructor"),
        ("name: !!python/object/new:subprocess.Popen [[touch, pwned]]", "could not determine a constructor"),
        ("a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
            f"{n}: &{n} [{','.join([f'*{m}'] * 10)}]\n" for m, n in zip("abcdefghi", "bcdefghij", strict=True)
        ), "aliases make more than 50,000 values"),
        ("a: &a {x: 1}\n" + "".join(
            f"{n}: &{n} {{<<: [{','.join([f'*{m}'] * 10)}]}}\n" for m, n in zip("abcdefghi", "bcdefghij", strict=True)
        ), "aliases make more than 50,000 values"),
        ("".join(f"b{n}: &b{n} [{f'*b{n - 1}' if n else ''}]\n" for n in range(3000)), "nested more than 40 deep"),
        ("a: &a [*a]", "holds itself"),
        ("a: " + "[" * 5000, "nested more than 40 deep"),
        ("a: " + "x" * (1 + (1 << 18)), "more than 262,144 characters"),
        ("a: " + "1" * 5000, "a value is none"),
        ("a: 2026-13-45", "a value is none"),
    ],
    ids=["apply", "name", "new", "aliases", "merges", "chain", "cycle", "deep", "long", "digits", "date"],
)  # fmt: skip
def test_yaml_is_data_of_bounded_size(tmp_path, monkeypatch, text, told):
    monkeypatch.chdir(tmp_path)
    assert told in refusal(tmp_path, text)
    value = text.partition(": ")[2] if text.count("\n") < 2 else None
    if value is not None and told != "holds itself":
        assert "the override " in refusal(tmp_path, tree(), f"name={value}")
    assert not (tmp_path / "pwned").exists()


def test_a_recipe_that_never_ends_is_not_read_to_its_end():
    with pytest.raises(yaml.YAMLError, match="more than 262,144 characters"):
        strict_yaml.read(Path("/dev/zero"))


def test_a_deepspeed_json_nested_without_end_is_a_message(tmp_path):
    (tmp_path / "z.json").write_text("[" * 100_000)
    assert "is not valid JSON" in deepspeed_problems(str(tmp_path / "z.json"))[0]


# --- files that name files -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("m") / "hf"
    SLMForCausalLM(ModelConfig.preset("cpu-tiny"), seed=7).save_pretrained(folder)
    return folder


OUT = [
    "../outside.safetensors",
    "sub/../../outside.safetensors",
    "/etc/passwd",
    "..",
    "",
    "a\\b",
    "a\x00b",
    5,
    ["x"],
    None,
]


@pytest.mark.parametrize("name", OUT, ids=ascii)
def test_an_index_of_weights_stays_in_its_folder(model_folder, tmp_path, name):
    folder = tmp_path / "hf"
    shutil.copytree(model_folder, folder)
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    for read in (load_model, describe_teacher):
        with pytest.raises((CorruptArtefact, UserError)) as caught:
            read(str(folder))
        assert str(index) in str(caught.value) or isinstance(name, int | list | None), caught.value


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": 3}', "{", "[" * 100_000])
def test_an_index_that_is_none_is_a_message(model_folder, tmp_path, content):
    folder = tmp_path / "hf"
    shutil.copytree(model_folder, folder)
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CorruptArtefact, match="index.json"):
        load_model(folder)


def test_a_link_out_of_a_model_folder_is_refused_but_in_the_hugging_face_cache(model_folder, tmp_path):
    """There snapshots/REVISION/FILE is a link to blobs/HASH, and is what people have."""
    folder = tmp_path / "hf"
    shutil.copytree(model_folder, folder)
    (folder / "model.safetensors").rename(tmp_path / "elsewhere")
    (folder / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CorruptArtefact, match="a link to .*outside of its folder"):
        load_model(folder)
    snapshot = tmp_path / "models--a--b" / "snapshots" / "abc"
    (tmp_path / "models--a--b" / "blobs").mkdir(parents=True)
    shutil.copytree(model_folder, snapshot)
    for file in list(snapshot.iterdir()):
        file.rename(tmp_path / "models--a--b" / "blobs" / file.name)
        file.symlink_to(Path("../../blobs") / file.name)
    load_model(snapshot)
    (tmp_path / "by-a-link").symlink_to(snapshot)  # of the folder itself: the user's own
    load_model(tmp_path / "by-a-link")


@pytest.mark.parametrize("name", ["../t-00000", "/tmp/t-00000", "sub/t", 5, None], ids=ascii)
def test_a_manifest_of_tokens_stays_in_its_folder(tmp_path, name):
    """A teacher's cache takes its name from the shard's, so it stays in its folder as well."""
    make_dataset(tmp_path / "a", lengths=[9, 8, 7])
    for file in (tmp_path / "a").glob("t-00000.*"):
        shutil.copy(file, tmp_path)
    path = tmp_path / "a" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["shards"][0]["name"] = name
    manifest["sha256"] = _manifest_sha256(manifest)  # its author can do so too
    path.write_text(json.dumps(manifest))
    with pytest.raises(CorruptArtefact, match="no plain name"):
        TokenDataset(tmp_path / "a")


def test_a_shard_that_is_a_link_to_elsewhere_is_refused(tmp_path):
    make_dataset(tmp_path / "a", lengths=[9, 8, 7])
    file = tmp_path / "a" / "t-00001.bin"
    file.rename(tmp_path / "b.bin")
    file.symlink_to(tmp_path / "b.bin")
    with pytest.raises(CorruptArtefact, match="(?s)a link to .*Fix: if it is meant, put the file itself there: cp"):
        TokenDataset(tmp_path / "a")
    assert file_inside(tmp_path / "a", "t-00000.bin", "x").is_file()


def test_a_saved_dataset_names_files_of_its_own(tmp_path):
    folder = tmp_path / "saved"
    folder.mkdir()
    (tmp_path / "secret.arrow").write_text("x")
    (folder / "dataset_info.json").write_text("{}")
    for name in ("../secret.arrow", str(tmp_path / "secret.arrow")):
        (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
        with pytest.raises(CorruptArtefact, match="no plain name"):
            find_files([folder])


@pytest.mark.parametrize(
    "where", ["../secret.jsonl", "{folder}/secret.jsonl", "file://{folder}/secret.jsonl", "link.jsonl"]
)
def test_the_readme_of_a_dataset_chooses_no_file_of_this_machine(tmp_path, where):
    """`datasets` reads what the data_files of a README say, wherever it is."""
    (tmp_path / "secret.jsonl").write_text('{"text": "secret"}\n')
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "link.jsonl").symlink_to(tmp_path / "secret.jsonl")
    where = where.format(folder=tmp_path)
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files: {where!r}\n---\n")
    with pytest.raises(UserError, match="which is none of its own"):
        open_hub(f"hf://{folder}")


def test_a_dataset_runs_no_code_and_holds_no_pickles(tmp_path):
    """A script of a dataset's own, and an archive whose members could be pickles (webdataset)."""
    scripted = tmp_path / "scripted"
    scripted.mkdir()
    (scripted / "scripted.py").write_text(f"open({str(tmp_path / 'pwned')!r}, 'w')\n")
    with pytest.raises(UserError, match="scripts are no longer supported"):
        open_hub(f"hf://{scripted}")
    packed = tmp_path / "packed"
    packed.mkdir()
    (packed / "x.pth").write_bytes(b"")
    subprocess.run(["tar", "-cf", packed / "train.tar", "-C", packed, "x.pth"], check=True)
    (packed / "x.pth").unlink()
    with pytest.raises(UserError, match="kind webdataset, whose files can hold more than text"):
        open_hub(f"hf://{packed}")
    assert not (tmp_path / "pwned").exists()


# --- code that comes with a model ------------------------------------------------------------------------------


class Payload:
    """Unpickled, it writes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (os.mkdir, (self.path,))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "weights.ckpt", "x.pkl"])
def test_pickles_are_refused_with_the_command_that_converts_them(model_folder, tmp_path, monkeypatch, name):
    folder = tmp_path / "it's $(touch pwned)"
    shutil.copytree(model_folder, folder)
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Payload(tmp_path / "pwned")}, folder / name)
    monkeypatch.chdir(ROOT)
    recipe = tmp_path / "r.yaml"
    for source in (folder, folder / name):
        recipe.write_text(json.dumps(tree(init_from={"path": str(source)})))
        for read in (load_model, describe_teacher, lambda _: check_init_from(load_recipe(recipe))):
            with pytest.raises(UserError, match="a pickle: to read it is to run") as caught:
                read(str(source))
            words = shlex.split(str(caught.value).partition("convert it: ")[2].partition(", and copy")[0])
            assert words[:2] == ["python", "-c"]
            assert words[3:] == [str(folder), f"{folder}-safetensors"]  # whole, whatever a shell could read in it
    assert not (tmp_path / "pwned").exists()


@pytest.mark.slow
def test_the_command_that_converts_pickles_does(model_folder, tmp_path):
    folder = tmp_path / "old model"
    shutil.copytree(model_folder, folder)
    (folder / "model.safetensors").unlink()
    model = SLMForCausalLM.from_pretrained(model_folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(UserError) as caught:
        load_model(folder)
    words = shlex.split(str(caught.value).partition("convert it: ")[2].partition(", and copy")[0])
    subprocess.run([sys.executable, *words[1:]], check=True, capture_output=True, timeout=200)
    again = SLMForCausalLM.from_pretrained(f"{folder}-safetensors")
    for (name, was), now in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(was, now), name


def test_deepspeeds_own_checkpoints_are_refused(tmp_path, monkeypatch):
    """The zero_to_fp32.py that lies in such a folder is as foreign as its pickles."""
    folder = tmp_path / "global_step5"
    folder.mkdir()
    torch.save({"module": Payload(tmp_path / "pwned")}, folder / "mp_rank_00_model_states.pt")
    (tmp_path / "zero_to_fp32.py").write_text("")
    for source in (tmp_path, folder):
        with pytest.raises(UserError, match="python -m deepspeed.utils.zero_to_fp32 .* --safe_serialization"):
            load_model(source)
    assert not (tmp_path / "pwned").exists()


def test_an_adapter_is_no_model(model_folder, tmp_path):
    folder = tmp_path / "hf"
    shutil.copytree(model_folder, folder)
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "/elsewhere"}')
    with pytest.raises(UserError, match="merge them first"):
        load_model(folder)


def foreign(model_folder, folder, **fields):
    shutil.copytree(model_folder, folder)
    config = {"model_type": "own", "architectures": ["Own"], "vocab_size": 512, **fields}
    (folder / "config.json").write_text(json.dumps(config))
    code = f"open({str(folder / 'pwned')!r}, 'w')\nclass Own: pass\nclass OwnConfig: pass\n"
    (folder / "own.py").write_text(code)
    return str(folder)


def test_code_that_comes_with_a_teacher_does_not_run(model_folder, tmp_path, monkeypatch):
    """auto_map names it; transformers would ask on the terminal, and an answer in the pipe would do. The environment cannot
    switch it on either."""
    monkeypatch.setenv("HF_DATASETS_TRUST_REMOTE_CODE", "1")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}
    path = foreign(model_folder, tmp_path / "hf", auto_map=auto_map)
    with pytest.raises(UserError, match="code that comes with a model is never run"):
        load_teacher(path, torch.device("cpu"))
    assert not (tmp_path / "hf" / "pwned").exists()


@pytest.mark.parametrize(
    "fields",
    [
        {"attn_implementation": "someone/kernel"},
        {"text_config": {"_attn_implementation": {"": "someone/kernel"}}},
        {"transformers_weights": "../elsewhere.safetensors"},
    ],
)
def test_a_config_that_fetches_kernels_or_weights_from_elsewhere_is_refused(model_folder, tmp_path, fields):
    with pytest.raises(UserError, match="would be fetched from elsewhere and run"):
        describe_teacher(foreign(model_folder, tmp_path / "hf", model_type="gpt2", **fields))


def test_a_class_runs_only_if_the_user_names_it(tmp_path, monkeypatch):
    """A checkpoint's recipe and a dataset's manifest may have come with a folder that holds the class too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "evil_words.py").write_text("open('pwned', 'w')\n")
    with pytest.raises(UserError, match="(?s)runs/x names a Python class .*--tokenizer evil_words:Words"):
        load_tokenizer("evil_words:Words", said_by="runs/x")
    make_dataset(tmp_path / "a", lengths=[9, 8, 7])
    path = tmp_path / "a" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["tokenizer"]["spec"] = "evil_words:Words"
    manifest["sha256"] = _manifest_sha256(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="a names a Python class"):
        show(tmp_path / "a", 0)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_json_nested_without_end_is_a_message(tmp_path, name):
    SLMTokenizer().save_pretrained(tmp_path)
    (tmp_path / name).write_text('{"a":' * 100_000)
    with pytest.raises(CorruptArtefact, match=name):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "is_secret"),
    [
        *((name, "hunter2hunter2", True) for name in (
            "PGPASSWORD", "SSHPASS", "GITHUB_PAT", "MYSQL_PWD", "GPG_PASSPHRASE", "PASS", "APIKEY", "aws_secret_access_key",
            "HF_TOKEN", "GOOGLE_CREDENTIALS", "BASIC_AUTH", "CLIENT_SECRETS",
        )),
        ("PATH", "bin:sbin:local", False),
        ("PATTERN", "some pattern", False),
        ("PWD", "/home/somebody", False),
        ("OLDPWD", "/home/somebody", False),
        ("SSH_AUTH_SOCK", "/tmp/agent.sock", False),
        ("GIT_AUTHOR_NAME", "Some Body", False),
        ("TOKENIZERS_PARALLELISM", "something", False),
        ("MAX_TOKENS", "1000000000", False),
        ("XDG_CONFIG", "something", False),
    ],
)  # fmt: skip
def test_which_variables_are_secrets(monkeypatch, name, value, is_secret):
    """As docs/security.md says."""
    for other in list(os.environ):
        monkeypatch.delenv(other)
    monkeypatch.setenv(name, value)
    assert redacted(f"({value})") == ("(***)" if is_secret else f"({value})")
