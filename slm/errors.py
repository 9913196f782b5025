"""The three ways a command can fail that are not our bug, and how they are shown.

Owns the exception classes and their exit codes. A message says the value, the field, the consequence
and the fix; the command line prints it without a traceback.

    raise UserError("optim.lr is -1: weights would move uphill", fix="give a positive rate, such as 3e-4")
"""

from __future__ import annotations


class SLMError(Exception):
    """Base of what is shown to a user as a message, never as a traceback."""

    exit_code = 2
    title = "Error"

    def __init__(self, problem: str, *, fix: str = "") -> None:
        self.problem, self.fix = problem, fix
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
