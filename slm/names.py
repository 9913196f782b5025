"""What may be in a name, and which file a name in somebody else's file may mean. Imports no torch.

Owns the rule for names (of runs, phases, sources, teachers), for labels and for paths in a recipe, and the rule for file
names in manifests and indexes: names become folders, lines of logs and words of commands, and a downloaded index must not
reach out of its folder. Quoting is the launchers'.

    class Phase(Section):
        name: Name
    path = file_inside(folder, "model-00001-of-00002.safetensors", index)     # or CorruptArtefact
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from slm.errors import CorruptArtefact

# Visible, no option of a command, nothing that a shell, a path or an override (a.b=c) reads as more than a letter.
NAME_PATTERN = r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}$"
# C0 and C1 controls (a newline forges a line of a log), separators of lines, and halves of characters, which no UTF-8 file
# can hold: Python makes them of bytes on the command line that are no UTF-8.
_UNWRITABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def _check_name(name: str) -> str:
    if not re.fullmatch(NAME_PATTERN[1:-1], name):
        raise ValueError(
            f"{shortened(name)} is no name, as it also names folders and words of commands: use up to 100 letters (A-Z, a-z), "
            "digits, _, . and -, and begin with a letter, a digit or _"
        )
    return name


def _check_phase(name: str) -> str:
    if "-" in name:
        raise ValueError(f"{shortened(name)} has a -, which ends the phase's name in PHASE-STEP: use _ instead")
    return _check_name(name)


def _check_text(text: str) -> str:
    if found := _UNWRITABLE.search(text):
        raise ValueError(
            f"{shortened(text)} has the character U+{ord(found[0]):04X}, which would break the lines of logs and commands it "
            "stands in: rename it without"
        )
    return text


def _check_output(text: str) -> str:
    if text.startswith("-"):
        raise ValueError(f"{shortened(text)} begins as an option of a command does: write ./{shortened(text)[1:-1]}")
    return _check_text(text)


Name = Annotated[str, Field(json_schema_extra={"pattern": NAME_PATTERN}), AfterValidator(_check_name)]
PhaseName = Annotated[
    str, Field(json_schema_extra={"pattern": NAME_PATTERN.replace("-]", "]")}), AfterValidator(_check_phase)
]
Text = Annotated[str, AfterValidator(_check_text)]  # a path to read, or a label
Output = Annotated[str, AfterValidator(_check_output)]  # a path to write to


def shortened(value: object, limit: int = 80) -> str:
    """repr, for a message: on one line, and not longer than a line."""
    text = ascii(value)
    return text if len(text) <= limit else f"{text[: limit - 4]}...{text[-1]}"


def file_inside(folder: Path, name: Any, said_by: object) -> Path:
    """folder/name, of a file name that stands in the file `said_by`. Raises CorruptArtefact if that is not a plain name, or a
    link to elsewhere: only a folder of the Hugging Face cache has its files, by links, in `blobs` beside it."""
    if not isinstance(name, str) or name in ("", ".", "..") or re.search(r"[/\\]", name) or _UNWRITABLE.search(name):
        raise CorruptArtefact(
            f"{said_by} names the file {shortened(name)}, which is no plain name: it could be any file of this machine",
            fix="get the folder again from where you trust it; its own tools write plain names",
        )
    path, home = folder / name, folder.resolve()
    if path.is_symlink():
        homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
        target = path.resolve()
        if not any(target.is_relative_to(h) for h in homes):
            raise CorruptArtefact(
                f"{path} is a link to {target}, outside of its folder: an archive could make it name any file of this machine",
                fix="if it is meant, put the file itself there: cp --remove-destination "
                f"{shlex.quote(str(target))} {shlex.quote(str(path))}",
            )
    return path
