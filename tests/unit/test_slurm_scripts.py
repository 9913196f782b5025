"""launchers/slurm: what submit.py submits again and what it leaves alone, when job.py requeues, what a cluster's file may say.

SLURM's commands are stand-ins here that write down how they were called and answer as a test says, for moments that cannot be
had at will; the real ones are in tests/slurm.
"""

import importlib.util
import json
import os
import signal
import stat
import sys
from pathlib import Path

import pytest
import yaml

from slm.errors import EnvironmentProblem, UserError
from slm.recipe import load_recipe

ROOT = Path(__file__).parents[2]


def launcher(name, monkeypatch):
    """A file of launchers/slurm, which is no package."""
    monkeypatch.syspath_prepend(str(ROOT / "launchers" / "slurm"))
    spec = importlib.util.spec_from_file_location(name, ROOT / "launchers" / "slurm" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


class Slurm:
    """answers: {"squeue": a line of shell, ...}; calls: what was asked, "COMMAND ARGUMENTS" each."""

    def __init__(self, folder, monkeypatch):
        self.folder = folder
        monkeypatch.setenv("PATH", str(folder), prepend=":")
        for name in ("sbatch", "squeue", "scancel", "scontrol"):
            self.answer(name, "exit 0")

    def answer(self, name, line):
        path = self.folder / name
        path.write_text(f'#!/bin/sh\necho "{name} $*" >> {self.folder}/calls\n{line}\n')
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    @property
    def calls(self):
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    return Slurm(tmp_path / "bin", monkeypatch)


# ------------------------------------------------------------------------------------------------ submit.py
@pytest.fixture
def chain(tmp_path, monkeypatch, slurm):
    """A function: submits two phases, of which the first is over, with jobs 100 (check) to 103 (evaluation) of before."""
    phase = {"tokens": 640, "batch_tokens": 64, "seq_len": 64}
    tree = {
        "name": "t",
        "output": str(tmp_path / "run"),
        "model": "cpu-tiny",
        "data": {"sources": {"a": "a"}, "validation": {"a": "b"}},
        "phases": [{**phase, "name": "one"}, {**phase, "name": "two"}],
    }
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(tree))
    saved = tmp_path / "run" / "checkpoints" / "one-00000010"
    saved.mkdir(parents=True)
    (saved / "manifest.json").write_text('{"global_step": 10}')
    (saved / "state.json").write_text('{"position": {"phase": "one", "step": 10}}')
    names = ("check", "phase one", "phase two", "evaluation")
    jobs = {name: {"job": str(100 + at), "submitted": 1, "arguments": []} for at, name in enumerate(names)}
    (tmp_path / "run" / "jobs.json").write_text(json.dumps(jobs))
    (tmp_path / "run" / "checked").touch()
    os.utime(tmp_path / "run" / "checked", (1, 1))
    slurm.answer("sbatch", "echo 200")
    submit = launcher("submit", monkeypatch)

    def run():
        recipe = load_recipe(tmp_path / "t.yaml")
        cluster = submit.Cluster()
        stages = submit.stages(recipe, cluster, [str(tmp_path / "t.yaml")])
        submit.submit(stages, recipe.run_dir, cluster, recipe.name, dry_run=False)
        return [call.split()[0] for call in slurm.calls if not call.startswith("squeue")]

    return run


def test_a_running_phase_is_left_alone_though_its_check_is_old(chain, slurm):
    """Nothing is submitted and nothing is cancelled while phase two runs, and what waits for it is kept."""
    slurm.answer("squeue", "printf '102|RUNNING|n1\\n103|PENDING|(Dependency)\\n'")
    assert chain() == []


def test_what_waits_for_a_failed_job_is_submitted_again_with_it(chain, slurm):
    """Phase two has left the queue undone: it and the evaluation, whose old job still waits for it; the check comes before."""
    slurm.answer("squeue", "printf '103|PENDING|(Dependency)\\n'")
    assert chain() == ["sbatch", "sbatch", "scancel", "sbatch"]
    submitted = [call for call in slurm.calls if call.startswith("sbatch")]
    assert "check.sbatch" in submitted[0]
    assert "--until two" in submitted[1]
    assert "--dependency=afterok:200" in submitted[1]


def test_a_job_that_can_never_start_does_not_count_as_in_the_queue(chain, slurm):
    """SLURM is about to cancel it."""
    slurm.answer("squeue", "printf '102|PENDING|(DependencyNeverSatisfied)\\n'")
    assert chain().count("sbatch") == 3


def test_a_queue_that_does_not_answer_is_not_taken_for_an_empty_one(chain, slurm):
    """Else the whole chain would be submitted twice."""
    slurm.answer("squeue", "exit 1")
    with pytest.raises(EnvironmentProblem, match="squeue does not answer"):
        chain()
    assert not [call for call in slurm.calls if call.startswith("sbatch")]


def test_a_chain_whose_jobs_json_is_gone_is_not_submitted_twice(chain, slurm, tmp_path):
    """Its jobs are found by their names."""
    (tmp_path / "run" / "jobs.json").write_text("[1]")
    slurm.answer("squeue", 'case "$*" in *--name=slm-t-phase-two*) echo 102;; esac')
    with pytest.raises(UserError, match="job 102 in the queue is named slm-t-phase-two"):
        chain()
    assert not [call for call in slurm.calls if call.startswith("sbatch")]


def checked(tmp_path, monkeypatch, shards=None, **cluster):
    """What check finds wrong with a recipe of one phase on one rank, whose shards are in a/train and a/validation."""
    submit = launcher("submit", monkeypatch)
    phase = {"name": "one", "tokens": 640, "batch_tokens": 64, "seq_len": 64}
    data = {"sources": {"a": str(tmp_path / "a" / "train")}, "validation": {"a": str(tmp_path / "a" / "validation")}}
    tree = {"name": "t", "output": str(tmp_path / "r"), "model": "cpu-tiny", "data": data, "phases": [phase]}
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(tree))
    recipe = load_recipe(tmp_path / "t.yaml")
    given = {"data": {"shards": shards}} if shards else {}
    fields = submit.Cluster.model_validate({**given, **cluster})
    with pytest.raises(UserError) as caught:
        submit.check(recipe, fields, submit.stages(recipe, fields, []))
    return str(caught.value)


def test_shards_that_nobody_makes_are_missed_whatever_else_is_made(tmp_path, monkeypatch, slurm):
    """Sources and validation; made by a stage of the chain is as good as there."""
    said = checked(tmp_path, monkeypatch, {"b": ["text", "--output", str(tmp_path / "b")]})
    assert said.count("none of data.shards makes them") == 2
    said = checked(tmp_path, monkeypatch, {"a": ["text", "--output", str(tmp_path / "a")]}, time="1")
    assert "none of data.shards" not in said


@pytest.mark.parametrize(("time", "warn"), [("5", 300), ("00:04:00", 300), ("20", 1200), ("0-1", 3600)])
def test_a_warning_before_the_job_has_begun_is_refused(tmp_path, monkeypatch, slurm, time, warn):
    """Minutes, hours, days; with what to change."""
    assert "would be told to save before it has begun" in checked(tmp_path, monkeypatch, time=time, warn_seconds=warn)


def test_a_kind_of_gpu_that_nobody_knows_and_gpus_that_nobody_asked_for(tmp_path, monkeypatch, slurm):
    """Said once, as the cluster file's field; and no plan without its GPUs."""
    assert checked(tmp_path, monkeypatch, gpu="h9000").count("gpu is 'h9000'") == 1
    assert "gpu is h100, and its job has no gpus_per_node" in checked(tmp_path, monkeypatch, gpu="h100")


def test_only_what_is_named_reaches_the_job(monkeypatch):
    """sbatch gets an environment of its own: a few variables, and those of the cluster's file."""
    submit = launcher("submit", monkeypatch)
    monkeypatch.setenv("WANDB_API_KEY", "canary")
    monkeypatch.setenv("HF_TOKEN", "canary")
    assert "canary" not in str(submit.environment(submit.Cluster()))
    assert submit.environment(submit.Cluster(environment=["HF_TOKEN"]))["HF_TOKEN"] == "canary"


# --------------------------------------------------------------------------------------------------- job.py
@pytest.fixture
def job(tmp_path, monkeypatch, slurm):
    """The module, in job 5, RUNNING, whose run stands at step 7; a requeue fails, so that the process goes on."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 7}\n')
    for name in ("SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    slurm.answer("scontrol", 'case "$1" in show) echo "JobState=RUNNING ExcNodeList=n[1-2]";; requeue) exit 1;; esac')
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    yield launcher("job", monkeypatch)
    for number, handler in before.items():
        signal.signal(number, handler)


def requeues(slurm):
    return [call for call in slurm.calls if call.startswith("scontrol requeue")]


@pytest.mark.parametrize(("code", "node"), [(75, ""), (79, "n3")])
def test_a_job_that_gains_nothing_is_started_three_times(tmp_path, job, slurm, capsys, code, node):
    """Its last two requeues were after the step at which it stands now, for whatever reason; a torn line hides nothing."""
    line = json.dumps({"kind": "requeue", "job": "5", "step": 7})
    (tmp_path / "events.jsonl").write_text(f"{line}\n")
    assert job.requeue(code, tmp_path, node) == code
    assert len(requeues(slurm)) == 1
    (tmp_path / "events.jsonl").write_text(f'{{"kind": "ha\n{line}\n{line}\n')
    assert job.requeue(code, tmp_path, node) == code
    assert len(requeues(slurm)) == 1
    assert "no further than step 7" in capsys.readouterr().err


def test_what_saves_nowhere_is_requeued_only_so_often(job, slurm, monkeypatch):
    """Token shards and teachers: nobody looks at their progress."""
    monkeypatch.setenv("SLURM_RESTART_COUNT", "19")
    job.requeue(138, None)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "20")
    job.requeue(138, None)
    assert len(requeues(slurm)) == 1


def test_a_member_of_an_array_requeues_itself_alone(job, slurm, monkeypatch):
    """The last member's number is that of the whole array, which scontrol would requeue with it."""
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "5")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    job.requeue(75, None)
    assert requeues(slurm) == ["scontrol requeue 5_2"]


def test_a_node_is_added_to_those_that_are_left_out(job, slurm):
    """And those of before stay."""
    job.leave_out("n3", ["5"])
    assert "scontrol update JobId=5 ExcNodeList=n[1-2],n3" in slurm.calls


def test_the_code_is_what_this_attempt_has_written(tmp_path, job):
    """0 too: a finished run is one whatever srun says; not the record of an attempt before, and not half a record."""
    assert job.code_of_run(137, tmp_path, 0.0) == 137
    (tmp_path / "exit.json").write_text('{"code": 0, "time": 10}')
    assert job.code_of_run(137, tmp_path, 5.0) == 0
    assert job.code_of_run(137, tmp_path, 15.0) == 137
    (tmp_path / "exit.json").write_text('{"code"')
    assert job.code_of_run(137, tmp_path, 0.0) == 137


def test_a_warning_between_two_attempts_is_no_failure(tmp_path, job, monkeypatch):
    """Of a run that has crashed and waits to be started again: the record is the crash's, and the job is requeued anyway."""
    (tmp_path / "exit.json").write_text('{"code": 1, "time": 10}')
    told = 128 + signal.SIGUSR1
    assert job.code_of_run(told, tmp_path, 5.0) == told
    assert told in job.TIME_IS_UP
    monkeypatch.setattr(job, "RESTARTS", "0")  # then srun says it, of a task that has failed
    assert job.code_of_run(told, tmp_path, 5.0) == 1


# ----------------------------------------------------------------------------------------------- cluster.py
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("partition", "low; touch pwned"),
        ("account", "$(id)"),
        ("qos", "a\nb"),
        ("time", "`id`"),
        ("time", 1440),
        ("memory", "1G --wrap=id"),
        ("environment", ["A=canary"]),
        ("exclude", ["--wrap"]),
        ("container", {"image": "x y"}),
        ("node", 3),
        ("phases", {"a b": {}}),
        ("train", {"array": 3}),
    ],
)
def test_a_cluster_file_cannot_say_more_than_values(tmp_path, monkeypatch, field, value):
    """Options of sbatch are words of an argument list, but what looks like a command is refused all the same, and by name."""
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump({field: value}))
    with pytest.raises(UserError, match=field):
        launcher("cluster", monkeypatch).load_cluster(path)


def test_the_cluster_file_that_is_copied_says_the_defaults(monkeypatch):
    """launchers/slurm/cluster.yaml has every field, but for those that only some need, which stand in its comments."""
    module, path = launcher("cluster", monkeypatch), ROOT / "launchers" / "slurm" / "cluster.yaml"
    cluster, text = module.load_cluster(path), path.read_text()
    assert not [name for name in module.Cluster.model_fields if f"{name}:" not in text]
    assert cluster.of_phase("any").ranks == 8
    assert cluster.of_phase("any").options() == [
        "--partition=gpu", "--time=24:00:00", "--nodes=1", "--ntasks-per-node=8", "--gpus-per-node=8", "--cpus-per-task=12",
    ]  # fmt: skip
