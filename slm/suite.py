"""Benchmarks of lm-evaluation-harness on our models: `slm eval MODEL --suite hellaswag,gsm8k`.

Owns which benchmarks run and what is refused, the limits of programs that a model writes, and what is done with the scores.
Tasks, prompts, filters and metrics are the harness's, which rank 0 alone runs; the model's side is harness.py's.

    scores = evaluate_suite("runs/demo", ["my_task"], task_folders=["tasks/"])
"""

from __future__ import annotations

import logging
import os
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager

from slm import parallel
from slm.afterwards import scores
from slm.errors import EnvironmentProblem, UserError
from slm.harness import HarnessModel

log = logging.getLogger("slm")

# Of a program that a model wrote, beside the time limit of the metric that runs it.
CODE_MEMORY_BYTES, CODE_FILE_BYTES, CODE_CPU_SECONDS = 4 << 30, 64 << 20, 30
CODE_IS_RUN = (
    "the programs that the model writes are run on this machine: each in a process of its own with the metric's time limit (3 "
    f"seconds for HumanEval and MBPP), {CODE_CPU_SECONDS} seconds of processor time, {CODE_MEMORY_BYTES >> 30} GiB of memory, "
    f"{CODE_FILE_BYTES >> 20} MiB a file and an empty environment; what it may read, and the network, are not limited"
)


# --- the whole ----------------------------------------------------------------------------------------------------


def evaluate_suite(
    model: str,
    names: list[str],
    *,
    tokenizer: str = "",
    rows: int = 4,
    max_length: int = 0,
    num_fewshot: int | None = None,
    limit: int | None = None,
    task_folders: Sequence[str | Path] = (),
    allow_code: bool = False,
    answers: Path | None = None,
) -> dict[str, Any] | None:
    """{"model", "fingerprint", "harness", "limit", "results": {task: its scores}}; None on ranks other than 0.

    Under any launcher the ranks share the requests. Raises UserError, EnvironmentProblem.
    """
    # Ranks wait for rank 0 while it fetches data and computes metrics.
    with parallel.launched(timeout_minutes=24 * 60) as device:
        lm = HarnessModel(model, tokenizer, rows, max_length, answers, device)
        if parallel.rank():
            lm.serve()
            return None
        try:
            return _run(lm, model, names, num_fewshot, limit, task_folders, allow_code)
        finally:
            lm.dismiss()


def _run(
    lm: HarnessModel,
    model: str,
    names: list[str],
    num_fewshot: int | None,
    limit: int | None,
    task_folders: Sequence[str | Path],
    allow_code: bool,
) -> dict[str, Any]:
    for folder in task_folders:
        if not Path(folder).is_dir():
            raise UserError(f"--tasks {folder} is no folder", fix="give a folder with the YAML files of tasks")
    manager = _task_manager(names, [str(folder) for folder in task_folders])
    _check_code(manager, names, allow_code)
    tasks = [task for name in names for task in _load(manager, name)]
    found = lm_eval.simple_evaluate(
        model=lm,
        tasks=tasks,
        num_fewshot=num_fewshot,
        limit=limit,
        task_manager=manager,
        log_samples=False,
        bootstrap_iters=1000,
        confirm_run_unsafe_code=allow_code,
    )
    assert found is not None
    return {
        "model": model,
        "fingerprint": lm.fingerprint,
        "harness": lm_eval.__version__,
        "limit": limit,
        "results": {
            name: {
                "scores": {key: x for key, x in row.items() if "," in key and isinstance(x, int | float)},
                "limit": limit,
                "num_fewshot": (found.get("n-shot") or {}).get(name),
                "documents": ((found.get("n-samples") or {}).get(name) or {}).get("effective"),
                "version": (found.get("versions") or {}).get(name),
            }
            for name, row in {**found["results"], **(found.get("groups") or {})}.items()
        },
    }


def _task_manager(names: list[str], folders: list[str]) -> Any:
    """Of the user's own tasks alone where they are all that is asked for: for its own the harness reads 13,000 files."""
    own = TaskManager(include_path=folders, include_defaults=False)
    return own if all(_is_whole(own.task_index, name) for name in names) else TaskManager(include_path=folders)


def _is_whole(index: Any, name: str) -> bool:
    """Whether it is there, with all tasks and groups in it."""
    return name in index and all(child == name or _is_whole(index, child) for child in _children(index, name) or [])


def _check_code(manager: Any, names: list[str], allow: bool) -> None:
    """Before anything of a task is imported: those of HumanEval fetch and run the metric when they are."""
    for name in names:
        if name not in manager.task_index:
            near = [known for known in manager.all_tasks if name.lower() in known.lower()][:8]
            raise UserError(
                f"there is no benchmark {name!r} in lm-evaluation-harness"
                + (f"; near it: {', '.join(near)}" * bool(near)),
                fix="python -m lm_eval ls tasks lists them; for tasks of your own give --tasks FOLDER",
            )
        runs_code = [task for task in _tasks_below(manager.task_index, name) if _runs_code(manager.task_index[task])]
        if runs_code and not (allow and runs_code == [name]):
            what = f"{name} runs" if runs_code == [name] else f"{name} holds {', '.join(runs_code[:5])}, which run"
            raise UserError(
                f"{what} programs that the model writes: {CODE_IS_RUN}",
                fix=f"if this is a machine for that, such as a container: --suite {runs_code[0]} --allow-code-execution",
            )
        if runs_code:
            log.warning("%s: %s", name, CODE_IS_RUN)
            _limit_programs()


def _tasks_below(index: Any, name: str) -> list[str]:
    """The tasks of a group or a tag, groups in it included; of a task itself."""
    children = _children(index, name)
    if children is None:
        return [name]
    return [task for child in children if child in index and child != name for task in _tasks_below(index, child)]


def _children(index: Any, name: str) -> list[str] | None:
    """What a group or a tag is made of; None of a task."""
    entry = index[name]
    config = entry.cfg or {}
    below = entry.tags if entry.yaml_path is None else config.get("task") if "group" in config else None
    if not isinstance(below, list | set):
        return None
    return [
        child if isinstance(child, str) else child.get("task", child.get("group")) for child in sorted(below, key=str)
    ]


def _runs_code(entry: Any) -> bool:
    return bool((entry.cfg or {}).get("unsafe_code"))


_programs_limited = False


def _limit_programs() -> None:
    """From now on a process that is forked from this one, as metrics do for each program, has limits and no environment."""
    global _programs_limited
    os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # code_eval's own question, which --allow-code-execution has answered
    os.environ["DISABLE_MULTIPROC"] = "1"  # the harness's own workers would have the limits too
    if not _programs_limited:
        os.register_at_fork(after_in_child=_limit_this_process)
    _programs_limited = True


def _limit_this_process() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    memory = pages * resource.getpagesize() + CODE_MEMORY_BYTES
    for what, limit in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, CODE_FILE_BYTES),
        (resource.RLIMIT_CPU, CODE_CPU_SECONDS),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(what)[1]
        value = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(what, (value, value))
    for name in [name for name in os.environ if name not in ("PATH", "LANG", "TMPDIR", "HOME")]:
        del os.environ[name]


def _load(manager: Any, name: str) -> list[Any]:
    """The group, the task, or the tasks of a tag. Raises EnvironmentProblem where its data cannot be had."""
    try:
        loaded = manager.load([name])
    except Exception as error:  # of datasets, of huggingface_hub, of httpx, and of a task's own code
        config = manager.task_index[name].cfg or {}
        of = config.get("dataset_path") or name
        told = str(error).strip().splitlines() or [type(error).__name__]
        raise EnvironmentProblem(
            f"the benchmark {name} cannot be read, most likely because its data ({of}) is not here and the hub cannot be "
            f"reached: {type(error).__name__}: {told[0][:300]}",
            fix=f'where there is a network: HF_HOME=FOLDER python -c "import datasets; datasets.load_dataset({of!r})", then here '
            "HF_HOME=FOLDER HF_HUB_OFFLINE=1 and the same command; a task on files of yours: --tasks FOLDER (docs/benchmarks.md)",
        ) from None
    return [loaded["groups"][name]] if name in loaded.get("groups", {}) else list(loaded["tasks"].values())


# --- what was found -----------------------------------------------------------------------------------------------


def draw(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("benchmark", "shots", "documents", "metric", "score", "± standard error")
    for task, metric, kind, value, error in scores(found["results"]):
        result = found["results"][task]
        name = metric if kind == "none" else f"{metric} ({kind})"
        shots, documents = (("-" if x is None else str(x)) for x in (result["num_fewshot"], result["documents"]))
        table.add_row(Text(task), shots, documents, name, f"{value:.4f}", "-" if error is None else f"{error:.4f}")
    Console().print(table)
    if found["limit"] is not None:
        print(f"(only the first {found['limit']} documents of each: no score to compare with others)")


def values_of(found: dict[str, Any]) -> dict[str, float]:
    """TASK/METRIC: score, for the log of a run; of several filters of one metric TASK/METRIC/FILTER."""
    rows = list(scores(found["results"]))
    names = [(task, metric) for task, metric, *_ in rows]
    return {
        f"{task}/{metric}" + f"/{kind}" * (names.count((task, metric)) > 1): value
        for task, metric, kind, value, _ in rows
    }
