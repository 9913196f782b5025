"""A phase's gate: what its last evaluation must show before the next phase begins. Pure; imports no torch.

gate: {short_loss_rise: 0.01, passkey: 0.99, position_rise: 0, repeat_tokens: 500M}

    for part in parts(phase):                      # the phase, and what it is repeated by if it falls short
        ...
        if all(holds for holds, _ in verdicts(phase, earlier, findings, before)): break

`findings` and `before` are findings.as_dict of this phase's end and of the one before it, as checkpoints keep them: the
verdict is a function of them and of the recipe, so it is the same whenever it is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from slm.errors import SLMError
from slm.fields import Count, Real, Section

if TYPE_CHECKING:
    from slm.recipe import Eval, Phase

ASKED = ("short_loss_rise", "passkey", "multi_key", "position_rise")


class Gate(Section):
    """What the evaluation at a phase's end must show. Without it the run stops there, or the phase is repeated."""

    short_loss_rise: Real | None = Field(
        None, description="held-out loss at short_seq_len may be higher than before the phase by so many nats"
    )
    short_seq_len: Count | None = Field(None, gt=1, description="null: the seq_len of the phase before")
    short_loss_before: Real | None = Field(
        None, description="the loss that it is compared with; null: that of the end of the phase before"
    )
    passkey: Real | None = Field(
        None, ge=0, le=1, description="share of exact answers with one key, at every length and depth"
    )
    multi_key: Real | None = Field(
        None, ge=0, le=1, description="the same where one of several keys is asked for (eval.recall.keys)"
    )
    position_rise: Real | None = Field(
        None,
        description="loss in the last bucket of positions may be higher than in an early one by so many nats; 0: not at all",
    )
    position_early: Count | None = Field(
        None, gt=0, description="the early one holds this position; null: short_seq_len"
    )
    repeat_tokens: Count = Field(
        0, ge=0, description="train on for so many tokens, rounded up to whole steps, if it falls short; 0: stop"
    )
    repeats: Count = Field(
        1, ge=1, le=99, description="so many times at most, with the schedule from its beginning each time"
    )

    @model_validator(mode="after")
    def _asks(self) -> Gate:
        if all(getattr(self, field) is None for field in ASKED):
            raise ValueError(f"asks for nothing: give {', '.join(ASKED)}, or leave the gate out")
        rise, positions = self.short_loss_rise is not None, self.position_rise is not None
        problems = [
            f"{field} is {getattr(self, field):g}, which has no effect {why}: remove it"
            for field, has_effect, why in (
                ("repeats", self.repeat_tokens > 0, "without repeat_tokens"),
                ("short_loss_before", rise, "without short_loss_rise"),
                ("position_early", positions, "without position_rise"),
                (
                    "short_seq_len",
                    rise or (positions and self.position_early is None),
                    "beside position_early" if positions else "without short_loss_rise or position_rise",
                ),
            )
            if not has_effect and getattr(self, field) != Gate.model_fields[field].default
        ]
        if problems:
            raise ValueError("; ".join(problems))
        return self


class GateFailed(SLMError):
    """The run stops at the end of a phase, which is saved."""

    exit_code = 78
    title = "Gate not passed"


def parts(phase: Phase) -> list[range]:
    """Steps of the phase, then those that it is repeated by, each time."""
    found = [range(phase.num_steps)]
    if phase.gate is not None and phase.gate.repeat_tokens:
        extra = -(-phase.gate.repeat_tokens // phase.batch_tokens)
        found += [
            range(phase.num_steps + i * extra, phase.num_steps + (i + 1) * extra) for i in range(phase.gate.repeats)
        ]
    return found


def part_to_train(phase: Phase, step: int) -> range | None:
    """The part that goes on from here; None if there is none left."""
    return next((part for part in parts(phase) if step < part.stop), None)


def is_at_an_end(phase: Phase, step: int) -> bool:
    """Whether the gate is looked at here: the phase is over, or a repetition is, be it one that the recipe no longer asks for."""
    found = parts(phase)
    return step in {part.stop for part in found} or step > found[-1].stop


def repetition(phase: Phase) -> str:
    """What the phase is repeated by, in words; empty if it is not."""
    repeated = parts(phase)[1:]
    if phase.gate is None or not repeated:
        return ""
    tokens = len(repeated[0]) * phase.batch_tokens
    rounded = "" if tokens == phase.gate.repeat_tokens else f" (repeat_tokens {phase.gate.repeat_tokens:,}, rounded up)"
    times = f"up to {len(repeated)} repetitions" if len(repeated) > 1 else "1 repetition"
    return f"{times} of {len(repeated[0]):,} steps = {tokens:,} tokens{rounded}"


def repetitions_done(phase: Phase, step: int) -> str:
    """How many of the repetitions that the recipe allows are over at this step, in words."""
    repeated = parts(phase)[1:]
    if step > (repeated[-1].stop if repeated else phase.num_steps):
        return f"{step - phase.num_steps:,} steps of repetition, more than the recipe asks for now"
    return (
        f"{sum(part.stop <= step for part in repeated)} of {len(repeated)} repetitions" if repeated else "no repetition"
    )


def failed(phase: Phase, step: int, shortfall: Sequence[str], run_dir: object) -> GateFailed:
    more = "repeats" if parts(phase)[1:] else "repeat_tokens"
    # The launcher ends with the first line alone.
    return GateFailed(
        f"phase {phase.name} does not pass its gate at step {step}, after {repetitions_done(phase, step)}\n  - "
        + "\n  - ".join(shortfall),
        fix=f"train it longer (phases.{phase.name}.tokens or gate.{more}), or ask for less; the same command goes on from "
        f"there. All numbers: {run_dir}/eval",
    )


def _short_seq_len(gate: Gate, earlier: Sequence[Phase]) -> int | None:
    return gate.short_seq_len or (earlier[-1].seq_len if earlier else None)


def gate_problems(phase: Phase, earlier: Sequence[Phase], settings: Eval, validation: Sequence[str]) -> list[str]:
    """What a gate asks for that nothing measures, in words. settings: eval; validation: names of data.validation."""
    gate, at = phase.gate, f"phases.{phase.name}.gate"
    if gate is None:
        return []
    problems = []
    asked = [field for field in ASKED if getattr(gate, field) is not None]
    if not validation:
        problems.append(
            f"{at} asks for {', '.join(asked)}, and data.validation is empty: name held-out token shards there"
        )
    for field, what in (("passkey", "1"), ("multi_key", "more than 1")):
        if getattr(gate, field) is None:
            continue
        keys = [k for k in (settings.recall.keys if settings.recall else []) if (k == 1) == (field == "passkey")]
        if settings.recall is None or not keys:
            problems.append(
                f"{at}.{field} is {getattr(gate, field):g}, but no evaluation measures it: give eval.recall with {what} among "
                "its keys"
            )
        elif max(settings.recall.lengths_of(phase.seq_len), default=0) * 2 <= phase.seq_len:
            problems.append(
                f"{at}.{field} is {getattr(gate, field):g}, but eval.recall.lengths has none in the upper half of seq_len "
                f"{phase.seq_len}, so what the phase teaches would not be looked at: add one"
            )
    if gate.short_loss_rise is not None:
        problems += [f"{at}.{problem}" for problem in _short_problems(phase, gate, earlier, settings)]
    extra = parts(phase)[1:]
    if extra and phase.schedule.warmup_steps > len(extra[0]):
        problems.append(
            f"{at}.repeat_tokens comes to {len(extra[0])} steps, and schedule.warmup_steps is {phase.schedule.warmup_steps}: the "
            "learning rate would never reach its peak in a repetition"
        )
    if gate.position_rise is not None and _bucket(_early(phase, earlier)) >= _bucket(phase.seq_len):
        problems.append(
            f"{at}.position_rise compares the last positions with position {_early(phase, earlier)}, which is in the last bucket "
            f"of seq_len {phase.seq_len}: give a smaller position_early"
        )
    return problems


def _short_problems(phase: Phase, gate: Gate, earlier: Sequence[Phase], settings: Eval) -> list[str]:
    """Why the loss at the short length cannot be compared, if so."""
    asked, short, given = f"short_loss_rise is {gate.short_loss_rise:g}", gate.short_seq_len, gate.short_loss_before
    if not earlier and (short is None or given is None):
        lacking = [field for field, value in (("short_seq_len", short), ("short_loss_before", given)) if value is None]
        return [
            f"{asked}, and no phase comes before this one, which would say {' and '.join(lacking)}: give "
            f"{'both' if len(lacking) > 1 else 'it'}, the loss from slm eval MODEL --seq-len {short or 'N'}"
        ]
    before, last = (f"phase {earlier[-1].name}", earlier[-1].seq_len) if earlier else ("", 0)
    named = "short_seq_len" if short else f"short_seq_len, that of {before} where it is not given,"
    short = short or last
    if short > phase.seq_len:
        return [
            f"{asked}, and {named} is {short}, longer than the phase's own seq_len {phase.seq_len}, so it is not measured here: "
            f"give short_seq_len, at most {phase.seq_len}"
        ]
    if given is None and short > last:
        return [
            f"{asked}, and {named} is {short}, longer than the seq_len {last} of {before}, so it was not measured before: give "
            f"at most {last}, or short_loss_before"
        ]
    ends = ["this phase"] if short not in (phase.seq_len, *settings.seq_lens) else []
    ends += [before] if given is None and short not in (last, *settings.seq_lens) else []
    if not ends:
        return []
    return [
        f"{asked}, over the held-out loss at {short} tokens, which is not measured at the end of {' and '.join(ends)}: add "
        f"{short} to eval.seq_lens"
    ]


def _bucket(position: int) -> int:
    """Of loss by position: 1, 2, 3-4, 5-8, ... tokens."""
    return (position - 1).bit_length()


def _early(phase: Phase, earlier: Sequence[Phase]) -> int:
    assert phase.gate is not None
    return phase.gate.position_early or _short_seq_len(phase.gate, earlier) or max(1, phase.seq_len // 8)


def asks_for_more(phase: Phase, earlier: Sequence[Phase], found: dict[str, Any]) -> bool:
    """Whether the evaluation at the phase's end lacks what its gate asks for: the recipe may have asked for less then."""
    gate = phase.gate
    if gate is None:
        return False
    lengths = [_short_seq_len(gate, earlier)] if gate.short_loss_rise is not None else []
    lengths += [phase.seq_len] if gate.position_rise is not None else []
    rows = [_main(found, length) for length in lengths]
    return any(row is None or not row["targets"] for row in rows) or any(
        getattr(gate, field) is not None and not _cells(field, found) for field in ("passkey", "multi_key")
    )


# What was looked at, in words, and whether it holds.
Verdict = tuple[bool, str]


def verdicts(
    phase: Phase, earlier: Sequence[Phase], found: dict[str, Any], before: dict[str, Any] | None
) -> list[Verdict]:
    """Of a phase's gate, with all numbers. earlier: the recipe's phases before this one."""
    gate = phase.gate
    if gate is None:
        return []
    told = []
    if gate.short_loss_rise is not None:
        told.append(_short_loss(gate, gate.short_loss_rise, _short_seq_len(gate, earlier), found, before or {}))
    for field in ("passkey", "multi_key"):
        if (least := getattr(gate, field)) is not None:
            told.append(_recall(field, least, found))
    if gate.position_rise is not None:
        told.append(_positions(gate.position_rise, phase.seq_len, _early(phase, earlier), found))
    return told


def _short_loss(gate: Gate, most: float, length: int | None, found: dict[str, Any], before: dict[str, Any]) -> Verdict:
    now, then = _main(found, length), _main(before, length)
    named = {"now": now, "before the phase": then} if gate.short_loss_before is None else {"now": now}
    for when, row in named.items():
        if row is None or not row["targets"]:
            way_out = f": slm eval of that checkpoint with --seq-len {length} does; give short_loss_before"
            return False, f"held-out loss at {length} tokens was not measured {when}{way_out if when != 'now' else ''}"
        if row["loss"] is None:
            return False, f"held-out loss at {length} tokens is not a number {when}"
    assert now is not None
    if then is not None and gate.short_loss_before is None and then["targets"] != now["targets"]:
        return False, (
            f"held-out loss at {length} tokens is over {now['targets']:,} targets now and was over {then['targets']:,} before "
            "the phase: another text, or another eval.max_sequences"
        )
    was = gate.short_loss_before if gate.short_loss_before is not None else (then or {})["loss"]
    rise = now["loss"] - was
    return rise <= most, (
        f"held-out loss at {length} tokens {now['loss']:.4f}, before the phase {was:.4f}: {rise:+.4f} nats, at most {most:+g} is "
        f"allowed{_too_much(rise, most)}"
    )


def _recall(field: str, least: float, found: dict[str, Any]) -> Verdict:
    cells = _cells(field, found)
    name = "pass key" if field == "passkey" else "several keys"
    if not cells:
        return False, f"{name}: nothing was measured when the phase ended (slm eval RUN --recall measures it)"
    failing = [row for row in cells if row["accuracy"] < least]
    worst = min(cells, key=lambda row: row["accuracy"])
    missing = f": {100 * (least - worst['accuracy']):.1f} points are missing" if failing else ""
    return not failing, (
        f"{name}: worst {worst['accuracy']:.1%} ({worst['length']:,} tokens, depth {worst['depth_percent']} %; {len(failing)} of "
        f"{len(cells)} cells below), at least {least:.1%} is asked for at every length and depth{missing}"
    )


def _cells(field: str, found: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in found.get("recall", []) if (row["keys"] == 1) == (field == "passkey")]


def _positions(most: float, seq_len: int, early: int, found: dict[str, Any]) -> Verdict:
    buckets = (_main(found, seq_len) or {}).get("by_position_full", [])
    first = next((b for b in buckets[:-1] if b["up_to"] >= early), None)
    if first is None:
        return False, f"loss by position: no held-out document fills {seq_len} tokens, so nothing can be compared"
    last = buckets[-1]
    if first["loss"] is None or last["loss"] is None:
        return False, f"loss by position is not a number at {last['up_to']:,} or at {first['up_to']:,} tokens"
    rise = last["loss"] - first["loss"]
    return rise <= most, (
        f"loss at positions up to {last['up_to']:,} is {last['loss']:.4f}, up to {first['up_to']:,} {first['loss']:.4f}: "
        f"{rise:+.4f} nats, at most {most:+g} is allowed{_too_much(rise, most)}"
    )


def _too_much(rise: float, most: float) -> str:
    return f": {rise - most:.4f} too much" if rise > most else ""


def _main(found: dict[str, Any], seq_len: int | None) -> dict[str, Any] | None:
    """Over all sources."""
    by_source = found.get("loss", {}).get(str(seq_len), {})
    return by_source.get("all") or next(iter(by_source.values()), None)
