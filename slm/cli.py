"""The `slm` command: plan, train, teacher, eval, generate, import, export, quantize, report, status, doctor, schema.

Owns the arguments and what is printed (of eval, generate, import, export and quantize: cli_models.py); each command is
one call into the module that does the work. Heavy imports are inside the commands, so that `slm plan` and `slm --help` answer
at once.

    slm train recipes/quickstart.yaml optim.lr=1e-3
"""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from slm import cli_models
from slm.errors import EnvironmentProblem, SLMError, UserError
from slm.redact import redacted

if TYPE_CHECKING:
    from slm.budget import Budget
    from slm.recipe import Recipe

app = typer.Typer(
    help="From raw text to a small language model, on DeepSpeed. (`slm-data` prepares the text.)",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="a YAML file, see recipes/")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[FIELD=VALUE]...", help="e.g. optim.lr=1e-3")]


def main() -> None:
    """Entry point: errors that a user can mend are one message and an exit code, never a traceback."""
    _open_standard_streams()
    # The deepspeed launcher adds --local_rank=N (unless told not to); the rank comes from the environment.
    sys.argv = [a for a in sys.argv if not a.startswith(("--local_rank", "--local-rank"))]
    try:
        app()
    except SLMError as error:
        typer.echo(redacted(f"{error.title}: {error}"), err=True)
        _note_exit(error.exit_code, str(error))
        sys.exit(error.exit_code)
    except SystemExit as end:
        if end.code == UserError.exit_code:  # typer has shown what is wrong with the command line
            _note_exit(UserError.exit_code, "the command line is not understood; see the message above")
        raise
    except Exception as error:  # a bug; what is printed may be kept as a log
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            _end_without_room(error)
        typer.echo(redacted(traceback.format_exc()), err=True, nl=False)
        sys.exit(1)


def _end_without_room(error: OSError) -> NoReturn:
    """Of what it writes each command tells by itself; left is above all a standard output in a file on a full disk."""
    problem = EnvironmentProblem(
        f"{error.filename or 'standard output'} cannot be written: {error.strerror}", fix="make room"
    )
    typer.echo(redacted(f"{problem.title}: {problem}"), err=True)
    _note_exit(problem.exit_code, str(problem))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what Python, as it ends, tries to write once more
    sys.exit(problem.exit_code)


def _open_standard_streams() -> None:
    """Where stdout or stderr is closed (`>&-`), what is printed goes nowhere, and no other file gets its number."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
            setattr(sys, name, os.fdopen(number, "w" if number else "r"))


def _note_exit(code: int, reason: str) -> None:
    """A launcher that waits for this process reads here how it ended. (What a run has written itself stays.)"""
    from slm.runtime import write_exit

    write_exit(None, code, reason)


def _load(recipe: str | Path, overrides: list[str] | None) -> Recipe:
    """From here on messages name the recipe as it was given."""
    from slm.recipe import load_recipe
    from slm.runtime import said_once

    SLMError.recipe = shlex.join([str(recipe), *(overrides or [])])
    with said_once():
        return load_recipe(recipe, overrides)


@app.command()
def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    gpus: Annotated[
        int | None,
        typer.Option(
            min=1, help="number of devices; if not given, the fewest that divide the work and, with --gpu, hold it"
        ),
    ] = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="the same as --gpus")] = None,
    gpu: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="their kind, as h200: also memory, speed, time and cost of every setting"),
    ] = None,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="--gpu: GPUs that share a fast link")] = 8,
    price: Annotated[
        float | None, typer.Option("--price-per-gpu-hour", help="--gpu: for the cost, in any currency")
    ] = None,
    mtbf_hours: Annotated[
        float | None,
        typer.Option(help="--gpu: hours between failures of one GPU; else those of Llama 3's run"),
    ] = None,
    save_stall: Annotated[
        float | None, typer.Option("--save-stall-seconds", help="--gpu: what a save blocks, as measured")
    ] = None,
    all_rows: Annotated[bool, typer.Option("--all", help="--gpu: every setting, with its memory by part")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="for programs: everything")] = False,
) -> None:
    """Check a recipe and say what it comes to: parameters, steps, batch, FLOPs; with --gpu also what fits, how fast, for how
    long. Needs no GPU and no data; what is here of its tokenizer and its data is held against it."""
    from dataclasses import asdict

    from slm.layout import fitting_ranks
    from slm.plan import check_what_is_here, describe, plan_phase

    options = [
        ("gpus-per-node", gpus_per_node != 8),
        ("price-per-gpu-hour", price is not None),
        ("mtbf-hours", mtbf_hours is not None),
        ("save-stall-seconds", save_stall is not None),
        ("all", all_rows),
    ]
    for option, given in options:
        if given and gpu is None:
            raise UserError(f"--{option} has no effect without --gpu", fix="add --gpu NAME, such as --gpu h200")
    if gpus is not None and ranks is not None and gpus != ranks:
        raise UserError(f"--gpus is {gpus} and --ranks {ranks}, and both are the number of devices", fix="give one")
    gpus = gpus or ranks
    loaded = _load(recipe, overrides)
    check_what_is_here(loaded)
    found = None
    if gpu is not None:
        found = _budget(loaded, gpu, gpus, gpus_per_node, price, mtbf_hours, save_stall)
        gpus = found.gpus.count
    gpus = gpus or next(iter(fitting_ranks(loaded.phases)), None)
    if as_json:
        phases = [asdict(plan_phase(loaded, phase, gpus or phase.sequence_parallel)) for phase in loaded.phases]
        told: dict[str, Any] = {"parameters": loaded.model.num_parameters(), "ranks": gpus, "phases": phases}
        if found is not None:
            from slm.budget import as_dict

            told["budget"] = as_dict(found)
        typer.echo(json.dumps(told, indent=2))
    else:
        typer.echo(describe(loaded, gpus))
    if found is not None:
        from slm.budget import check_fits
        from slm.budget_text import draw

        if not as_json:
            draw(found, all_rows=all_rows)
        check_fits(found)


def _budget(
    recipe: Recipe,
    gpu: str,
    count: int | None,
    per_node: int,
    price: float | None,
    mtbf_hours: float | None,
    save_stall: float | None,
) -> Budget:
    from slm.budget import Assumptions, budget, fewest_gpus
    from slm.forecast import MTBF_HOURS_PER_GPU, GPUs
    from slm.hardware import find_gpu

    kind, count_from = find_gpu(gpu), ""
    assumed = Assumptions(price, MTBF_HOURS_PER_GPU if mtbf_hours is None else mtbf_hours, save_stall)
    assumed.check()
    if count is None:
        count, count_from = fewest_gpus(recipe, kind, per_node)
    return budget(recipe, kind, GPUs(count, per_node), assumed, count_from=count_from)


@app.command()
def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    profile: Annotated[
        str, typer.Option(metavar="A:B", help="trace steps A to B of this attempt into RUN/profile")
    ] = "",
    until: Annotated[
        str,
        typer.Option(
            metavar="PHASE", help="leave at the end of this phase: the next job goes on, on other ranks if need be"
        ),
    ] = "",
    restarts: Annotated[
        int,
        typer.Option(
            metavar="N", min=0, help="start again, at most N times, after what can pass: killed, crashed, hung"
        ),
    ] = 0,
    launcher: Annotated[
        str,
        typer.Option(metavar="COMMAND", help="with --restarts: what starts `slm` on many ranks, as 'mpirun -n 2 slm'"),
    ] = "",
    must_resume: Annotated[
        bool, typer.Option("--must-resume", help="fail where there is no checkpoint, instead of beginning at step 0")
    ] = False,
    allow_change: Annotated[
        bool,
        typer.Option(
            "--allow-change", help="go on within a phase though its lr, schedule, loss … are others than before"
        ),
    ] = False,
    fresh_optimizer: Annotated[
        bool, typer.Option("--fresh-optimizer", help="go on from the checkpoint's weights alone; moments begin at zero")
    ] = False,
    check: Annotated[
        int,
        typer.Option(
            metavar="RANKS", min=0, help="begin nothing: say what would be refused, on so many ranks, at once"
        ),
    ] = 0,
) -> None:
    """Train, or go on with, the run of a recipe. Under deepspeed, torchrun, mpirun or srun on many ranks, or alone."""
    loaded = _load(recipe, overrides)
    steps = _steps(profile)
    if check:
        from slm.plan import check_before_start

        check_before_start(loaded, check, until)
        return
    from slm.resume import Resume

    if launcher and not restarts:
        raise UserError("--launcher has no effect without --restarts", fix="add --restarts N")
    if restarts:
        from slm.runtime import launched_ranks
        from slm.supervise import supervise

        if (ranks := launched_ranks()) and ranks.world_size > 1:
            raise UserError(
                f"--restarts in each of {ranks.world_size} ranks: each would start again without the others",
                fix="give --restarts N to launchers/local.sh, or slm train RECIPE --restarts N --launcher 'mpirun -n RANKS slm'",
            )
        if fresh_optimizer:
            raise UserError(
                "--fresh-optimizer with --restarts: each restart would throw the moments away again",
                fix="start once with --fresh-optimizer, stop it after its first save, and go on with --restarts",
            )
        command = shlex.split(launcher) or [sys.executable, "-m", "slm"]
        if shutil.which(command[0]) is None:
            raise UserError(f"--launcher: {command[0]} is no program on the PATH", fix="mend its name, or install it")
        command += ["train", str(recipe), *(overrides or [])]
        command += ["--profile", profile] * bool(profile) + ["--until", until] * bool(until)
        command += ["--must-resume"] * must_resume + ["--allow-change"] * allow_change
        sys.exit(supervise(command, loaded.run_dir, restarts))
    from slm import watchdog
    from slm.ledger import Ledger, process_age_seconds
    from slm.runtime import discover_ranks, lasting_imports

    with lasting_imports():
        import torch._dynamo  # noqa: F401 - torch's optimisers would

        from slm.train import train as run

    resume = Resume(must=must_resume, allow_change=allow_change, fresh_optimizer=fresh_optimizer)
    ledger = Ledger(process_age_seconds())
    code = run(loaded, profile_steps=steps, until=until, resume=resume, ledger=ledger)
    if any(loaded.watchdog.model_dump().values()):
        watchdog.leave(loaded.run_dir, discover_ranks().rank)
    sys.exit(code)


def _steps(text: str) -> range:
    if not text:
        return range(0)
    first, _, last = text.partition(":")
    if not (first.isdigit() and (last or first).isdigit()) or int(last or first) < int(first) or int(first) < 1:
        raise UserError(f"--profile is {text!r}, which is no range of steps", fix="write A:B, such as 5:8")
    return range(int(first), int(last or first) + 1)


@app.command()
def teacher(
    words: Annotated[
        list[str],
        typer.Argument(metavar="[verify|stats|diff] RECIPE [FIELD=VALUE]...", help="what to do, and a recipe"),
    ],
    plot: Annotated[Path | None, typer.Option(help="stats: also a picture, .png, .svg or .pdf")] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="diff: about so many are compared, for each cache (8192)")
    ] = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="verify: have slm teacher make the damaged blocks, and only them, again")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="verify, stats, diff: for programs")] = False,
) -> None:
    """Run the recipe's teachers over its token shards and keep their caches: slm teacher RECIPE, on any number of processes.

    Killed, the same command goes on. `verify` reads all of it again; `stats` shows what the teachers know and how much of
    it the caches hold; `diff` runs the teachers on a sample and says what the caches lost.
    """
    action = words[0] if words[0] in ("verify", "stats", "diff") else "build"
    rest = words if action == "build" else words[1:]
    if not rest:
        raise UserError(f"slm teacher {action} has no recipe", fix=f"slm teacher {action} recipe.yaml")
    if action == "build" and len(words) > 1 and "=" not in words[1]:
        raise UserError(
            f"{words[0]!r} is nothing that slm teacher does, and {words[1]!r} is no FIELD=VALUE",
            fix="slm teacher [verify|stats|diff] RECIPE [FIELD=VALUE]...",
        )
    for option, given, of in (
        ("--plot", plot is not None, ("stats",)),
        ("--tokens", tokens is not None, ("diff",)),
        ("--repair", repair, ("verify",)),
        ("--json", as_json, ("verify", "stats", "diff")),
    ):
        if given and action not in of:
            raise UserError(f"{option} has no effect here", fix=f"it is for slm teacher {' and '.join(of)}")
    recipe = _load(rest[0], rest[1:])
    if action == "build":
        from slm.runtime import lasting_imports

        with lasting_imports():
            from slm.distill.build import build
        sys.exit(build(recipe))
    from slm.distill import examine
    from slm.pictures import check_picture

    if plot is not None:
        check_picture(plot)
    if action == "verify":
        problems = examine.verify(recipe, repair=repair)
        told = [problem.problem for problem in problems]
        typer.echo(json.dumps(told) if as_json else "\n".join(told) or "every cache is whole and of its tokens")
        for fix in dict.fromkeys(problem.fix for problem in problems):
            typer.echo(f"  Fix: {fix}", err=True)
        sys.exit(max((problem.exit_code for problem in problems), default=0))
    found = examine.stats(recipe) if action == "stats" else examine.diff(recipe, tokens or 8192)
    if plot is not None:
        examine.plot(found, plot)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        (examine.draw if action == "stats" else examine.draw_diff)(found)


app.command("eval")(cli_models.evaluate)


app.command()(cli_models.generate)
app.command("import")(cli_models.import_model)
app.command()(cli_models.export)
app.command()(cli_models.quantize)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="runs' folders; several are laid over each other")],
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="where the page goes; RUN/report.html if it is of one run")
    ] = None,
    over: Annotated[
        str, typer.Option(metavar="steps|tokens", help="what curves are drawn over; several runs: tokens, unless told")
    ] = "",
    no_page: Annotated[bool, typer.Option("--no-page", help="only say where the time went")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="for programs: where the time went, and no page")] = False,
) -> None:
    """Where a run's time went, over all its attempts: the share of it that was training, what was lost, and to what. And all
    that it measured as one HTML page, which opens without a network."""
    from slm.ledger import describe, goodput, how_it_ended, read_events

    if over not in ("", "steps", "tokens"):
        raise UserError(f"--over is {over!r}, which no curve is drawn over", fix="give steps or tokens")
    has_page = not (no_page or as_json)
    if not has_page and (output or over):
        option = "--output" if output else "--over"
        raise UserError(f"{option} has no effect without a page", fix=f"leave {option} or --no-page and --json out")
    if has_page and output is None and len(runs) > 1:
        raise UserError(
            f"the page of {len(runs)} runs has no place of its own", fix="give --output FILE.html, or --no-page"
        )
    found = {str(run): goodput(read_events(run)) | {"ended": how_it_ended(run)} for run in runs}
    if as_json:
        typer.echo(json.dumps(found if len(runs) > 1 else found[str(runs[0])], indent=2))
        return
    for run, seconds in found.items():
        typer.echo((f"{run}:\n" if len(runs) > 1 else "") + f"{describe(seconds)}\n{seconds['ended']}")
    if has_page:
        from slm.report.page import write_page

        path = output or runs[0] / "report.html"
        write_page(runs, path, over or None)  # type: ignore[arg-type]
        typer.echo(f"wrote {path} (open it in a browser)", err=True)


@app.command()
def doctor(
    recipe: Annotated[Path | None, typer.Argument(metavar="[RECIPE]", help="also what this recipe needs")] = None,
    overrides: Overrides = None,
    folder: Annotated[Path | None, typer.Option(help="where runs are written (runs, or where the recipe's is)")] = None,
    limit: Annotated[float, typer.Option(metavar="SECONDS", min=1, help="of one measurement between ranks")] = 60.0,
    as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
    check: Annotated[bool, typer.Option("--check", help="measure nothing: say what is wrong with the recipe")] = False,
) -> None:
    """Measure what a run will need of this machine or, under any launcher, of all its machines and the network between."""
    loaded = _load(recipe, overrides) if recipe is not None else None
    if check:
        return
    from slm.doctor import examine

    folder = folder or (loaded.run_dir.parent if loaded else Path("runs"))
    code = examine(loaded, folder, try_seconds=limit, as_json=as_json)
    _note_exit(code, "something is wrong; see the table" if code else "done")
    sys.exit(code)


@app.command()
def status(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a run's folder")],
    as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
) -> None:
    """Where a run stands: its phases as saved, how the last attempt ended, and what SLURM says of the jobs of its chain."""
    from slm.status import print_status
    from slm.status import status as find

    if as_json:
        typer.echo(json.dumps(find(run), indent=2))
    else:
        print_status(run)


@app.command()
def schema() -> None:
    """Print the JSON Schema of a recipe, for editors (recipes/recipe.schema.json is this)."""
    from slm.recipe import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))


if __name__ == "__main__":
    main()
