"""The recipe: one YAML file is one run. Its schema, its reading and its overrides.

Owns every option of a run with its default and description; imports no torch and opens only the recipe and the
DeepSpeed JSON files. What contradicts something else is found by contradictions.py; what needs the data or the number of
ranks is checked in inputs.py.

    recipe = load_recipe("recipes/quickstart.yaml", ["optim.lr=1e-3", "phases.main.tokens=2M"])

Precedence: defaults < YAML < overrides. Unknown and duplicate keys are errors; all problems are listed at once.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator

from slm import strict_yaml
from slm.contradictions import contradictions, sections_in_doubt
from slm.distill.settings import Loss, Teacher
from slm.errors import UserError
from slm.fields import Count, Real, Section
from slm.gate import Gate
from slm.model.config import PRESETS, ModelConfig, RopeScaling
from slm.names import Name, Output, PhaseName, Text, shortened
from slm.problems import readable
from slm.recall.settings import Recall
from slm.safety import Safety
from slm.strategy import deepspeed_problems, resolve_deepspeed

Decay = Annotated[Real, Field(ge=0, lt=1)]


class Data(Section):
    """Named token datasets, each a folder that `slm-data shards` wrote."""

    sources: dict[Name, Text] = Field(min_length=1, description="name: folder of the training tokens")
    validation: dict[Name, Text] = Field({}, description="name: folder of held-out tokens; evaluated per name")

    @field_validator("validation")
    @classmethod
    def _not_the_sum(cls, value: dict[str, str]) -> dict[str, str]:
        if "all" in value:
            raise ValueError(
                "has a source named 'all', which is what the sum over all sources is called: name it otherwise"
            )
        return value


class Optim(Section):
    """AdamW (arXiv 1711.05101). Matrices decay, norm weights do not."""

    lr: Real = Field(3e-4, gt=0, description="peak learning rate")
    betas: tuple[Decay, Decay] = Field((0.9, 0.95), description="decay of the two moments")
    eps: Real = Field(1e-8, gt=0, description="added to the root of the second moment")
    weight_decay: Real = Field(0.1, ge=0, description="decoupled decay of matrices, times the learning rate")
    grad_clip: Real = Field(1.0, ge=0, description="largest norm of the whole gradient; 0 turns clipping off")


class Schedule(Section):
    """Learning rate over the steps of a phase, as a fraction of optim.lr."""

    type: Literal["cosine", "linear", "wsd", "constant"] = Field("cosine", description="shape after the warm-up")
    warmup_steps: Count = Field(0, ge=0, description="steps of linear rise from 0")
    min_ratio: Real = Field(0.1, ge=0, le=1, description="final fraction of the peak (not for constant)")
    decay_fraction: Real = Field(0.2, gt=0, le=1, description="wsd: last part of the phase, which falls linearly")


class DocFilter(Section):
    """Which documents of a source a phase trains on. For a mixture by length, name the same folder as several sources."""

    min_doc_tokens: Count = Field(0, ge=0, description="shorter documents are left out of this phase")
    max_doc_tokens: Count | None = Field(None, ge=1, description="longer documents are left out of this phase")
    share: Real = Field(1.0, gt=0, le=1, description="only this share of the documents, the same ones in every phase")
    exclude_seen: list[str] = Field([], description="earlier phases, whose documents are left out of this one")

    @model_validator(mode="after")
    def _leaves_some(self) -> DocFilter:
        if self.max_doc_tokens is not None and self.min_doc_tokens > self.max_doc_tokens:
            raise ValueError(
                f"min_doc_tokens is {self.min_doc_tokens}, above max_doc_tokens {self.max_doc_tokens}: no document is as "
                "long and as short as that, so none would be left; lower the one or raise the other"
            )
        return self


class Phase(Section):
    """One stretch of training with its own length, data mixture, batch and schedule."""

    name: PhaseName = Field(description="letters, digits, _ and . inside; names its checkpoints")
    tokens: Count = Field(gt=0, description="tokens of the phase, padding included; rounded up to whole steps")
    seq_len: Count = Field(gt=1, description="tokens of one packed sequence")
    batch_tokens: Count = Field(gt=0, description="tokens per optimiser step over all ranks; a multiple of seq_len")
    micro_batch: Count = Field(1, gt=0, description="sequences per rank and forward pass")
    mixture: dict[str, Real] = Field({}, description="source: weight; empty for all, each by its sequences")
    repeats: dict[str, Real] = Field({}, description="source: epochs for each one of the others; instead of mixture")
    filters: dict[str, DocFilter] = Field({}, description="source: which documents by length")
    rope_scaling: RopeScaling | None = Field(None, description="from this phase on; null keeps what was")
    schedule: Schedule = Field(Schedule(), description="learning rate over the phase")
    lr: Real | None = Field(None, gt=0, description="peak learning rate of this phase; null for optim.lr")
    loss: Loss = Field(Loss(), description="what is minimised")
    sequence_parallel: Count = Field(
        1, gt=0, description="ranks that share each sequence (Ulysses); the others share the batch"
    )
    activation_checkpointing: Literal["none", "full", "selective"] = Field(
        "none", description="full: keep each block's input; selective: attention's output too, which is not run again"
    )
    offload_activations: bool = Field(False, description="what checkpointing keeps waits in host memory (on a GPU)")
    mlp_tile_tokens: Count | None = Field(
        None, gt=0, description="norm and MLP in tiles of so many tokens, for extreme lengths; null for all at once"
    )
    deepspeed: Text = Field("ds_configs/zero1.json", description="ZeRO strategy: a DeepSpeed JSON file")
    gate: Gate | None = Field(None, description="what the evaluation at its end must show before the run goes on")

    @property
    def global_batch(self) -> int:
        """Sequences per step over all ranks."""
        return self.batch_tokens // self.seq_len

    @property
    def num_steps(self) -> int:
        return -(-self.tokens // self.batch_tokens)


class Checkpoint(Section):
    every_steps: Count = Field(500, gt=0, description="steps between saves; the end of a phase is always saved")
    keep_last: Count = Field(2, gt=0, description="newest checkpoints kept; phase ends and the best are kept besides")
    keep_every_steps: Count = Field(
        0, ge=0, description="a save at a multiple of it is never removed; 0: only phase ends and the best stay"
    )
    when_busy: Literal["wait", "skip"] = Field(
        "wait",
        description="a save that comes while the one before is still being written; phase ends and stops always wait",
    )
    on_failure: Literal["stop", "continue"] = Field(
        "stop",
        description="continue: go on after a failed save until three in a row, or that of a phase's end, have failed",
    )


class Eval(Section):
    """Held-out loss, also by position, at the phase's seq_len; and what is asked for beside it."""

    every_steps: Count = Field(0, ge=0, description="steps between evaluations; 0: only at the end of a phase")
    max_sequences: Count = Field(
        0, ge=0, description="at most this many sequences per source, at every length alike; 0 for all"
    )
    at_start: bool = Field(
        False, description="also before a phase's first step: what it makes of the model as it comes"
    )
    seq_lens: list[Annotated[Count, Field(gt=1)]] = Field(
        [],
        description="held-out loss at these lengths too, such as that of the phase before; a phase takes shorter ones",
    )
    recall: Recall | None = Field(None, description="pass keys hidden in held-out text; null for none, {} for defaults")

    def recall_is_due(self, step: int, num_steps: int) -> bool:
        """At an evaluation after `step` of a phase's num_steps."""
        return self.recall is not None and (step == num_steps or step % (self.recall.every_steps or 1) == 0)


class Wandb(Section):
    project: Text = Field(description="Weights & Biases project")
    entity: Text | None = Field(None, description="team or user; null for your default")
    group: Text | None = Field(None, description="group of runs")
    mode: Literal["online", "offline"] = Field("online", description="offline writes files for `wandb sync`")


class Log(Section):
    every_steps: Count = Field(1, gt=0, description="steps between lines of metrics.jsonl and the terminal")
    tensorboard: bool = Field(False, description="also write RUN/tensorboard")
    wandb: Wandb | None = Field(None, description="also log to Weights & Biases")


class Watchdog(Section):
    """A rank of which nothing is heard for so long hangs: all stacks are written and the run ends with code 79."""

    step_seconds: Real = Field(900, ge=0, description="longest time of one step; 0: not watched")
    slow_seconds: Real = Field(
        3600, ge=0, description="the same of a start, a phase's first step, a save, one batch of an evaluation; 0: not"
    )

    @model_validator(mode="after")
    def _long_enough(self) -> Watchdog:
        for name, seconds in self:
            if 0 < seconds < 1:
                raise ValueError(
                    f"{name} is {seconds:g}, which no run could keep: give a second or more, or 0 for no limit"
                )
        if 0 < self.slow_seconds < self.step_seconds:
            raise ValueError(
                f"slow_seconds is {self.slow_seconds:g}, less than step_seconds {self.step_seconds:g}: a save or the first step "
                "would have less time than any other step; make it the larger"
            )
        return self


class InitFrom(Section):
    path: Text = Field(description="another run, one of its checkpoints, or a Hugging Face folder")
    optimizer: bool = Field(False, description="take the optimiser's moments too (not from a Hugging Face folder)")


class Recipe(Section):
    """A run. Model: a preset's name with fields replaced, or all fields."""

    name: Name = Field(description="of the run; also its name in W&B")
    output: Output = Field("", description="run directory; empty for runs/NAME")
    seed: Count = Field(1234, ge=0, lt=2**63, description="of the initial weights and of the data order")
    model: ModelConfig = Field(description="preset: NAME and/or fields of the model's shape")
    tokenizer: Text = Field("", description="tokenizer folder or file, or module:Class; empty if nothing is decoded")
    data: Data
    teacher: dict[Name, Teacher] = Field({}, description="name: teacher, for losses of type distill; or one alone")
    optim: Optim = Optim()
    phases: list[Phase] = Field(min_length=1)
    init_from: InitFrom | None = Field(None, description="weights to start from; null for random ones")
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: float32 on a CPU, bfloat16 on a GPU that has it, else float16"
    )
    compile: bool | Literal["auto"] = Field("auto", description="torch.compile of each block; auto: on a GPU")
    deterministic: bool = Field(
        False, description="on a GPU only kernels that give the same bits every time (slower); a CPU always does"
    )
    checkpoint: Checkpoint = Checkpoint()
    safety: Safety = Safety()
    eval: Eval = Eval()
    log: Log = Log()
    watchdog: Watchdog = Watchdog()

    @model_validator(mode="before")
    @classmethod
    def _expand_short_forms(cls, data: Any) -> Any:
        model = data.get("model") if isinstance(data, dict) else None
        if isinstance(model, str):
            model = {"preset": model}
        if isinstance(model, dict) and "preset" in model:
            fields = {k: v for k, v in model.items() if k != "preset"}
            if model["preset"] not in PRESETS:
                raise ValueError(f"model.preset is {model['preset']!r}, which is none of {', '.join(PRESETS)}")
            preset = dict(PRESETS[model["preset"]])
            if "hidden_size" in fields or "num_attention_heads" in fields:
                preset.pop("head_dim", None)
            data = {**data, "model": {**preset, **fields}}
        if isinstance(data, dict) and isinstance(data.get("teacher"), str):
            data = {**data, "teacher": {"model": data["teacher"]}}
        if isinstance(data, dict) and isinstance(teacher := data.get("teacher"), dict):
            if any(key in Teacher.model_fields or isinstance(value, str) for key, value in teacher.items()):
                data = {**data, "teacher": {"teacher": teacher}}  # one alone, whose fields these are
        return data

    @model_validator(mode="after")
    def _cross_checks(self, info: ValidationInfo) -> Recipe:
        if problems := contradictions(self, **(info.context or {})):
            raise ValueError("\n".join(problems))
        return self

    def scaling_of(self, phase: Phase) -> tuple[str, RopeScaling | None]:
        """The last phase so far that gives a scaling: its name, and that scaling; None if the model's own is in force."""
        for earlier in reversed(self.phases[: self.phases.index(phase) + 1]):
            if earlier.rope_scaling is not None:
                return earlier.name, earlier.rope_scaling
        return "", None

    def model_of(self, phase: Phase) -> ModelConfig:
        """The model as it is in a phase: rope_scaling is that of the last phase so far which gives one, and the context is
        no longer than that reaches."""
        _, scaling = self.scaling_of(phase)
        if scaling is None:
            return self.model
        context = min(self.model.max_position_embeddings, scaling.reach_tokens or self.model.max_position_embeddings)
        return self.model.model_copy(update={"rope_scaling": scaling, "max_position_embeddings": context})

    def most_checkpoints(self, phases: Sequence[Phase] | None = None) -> int:
        """That a run of these phases (all) lets lie at once, while the last one is written: the newest keep_last, that one, the
        ends of the phases before it, the best where there is one within a phase, and those of keep_every_steps. Gates that repeat
        a phase add an end each time."""
        phases = self.phases if phases is None else phases
        every, milestone, looks = self.checkpoint.every_steps, self.checkpoint.keep_every_steps, self.eval.every_steps
        best = bool(self.data.validation and looks)

        def multiples(phase: Phase, *of: int) -> int:
            return (phase.num_steps - 1) // math.lcm(*of)

        kept = sum(
            multiples(phase, milestone, every)
            + (multiples(phase, milestone, looks) - multiples(phase, milestone, every, looks) if best else 0)
            for phase in (phases if milestone else ())
        )
        return self.checkpoint.keep_last + len(phases) + best + kept

    @property
    def run_dir(self) -> Path:
        return Path(self.output or f"runs/{self.name}")


# --- reading -------------------------------------------------------------------------------------------------


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Reads a YAML recipe, applies `a.b.c=value` overrides, checks everything. Raises UserError listing all problems."""
    path = Path(path)
    try:
        tree, duplicates = strict_yaml.read(path)
    except FileNotFoundError:
        raise UserError(f"the recipe {path} does not exist", fix="give the path of a YAML file, see recipes/") from None
    except IsADirectoryError:
        inside = ", ".join(sorted(str(file) for file in path.glob("*.yaml"))[:5])
        raise UserError(
            f"{path} is a folder, and a recipe is a file",
            fix=f"give one of the files in it: {inside}" if inside else "give the path of a YAML file, see recipes/",
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path} is not a readable recipe ({reason})", fix="give a YAML file, see recipes/") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}", fix="mend it; recipes/ has examples") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds no mapping of fields, so it is no recipe", fix="see recipes/quickstart.yaml")
    given = [override.partition("=")[0] for override in overrides or []]
    for dotted in {name for name in given if given.count(name) > 1}:
        raise UserError(f"the override {dotted} is given twice; only one could count", fix="remove one of them")
    for override in overrides or []:
        _apply(tree, override)
    _resolve_deepspeed_paths(tree, path)
    recipe, problems = _validated(tree)
    problems = duplicates + problems + _deepspeed_problems(tree)
    if recipe is None or problems:
        raise UserError(_listing(str(path), problems))
    return recipe


def recipe_from_tree(tree: dict[str, Any], where: str) -> Recipe:
    """Validates a nested dict. Raises UserError listing all problems."""
    recipe, problems = _validated(tree)
    if recipe is None:
        raise UserError(_listing(where, problems))
    return recipe


def _validated(tree: dict[str, Any]) -> tuple[Recipe | None, list[str]]:
    """(the recipe, []) or (None, every problem): bad fields first, then, without them, what contradicts the rest."""
    try:
        return Recipe.model_validate(tree), []
    except ValidationError as error:
        problems = readable(error, tree, Recipe)
        rest = _without(tree, [item["loc"] for item in error.errors()])
        in_doubt = sections_in_doubt(error.errors(), tree)
    try:
        Recipe.model_validate(rest, context=in_doubt)
    except ValidationError as error:
        known = {problem.split(" ", 1)[0] for problem in problems}
        contradictions = [item for item in error.errors() if not item["loc"]]
        if contradictions:
            more = [line for item in contradictions for line in item["msg"].removeprefix("Value error, ").split("\n")]
            problems += [line for line in more if line.split(" ", 1)[0] not in known and line not in problems]
    return None, problems


def _without(tree: dict[str, Any], locations: list[tuple[Any, ...]]) -> dict[str, Any]:
    """A copy without the fields at these locations; of phases, those without any bad field."""
    rest = copy.deepcopy(tree)
    bad_phases = {location[1] for location in locations if location[:1] == ("phases",) and len(location) > 1}
    for location in locations:
        node: Any = rest
        for part in location[:-1]:
            node = node.get(part) if isinstance(node, dict) else None
        if isinstance(node, dict) and location:
            node.pop(location[-1], None)
    if isinstance(rest.get("phases"), list):
        rest["phases"] = [phase for i, phase in enumerate(rest["phases"]) if i not in bad_phases]
    return rest


def _listing(where: str, problems: list[str]) -> str:
    count = f"{len(problems)} problem" + "s" * (len(problems) != 1)
    return f"{where}: {count}\n" + "\n".join(f"  - {p}" for p in problems)


def _apply(tree: dict[str, Any], override: str) -> None:
    """Sets tree[a][b][c] for 'a.b.c=value'; a phase is addressed by its number or its name."""
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise UserError(f"the override {override!r} has no value", fix="write field.of.the.recipe=value")
    try:
        value, duplicates = strict_yaml.load(text) if text else ("", [])
    except yaml.YAMLError as error:
        why = str(getattr(error, "problem", None) or error)
        raise UserError(
            f"the override {shortened(override)} is not valid YAML: {why}", fix="quote it, or close its brackets"
        ) from None
    if duplicates:
        raise UserError(f"the override {shortened(override)}: {duplicates[0]}")
    node: Any = tree
    parts = dotted.split(".")
    for i, part in enumerate(parts):
        last = i == len(parts) - 1
        if isinstance(node, list):
            index = next(
                (n for n, item in enumerate(node) if isinstance(item, dict) and item.get("name") == part), None
            )
            if index is None and part.isdigit() and int(part) < len(node):
                index = int(part)
            if index is None:
                names = ", ".join(str(item.get("name")) for item in node if isinstance(item, dict))
                raise UserError(f"the override {override!r}: {part!r} is neither a position nor one of {names}")
            if last:
                node[index] = value
            node = node[index]
        elif isinstance(node, dict):
            if last:
                node[part] = value
            elif isinstance(node.get(part), str) and part == "model":
                node[part] = {"preset": node[part]}
                node = node[part]
            else:
                if node.get(part) is None:
                    node[part] = {}
                node = node[part]
        else:
            raise UserError(f"the override {override!r}: {'.'.join(parts[:i])} is a value, it has no field {part!r}")


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML that load_recipe reads back to the same Recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def json_schema() -> dict[str, Any]:
    """JSON Schema of a recipe, for editors (recipes/recipe.schema.json)."""
    schema = Recipe.model_json_schema()
    schema["properties"]["model"] = {
        "description": "a preset's name, or the fields of a shape with an optional preset to start from",
        "anyOf": [
            {"enum": list(PRESETS)},
            {"type": "object", "properties": {"preset": {"enum": list(PRESETS)}, **_properties(schema, "ModelConfig")}},
        ],
    }
    return schema


def _properties(schema: dict[str, Any], name: str) -> dict[str, Any]:
    return schema["$defs"][name]["properties"]


def _resolve_deepspeed_paths(tree: dict[str, Any], recipe_path: Path) -> None:
    for phase in tree["phases"] if isinstance(tree.get("phases"), list) else []:
        if isinstance(phase, dict):
            name = phase.get("deepspeed", Phase.model_fields["deepspeed"].default)
            phase["deepspeed"] = resolve_deepspeed(name, recipe_path) if isinstance(name, str) else name


def _deepspeed_problems(tree: dict[str, Any]) -> list[str]:
    phases = tree["phases"] if isinstance(tree.get("phases"), list) else []
    paths = [phase.get("deepspeed") for phase in phases if isinstance(phase, dict)]
    return [p for path in dict.fromkeys(paths) if isinstance(path, str) for p in deepspeed_problems(path)]
