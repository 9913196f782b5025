"""What a cluster is like, for submit.py: partitions, what each stage asks for, and what jobs get from the shell.

Owns the schema of cluster.yaml, and that nothing in it can be read as more than a value: every option of sbatch is one word
of an argument list, and no line of a job script is made from it.

    cluster = load_cluster("cluster.yaml")
    cluster.of_phase("extend_128k").options()      # ["--nodes=8", "--ntasks-per-node=8", ...]
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import AfterValidator, BeforeValidator, Field, ValidationError

from slm import strict_yaml
from slm.errors import UserError
from slm.fields import Count, Section
from slm.names import Name, Text, shortened
from slm.problems import readable


def _check_word(text: str) -> str:
    """Letters of names, lists and sizes; a node list has brackets, a constraint & and |. No shell reads them, but people do."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.,:@/+&|*()\[\]=-]{0,199}", text):
        raise ValueError(f"{shortened(text)} is no value of an option of sbatch")
    return text


def _check_variable(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", text):
        raise ValueError(f"{shortened(text)} is no name of a variable; values stay in your shell, so name it alone")
    return text


def _check_time(text: str) -> str:
    if isinstance(text, int):
        raise ValueError(f"{text} is no time limit: put it in quotes, which YAML wants for 24:00:00")
    if not re.fullmatch(r"(\d+-\d{1,2}(:\d{1,2}){0,2}|\d+(:\d{1,2}){0,2})", text):
        raise ValueError(f"{shortened(text)} is no time limit: write HH:MM:SS or DAYS-HH:MM:SS, in quotes")
    return text


Word = Annotated[str, AfterValidator(_check_word)]
Variable = Annotated[str, AfterValidator(_check_variable)]


class Job(Section):
    """What one job asks for; what is not given is the cluster's own, or as at the top of the file."""

    partition: Word | None = Field(None, description="where it runs; null for the cluster's default")
    account: Word | None = Field(None, description="who pays")
    qos: Word | None = Field(None, description="quality of service")
    constraint: Word | None = Field(None, description="features that its nodes must have")
    time: Annotated[str, BeforeValidator(_check_time)] | None = Field(None, description='limit, such as "24:00:00"')
    nodes: Count | None = Field(None, gt=0, description="machines")
    tasks_per_node: Count | None = Field(None, gt=0, description="processes on each: one for each GPU")
    gpus_per_node: Count | None = Field(None, gt=0, description="GPUs of each machine; null on a cluster without")
    cpus_per_task: Count | None = Field(None, gt=0, description="cores for each process")
    memory: Word | None = Field(None, description="of each machine, such as 200G")
    array: Count | None = Field(None, gt=0, description="data, teacher: so many jobs share the work")

    @property
    def ranks(self) -> int:
        return (self.nodes or 1) * (self.tasks_per_node or 1)

    @property
    def limit_seconds(self) -> float | None:
        """None without a limit: 0 means none, too. (sbatch(1): minutes, minutes:seconds, hours:…, days-hours, days-hours:…)"""
        if self.time is None:
            return None
        days, dash, rest = self.time.rpartition("-")
        parts = [int(part) for part in rest.split(":")]
        hours_first = bool(dash) or len(parts) == 3
        scale = (3600, 60, 1) if hours_first else (60, 1)
        seconds = int(days or 0) * 86400 + sum(part * unit for part, unit in zip(parts, scale, strict=False))
        return seconds or None

    def options(self) -> list[str]:
        names = {"tasks_per_node": "ntasks-per-node", "memory": "mem"}
        given = {names.get(name, name.replace("_", "-")): value for name, value in self if value is not None}
        if "array" in given:
            given["array"] = f"1-{given['array']}"
        return [f"--{name}={value}" for name, value in given.items()]


class Data(Job):
    shards: dict[Name, list[Text]] = Field(
        {}, description="corpus: the arguments of `slm-data shards` for it, each a word of its own"
    )


class Evaluation(Job):
    arguments: list[Text] = Field(["--by-position"], description="of `slm eval RUN`, each a word of its own")


class Container(Section):
    """The tasks run in an image, by the SLURM plugin pyxis (srun --container-image)."""

    image: Word = Field(description="a .sqsh file, or a registry's image")
    mounts: Word | None = Field(None, description="FROM:TO,FROM:TO; null for the folder of this project alone")
    python: Word = Field("python3", description="the interpreter in the image")


class Cluster(Job):
    train: Job = Field(Job(), description="of every phase")
    phases: dict[Name, Job] = Field({}, description="phase: what it asks for otherwise")
    data: Data = Field(Data(), description="token shards; no job without `shards`")
    teacher: Job = Field(Job(), description="the teacher's caches")
    eval: Evaluation = Field(Evaluation(), description="the evaluation at the end")
    exclude: list[Word] = Field([], description="nodes that no job may run on")
    exclude_suspects: bool = Field(True, description="nor those on which a rank hung or held other weights")
    environment: list[Variable] = Field(
        [], description="variables that jobs get from your shell, by name: WANDB_API_KEY"
    )
    setup: Text | None = Field(None, description="a shell file that each job sources first, as for `module load`")
    container: Container | None = Field(None, description="an image for the tasks")
    gpu: Word | None = Field(
        None, description="kind of its GPUs, as in slm plan --gpu: phases that do not fit are refused"
    )
    check: bool = Field(True, description="first slm doctor on as many nodes as the largest phase has, once a day")
    restarts: Count = Field(3, ge=0, description="of a phase that crashed or hung, within its job")
    warn_seconds: Count = Field(300, gt=0, description="before its time limit a phase is told to save")

    def job(self, *sections: Job) -> Job:
        """The top of the file, and over it what each of these sections gives."""
        fields = {name: getattr(self, name) for name in Job.model_fields if name != "array"}
        for section in sections:
            fields |= {name: value for name in Job.model_fields if (value := getattr(section, name)) is not None}
        return Job(**fields)

    def of_phase(self, phase: str) -> Job:
        return self.job(self.train, self.phases.get(phase, Job()))


def load_cluster(path: str | Path) -> Cluster:
    """Raises UserError, listing all problems."""
    try:
        tree, problems = strict_yaml.read(Path(path))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(
            f"{path} cannot be read as a cluster: {error}", fix="see launchers/slurm/cluster.yaml"
        ) from None
    try:
        cluster = Cluster.model_validate(tree if tree is not None else {})
    except ValidationError as error:
        problems += [line.replace("field of a recipe", "field of a cluster") for line in readable(error, tree, Cluster)]
    else:
        for name, given in (("train", cluster.train), ("eval", cluster.eval), *cluster.phases.items()):
            if given.array:
                problems.append(
                    f"{name}.array is {given.array}: only data and teacher can be shared by jobs; remove it"
                )
    if problems:
        listed = "".join(f"\n  - {problem}" for problem in problems)
        raise UserError(f"{path} has problems:{listed}", fix="launchers/slurm/cluster.yaml has every field")
    return cluster
