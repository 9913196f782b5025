"""Training, from a recipe to a finished run: train -> run_phases -> run_phase (loop.py) -> train_step (step.py).

Owns an attempt: where it goes on, one phase after the other, their gates, going back, and how it ends. The steps of a phase
are loop.py's; what a run starts from is found and checked in inputs.py.

    exit_code = train(load_recipe("recipes/quickstart.yaml"))
"""

from __future__ import annotations

import errno
import logging
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from slm import checkpoint, gate, parallel, plan, watchdog
from slm.data.batches import PhaseData
from slm.data.tokens import TokenDataset
from slm.diagnostics import start_profiler, surroundings
from slm.engine import Engine, deepspeed_config, resolve_precision
from slm.errors import EnvironmentProblem, SLMError, UserError
from slm.evaluate import HeldOut, examine
from slm.findings import as_dict, report
from slm.inputs import (
    check_init_from,
    check_lengths,
    check_tokenizer,
    check_vocabulary,
    held_out,
    identity,
    load_initial_state,
    open_phase_data,
    open_recall,
    origin,
    restore_state,
)
from slm.layout import check_ranks
from slm.ledger import Ledger
from slm.loop import Diverged, Run, StepData, Stopped, run_phase
from slm.metrics import MetricsLogger, append_event
from slm.model.llama import Objective
from slm.recipe import Phase, Recipe, dump_recipe
from slm.resume import Position, Resume, as_far_as_run, open_checkpoint, phases_to_run, position_of, recipe_changes
from slm.room import check_room
from slm.runtime import Ranks, RunLock, StopRequest, atomic_write, discover_ranks, setup_logging, write_exit
from slm.safety import ReplicasDiffer, RollBack
from slm.saving import Checkpointer, remove

log = logging.getLogger("slm")

EXIT_CRASHED, EXIT_STOPPED = 5, 75


# --- the run -------------------------------------------------------------------------------------------------


def train(
    recipe: Recipe,
    *,
    profile_steps: range = range(0),
    until: str = "",
    resume: Resume | None = None,
    ledger: Ledger | None = None,
) -> int:
    """Runs or resumes a recipe on this rank; returns the exit code and leaves it in RUN/exit.json.

    until: the name of the phase at whose end this job is over; the last one if empty.
    ledger: of the time since the process began; a new one if there is none.

    A mistake of the user's and a broken file are printed as messages; anything else with its traceback.
    """
    stop = StopRequest()
    ranks = discover_ranks()
    run_dir: Path | None = None
    lock: RunLock | None = None
    is_new = refused = joined = False
    everyone: list[watchdog.Process] = []
    setup_logging(ranks.rank, None)
    try:
        if recipe.deterministic:
            parallel.same_bits_every_time()
        device = parallel.local_device(ranks.local_rank)
        # A collective call must not give up before the watchdog, which says where the others are.
        joined = parallel.start(device, timeout_minutes=max(30.0, 1.5 * recipe.watchdog.slow_seconds / 60))
        lock, is_new = _take_run_dir(recipe, ranks)
        run_dir = recipe.run_dir
        setup_logging(ranks.rank, run_dir)
        limits, everyone = recipe.watchdog.model_dump(), parallel.gather_objects(watchdog.myself())
        watchdog.start(run_dir, ranks.rank, **limits, everyone=everyone, on_gpu=device.type == "cuda")
        _train(recipe, ranks, device, run_dir, stop, profile_steps, until, resume or Resume(), ledger or Ledger())
        code, reason = 0, "done"
    except Stopped as error:
        code, reason = EXIT_STOPPED, str(error)
        log.info("%s; saved. The same command goes on from there (exit code %d)", error, code)
    except SLMError as error:
        code, reason, refused = error.exit_code, str(error), True
        if isinstance(error, ReplicasDiffer) and error.suspect_node and ranks.rank == 0:
            append_event(recipe.run_dir, "replicas differ", suspect_node=error.suspect_node, why=error.problem)
        # Every rank finds the same mistake, or judges by the same numbers: it is said once.
        if ranks.rank == 0 or not isinstance(error, (UserError, gate.GateFailed)):
            log.error(
                "%s", error if type(error).title == "Error" else f"{error.title}: {error}"
            )  # "ERROR Error" says it twice
    except KeyboardInterrupt:
        code, reason = EXIT_CRASHED, "interrupted twice; the last save is the newest state"
        log.error(reason)
    except Exception as error:
        code, reason = EXIT_CRASHED, f"{type(error).__name__}: {error}"
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            code, reason = EnvironmentProblem.exit_code, f"{error.strerror}: {error.filename or recipe.run_dir}"
            log.error("%s. Fix: free space there, or give the run (output) another disk", reason)
        elif parallel.is_lost_peer(error):
            who = watchdog.name_the_gone(everyone) or "another rank"
            reason = f"{who} has gone (killed, out of memory, or crashed: see its log); the same command goes on"
            log.error("%s\n%s", reason, str(error).splitlines()[0])
        else:
            log.error("crashed\n%s", traceback.format_exc())
    # Refused before anything began, a new run leaves no folder; what refuses it does so on all ranks.
    if is_new and refused and not (recipe.run_dir / "recipe.yaml").exists() and (lock is None or lock.remove_folder()):
        run_dir = None
    write_exit(run_dir, code, reason)
    if joined and code in (0, EXIT_STOPPED):  # after a failure another rank may be in a collective call: just leave
        parallel.stop()
    watchdog.stop()
    if lock is not None:
        lock.close()
    stop.close()
    return code


def _take_run_dir(recipe: Recipe, ranks: Ranks) -> tuple[RunLock | None, bool]:
    """Rank 0 takes the lock; all ranks learn whether it could, and whether the run directory is new."""
    lock: RunLock | None = None
    error: Exception | None = None
    if ranks.rank == 0:
        try:
            lock = RunLock(recipe.run_dir)
        except Exception as caught:
            error = caught
    error, is_new = parallel.broadcast((error, lock is not None and lock.made_folder))
    if error is not None:
        raise error
    return lock, is_new


def _train(
    recipe: Recipe,
    ranks: Ranks,
    device: torch.device,
    run_dir: Path,
    stop: StopRequest,
    profile_steps: range,
    until: str,
    resume: Resume,
    ledger: Ledger,
) -> None:
    reader = open_checkpoint(run_dir, resume)
    if reader is None:  # a run that has checkpoints of its own no longer needs what it began from
        parallel.together(check_init_from, recipe)
    # Phases that are over, and those of later jobs, may want other data and numbers of ranks than are here.
    recipe = as_far_as_run(reader, recipe) if reader else recipe
    phases = phases_to_run(recipe, reader, until)
    data, look_at, identities = parallel.together(_open_inputs, recipe, phases, ranks, device)
    position = position_of(reader, recipe, identities, resume.allow_change) if reader else Position()
    changes = recipe_changes(reader, recipe) if reader else []
    if phases:
        parallel.first_rank_decides(check_room, run_dir, recipe, phases)
    if ranks.rank == 0:
        if phases:  # where nothing is left to train, it stays the recipe of what was
            atomic_write(run_dir / "recipe.yaml", dump_recipe(recipe))
        log.info("%s", plan.describe(recipe, ranks.world_size, phases))
        for phase in phases:
            log.info("phase %s data: %s", phase.name, data[phase.name].describe())
        log.info("going on from %s" if reader else "starting from %s", reader.folder if reader else origin(recipe))
    run = open_run(recipe, ranks, device, run_dir, stop, position, ledger, profile_steps)
    if phases:
        run.metrics.event("data", phases={phase.name: data[phase.name].report() for phase in phases})
    if changes:
        run.metrics.event("recipe changed", step=position.global_step, changes=changes)
    if reader is not None and resume.fresh_optimizer:
        run.metrics.event("fresh optimizer", step=position.global_step)
    try:
        run_phases(
            run,
            phases,
            dict(data),
            look_at,
            position,
            reader,
            identities=identities,
            start=lambda engine: load_initial_state(engine, recipe),
        )
    finally:
        run.saver.finish(timeout_seconds=120)
        if run.profiler is not None:
            run.profiler.stop()
        run.tell_seconds(run.step)
        run.metrics.close()


def _open_inputs(
    recipe: Recipe, phases: list[Phase], ranks: Ranks, device: torch.device
) -> tuple[dict[str, PhaseData], Callable[[Phase], HeldOut], dict[str, dict[str, Any]]]:
    """Everything that can be wrong is found here, before anything is built: (data by phase, what to evaluate, identities)."""
    precision, _ = resolve_precision(recipe.precision, device)
    check_ranks(phases, ranks.world_size)
    for phase in phases:
        # Refuses what would train wrongly.
        deepspeed_config(phase, recipe.optim, precision, ranks.world_size, device.type)
    data = {phase.name: open_phase_data(recipe, phase) for phase in phases}
    validation = {name: TokenDataset(path) for name, path in recipe.data.validation.items()}
    check_vocabulary(recipe, [*data.values()], validation)
    check_tokenizer(recipe, [*data.values()])
    check_lengths(recipe, data, validation)
    recall = open_recall(recipe, phases, validation)
    look_at = partial(held_out, recipe, validation, recall, ranks)
    return data, look_at, {phase.name: identity(recipe, phase, data[phase.name]) for phase in phases}


def open_run(
    recipe: Recipe,
    ranks: Ranks,
    device: torch.device,
    run_dir: Path,
    stop: StopRequest,
    position: Position,
    ledger: Ledger,
    profile_steps: range = range(0),
) -> Run:
    """The sinks and the saver of one attempt. The caller closes run.metrics."""
    precision, why = resolve_precision(recipe.precision, device)
    log.info("precision %s, because %s; device %s; ranks %d", precision, why, device.type, ranks.world_size)
    open_metrics = partial(
        MetricsLogger,
        run_dir,
        tensorboard=recipe.log.tensorboard,
        wandb=recipe.log.wandb.model_dump() if recipe.log.wandb else None,
        run_name=recipe.name,
        config=recipe.model_dump(mode="json"),
        start_step=position.global_step,
        rank=ranks.rank,
    )
    metrics = parallel.together(open_metrics)  # where W&B refuses the first rank, all leave
    saver = Checkpointer(run_dir, recipe.checkpoint, metrics.event)
    age = sum(ledger.seconds().values())
    here = surroundings(device)
    start = dict(world_size=ranks.world_size, precision=precision, step=position.global_step, age=age)
    metrics.event("start", **start, environment=here)
    profiler = start_profiler(run_dir, ranks.rank, profile_steps, device.type)
    return Run(
        recipe, ranks, device, precision, run_dir, metrics, saver, stop, ledger, profiler, step=position.global_step
    )


def run_phases(
    run: Run,
    phases: list[Phase],
    data: dict[str, StepData],
    look_at: Callable[[Phase], HeldOut],
    position: Position,
    reader: checkpoint.Reader | None,
    *,
    identities: dict[str, dict[str, Any]],
    start: Callable[[Engine], None],
    objective: Objective | None = None,
) -> Position:
    """Runs these phases, what is left of the recipe's; the state goes from one to the next through its last checkpoint.

    `reader` is the checkpoint that `position` is of; without one, `start` fills the first engine. Raises GateFailed.
    """
    for phase in phases:
        # What the evaluation before this phase found, for its gate.
        before = reader.state.get("before" if phase.name == position.phase else "findings") if reader else None
        if phase.name != position.phase:
            position = position.at_start_of(phase.name)
        while True:
            part = gate.part_to_train(phase, position.step)
            if gate.is_at_an_end(phase, position.step):
                assert reader is not None
                shortfall = _judge(run, phase, reader, before, look_at)
                if not shortfall:
                    break
                if part is None:
                    raise gate.failed(phase, position.step, shortfall, run.run_dir)
            assert part is not None
            if part.start and run.ranks.rank == 0:
                log.info("phase %s goes on to step %d, as its gate says", phase.name, part.stop)
            try:
                position = run_phase(
                    run,
                    phase,
                    data[phase.name],
                    look_at,
                    position,
                    part,
                    load=(lambda engine, reader=reader: restore_state(engine, reader)) if reader else start,  # type: ignore[misc]
                    losses=_losses_before(run.recipe, reader) if position.step else [],
                    identity=identities[phase.name],
                    before=before,
                    objective=objective,
                )
            except RollBack as back:
                reader, position = _roll_back(run, phase, back.args[0])
                continue
            run.saver.wait()
            parallel.barrier()
            folder = run.run_dir / "checkpoints" / checkpoint.folder_name(phase.name, position.step)
            reader = parallel.together(checkpoint.Reader, folder)
    left = [phase.name for phase in phases_to_run(run.recipe, reader)]
    run.metrics.event("done", step=position.global_step, phases_left=left)
    parallel.barrier()
    if phases and left:
        log.info("phase %s is over (--until); the next job goes on with %s", phases[-1].name, left[0])
    elif not phases:
        log.info("there is nothing left to train here")
    log.info("done: %d steps, %s document tokens; %s", position.global_step, f"{position.tokens:,}", run.run_dir)
    return position


def _losses_before(recipe: Recipe, reader: checkpoint.Reader | None) -> list[float]:
    """What a spike is told by; none of a recipe that was another, whose losses may be of another kind."""
    same = reader is not None and reader.state["recipe"] == recipe.model_dump(mode="json")
    return reader.state.get("losses", []) if reader is not None and same else []


def _roll_back(run: Run, phase: Phase, bad: Position) -> tuple[checkpoint.Reader | None, Position]:
    """The newest whole checkpoint from before the steps that were skipped in a row, and the position there: the data from
    it up to where the run stands now is left out. Before the first save the run begins anew, with other data.

    Nothing of this needs to be saved: killed before its next save, the run comes to the same bad steps and goes back again.
    """
    watchdog.at("going back from step", bad.global_step)
    run.saver.wait()
    parallel.barrier()
    first_bad = bad.global_step - bad.skipped_in_a_row
    folder = checkpoint.choose_together(run.run_dir, up_to_step=first_bad)
    if folder is None and parallel.first_rank_decides(checkpoint.newest_first, run.run_dir / "checkpoints"):
        raise Diverged(
            f"{bad.skipped_in_a_row} steps in a row were skipped, and none of the checkpoints is from before them",
            fix=f"keep more of them (checkpoint.keep_last {run.recipe.checkpoint.keep_last}), or start anew with a lower lr",
        )
    reader = parallel.together(checkpoint.Reader, folder) if folder else None
    to = Position.of(reader.state) if reader else Position()
    if to.phase != phase.name:
        to = to.at_start_of(phase.name)
    to = replace(to, rollbacks=bad.rollbacks + 1, skipped_in_a_row=0)
    to = replace(to, steps_left_out=bad.steps_left_out + bad.step - to.step)
    if run.ranks.rank == 0:
        log.warning(
            "going back from step %d to %s, and leaving out the data of the %d steps in between",
            bad.global_step,
            f"the checkpoint of step {to.global_step}" if reader else "the beginning",
            bad.step - to.step,
        )
    if run.ranks.rank == 0:  # a stop within the bad steps has saved there: nobody shall go on from it
        for later in checkpoint.newest_first(run.run_dir / "checkpoints"):
            if (checkpoint.manifest_or_none(later) or {"global_step": 0})["global_step"] > to.global_step:
                remove(later)
    run.tell_seconds(bad.global_step)
    run.metrics.event("rollback", from_step=bad.global_step, to_step=to.global_step, steps_left_out=to.steps_left_out)
    run.metrics.go_back(to.global_step)
    return reader, to


def _judge(
    run: Run,
    phase: Phase,
    reader: checkpoint.Reader,
    before: dict[str, Any] | None,
    look_at: Callable[[Phase], HeldOut],
) -> list[str]:
    """What the end of a phase falls short of, by the evaluation in its checkpoint; the verdict goes to the log and events."""
    earlier = run.recipe.phases[: run.recipe.phases.index(phase)]
    if gate.asks_for_more(phase, earlier, reader.state.get("findings") or {}):
        reader.state["findings"] = _measured_again(run, phase, reader, look_at(phase))
    told = gate.verdicts(phase, earlier, reader.state.get("findings") or {}, before)
    short = [text for holds, text in told if not holds]
    if told:
        held = [text for holds, text in told if holds]
        run.metrics.event("gate", phase=phase.name, passed=not short, short=short, held=held)
    if run.ranks.rank == 0:
        for holds, text in told:
            level = logging.INFO if holds else logging.WARNING
            log.log(level, "gate of %s, %s: %s", phase.name, "held" if holds else "short", text)
    return short


def _measured_again(run: Run, phase: Phase, reader: checkpoint.Reader, held_out: HeldOut) -> dict[str, Any]:
    """The evaluation at the end of a phase, once more: the recipe has asked for more since."""
    step, global_step = (reader.state["position"][name] for name in ("step", "global_step"))
    log.info("gate of %s: not all that it asks for was measured at step %d, so it is evaluated again", phase.name, step)
    config = run.recipe.model_of(phase)
    engine = Engine(config, phase, run.recipe.optim, precision=run.precision, device=run.device)
    restore_state(engine, reader)
    found = examine(engine, held_out, run.device)
    engine.close()
    report(run.metrics, run.run_dir, phase.name, step, global_step, found, False)
    return as_dict(found)
