"""Pictures as files: whether one can be drawn and written, and writing it. matplotlib is an optional extra.

check_picture(path)                  # before the work whose result it shows
save_picture(figure, path)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slm.errors import EnvironmentProblem, UserError


def check_picture(path: Path) -> None:
    """Raises EnvironmentProblem without matplotlib, UserError for a path that cannot be written: before work is done."""
    try:
        import matplotlib
    except ImportError:
        raise EnvironmentProblem("the picture needs matplotlib", fix='pip install -e ".[plots]"') from None
    matplotlib.use("Agg")
    if path.suffix not in (".png", ".svg", ".pdf") or not path.parent.is_dir():
        raise UserError(
            f"--plot {path} is no picture that could be written",
            fix="give a .png, .svg or .pdf in a folder that is there",
        )


def save_picture(figure: Any, path: Path) -> None:
    """Writes a figure and closes it. Raises UserError."""
    from matplotlib import pyplot

    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise UserError(f"--plot {path}: {error}", fix="give a file that can be written") from None
    finally:
        pyplot.close(figure)
