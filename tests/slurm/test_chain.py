"""launchers/slurm on a real SLURM of two nodes: a chain from text to an evaluation, preempted, requeued, resumed; a gate that
fails; a job that is cancelled; and what is refused before anything is submitted. In one file, so that there is one cluster."""

import json
import os
import re
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest
import yaml

from slm import SLMForCausalLM, SLMTokenizer
from slm.model.config import ModelConfig
from slm.text_loss import evaluate_text
from tests.distributed.test_launcher import processes_of
from tests.shards import make_dataset

ROOT = Path(__file__).parents[2]
SUBMIT = str(ROOT / "launchers" / "slurm" / "submit.py")
TRAIN = str(ROOT / "launchers" / "slurm" / "train.sbatch")
CANARY = "canary-8d1f0c"
JOBS_SECONDS = 240.0


@pytest.fixture
def lab(tmp_path, cluster):
    """Writes a recipe and a cluster file, and cancels what a test leaves in the queue."""
    yield Lab(tmp_path, cluster)
    cluster.run("scancel", "--quiet", "-u", "root", "--full", "--signal=KILL", check=False)
    cluster.run("scancel", "--quiet", "-u", "root", check=False)
    cluster.wait_until(lambda: not cluster.run("squeue", "-h").stdout.strip(), seconds=90)
    print(*(f"{path.name}:\n{path.read_text()[-3000:]}" for path in tmp_path.rglob("*.log")), sep="\n")


class Lab:
    def __init__(self, folder: Path, cluster) -> None:
        self.folder, self.cluster, self.run_dir = folder, cluster, folder / "run"
        # Ranks and a port of another launcher in the shell that submits do no harm.
        foreign = {"RANK": "7", "WORLD_SIZE": "9", "LOCAL_RANK": "7", "MASTER_ADDR": "192.0.2.1", "MASTER_PORT": "1"}
        self.environment = {**foreign, "DS_ACCELERATOR": "cpu", "WANDB_API_KEY": CANARY, "VIRTUAL_ENV": sys.prefix}

    def recipe(self, **changes) -> Path:
        """Two phases of 6 steps of 256 tokens, saved every two steps."""
        phase = {"tokens": 6 * 256, "batch_tokens": 256, "micro_batch": 2, "seq_len": 64}
        tree = {
            "name": "t",
            "output": str(self.run_dir),
            "model": "cpu-tiny",
            "data": {"sources": {"a": str(self.folder / "a")}, "validation": {"val": str(self.folder / "val")}},
            "optim": {"lr": 3e-3},
            "phases": [{**phase, "name": "one"}, {**phase, "name": "two"}],
            "checkpoint": {"every_steps": 100},
            **changes,
        }
        path = self.folder / "t.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    def datasets(self) -> None:
        make_dataset(self.folder / "a")
        make_dataset(self.folder / "val", lengths=[90, 40, 130, 64, 65], seed=5)

    def cluster_file(self, **changes) -> Path:
        tree = {
            "partition": "low",
            "time": "10",
            "train": {"nodes": 2, "tasks_per_node": 1},
            "check": False,
            "environment": ["SLURM_CONF"],
            **changes,
        }
        path = self.folder / "cluster.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    def submit(self, *more: str, **cluster) -> subprocess.CompletedProcess:
        command = [
            sys.executable,
            SUBMIT,
            str(self.folder / "t.yaml"),
            "--cluster",
            str(self.cluster_file(**cluster)),
            *more,
        ]
        done = self.cluster.run(*command, check=False, cwd=self.folder, env=self.environment)
        print(done.stdout, done.stderr)
        assert "Traceback" not in done.stderr
        return done

    def sbatch(self, *options: str) -> str:
        """The job of `sbatch OPTIONS`."""
        return self.cluster.run("sbatch", "--parsable", *options, cwd=ROOT, env=self.environment).stdout.strip()

    def jobs(self) -> dict[str, str]:
        return {name: entry["job"] for name, entry in json.loads((self.run_dir / "jobs.json").read_text()).items()}

    def state(self, job: str) -> set[str]:
        """Of a job, or of the members of an array."""
        return set(re.findall(r"\bJobState=(\S+)", self.cluster.run("scontrol", "show", "job", "-o", job).stdout))

    def wait_for(self, job: str, state: str) -> None:
        self.cluster.wait_until(lambda: self.state(job) == {state}, seconds=JOBS_SECONDS)

    def steps(self) -> list[tuple]:
        """(phase, step, loss) of every step, in the order of the file."""
        path = self.run_dir / "metrics.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [(row["phase"], row["step"], row["loss"]) for row in rows if "loss" in row]

    def events(self, kind: str) -> list[dict]:
        rows = [json.loads(line) for line in (self.run_dir / "events.jsonl").read_text().splitlines()]
        return [row for row in rows if row["kind"] == kind]

    def start_now(self, job: str) -> None:
        """A requeued job waits for two minutes by default, counted anew from when its last process has gone. Three seconds is
        enough, and no less will do: a node refuses a job's new credential in the second in which it revoked the old one."""

        def has_started() -> bool:
            shown = self.cluster.run("scontrol", "show", "job", "-o", job, check=False).stdout
            start = re.search(r"StartTime=(\d\S+)", shown)
            soon = time.time() + 10
            if "JobState=PENDING" in shown and start and datetime.fromisoformat(start[1]).timestamp() > soon:
                self.cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now+3", check=False)
            return "Restarts=1" in shown and "JobState=RUNNING" in shown

        self.cluster.wait_until(has_started, seconds=180)

    def local(self, recipe: Path, run_dir: Path) -> list[tuple]:
        """The same recipe on two ranks of this machine, uninterrupted."""
        command = ["bash", str(ROOT / "launchers" / "local.sh"), str(recipe), "2", f"output={run_dir}"]
        subprocess.run(command, check=True, env={**os.environ, **self.environment, "OMP_NUM_THREADS": "1"}, timeout=200)
        other = Lab(self.folder, self.cluster)
        other.run_dir = run_dir
        return other.steps()


@pytest.mark.timeout(600)
def test_a_chain_from_text_to_an_evaluation_preempted_on_the_way(lab):
    """Data array, a check of the nodes -> teacher array -> a phase on two nodes -> another on one -> evaluation. A job of higher
    priority takes the nodes while the first phase runs: it saves, is requeued once, goes on, and its steps are those of an
    uninterrupted run. No secret gets into a job unasked. Run again, there is nothing to submit."""
    (lab.folder / "text").mkdir()
    for number in range(40):
        (lab.folder / "text" / f"{number}.txt").write_text(
            f"Document {number} says: " + "the quick brown fox. " * (3 + number)
        )
    tokenizer = SLMTokenizer()
    tokenizer.save_pretrained(lab.folder / "tokenizer")
    teacher = SLMForCausalLM(ModelConfig.preset("cpu-tiny", vocab_size=264)).init_weights(seed=1)
    teacher.save_pretrained(lab.folder / "teacher")
    tokenizer.save_pretrained(lab.folder / "teacher")
    tokens = lab.folder / "tokens"
    phase = {"batch_tokens": 256, "micro_batch": 2, "seq_len": 64}
    recipe = lab.recipe(
        model={"preset": "cpu-tiny", "vocab_size": 264},
        tokenizer=str(lab.folder / "tokenizer"),
        data={"sources": {"a": str(tokens / "train")}, "validation": {"a": str(tokens / "validation")}},
        teacher={"model": str(lab.folder / "teacher"), "cache": {"kind": "top_k", "k": 8, "block_tokens": 1024}},
        phases=[
            {**phase, "name": "one", "tokens": 600 * 256},
            {**phase, "name": "two", "tokens": 6 * 256, "loss": {"type": "distill", "alpha": 0.5}},
        ],
    )
    shards = [str(lab.folder / "text"), "--tokenizer", str(lab.folder / "tokenizer"), "--validation-fraction", "0.2"]
    asked = {
        "check": True,
        "data": {"shards": {"text": [*shards, "--output", str(tokens)]}, "array": 2},
        "teacher": {"array": 2},
        "phases": {"two": {"nodes": 1}},
    }

    told = lab.submit("--dry-run", **asked)
    assert told.returncode == 0
    assert [line.partition(":")[0] for line in told.stdout.splitlines() if "would submit" in line] == [
        "data text", "check", "teacher", "phase one", "phase two", "evaluation",
    ]  # fmt: skip
    assert not lab.run_dir.exists()
    assert not lab.cluster.run("squeue", "-h").stdout

    assert lab.submit(**asked).returncode == 0
    jobs = lab.jobs()
    lab.cluster.wait_until(lambda: len(lab.steps()) > 20, seconds=JOBS_SECONDS)
    urgent = lab.sbatch("--partition=high", "--nodes=2", "--ntasks-per-node=2", "--output=/dev/null", "--wrap=true")
    kept = lab.submit(**asked).stdout
    assert f"phase one: job {jobs['phase one']} is in the queue" in kept
    assert "data text: done" in kept
    assert lab.jobs() == jobs
    lab.start_now(jobs["phase one"])
    assert lab.state(urgent) <= {"RUNNING", "COMPLETING", "COMPLETED"}
    assert len(lab.steps()) < 400  # it was in the middle
    for name in ("phase one", "phase two", "evaluation"):
        lab.wait_for(jobs[name], "COMPLETED")

    assert [(event["job"], event["restart"]) for event in lab.events("requeue")] == [(jobs["phase one"], 1)]
    assert [event["world_size"] for event in lab.events("start")] == [2, 2, 1]
    assert lab.steps()[:400] == lab.local(recipe, lab.folder / "local")[:400]
    assert json.loads((lab.run_dir / "eval" / "final.json").read_text())["loss"]["64"]["a"]["loss"] < 0.2

    done = lab.submit(**asked)
    assert [line for line in done.stdout.splitlines() if not line.endswith(": done")] == done.stdout.splitlines()[-1:]
    assert lab.jobs() == jobs
    shown = lab.cluster.run(sys.executable, "-m", "slm", "status", str(lab.run_dir)).stdout
    assert len(re.findall(r"\bover\b", shown)) == 2
    # What SLURM keeps of the chain's jobs. (sbatch by hand, as of the urgent one, hands on everything.)
    kept_by_slurm = [path for job in jobs.values() for path in lab.cluster.folder.glob(f"state/hash*/job.{job}/*")]
    written = [path for path in lab.run_dir.rglob("*") if path.is_file()] + kept_by_slurm
    assert len(kept_by_slurm) > 5
    assert len(written) > 10
    assert not [path for path in written if CANARY.encode() in path.read_bytes()]


@pytest.mark.timeout(600)
def test_a_gate_that_fails_stops_the_chain_and_mended_it_goes_on(lab):
    """Code 78: what waits for the phase is cancelled by SLURM, and nothing is requeued. With a gate that holds, the same
    command submits the phase and what comes after it, and not what was done. In a folder that a shell would not like."""
    lab.run_dir = lab.folder / "it's $(touch pwned); 100%j"
    lab.datasets()
    phase = {"tokens": 6 * 256, "batch_tokens": 256, "micro_batch": 2, "seq_len": 64}
    gate = {"short_loss_rise": -20.0}
    longer = {**phase, "seq_len": 128, "micro_batch": 1}
    phases = [{**phase, "name": "one"}, {**longer, "name": "two", "gate": gate}, {**longer, "name": "three"}]
    recipe = lab.recipe(phases=phases, eval={"seq_lens": [64]})
    nodes = {"train": {"nodes": 1, "tasks_per_node": 1}}
    assert lab.submit(**nodes).returncode == 0
    jobs = lab.jobs()
    for name, state in (("phase one", "COMPLETED"), ("phase two", "FAILED"), ("phase three", "CANCELLED")):
        lab.wait_for(jobs[name], state)
    lab.wait_for(jobs["evaluation"], "CANCELLED")
    assert json.loads((lab.run_dir / "exit.json").read_text())["code"] == 78
    assert "requeue" not in (lab.run_dir / "events.jsonl").read_text()
    shown = lab.cluster.run(sys.executable, "-m", "slm", "status", str(lab.run_dir)).stdout
    assert "gate not passed" in shown
    assert "code 78" in shown

    gate["short_loss_rise"] = 20.0
    lab.recipe(phases=phases, eval={"seq_lens": [64]})
    assert recipe.read_text().count("20.0") == 1
    said = lab.submit(**nodes).stdout
    assert "phase one: done" in said
    again = lab.jobs()
    assert again["phase one"] == jobs["phase one"]
    assert not set(list(again.values())[1:]) & set(jobs.values())
    lab.wait_for(again["evaluation"], "COMPLETED")
    assert (
        len([*(lab.run_dir / "logs").glob("slm-t-evaluation-*.log")]) == 1
    )  # a %j in the folder's name is none of SLURM's
    assert not [*lab.folder.rglob("pwned")]
    assert [step[:2] for step in lab.steps()] == [
        (name, 6 * at + n) for at, name in enumerate(("one", "two", "three")) for n in range(1, 7)
    ]


@pytest.mark.timeout(400)
def test_a_warning_before_the_time_limit_requeues_and_scancel_does_not(lab):
    """By hand, without a chain. SIGUSR1 to the steps is what SLURM sends before the limit: one requeue, by one process. scancel
    is the end: it saves, and stays cancelled."""
    lab.datasets()
    phase = {"name": "main", "tokens": 5000 * 256, "batch_tokens": 256, "micro_batch": 2, "seq_len": 64}
    recipe = lab.recipe(phases=[phase])
    job = lab.sbatch("--nodes=2", "--ntasks-per-node=1", f"--output={lab.folder}/job.log", TRAIN, str(recipe))
    lab.cluster.wait_until(lambda: lab.steps(), seconds=90)
    lab.cluster.run("scancel", "--signal=USR1", job)
    lab.start_now(job)
    (requeued,) = lab.events("requeue")
    assert (requeued["job"], requeued["step"]) == (job, len(lab.steps()))
    lab.cluster.wait_until(lambda: len(lab.steps()) > requeued["step"], seconds=90)
    lab.cluster.run("scancel", job)
    lab.wait_for(job, "CANCELLED")
    assert len(lab.events("requeue")) == 1
    assert json.loads((lab.run_dir / "exit.json").read_text())["code"] == 75
    steps = [step for _, step, _ in lab.steps()]
    assert steps == list(range(1, steps[-1] + 1))
    assert (lab.run_dir / "checkpoints" / f"main-{steps[-1]:08d}" / "manifest.json").exists()


def test_what_cannot_run_is_not_submitted(lab):
    """All of it at once, by name: an unknown partition, ranks that do not divide the batch, GPUs without tasks, a phase that is
    not there, too many nodes, no shards, a variable that is not set; and a field that a shell could run."""
    lab.recipe()
    said = lab.submit(
        partition="nowhere",
        train={"nodes": 3},
        phases={"two": {"gpus_per_node": 4}, "three": {}},
        environment=["SLURM_CONF", "NOT_SET_ANYWHERE"],
        setup=str(lab.folder / "none.sh"),
    ).stderr
    for problem in (
        "Invalid partition",
        "3 ranks",
        "phase two: gpus_per_node is 4",
        "three",
        "no token shards",
        "none.sh",
    ):
        assert problem in said
    assert "NOT_SET_ANYWHERE" in said
    assert not lab.run_dir.exists()
    long = {"name": "one", "tokens": 2**18, "batch_tokens": 2**16, "micro_batch": 1, "seq_len": 2**15}
    lab.recipe(model="llama3.2-1b", phases=[long])
    two = {"nodes": 1, "tasks_per_node": 2, "gpus_per_node": 2}
    assert "GiB too much" in lab.submit(gpu="rtx4090", train=two).stderr
    assert "gpu is 'abacus'" in lab.submit(gpu="abacus", train=two).stderr
    lab.recipe()
    lab.datasets()
    assert "Requested node configuration is not available" in lab.submit(train={"nodes": 4}).stderr
    refused = lab.submit(partition="low; touch pwned")
    assert refused.returncode == 2
    assert "partition" in refused.stderr
    assert not lab.cluster.run("squeue", "-h").stdout


def test_without_slurm_it_says_where_to_run_it(tmp_path):
    """Where there is no sbatch: code 3, no traceback."""
    command = [sys.executable, SUBMIT, "recipes/demo.yaml", "--cluster", "launchers/slurm/cluster.yaml"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 3
    assert "login node" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.timeout(400)
def test_a_node_on_which_a_rank_hangs_is_left_out(lab):
    """The rank on node2 is stopped, as by a device that hangs: the watchdog names it, the job is requeued without that node, and
    a chain that is submitted for this run keeps off it too. (Two nodes are all there are, so the job then waits.)"""
    lab.datasets()
    phase = {"name": "main", "tokens": 5000 * 256, "batch_tokens": 256, "micro_batch": 2, "seq_len": 64}
    recipe = lab.recipe(phases=[phase], watchdog={"step_seconds": 5, "slow_seconds": 120})
    lab.environment["SLM_RESTARTS"] = "0"
    job = lab.sbatch("--nodes=2", "--ntasks-per-node=1", f"--output={lab.folder}/job.log", TRAIN, str(recipe))
    lab.cluster.wait_until(lambda: lab.steps(), seconds=90)
    (rank,) = [
        p for p in processes_of(recipe) if p.environ().get("SLURM_PROCID") == "1" and "SLURM_STEP_ID" in p.environ()
    ]
    rank.suspend()
    lab.cluster.wait_until(
        lambda: "ExcNodeList=node2" in lab.cluster.run("scontrol", "show", "job", job).stdout, seconds=90
    )
    (requeued,) = lab.events("requeue")
    assert (requeued["code"], requeued["exclude"]) == (79, "node2")
    assert "rank 1 hangs" in json.loads((lab.run_dir / "exit.json").read_text())["reason"]
    told = lab.submit("--dry-run", train={"nodes": 1, "tasks_per_node": 1})
    assert "not on node2" in told.stdout
    assert told.stdout.count("--exclude=node2") == 2


@pytest.mark.timeout(400)
def test_a_member_of_an_array_requeues_itself_and_no_other(lab):
    """The teacher as an array of two; the last member, whose number is that of the whole array, is told that its time is up. The
    other goes on, and the cache is complete in the end."""
    tokenizer = SLMTokenizer()
    make_dataset(lab.folder / "a", lengths=[150] * 3000, vocab_size=259, fingerprint=tokenizer.fingerprint)
    model = SLMForCausalLM(ModelConfig.preset("cpu-small", vocab_size=264)).init_weights(seed=1)
    model.save_pretrained(lab.folder / "teacher")
    tokenizer.save_pretrained(lab.folder / "teacher")
    phase = {"name": "main", "tokens": 6 * 256, "batch_tokens": 256, "micro_batch": 2, "seq_len": 64}
    recipe = lab.recipe(
        model={"preset": "cpu-tiny", "vocab_size": 264},
        tokenizer=str(lab.folder / "teacher"),
        data={"sources": {"a": str(lab.folder / "a")}},
        teacher={"model": str(lab.folder / "teacher"), "cache": {"kind": "top_k", "k": 8, "block_tokens": 4096}},
        phases=[{**phase, "loss": {"type": "distill"}}],
    )
    script = str(ROOT / "launchers" / "slurm" / "teacher.sbatch")
    array = lab.sbatch("--array=1-2", f"--output={lab.folder}/member-%a.log", script, str(recipe))
    log = lab.folder / "member-2.log"
    lab.cluster.wait_until(lambda: log.exists() and "loading" in log.read_text(), seconds=90)
    lab.cluster.run("scancel", "--signal=USR1", f"{array}_2")
    lab.start_now(f"{array}_2")

    def restarts(member: int) -> list[str]:
        shown = lab.cluster.run("scontrol", "show", "job", "-o", f"{array}_{member}").stdout
        return re.findall(r"\bRestarts=(\d+)", shown)

    assert (restarts(1), restarts(2)) == (["0"], ["1"])
    for member in (1, 2):
        lab.wait_for(f"{array}_{member}", "COMPLETED")
    assert (restarts(1), restarts(2)) == (["0"], ["1"])
    assert [*(lab.folder / "a").rglob("*.kdc")]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_slurms_own_warning_before_a_time_limit(lab):
    """A limit of two minutes, a warning 45 s before: SLURM sends SIGUSR1 to the tasks by itself."""
    lab.datasets()
    phase = {"name": "main", "tokens": 50000 * 256, "batch_tokens": 256, "micro_batch": 2, "seq_len": 64}
    recipe = lab.recipe(phases=[phase])
    limit = ("--time=2", "--signal=USR1@45", f"--output={lab.folder}/job.log")
    job = lab.sbatch("--nodes=2", "--ntasks-per-node=1", *limit, TRAIN, str(recipe))
    lab.cluster.wait_until(lambda: (lab.run_dir / "exit.json").exists(), seconds=200)
    assert "SIGUSR1" in json.loads((lab.run_dir / "exit.json").read_text())["reason"]
    lab.start_now(job)
    assert [event["job"] for event in lab.events("requeue")] == [job]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_preemption_without_a_grace_time_is_requeued_by_slurm_alone(lab):
    """In partition main all get SIGTERM at once: the run saves, the script sees that SLURM ends the job, and leaves it to it."""
    lab.datasets()
    phase = {"name": "main", "tokens": 5000 * 256, "batch_tokens": 256, "micro_batch": 2, "seq_len": 64}
    recipe = lab.recipe(phases=[phase])
    job = lab.sbatch("--nodes=2", "--ntasks-per-node=1", f"--output={lab.folder}/job.log", TRAIN, str(recipe))
    lab.cluster.wait_until(lambda: lab.steps(), seconds=90)
    lab.sbatch("--partition=high", "--nodes=2", "--ntasks-per-node=2", "--output=/dev/null", "--wrap=true")
    lab.start_now(job)
    assert not lab.events("requeue")
    assert "Restarts=1" in lab.cluster.run("scontrol", "show", "job", "-o", job).stdout
    lab.cluster.wait_until(lambda: [event["step"] > 0 for event in lab.events("start")] == [False, True], seconds=90)


def test_a_text_under_srun(cluster, tmp_path):
    """Two tasks find what one process finds; one of them says it."""
    text = (ROOT / "README.md").read_text()
    tokenizer = SLMTokenizer(vocab_size=300).train([text])
    config = ModelConfig.preset("cpu-tiny", vocab_size=len(tokenizer), initializer_range=0.2)
    SLMForCausalLM(config).init_weights(seed=0).save_pretrained(tmp_path / "model", tokenizer)
    (tmp_path / "a.txt").write_text(text)
    [alone] = evaluate_text(str(tmp_path / "model"), [tmp_path / "a.txt"], seq_len=64)
    # Without the ranks that this process has told itself of (runtime.discover_ranks).
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    step = [
        "env",
        *(f"--unset={name}" for name in names),
        "MASTER_ADDR=127.0.0.1",
    ]  # the nodes' names mean nothing to DNS
    step += ["srun", "--nodes=2", "--ntasks-per-node=1", "--mpi=none", "--export=ALL", sys.executable, "-m", "slm"]
    environment = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    words = ["eval", str(tmp_path / "model"), "--text", str(tmp_path / "a.txt"), "--seq-len", "64", "--json"]
    done = cluster.run(*step, *words, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    [told] = json.loads(done.stdout)
    assert told["num_tokens"] == alone.num_tokens
    assert told["loss_sum"] == pytest.approx(alone.loss_sum, rel=1e-6)
