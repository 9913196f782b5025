"""Submit a recipe to SLURM as a chain of jobs: token shards, a check of the nodes, the teacher's caches, one job for each phase,
the evaluation.

Owns what depends on what, what is already there, and that nothing is submitted twice. Each job runs a script beside this file.
Run again, it submits what is missing: a job that is still in the queue is left alone, a stage that is complete is left out,
and one that has failed is submitted again with all that waited for it. RUN/jobs.json holds the jobs; `slm status RUN` shows them.

    python launchers/slurm/submit.py recipes/llama3.2-1b.yaml --cluster my-cluster.yaml --dry-run
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from cluster import Cluster, Job, load_cluster  # noqa: E402

from slm.budget import Assumptions, budget, check_fits  # noqa: E402
from slm.data.tokens import MANIFEST  # noqa: E402
from slm.distill.wanted import cached_teachers  # noqa: E402
from slm.errors import EnvironmentProblem, SLMError, UserError  # noqa: E402
from slm.forecast import GPUs  # noqa: E402
from slm.hardware import find_gpu  # noqa: E402
from slm.layout import check_ranks  # noqa: E402
from slm.names import shortened  # noqa: E402
from slm.recipe import Recipe, load_recipe  # noqa: E402
from slm.status import ANSWER_SECONDS, DATA, JOBS, PHASE, is_done, is_live, queue, read_jobs, suspects, write_jobs  # noqa: E402

# What sbatch and a job need of the shell that submits it; others only by cluster.yaml's `environment`, so that no secret travels
# unasked. (sbatch --export=NAME,NAME would have SLURM read the user's login files on the node, and all that they set.)
ENVIRONMENT = ("SLURM_CONF", "PATH", "HOME", "USER", "LANG", "LC_ALL", "VIRTUAL_ENV", "CONDA_PREFIX", "LD_LIBRARY_PATH",
               "DS_ACCELERATOR", "HF_HOME", "HF_HUB_OFFLINE", "TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME")  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """One job of the chain. script: beside this file. after: stages that must have succeeded."""

    name: str
    script: str
    arguments: list[str]
    job: Job
    after: tuple[str, ...]
    is_done: bool


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="FIELD=VALUE", help="of the recipe, as for slm train")
    parser.add_argument(
        "--cluster", type=Path, required=True, help="what the cluster is like; see launchers/slurm/cluster.yaml"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would be submitted, after all checks, and do nothing"
    )
    options = parser.parse_intermixed_args(arguments)
    for program in ("sbatch", "squeue"):
        if shutil.which(program) is None:
            raise EnvironmentProblem(
                f"there is no {program} here", fix="run this where jobs are submitted: a login node"
            )
    recipe = load_recipe(options.recipe, options.overrides)
    cluster = load_cluster(options.cluster)
    words = [str(options.recipe.resolve()), *options.overrides]
    chain = stages(recipe, cluster, words)
    check(recipe, cluster, chain)
    tell_of_changes(recipe, chain)
    with locked(recipe.run_dir, write=not options.dry_run):
        submit(chain, recipe.run_dir, cluster, recipe.name, dry_run=options.dry_run)
    return 0


# ------------------------------------------------------------------------------------------------ the chain
def stages(recipe: Recipe, cluster: Cluster, words: list[str]) -> list[Stage]:
    """In order. words: the recipe and its overrides, as each job gets them."""
    run_dir, found = recipe.run_dir, []

    def add(name: str, script: str, arguments: list[str], job: Job, after: tuple[str, ...]) -> None:
        found.append(Stage(name, script, arguments, job, after, is_done(name, arguments, run_dir, recipe)))

    for corpus, arguments in cluster.data.shards.items():
        if "--output" not in arguments[:-1]:
            raise UserError(
                f"data.shards.{corpus} has no --output, so nobody could tell whether its shards are there",
                fix="end the list with --output and a folder",
            )
        job = cluster.job(cluster.data).model_copy(update={"array": cluster.data.array})
        add(DATA + corpus, "data.sbatch", arguments, job, ())
    data = tuple(stage.name for stage in found)
    before: tuple[str, ...] = data
    checked: tuple[str, ...] = ()
    if cluster.check:
        largest = max((cluster.of_phase(phase.name) for phase in recipe.phases), key=lambda job: job.ranks)
        minutes = 15 + (largest.nodes or 1) // 4  # pairs of nodes are measured in rounds
        job = largest.model_copy(update={"time": str(minutes)})
        # At once, while shards are being made; with the recipe where its shards are there to be looked at.
        known = words if all(stage.is_done for stage in found) else []
        add("check", "check.sbatch", [str(run_dir), *known], job, ())
        checked = ("check",)
    cached = [phase.name for phase in recipe.phases if cached_teachers(recipe, phase)]
    if cached:
        job = cluster.job(cluster.teacher).model_copy(update={"array": cluster.teacher.array})
        add("teacher", "teacher.sbatch", words, job, data)
    for phase in recipe.phases:
        after = (*before, *checked, *(("teacher",) if phase.name in cached else ()))
        name = PHASE + phase.name
        arguments = [*words, "--until", phase.name]
        arguments += ["--must-resume"] if phase != recipe.phases[0] else []  # the phase before has saved
        add(name, "train.sbatch", arguments, cluster.of_phase(phase.name), after)
        before = (name,)
    if recipe.data.validation:
        job = cluster.job(cluster.eval)
        add("evaluation", "eval.sbatch", [str(run_dir), *cluster.eval.arguments], job, before)
    return found


# ----------------------------------------------------------------------------------- what is wrong with it
def check(recipe: Recipe, cluster: Cluster, chain: list[Stage]) -> None:
    """Raises UserError with everything that would fail later: ranks that do not divide, what is not there, what SLURM refuses."""
    problems = []
    gpu = None
    if cluster.gpu:
        try:
            gpu = find_gpu(cluster.gpu)
        except UserError as error:
            problems.append(f"{error.problem.removeprefix('--')}. {error.fix}")
    if unknown := sorted(set(cluster.phases) - {phase.name for phase in recipe.phases}):
        problems.append(f"phases of the cluster that the recipe does not have: {', '.join(unknown)}")
    for phase in recipe.phases:
        job = cluster.of_phase(phase.name)
        if job.gpus_per_node and job.gpus_per_node != (job.tasks_per_node or 1):
            problems.append(
                f"phase {phase.name}: gpus_per_node is {job.gpus_per_node} and tasks_per_node {job.tasks_per_node or 1}; one "
                "task drives one GPU: make them equal"
            )
        try:
            check_ranks([phase], job.ranks)
            if gpu and job.gpus_per_node:
                check_fits(budget(recipe, gpu, GPUs(job.ranks, job.gpus_per_node), Assumptions(), [phase]))
            elif gpu:
                problems.append(f"phase {phase.name}: gpu is {cluster.gpu}, and its job has no gpus_per_node")
        except UserError as error:
            problems.append(
                f"{error.problem}. {error.fix}. (Its job has {job.nodes or 1} nodes x {job.tasks_per_node or 1} tasks.)"
            )
        if (limit := job.limit_seconds) and limit < cluster.warn_seconds + 120:
            problems.append(
                f"phase {phase.name}: its time limit is {limit:g} s, and warn_seconds {cluster.warn_seconds}: it would be told "
                "to save before it has begun. Give it more time, or warn it later"
            )
    outputs = [Path(arguments[arguments.index("--output") + 1]).resolve() for arguments in cluster.data.shards.values()]
    for path in {*recipe.data.sources.values(), *recipe.data.validation.values()}:
        made = Path(path).resolve() in outputs or Path(path).resolve().parent in outputs
        if not made and not (Path(path) / MANIFEST).exists():
            problems.append(f"no token shards in {path}, and none of data.shards makes them (their --output)")
    if recipe.tokenizer and ":" not in recipe.tokenizer and not Path(recipe.tokenizer).exists():
        problems.append(f"the tokenizer {recipe.tokenizer} does not exist")
    if cluster.setup and not Path(cluster.setup).is_file():
        problems.append(f"setup {cluster.setup} does not exist")
    unset = [name for name in cluster.environment if name not in os.environ]
    if unset:
        problems.append(f"environment names {', '.join(unset)}, which is not set in this shell")
    for stage in chain:
        if not stage.is_done and (refusal := refused_by_slurm(stage, recipe, cluster)):
            problems.append(f"SLURM refuses {stage.name} ({' '.join(stage.job.options())}): {refusal}")
    if problems:
        listed = "".join(f"\n  - {problem}" for problem in problems)
        raise UserError(f"nothing is submitted, because of:{listed}", fix="mend the recipe or the cluster's file")


def tell_of_changes(recipe: Recipe, chain: list[Stage]) -> None:
    """Says what the recipe says otherwise than when it was last run: phases that are over stay as they were."""
    then = recipe.run_dir / "recipe.yaml"
    if not then.exists() or not any(stage.is_done for stage in chain if stage.name.startswith(PHASE)):
        return
    was, now = (flat(tree) for tree in (load_recipe(then).model_dump(mode="json"), recipe.model_dump(mode="json")))
    changed = [
        f"{name} was {was.get(name)}, is {now.get(name)}" for name in {**was, **now} if was.get(name) != now.get(name)
    ]
    if changed:
        say(f"the recipe has changed, and what is done stays as it was: {'; '.join(sorted(changed))}")


def flat(tree: Any, at: str = "") -> dict[str, Any]:
    """{a.b.c: value}; phases by their names."""
    if isinstance(tree, dict) and tree:
        return {k: v for key, value in tree.items() for k, v in flat(value, f"{at}.{key}" if at else str(key)).items()}
    if isinstance(tree, list) and tree and isinstance(tree[0], dict):
        return {k: v for item in tree for k, v in flat(item, f"{at}.{item.get('name')}").items()}
    return {at: tree}


def refused_by_slurm(stage: Stage, recipe: Recipe, cluster: Cluster) -> str:
    """What sbatch says against a job without submitting it: its partition, account, limits, nodes."""
    options = sbatch_options(stage, recipe.run_dir, cluster, recipe.name, excluded_nodes(recipe.run_dir, cluster))
    command = ["sbatch", "--test-only", *options, script(stage)]
    try:
        done = subprocess.run(
            command, env=environment(cluster), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=ANSWER_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"no answer in {ANSWER_SECONDS} s: does the controller run, and is SLURM_CONF right?"
    if done.returncode == 0:
        return ""
    lines = [line.removeprefix("sbatch: error: ") for line in done.stdout.splitlines() if line.strip()]
    return "; ".join(dict.fromkeys(lines)) or f"code {done.returncode}"


# ------------------------------------------------------------------------------------------------ submitting
def submit(chain: list[Stage], run_dir: Path, cluster: Cluster, run: str, *, dry_run: bool) -> None:
    """Submits what is missing, in order, and says so a line each. Each job is on the disk before the next is submitted."""
    jobs, known = read_jobs(run_dir), queue()
    if known is None:
        raise EnvironmentProblem(
            "squeue does not answer, so nobody could tell what is in the queue already",
            fix="try again when `squeue` works",
        )
    for stage in chain:  # of a chain whose jobs.json is gone
        title = job_title(run, stage)
        if stage.name not in jobs and not stage.is_done and (others := named_so(title)):
            raise UserError(
                f"job {others[0]} in the queue is named {title} too, and {run_dir}/{JOBS} does not know of it: {stage.name} "
                "would be submitted twice",
                fix=f"scancel {others[0]} if it is of this run (and what comes after it), or give this run another name",
            )
    live = {
        stage.name: old for stage in chain if is_live(known.get(old := jobs.get(stage.name, {}).get("job", ""), []))
    }
    at_work: dict[str, str] = {}  # stage: its job, of those that are not done
    again: set[str] = set()
    excluded = excluded_nodes(run_dir, cluster)
    if suspected := [node for node in excluded if node not in cluster.exclude]:
        say(f"not on {', '.join(suspected)}: a rank hung there, or held other weights (exclude_suspects)")
    for stage in chain:
        before = [name for name in stage.after if name in at_work]
        if stage.is_done:
            say(f"{stage.name}: done")
            continue
        if stage.name == "check" and any(name.startswith(PHASE) for name in live):
            say("check: not needed, a phase is in the queue")
            continue
        if stage.name in live:
            old = live[stage.name]
            waits = all(state == "PENDING" and "Dependency" in why for state, why in known[old])
            if not (waits and again.intersection(stage.after)):
                at_work[stage.name] = old
                say(f"{stage.name}: job {old} is in the queue")
                continue
            say(f"{stage.name}: job {old} waits for one that is submitted again; it is too")
            if not dry_run:
                subprocess.run(["scancel", old], check=False)  # it may have ended by itself meanwhile
        options = sbatch_options(stage, run_dir, cluster, run, excluded, [at_work[name] for name in before])
        command = ["sbatch", "--parsable", *options, script(stage), *stage.arguments]
        again.add(stage.name)
        if dry_run:
            at_work[stage.name] = f"<{stage.name}>"
            say(f"{stage.name}: would submit\n    {shlex.join(command)}")
            continue
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
        done = subprocess.run(command, env=environment(cluster), capture_output=True, text=True)
        if done.returncode:
            raise EnvironmentProblem(
                f"sbatch refused {stage.name}: {done.stderr.strip()}",
                fix="mend that, and run this again: it submits the rest",
            )
        job = done.stdout.strip().partition(";")[0]  # JOB;CLUSTER
        jobs[stage.name] = {"job": job, "submitted": time.time(), "arguments": stage.arguments}
        write_jobs(run_dir, jobs)
        at_work[stage.name] = job
        after = f", after {', '.join(before)}" if before else ""
        say(f"{stage.name}: job {job}{after}")
    if not dry_run:
        say(f"slm status {shlex.quote(str(run_dir))} shows where it stands; its jobs write to {run_dir}/logs")


def sbatch_options(
    stage: Stage, run_dir: Path, cluster: Cluster, run: str, exclude: list[str], after: list[str] | None = None
) -> list[str]:
    """One word each; values were checked by cluster.py and by the recipe."""
    name = job_title(run, stage)
    member = "%A_%a" if stage.job.array else "%j"
    logs = str(run_dir.resolve() / "logs").replace("%", "%%")  # in which SLURM would put numbers of its own
    options = [*stage.job.options(), f"--job-name={name}", f"--output={logs}/{name}-{member}.log"]
    options += [f"--chdir={Path.cwd()}", "--export=ALL"]
    if stage.script == "train.sbatch":
        options.append(f"--signal=USR1@{cluster.warn_seconds}")
    if after:
        options += [f"--dependency=afterok:{':'.join(after)}", "--kill-on-invalid-dep=yes"]
    if exclude:
        options.append(f"--exclude={','.join(exclude)}")
    return options


def job_title(run: str, stage: Stage) -> str:
    return f"slm-{run}-{stage.name.replace(' ', '-')}"


def named_so(title: str) -> list[str]:
    """Jobs of that name, of this user, that are not over."""
    command = ["squeue", "--noheader", f"--user={os.getuid()}", f"--name={title}", "--format=%F"]
    return sorted(set(subprocess.run(command, capture_output=True, text=True).stdout.split()))


def script(stage: Stage) -> str:
    return str(ROOT / "launchers" / "slurm" / stage.script)


def environment(cluster: Cluster) -> dict[str, str]:
    """All that sbatch gets, and hands on."""
    wanted = {*ENVIRONMENT, *cluster.environment}
    kept = {name: value for name, value in os.environ.items() if name in wanted or name.startswith("SBATCH_")}
    ours = {"SLM_ROOT": str(ROOT), "SLM_RESTARTS": str(cluster.restarts)}
    return {**kept, **ours, **container(cluster), **setup(cluster)}


def setup(cluster: Cluster) -> dict[str, str]:
    return {"SLM_SETUP": str(Path(cluster.setup).resolve())} if cluster.setup else {}


def container(cluster: Cluster) -> dict[str, str]:
    if cluster.container is None:
        return {}
    given = {"SLM_CONTAINER": cluster.container.image, "SLM_CONTAINER_PYTHON": cluster.container.python}
    return given | ({"SLM_CONTAINER_MOUNTS": cluster.container.mounts} if cluster.container.mounts else {})


def excluded_nodes(run_dir: Path, cluster: Cluster) -> list[str]:
    """The cluster's, and those that an attempt at this run has named as suspect."""
    return list(dict.fromkeys([*cluster.exclude, *(suspects(run_dir) if cluster.exclude_suspects else [])]))


@contextmanager
def locked(run_dir: Path, *, write: bool) -> Iterator[None]:
    """Two of these at once would submit everything twice."""
    if not write:
        yield
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    with open(run_dir / ".submitting", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another submit.py is at work on {shortened(str(run_dir))}", fix="wait for it") from None
        yield


def say(text: str) -> None:
    try:
        print(text, flush=True)
    except OSError:  # nobody listens any more, as behind `| head`: no reason to submit half a chain
        sys.stdout = open(os.devnull, "w")


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except SLMError as error:
        print(f"{error.title}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
