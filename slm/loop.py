"""The loop: one phase of a run, step by step, with everything that happens between steps.

Owns when things happen; what happens is elsewhere: one step in step.py, DeepSpeed in engine.py, the order of data in
data/order.py, saving in saving.py, logs in metrics.py. What comes before a phase and after it is train.py's.

    position = run_phase(run, phase, data, look_at, position, part, load=…, losses=[], identity=…)
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from slm import checkpoint, parallel, plan, replicas, watchdog
from slm.data.batches import Batch, PhaseData
from slm.diagnostics import explained
from slm.distill.student import Targets
from slm.engine import Engine
from slm.errors import SLMError
from slm.evaluate import HeldOut, examine
from slm.findings import as_dict, report
from slm.ledger import Ledger
from slm.metrics import MetricsLogger, StepTimer, memory_stats, mfu, peak_flops
from slm.model.llama import Objective
from slm.optim import learning_rate
from slm.progress import StepProgress
from slm.recipe import Phase, Recipe
from slm.resume import Position
from slm.runtime import Ranks, StopRequest
from slm.safety import RollBack, Spikes, stragglers
from slm.saving import Checkpointer
from slm.step import SaveFailed, StepTotals, train_step
from slm.strategy import zero_stage

log = logging.getLogger("slm")

_SECONDS_BETWEEN_WARNINGS = 60.0


class Stopped(Exception):
    """A signal asked the run to stop; it has saved and will go on by the same command."""


class Diverged(SLMError):
    exit_code = 76
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
    slow_told: float = -math.inf  # when a slow rank was last warned of

    def tell_seconds(self, step: int) -> None:
        """Writes down where the time went, up to now. step: how far training is."""
        self.step = step
        self.metrics.event("seconds", step=step, seconds=self.ledger.seconds())


class StepData(Protocol):
    """What run_phase wants of its data: PhaseData, or the notebook's windows."""

    def step_batches(self, step: int, *, global_batch: int, micro_batch: int, share: parallel.Share) -> list[Batch]: ...


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
    measured_at = checked_at = -1

    @contextmanager
    def doing(what: str) -> Iterator[None]:
        with timer.part(what), run.ledger.within(what):
            yield

    def check_replicas() -> None:
        nonlocal checked_at
        if checked_at != position.global_step:  # once a step, also where a save follows
            with doing("check"):
                replicas.check(engine.replicated(), position.global_step)
            checked_at = position.global_step

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
        lowest = None if position.skipped_in_a_row else found.lower_than(position.best_loss)
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
                skipped_in_a_row=position.skipped_in_a_row + 1 if done.why_skipped else 0,
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

            best, every = False, recipe.eval.every_steps
            name = checkpoint.folder_name(phase.name, position.step)
            # The end of the run is not put off for a signal: there is nothing left to stop.
            stopping = done.stop_requested and not (last and phase == recipe.phases[-1])
            if last or (every and position.step % every == 0):
                if stopping:  # whoever asked may not wait for an evaluation to end
                    save(name, permanent=last, required=True)
                    run.saver.wait()
                if best := (lowest := measure()) is not None:
                    position = replace(position, best_loss=lowest)
            # While steps are skipped weights stay as they are, and a rollback wants the checkpoint before them to be kept.
            due = position.step % recipe.checkpoint.every_steps == 0 and not position.skipped_in_a_row
            if best or last or stopping or due:
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
        if run.ranks.rank == 0 and time.monotonic() - run.slow_told > _SECONDS_BETWEEN_WARNINGS:
            run.slow_told = time.monotonic()
            log.warning(
                "rank %d is slow: %.0f ms a step more than the others, %.0f%% of a step (up to step %d; events.jsonl has all)",
                rank, 1000 * more, 100 * more * num_steps / seconds, step,
            )  # fmt: skip


def _targets(recipe: Recipe, phase: Phase, data: StepData, device: torch.device) -> Targets | None:
    """What a phase's loss is computed from beside the labels."""
    if phase.loss.type != "distill":
        return None
    assert isinstance(data, PhaseData)
    dataset = next(iter(data.sources.values()))
    return Targets(recipe, phase, device, dataset.vocab_size)
