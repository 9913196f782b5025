"""The three ways a command can fail that are not our bug, and how they are shown.

Owns the exception classes and their exit codes. A message says the value, the field, the consequence
and the fix; the command line prints it without a traceback. RECIPE in a message becomes what the command line was given.

    raise UserError("optim.lr is -1: weights would move uphill", fix="give a positive rate, such as 3e-4")
"""

from __future__ import annotations

import re


class SLMError(Exception):
    """Base of what is shown to a user as a message, never as a traceback."""

    exit_code = 2
    title = "Error"
    recipe = "RECIPE"  # the recipe and its overrides, set by the command line: a fix can then be copied as it is

    def __init__(self, problem: str, *, fix: str = "") -> None:
        self.problem, self.fix = (re.sub(r"\bRECIPE\b", lambda _: SLMError.recipe, text) for text in (problem, fix))
        problem, fix = self.problem, self.fix
        super().__init__(f"{problem}\n  Fix: {fix}" if fix else problem)

    def __reduce__(self) -> tuple[object, ...]:  # crosses process pools with its fix intact
        return (_rebuild, (type(self), self.problem, self.fix))


def _rebuild(cls: type[SLMError], problem: str, fix: str) -> SLMError:
    return cls(problem, fix=fix)


class UserError(SLMError):
    """Something the user gave is wrong: a recipe, a path, an argument. Exit code 2."""


class EnvironmentProblem(SLMError):
    """The machine lacks something: a package, a compiler, disk space. Exit code 3."""

    exit_code = 3
    title = "Environment problem"


class CorruptArtefact(SLMError):
    """A file that we or another tool wrote is not whole. Exit code 4."""

    exit_code = 4
    title = "Corrupt file"
