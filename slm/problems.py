"""What pydantic finds wrong with a recipe, in the words of its other messages: value, field, consequence, fix.

Owns the words, and what a misspelt key or value was meant to be. Imports no torch.

    lines = readable(error, tree, Recipe)      # one for each problem
"""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from slm.names import NAME_PATTERN, shortened

# By pydantic's names of what is wrong (https://docs.pydantic.dev/latest/errors/validation_errors/): what stands after the value.
_WORDS = {
    "greater_than": "and has to be above {gt}",
    "greater_than_equal": "and has to be {ge} or more",
    "less_than": "and has to be below {lt}",
    "less_than_equal": "and has to be {le} or less",
    "finite_number": "which is no finite number",
    "int_from_float": "which is no whole number",
    "bool_parsing": "which is neither true nor false",
    "bool_type": "which is neither true nor false",
    "string_type": "which is no text: put quotes around it if it is meant",
    "list_type": "which is no list, as in [1, 2]",
    "tuple_type": "which is no list, as in [1, 2]",
    "dict_type": "which is no mapping, as in {{name: value}}",
    "model_type": "which is no mapping of fields, as in {{field: value}}",
    "model_attributes_type": "which is no mapping of fields, as in {{field: value}}",
    "too_short": "and has to hold {min_length} or more",
    "too_long": "and may hold {max_length} at most",
}


def readable(error: ValidationError, tree: dict[str, Any], schema: type[BaseModel]) -> list[str]:
    lines: list[str] = []
    told: dict[str, int] = {}  # the line of a field that may be of several kinds, of which a value is none
    for item in error.errors():
        parts = [
            part for part in _named(item["loc"], tree) if not re.match(r"function-|literal\[", part) and part != "[key]"
        ]
        if parts[-1:] in (["bool"], ["float"], ["int"]):  # which of the kinds that a field may be of
            parts.pop()
        field = ".".join(part if part.isprintable() else ascii(part) for part in parts) or "recipe"
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            meant = _meant(item["loc"], schema)
            mend = f"did you mean {' or '.join(meant)}?" if meant else "remove it or mend its name"
            lines.append(f"{field} is not a field of a recipe, so it would have no effect: {mend}")
        elif item["type"] == "missing":
            lines.append(f"{field} is missing: it has no default")
        elif item["loc"] and item["type"] != "value_error":
            if field in told:
                lines[told[field]] += f", {_in_words(item)}"
            else:
                told[field] = len(lines)
                lines.append(f"{field} is {shortened(item['input'])}, {_in_words(item)}")
        elif item["loc"] and "could not convert string to float" in message:  # float() of a Real
            lines.append(f"{field} is {shortened(item['input'])}, which is no number")
        elif item["loc"]:
            lines.append(f"{field}: {message}")
        else:
            lines.extend(message.split("\n"))
    return lines


def _in_words(item: Mapping[str, Any]) -> str:
    kind, context = item["type"], {**item.get("ctx", {})}
    if kind == "literal_error":
        values = [str(value) for value in re.findall(r"'([^']*)'", str(context["expected"]))]
        near = difflib.get_close_matches(str(item["input"]), values, n=1)
        return f"which is none of {', '.join(values)}" + (f": did you mean {near[0]}?" if near else "")
    if kind.startswith(("int_", "float_")) and kind not in _WORDS:
        return f"which is no {'whole ' * kind.startswith('int_')}number"
    for name, value in context.items():
        context[name] = f"{value:g}" if isinstance(value, float) else value
    return _WORDS[kind].format(**context) if kind in _WORDS else f"which is refused: {item['msg']}"


def _meant(location: tuple[Any, ...], schema: type[BaseModel]) -> list[str]:
    """Fields that an unknown key was perhaps meant to be: one of its section that is spelt alike, else those of such a
    name elsewhere."""
    section: Any = schema
    for part in location[:-1]:
        section = _part_of(section, part)
    key = str(location[-1])
    siblings = list(section.model_fields) if isinstance(section, type) and issubclass(section, BaseModel) else []
    by_name: dict[str, list[str]] = {}
    for path in _paths(schema):
        by_name.setdefault(path.rpartition(".")[2], []).append(path)
    if near := difflib.get_close_matches(key, siblings, n=1, cutoff=0.8):
        return near
    if elsewhere := difflib.get_close_matches(key, by_name, n=1, cutoff=0.8):
        return by_name[elsewhere[0]][:3]
    return difflib.get_close_matches(key, siblings, n=1)


def _part_of(kind: Any, part: Any) -> Any:
    """What stands at a key or position of a value of this kind; None if it is nothing with fields."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return _core(kind.model_fields[part].annotation) if part in kind.model_fields else None
    return _core(get_args(kind)[-1]) if get_origin(kind) in (list, dict) else None


def _core(kind: Any) -> Any:
    """The section, list or mapping among what a field may be."""
    if get_origin(kind) is Annotated:
        return _core(get_args(kind)[0])
    if get_origin(kind) in (Union, types.UnionType):
        kinds = [_core(each) for each in get_args(kind)]
        return next((each for each in kinds if get_origin(each) in (list, dict) or hasattr(each, "model_fields")), None)
    return kind


def _paths(section: type[BaseModel], at: str = "") -> Iterator[str]:
    """All fields below a section, as they are written: phases.NAME.seq_len."""
    for name, field in section.model_fields.items():
        yield at + name
        kind = _core(field.annotation)
        if get_origin(kind) in (list, dict):
            kind, name = _core(get_args(kind)[-1]), f"{name}.NAME"
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _paths(kind, f"{at}{name}.")


def _named(location: tuple[Any, ...], tree: dict[str, Any]) -> list[str]:
    """As it is written: a phase by its name, a lone teacher without one."""
    parts = [str(part) for part in location]
    if parts[:2] == ["teacher", "teacher"] and "teacher" not in tree["teacher"]:
        del parts[1]  # one alone
    if parts[:1] == ["phases"] and len(parts) > 1 and isinstance(tree["phases"], list):
        phase = tree["phases"][location[1]]
        if isinstance(phase, dict) and re.fullmatch(NAME_PATTERN, str(phase.get("name"))) and parts[2:] != ["name"]:
            parts[1] = str(phase["name"])
    return parts
