"""The kinds of fields that a recipe has: counts with units, finite numbers, values over a phase. Imports no torch.

class Phase(Section):
    tokens: Count = Field(gt=0)          # "100B" -> 100_000_000_000
"""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def parse_count(value: Any) -> Any:
    """'100B' -> 100_000_000_000, '8Ki' -> 8192; numbers pass. Raises ValueError."""
    if isinstance(value, bool):
        raise ValueError(f"{value} is not a count")
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?(?:e[0-9]+)?)\s*([kmbt]|ki|mi|gi)?\s*", value, re.IGNORECASE)
    if not match:
        raise ValueError(f"{value!r} is not a count; write a number with an optional k, M, B, T, Ki, Mi or Gi")
    number = float(match[1].replace("_", "")) * _UNITS[(match[2] or "").lower()]
    if not number.is_integer():
        raise ValueError(f"{value!r} is not a whole number")
    return int(number)


Count = Annotated[int, BeforeValidator(parse_count)]
# YAML 1.1 reads 1e-3 (without a dot) as text; a number is what was meant.
Real = Annotated[float, BeforeValidator(lambda v: float(v) if isinstance(v, str) else v), Field(allow_inf_nan=False)]


def _parse_over_phase(value: Any) -> Any:
    given = value if isinstance(value, dict) else {0: value}
    try:
        numbers = {float(at): float(is_then) for at, is_then in given.items()}
    except (TypeError, ValueError):
        numbers = {}
    if not numbers:
        raise ValueError(
            f"{value!r} is neither a number nor what it is at fractions of the phase, such as {{0: 0.5, 1: 0.1}}"
        )
    return numbers if isinstance(value, dict) else numbers[0.0]


# A number, or what it is at some fractions of the phase: {0: 0.5, 1: 0.1}.
OverPhase = Annotated[Real | dict[Real, Real], BeforeValidator(_parse_over_phase)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


def points(value: float | dict[float, float]) -> list[tuple[float, float]]:
    """(fraction of the phase, value) in order."""
    return sorted(value.items()) if isinstance(value, dict) else [(0.0, value)]


def straight(value: float | dict[float, float], fraction: float) -> float:
    """The value at a fraction of the phase, in straight lines between the points, constant outside of them."""
    known = points(value)
    if fraction <= known[0][0]:
        return known[0][1]
    for (x0, y0), (x1, y1) in zip(known, known[1:], strict=False):
        if fraction < x1:
            return y0 + (y1 - y0) * (fraction - x0) / (x1 - x0)
    return known[-1][1]


def stepwise(value: float | dict[float, float], fraction: float) -> float:
    """The value at a fraction of the phase: that of the last point which has been reached."""
    known = points(value)
    return next((y for x, y in reversed(known) if x <= fraction), known[0][1])
