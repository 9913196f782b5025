"""What a recipe comes to on named GPUs, in words: a table and a few lines a phase, and the whole. No torch.

draw(budget(recipe, find_gpu("h200"), GPUs(64), Assumptions()))
"""

from __future__ import annotations

import sys

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from slm.budget import Budget, PhaseBudget, counted, host_memory, left_out, row_figures, settings, span, total
from slm.choose import Candidate, gib, reasons
from slm.forecast import lost_fraction
from slm.hardware import HOST_MEMORY_BANDWIDTH, PAGEABLE, PINNED
from slm.memory import STATE_BYTES

_WIDE = 1000  # columns where nobody's terminal says how many there are


def draw(found: Budget, *, all_rows: bool = False) -> None:
    """A table and a few lines a phase."""
    console = Console(width=None if sys.stdout.isatty() else _WIDE, highlight=False)
    gpu, assumed = found.gpu, found.assumed
    console.print(
        f"\non {found.gpus.count} x {gpu.name} ({found.gpus.nodes} node{'s' * (found.gpus.nodes > 1)}): "
        f"{gpu.memory_gib:g} GiB each, of which "
        f"tensors may fill {gib(gpu.usable_bytes)}. Speeds are forecasts, not measurements:\n"
        f"matrix products at {gpu.matmul_efficiency:.0%} and attention at {gpu.attention_efficiency:.0%} of peak, "
        f"{gpu.efficiency_from} (benchmarks/published_speeds.py).",
        soft_wrap=True,
    )
    if found.count_from:
        console.print(found.count_from, soft_wrap=True)
    for part in found.phases:
        table = _table(found, part, all_rows)
        needed = Measurement.get(console, console.options.update(width=_WIDE), table).maximum
        Console(width=max(needed, console.width), highlight=False).print(table)  # on a narrow terminal no word is cut
        for line in _lines(found, part):
            console.print(f"  {line}", soft_wrap=True)
    for line in _total_lines(found):
        console.print(line, soft_wrap=True)
    console.print(f"checkpoints: {_gb(STATE_BYTES * found.recipe.model.num_parameters())} each; {_kept(found)}")
    failures = f"one failure in {found.mtbf_seconds / 3600:,.0f} h ({assumed.mtbf_hours_per_gpu:,.0f} h a GPU)"
    console.print(f"failures: {failures}; a save blocks for {found.stall_seconds:.2g} s")


def _kept(found: Budget) -> str:
    recipe = found.recipe
    most = recipe.most_checkpoints()
    size = _gb(STATE_BYTES * recipe.model.num_parameters() * most)
    alone = _gb(2 * recipe.model.num_parameters())
    return f"at most {most} at once, {size}; the model alone in 16 bits {alone}"


def _gb(num_bytes: float) -> str:
    """Decimal, as disks and networks are."""
    if num_bytes >= 1e9:
        return f"{num_bytes / 1e9:,.2f} GB" if num_bytes < 1e11 else f"{num_bytes / 1e9:,.0f} GB"
    return f"{num_bytes / 1e6:.1f} MB" if num_bytes >= 1e6 else f"{num_bytes / 1e3:.1f} kB"


def _total_lines(found: Budget) -> list[str]:
    whole = total(found)
    if whole is None:
        missing = []
        for part in found.phases:
            row = counted(part)
            if row is None or not row.has_forecast:
                missing.append(f"{part.phase.name} {'fits in no way' if row is None else 'has no forecast'}")
        return [f"all phases: no total ({', '.join(missing)})", f"not counted: {'; '.join(left_out(found))}"]
    price = found.assumed.price_per_gpu_hour
    cost = "" if whole.cost is None else f", {whole.cost:,.0f} at {price:g} a GPU hour"
    how = f" ({', '.join(whole.as_chosen)} as chosen, for as it is it does not fit)" if whole.as_chosen else ""
    return [
        f"all phases{how}: {span(whole.days * 86400)}, {_hours(whole.gpu_hours)}{cost}",
        f"not counted: {'; '.join(left_out(found))}",
    ]


def _hours(gpu_hours: float) -> str:
    return f"{gpu_hours:,.0f} GPU hours" if gpu_hours >= 10 else f"{gpu_hours:.2g} GPU hours"


def _table(found: Budget, part: PhaseBudget, all_rows: bool) -> Table:
    missing = "; * not all is counted, see below" if any(row.not_counted for row in part.rows) else ""
    table = Table(
        title=f"phase {part.phase.name}: {part.phase.seq_len:,} tokens, {part.phase.batch_tokens:,} a step{missing}",
        title_justify="left",
    )
    names = ["", "ZeRO", "GPUs a\nsequence", "recompute", "micro-batch", "GiB", "fits", "tokens/s\n/GPU"]
    parts = [name for name in part.own.memory.peak.parts() if any(row.memory.peak.parts()[name] for row in part.rows)]
    for name in names + (parts if all_rows else []):
        table.add_column(name, no_wrap=True, justify="left" if name in ("", "ZeRO", "recompute", "fits") else "right")
    for row in _shown(part, all_rows):
        same = part.best is not None and row.is_own and part.best.overrides == row.overrides
        mark = "recipe, chosen" if same else "recipe" if row.is_own else "chosen" if row is part.best else ""
        policy = row.policy + " +tiles" * (row.mlp_tile_tokens is not None) + " +host" * row.offload_activations
        held = row.memory.peak
        star = "*" * bool(row.not_counted)
        cells = [
            mark,
            row.deepspeed,
            str(row.sequence_parallel),
            policy,
            str(row.micro_batch),
            gib(held.total_bytes) + star,
        ]
        rate = "?" if not row.has_forecast else f"{row.tokens_per_second / found.gpus.count:,.0f}{star}"
        rate = rate if row.fits else "-"
        cells += [("yes" if row.fits else "no") + star, rate]
        cells += [gib(held.parts()[name]) for name in parts] if all_rows else []
        table.add_row(*cells, style="bold" if mark else None)
    return table


def _shown(part: PhaseBudget, all_rows: bool) -> list[Candidate]:
    """The recipe's own, and unless all: one row for each strategy and policy, at the degree chosen and the recipe's; offloading
    only where it is needed."""
    others = [row for row in part.rows if not row.is_own]
    if all_rows:
        return [part.own, *others]
    shown_degrees = {
        part.own.sequence_parallel,
        part.best.sequence_parallel if part.best else part.own.sequence_parallel,
    }
    needed = part.best is None or part.best.zero.offload_optimizer
    others = [
        row
        for row in others
        if row.sequence_parallel in shown_degrees
        and (needed or row.deepspeed == part.own.deepspeed or not row.zero.offload_optimizer)
    ]
    return [part.own, *others]


def _lines(found: Budget, part: PhaseBudget) -> list[str]:
    row, phase = part.own, part.phase
    lines = [_memory_line("recipe", row)]
    if part.best is not None and part.best.overrides != row.overrides:
        lines.append(_memory_line("chosen", part.best))
    lines += _warnings(part)
    if part.best is None:
        lines.append("chosen: none of these fits")
    else:
        said = settings(part)
        only = " (what is not counted must find room beside it)" if part.best.not_counted else ""
        lines.append(f"chosen: {said or 'as the recipe has it'}{only}")
        lines += [f"  {reason}" for reason in reasons(part.best, part.rows, found.gpu)]
    shown = row if row.fits else part.best
    if shown is None:
        return lines
    name = "as the recipe has it: " if shown is row else "as chosen: "
    if not shown.has_forecast:
        tokens = shown.micro_batch * phase.seq_len // shown.sequence_parallel
        return [
            *lines,
            f"{name}no forecast of speed, time or saves: {tokens:,} tokens of this model a micro-batch are too few for the rule "
            f"(it computes {span(shown.time.compute_seconds / shown.gradient_accumulation)}, and the GPU would wait for its "
            "kernels to be started)",
        ]
    figures = row_figures(found, part, shown)
    price = found.assumed.price_per_gpu_hour
    cost = f", {figures['cost']:,.0f} at {price:g} a GPU hour" if price is not None else ""
    sent = figures["communication_bytes_per_step"]
    exchanged = f" and {_gb(sent['sequences'])} of sequences" if sent["sequences"] else ""
    taught = f", the teacher {span(figures['teacher_seconds'])} (not in MFU)" if figures["teacher_seconds"] else ""
    return [
        *lines,
        f"{name}{figures['tokens_per_second']:,.0f} tokens/s, "
        f"MFU {figures['mfu_causal']:.0%} causal, {figures['mfu_full']:.0%} full; a step {span(figures['step_seconds'])}, "
        f"of which communication {span(figures['exposed_communication_seconds'])}{taught}"
        f"{'; WITHOUT what is not counted (above)' if shown.not_counted else ''}",
        *([_offload_line(found, shown)] if shown.zero.offloads else []),
        f"a GPU sends {_gb(sent['gradients_and_weights'])} of gradients and weights{exchanged} a step",
        f"{phase.num_steps:,} steps in {span(figures['days'] * 86400)}, {_hours(figures['gpu_hours'])}{cost}",
        _save_line(found, part, shown),
    ]


def _save_line(found: Budget, part: PhaseBudget, row: Candidate) -> str:
    interval, every = part.save_seconds, found.recipe.checkpoint.every_steps
    steps = max(1, round(interval / row.time.seconds))
    lost = [
        lost_fraction(seconds, found.stall_seconds, found.mtbf_seconds)
        for seconds in (interval, every * row.time.seconds)
    ]
    best, own = (f"{fraction:.2%}" if fraction < 1 else "all of the time" for fraction in lost)
    if steps >= part.phase.num_steps:
        return (
            f"save at the phase's end: it is shorter than the {span(interval)} after which a save pays (Young); "
            f"checkpoint.every_steps {every:,}: {own} lost to saves and failures"
        )
    return (
        f"save every {span(interval)} = {steps:,} steps (Young: {best} lost to saves and failures; "
        f"checkpoint.every_steps {every:,}: {own})"
    )


def _memory_line(name: str, row: Candidate) -> str:
    held = row.memory.peak
    unit, scale = ("GiB", 1.0) if held.total_bytes >= 2**30 else ("MiB", 2**-10)
    parts = " + ".join(
        f"{part} {gib(value / scale)}" for part, value in held.parts().items() if value >= 0.005 * held.total_bytes
    )
    on_host = f"; host memory {gib(row.host_bytes_per_node / scale)} {unit} a node"
    made = f" = {parts}" if parts else ""
    return f"{name}: {gib(held.total_bytes / scale)} {unit} at its fullest ({held.moment}){made}{on_host}"


def _warnings(part: PhaseBudget) -> list[str]:
    """What the figures of the recipe's row and of the choice do not hold."""
    rows = {"recipe": part.own} | ({} if part.best is None else {"chosen": part.best})
    told = [f"NOT COUNTED: {what}" for what in dict.fromkeys(what for row in rows.values() for what in row.not_counted)]
    for name, row in rows.items():
        if row.too_much_for_a_host:
            told.append(f"warning ({name}): it needs {host_memory(row)}, for what is offloaded and for checkpoints")
        elif row.memory.host_bytes:
            told.append(
                f"warning ({name}): each node needs {gib(row.host_bytes_per_node)} GiB of host memory free for what is "
                "offloaded and for checkpoints; how much a node has is not known here"
            )
    return told


def _offload_line(found: Budget, row: Candidate) -> str:
    efficiency = PINNED if row.zero.pinned else PAGEABLE
    kind = "page-locked" if row.zero.pinned else "not page-locked (pin_memory false)"
    link, memory = row.time.host_link_bytes / 1e9, row.time.host_memory_bytes / 1e9
    return (
        f"offload: {span(row.time.offload_seconds)} a step, taken as not hidden: a GPU moves {link:.2f} GB to and from host "
        f"memory, at {efficiency:.0%} of {found.gpu.host_bandwidth / 1e9:g} GB/s for it is {kind}, and the CPUs {memory:.2f} GB "
        f"for it (Adam), at {HOST_MEMORY_BANDWIDTH / 1e9:g} GB/s a node: assumed, not measured"
    )
