"""A phase's gate: what its last evaluation must show before the next phase begins. Pure; imports no torch.

gate: {short_loss_rise: 0.01, passkey: 0.99, position_rise: 0, repeat_tokens: 500M}

    for part in parts(phase):                      # the phase, and what it is repeated by if it falls short
        ...
        if not shortfalls(phase, findings, before): break

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
    repeat_tokens: Count = Field(0, ge=0, description="train on for so many tokens if it falls short; 0: stop")
    repeats: Count = Field(
        1, ge=1, le=99, description="so many times at most, with the schedule from its beginning each time"
    )

    @model_validator(mode="after")
    def _asks(self) -> Gate:
        if all(getattr(self, field) is None for field in ASKED):
            raise ValueError(f"asks for nothing: give {', '.join(ASKED)}, or leave the gate out")
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
        elif not settings.recall.lengths_of(phase.seq_len):
            problems.append(
                f"{at}.{field} is {getattr(gate, field):g}, but eval.recall.lengths has none up to seq_len "
                f"{phase.seq_len}: add one"
            )
    short = _short_seq_len(gate, earlier)
    if gate.short_loss_rise is not None:
        measured = {phase.seq_len, *(n for n in settings.seq_lens if n < phase.seq_len)}
        before = {earlier[-1].seq_len, *settings.seq_lens} if earlier else set()
        if short is None or (gate.short_loss_before is None and not earlier):
            problems.append(
                f"{at}.short_loss_rise is {gate.short_loss_rise:g}, and no phase comes before this one: give short_seq_len and "
                "short_loss_before, the loss to compare with (slm eval MODEL --seq-len N)"
            )
        elif short not in measured or (gate.short_loss_before is None and short not in before):
            problems.append(
                f"{at}.short_loss_rise compares the held-out loss at {short} tokens, which is not measured at the end of this "
                f"phase{'' if gate.short_loss_before is not None else ' and of the one before'}: add {short} to eval.seq_lens"
            )
    if gate.position_rise is not None and _bucket(_early(phase, earlier)) >= _bucket(phase.seq_len):
        problems.append(
            f"{at}.position_rise compares the last positions with position {_early(phase, earlier)}, which is in the last bucket "
            f"of seq_len {phase.seq_len}: give a smaller position_early"
        )
    return problems


def _bucket(position: int) -> int:
    """Of loss by position: 1, 2, 3-4, 5-8, ... tokens."""
    return (position - 1).bit_length()


def _early(phase: Phase, earlier: Sequence[Phase]) -> int:
    assert phase.gate is not None
    return phase.gate.position_early or _short_seq_len(phase.gate, earlier) or max(1, phase.seq_len // 8)


def shortfalls(
    phase: Phase, earlier: Sequence[Phase], found: dict[str, Any], before: dict[str, Any] | None
) -> tuple[list[str], list[str]]:
    """(What falls short, what was held), each in words with its numbers. earlier: the recipe's phases before this one."""
    gate = phase.gate
    assert gate is not None
    short: list[str] = []
    held: list[str] = []

    def judge(holds: bool, text: str) -> None:
        (held if holds else short).append(text)

    if gate.short_loss_rise is not None:
        length = _short_seq_len(gate, earlier)
        now = _loss(found, length)
        then = gate.short_loss_before if gate.short_loss_before is not None else _loss(before or {}, length)
        if now is None or then is None:
            judge(
                False,
                f"held-out loss at {length} tokens was not measured {'now' if now is None else 'before the phase'}",
            )
        else:
            judge(
                now - then <= gate.short_loss_rise,
                f"held-out loss at {length} tokens {now:.4f}, before the phase {then:.4f}: {now - then:+.4f} nats, at most "
                f"{gate.short_loss_rise:+g} is allowed",
            )
    for field in ("passkey", "multi_key"):
        least = getattr(gate, field)
        if least is None:
            continue
        cells = [row for row in found.get("recall", []) if (row["keys"] == 1) == (field == "passkey")]
        failing = [row for row in cells if row["accuracy"] < least]
        worst = min(cells, key=lambda row: row["accuracy"], default=None)
        name = "pass key" if field == "passkey" else "several keys"
        if worst is None:
            judge(False, f"{name}: nothing was measured")
        else:
            where = f"{worst['length']:,} tokens, depth {worst['depth_percent']} %"
            judge(
                not failing,
                f"{name}: worst {worst['accuracy']:.1%} ({where}; {len(failing)} of {len(cells)} cells below), at least "
                f"{least:.1%} is asked for at every length and depth",
            )
    if gate.position_rise is not None:
        early = _early(phase, earlier)
        buckets = (_main(found, phase.seq_len) or {}).get("by_position_full", [])
        first = next((b for b in buckets[:-1] if b["up_to"] >= early), None)
        if first is None:
            judge(
                False,
                f"loss by position: no held-out document fills {phase.seq_len} tokens, so nothing can be compared",
            )
        else:
            rise = buckets[-1]["loss"] - first["loss"]
            judge(
                rise <= gate.position_rise,
                f"loss at positions up to {buckets[-1]['up_to']:,} is {buckets[-1]['loss']:.4f}, up to {first['up_to']:,} "
                f"{first['loss']:.4f}: {rise:+.4f} nats, at most {gate.position_rise:+g} is allowed",
            )
    return short, held


def _main(found: dict[str, Any], seq_len: int | None) -> dict[str, Any] | None:
    """Over all sources."""
    by_source = found.get("loss", {}).get(str(seq_len), {})
    return by_source.get("all") or next(iter(by_source.values()), None)


def _loss(found: dict[str, Any], seq_len: int | None) -> float | None:
    row = _main(found, seq_len)
    return None if row is None or not row["targets"] else row["loss"]
