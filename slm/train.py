"""Training, from a recipe to a finished run: train -> run_phase -> train_step. Read it top to bottom.

Owns the loop and when things happen. What happens is elsewhere: DeepSpeed in engine.py, the order of data in
data/order.py, files of a checkpoint in checkpoint.py, logs in metrics.py.

    exit_code = train(load_recipe("recipes/quickstart.yaml"))
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from slm import checkpoint, gate, parallel, plan, replicas, watchdog
from slm.data.batches import Batch, PhaseData
from slm.data.tokens import TokenDataset
from slm.diagnostics import explained, start_profiler
from slm.distill.student import Targets
from slm.engine import Engine, deepspeed_config, resolve_precision
from slm.errors import SLMError, UserError
from slm.evaluate import HeldOut, examine
from slm.findings import as_dict, report
from slm.inputs import (
    Position,
    Resume,
    as_far_as_run,
    check_init_from,
    check_lengths,
    check_tokenizer,
    check_vocabulary,
    held_out,
    identity,
    load_initial_state,
    open_checkpoint,
    open_phase_data,
    open_recall,
    origin,
    phases_to_run,
    position_of,
    recipe_changes,
    restore_state,
)
from slm.layout import check_ranks
from slm.ledger import Ledger
from slm.metrics import MetricsLogger, StepTimer, memory_stats, mfu, peak_flops
from slm.model.llama import Objective
from slm.optim import learning_rate
from slm.progress import StepProgress
from slm.recipe import Phase, Recipe, dump_recipe
from slm.runtime import Ranks, RunLock, StopRequest, atomic_write, discover_ranks, setup_logging, write_exit
from slm.safety import RollBack, Spikes, stragglers
from slm.saving import Checkpointer
from slm.step import SaveFailed, StepTotals, train_step
from slm.strategy import zero_stage

log = logging.getLogger("slm")

EXIT_CRASHED, EXIT_STOPPED, EXIT_DIVERGED = 5, 75, 76


class Stopped(Exception):
    """A signal asked the run to stop; it has saved and will go on by the same command."""


class Diverged(SLMError):
    exit_code = EXIT_DIVERGED
    title = "Diverged"


@dataclass
class Run:
    """What stays the same over the phases of one attempt."""

    recipe: Recipe
    ranks: Ranks
    device: torch.device
    precision: str
    run_dir: Path
    metrics: MetricsLogger
    saver: Checkpointer
    stop: StopRequest
    ledger: Ledger
    profiler: Any = None
    step: int = 0  # that was last told of

    def tell_seconds(self, step: int) -> None:
        """Writes down where the time went, up to now. step: how far training is."""
        self.step = step
        self.metrics.event("seconds", step=step, seconds=self.ledger.seconds())


class StepData(Protocol):
    """What run_phase wants of its data: PhaseData, or the notebook's windows."""

    def step_batches(self, step: int, *, global_batch: int, micro_batch: int, share: parallel.Share) -> list[Batch]: ...


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
        watchdog.start(run_dir, ranks.rank, **limits, everyone=everyone)
        _train(recipe, ranks, device, run_dir, stop, profile_steps, until, resume or Resume(), ledger or Ledger())
        code, reason = 0, "done"
    except Stopped as error:
        code, reason = EXIT_STOPPED, str(error)
        log.info("%s; saved. The same command goes on from there (exit code %d)", error, code)
    except SLMError as error:
        code, reason, refused = error.exit_code, str(error), True
        # Every rank finds the same mistake, or judges by the same numbers: it is said once.
        if ranks.rank == 0 or not isinstance(error, (UserError, gate.GateFailed)):
            log.error("%s: %s", error.title, error)
    except KeyboardInterrupt:
        code, reason = EXIT_CRASHED, "interrupted twice; the last save is the newest state"
        log.error(reason)
    except Exception as error:
        code, reason = EXIT_CRASHED, f"{type(error).__name__}: {error}"
        if parallel.is_lost_peer(error):
            reason = "another rank has gone (killed, out of memory, or crashed: see its log); the same command goes on"
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
    if ranks.rank == 0:
        if phases:  # where nothing is left to train, it stays the recipe of what was
            atomic_write(run_dir / "recipe.yaml", dump_recipe(recipe))
        log.info("%s", plan.describe(recipe, ranks.world_size, phases))
        for phase in phases:
            log.info("phase %s data: %s", phase.name, data[phase.name].describe())
        log.info("going on from %s" if reader else "starting from %s", reader.folder if reader else origin(recipe))
    run = open_run(recipe, ranks, device, run_dir, stop, position, ledger, profile_steps)
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
    metrics = MetricsLogger(
        run_dir,
        tensorboard=recipe.log.tensorboard,
        wandb=recipe.log.wandb.model_dump() if recipe.log.wandb else None,
        run_name=recipe.name,
        config=recipe.model_dump(mode="json"),
        start_step=position.global_step,
        rank=ranks.rank,
    )
    saver = Checkpointer(run_dir, recipe.checkpoint, metrics.event)
    age = sum(ledger.seconds().values())
    metrics.event("start", world_size=ranks.world_size, precision=precision, step=position.global_step, age=age)
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
                    losses=reader.state.get("losses", []) if reader and position.step else [],
                    identity=identities[phase.name],
                    before=before,
                    objective=objective,
                )
            except RollBack as back:
                reader, position = _roll_back(run, phase, back.args[0])
                continue
            run.saver.wait()
            parallel.barrier()
            reader = checkpoint.Reader(run.run_dir / "checkpoints" / checkpoint.folder_name(phase.name, position.step))
    run.metrics.event("done", step=position.global_step)
    parallel.barrier()
    if phases and phases[-1] != run.recipe.phases[-1]:
        log.info("phase %s is over (--until); the next job goes on with the one after it", phases[-1].name)
    elif not phases:
        log.info("there is nothing left to train here")
    log.info("done: %d steps, %s document tokens; %s", position.global_step, f"{position.tokens:,}", run.run_dir)
    return position


def _roll_back(run: Run, phase: Phase, bad: Position) -> tuple[checkpoint.Reader | None, Position]:
    """The newest whole checkpoint from before the steps that were skipped in a row, and the position there: the data from
    it up to where the run stands now is left out. Without a checkpoint the run begins anew, with other data."""
    watchdog.at("going back from step", bad.global_step)
    run.saver.wait()
    parallel.barrier()
    first_bad = bad.global_step - bad.skipped_in_a_row
    folder = checkpoint.choose_together(run.run_dir, up_to_step=first_bad)
    reader = checkpoint.Reader(folder) if folder else None
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


# --- a phase -------------------------------------------------------------------------------------------------


def run_phase(
    run: Run,
    phase: Phase,
    data: StepData,
    look_at: Callable[[Phase], HeldOut],
    position: Position,
    part: range,
    *,
    load: Callable[[Engine], None],
    losses: list[float],
    identity: dict[str, Any],
    before: dict[str, Any] | None = None,
    objective: Objective | None = None,
) -> Position:
    """Trains from `position` to the end of this part of the phase (gate.parts); every save, evaluation and log line happens
    here. losses: the last ones of this phase (safety.Spikes). before: what the evaluation before the phase found, which
    checkpoints carry along.

    Raises Stopped after saving when a signal came, RollBack with the position, Diverged, ReplicasDiffer, OutOfMemory,
    UserError.
    """
    run.ledger.enter("init")
    recipe, device, world = run.recipe, run.device, run.ranks.world_size
    watchdog.at(f"the start of phase {phase.name}, step", position.global_step + 1)  # until the first step is done
    compile_blocks = recipe.compile if isinstance(recipe.compile, bool) else device.type == "cuda"
    if compile_blocks and zero_stage(phase.deepspeed) == 3:
        log.info("blocks are not compiled: ZeRO-3 fetches weights between their layers")
        compile_blocks = False
    config = recipe.model_of(phase)
    try:
        engine = Engine(
            config,
            phase,
            recipe.optim,
            precision=run.precision,
            device=device,
            compile_blocks=compile_blocks,
            objective=objective,
        )
        load(engine)
        targets = _targets(recipe, phase, data, device)
    except RuntimeError as error:
        raise explained(error, run.run_dir, run.ranks.rank, device.type, phase) from error

    latest: dict[str, Any] | None = None  # what the newest evaluation found
    measured_at = -1

    @contextmanager
    def doing(what: str) -> Iterator[None]:
        with timer.part(what), run.ledger.within(what):
            yield

    def check_replicas() -> None:
        with doing("check"):
            replicas.check(engine.replicated(), position.global_step)

    def save(name: str, **options: Any) -> None:
        watchdog.at("the save of step", position.global_step)
        if recipe.safety.check_replicas_every_steps:
            check_replicas()
        with doing("save"):
            begun = run.saver.save(engine.fragments(), engine.shapes, state(), name=name, **options)
            parallel.barrier()  # rank 0 may have waited for the save before: nobody waits for it at a step's limit
        if begun:
            run.metrics.event("save begun", name=name, step=position.global_step)
        run.tell_seconds(position.global_step)

    def state() -> dict[str, Any]:
        return {
            "position": asdict(position),
            "global_step": position.global_step,
            "optimizer_steps": engine.optimizer_steps,
            "loss_scale": engine.loss_scale,
            "identity": identity,
            "model": config.model_dump(mode="json"),
            "recipe": recipe.model_dump(mode="json"),
            "layout": {"world_size": world, "zero_stage": engine.stage, "sequence_parallel": phase.sequence_parallel},
            "findings": latest if measured_at == position.step else None,
            "before": before,
            "losses": list(spikes.losses),
        }

    def measure() -> float | None:
        """Evaluates and logs what is found; returns the held-out loss if it is the lowest of the phase so far."""
        nonlocal latest, measured_at
        watchdog.at("an evaluation after step", position.global_step)
        with doing("eval"):
            recall = recipe.eval.recall_is_due(position.step, part.stop)
            found = examine(engine, look_at(phase), device, progress.evaluating, recall=recall)
        latest, measured_at = as_dict(found), position.step
        lowest = found.lower_than(position.best_loss)
        report(run.metrics, run.run_dir, phase.name, position.step, position.global_step, found, lowest is not None)
        parallel.barrier()  # rank 0 has drawn pictures
        return lowest

    timer, spikes = StepTimer(device.type), Spikes(recipe.safety, losses)
    share = parallel.Share.of(run.ranks.rank, world, phase.sequence_parallel)
    batch_of: dict[str, Any] = dict(global_batch=phase.global_batch, micro_batch=phase.micro_batch, share=share)
    peak = peak_flops(device)
    last_log, steps_since_log, totals = time.perf_counter(), 0, StepTotals()
    progress = StepProgress(f"{recipe.name}/{phase.name}", part.stop, position.step, enabled=run.ranks.rank == 0)
    try:
        if recipe.eval.at_start and position.step == 0:
            measure()
        first = position.step
        run.ledger.enter("compile" if compile_blocks else "step")
        while position.step < part.stop:
            if position.step > first:  # the first one may compile
                watchdog.at(watchdog.STEP, position.global_step + 1)
            data_step = position.step + position.steps_left_out
            with doing("data"):
                batches = [b.to(device) for b in data.step_batches(data_step, **batch_of)]
            lr = learning_rate(phase.schedule, phase.lr or recipe.optim.lr, position.step - part.start, len(part))
            fraction = min(1.0, position.step / phase.num_steps)
            done = train_step(
                engine,
                batches,
                lr,
                timer,
                targets,
                fraction,
                loss_limit=spikes.limit,
                stop_requested=run.stop.signal_name is not None,
                save_failed=run.saver.failed,
            )
            position = replace(
                position,
                step=position.step + 1,
                global_step=position.global_step + 1,
                tokens=position.tokens + int(done.num_tokens),
                skipped_in_a_row=position.skipped_in_a_row + 1 if done.result.skipped else 0,
            )
            run.ledger.enter("step")
            steps_since_log += 1
            totals = totals.plus(done)
            step, last = position.global_step, position.step == part.stop
            if run.profiler is not None:
                run.profiler.step()

            if done.why_skipped:
                # data_step: whose sequences these were (PhaseData.sample_ids)
                run.metrics.event("skip", step=step, reason=done.why_skipped, phase=phase.name, data_step=data_step)
                if run.ranks.rank == 0:
                    log.warning("step %d skipped on all ranks, weights untouched: %s", step, done.why_skipped)
                if position.skipped_in_a_row >= recipe.safety.skips_before_rollback:
                    if position.rollbacks < recipe.safety.rollbacks:
                        raise RollBack(position)
                    raise Diverged(
                        f"{position.skipped_in_a_row} steps in a row were skipped (up to step {step}: {done.why_skipped}), after "
                        f"going back {position.rollbacks} times in this phase",
                        fix=f"lower optim.lr ({recipe.optim.lr:g}) or lengthen the warm-up; look at the data of the skipped "
                        f"steps ({run.run_dir}/events.jsonl names them); earlier checkpoints are in {run.run_dir}/checkpoints",
                    )
            else:
                spikes.accept(done.loss)
            every = recipe.safety.check_replicas_every_steps
            if every and step % every == 0:
                check_replicas()

            if step % recipe.log.every_steps == 0 or last:
                sums = parallel.reduce_sum(done.parts.tolist())
                parts = timer.snapshot()
                # Evaluating and saving are not training: they have their own columns and lower no throughput.
                wall, last_log = time.perf_counter() - last_log, time.perf_counter()
                seconds = wall - sum(parts.get(name, 0.0) for name in ("eval", "save", "check"))
                flops = {
                    "full": plan.training_flops(config, totals.num_tokens, totals.pairs_full),
                    "causal": plan.training_flops(config, totals.num_tokens, totals.pairs_causal),
                }
                row = {
                    "phase": phase.name,
                    "loss": done.loss,
                    **(targets.named(sums, done.num_targets, fraction) if targets else {}),
                    "lr": lr,
                    "grad_norm": done.result.grad_norm,
                    "tokens": position.tokens,
                    "tokens_per_second": totals.num_tokens / seconds,
                    "padding": 1 - totals.num_tokens / (steps_since_log * phase.batch_tokens),
                    **mfu(flops, seconds=seconds, num_devices=world, peak=peak),
                    **memory_stats(),
                    **{f"seconds/{name}": value / steps_since_log for name, value in parts.items()},
                    "seconds/step": seconds / steps_since_log,
                }
                run.metrics.log(step, row)
                run.tell_seconds(step)
                progress.update(position.step, done.loss, totals.num_tokens / seconds)
                _tell_stragglers(run, step, parts, steps_since_log, seconds)
                steps_since_log, totals = 0, StepTotals()

            best = False
            every = recipe.eval.every_steps
            if last or (every and position.step % every == 0):
                if best := (lowest := measure()) is not None:
                    position = replace(position, best_loss=lowest)

            stopping = done.stop_requested and not last
            if best or last or stopping or position.step % recipe.checkpoint.every_steps == 0:
                name = checkpoint.folder_name(phase.name, position.step)
                save(name, permanent=last, best=best, required=stopping)
            if stopping:
                run.saver.wait()
                parallel.barrier()
                raise Stopped(f"stopped by {run.stop.signal_name or 'a signal to another rank'} after step {step}")
    except RollBack:
        engine.close()  # the phase builds another
        raise
    except SaveFailed:
        run.saver.wait()  # raises the reason, on all ranks
        raise
    except RuntimeError as error:
        raise explained(error, run.run_dir, run.ranks.rank, device.type, phase) from error
    finally:
        progress.close()
    engine.close()
    run.ledger.enter("finish")
    return position


def _tell_stragglers(run: Run, step: int, parts: dict[str, float], num_steps: int, seconds: float) -> None:
    """Says which ranks kept the others waiting since the last line, by what each did without waiting itself."""
    own = sum(parts.get(name, 0.0) for name in ("data", "teacher", "forward")) / num_steps
    of_ranks = parallel.gather(torch.tensor(own, dtype=torch.float64, device=run.device))
    slow = stragglers({rank: float(of_rank) for rank, of_rank in enumerate(of_ranks)}, seconds / num_steps)
    for rank, more in slow.items():
        run.metrics.event("straggler", step=step, rank=rank, seconds_more=more)
        if run.ranks.rank == 0:
            log.warning("rank %d is slow: %.0f ms a step more than the others (up to step %d)", rank, 1000 * more, step)


def _targets(recipe: Recipe, phase: Phase, data: StepData, device: torch.device) -> Targets | None:
    """What a phase's loss is computed from beside the labels."""
    if phase.loss.type != "distill":
        return None
    assert isinstance(data, PhaseData)
    dataset = next(iter(data.sources.values()))
    return Targets(recipe, phase, device, dataset.vocab_size)
