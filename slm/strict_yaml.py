"""YAML that holds data and nothing else: no Python objects, no bombs, and no key given twice, of which the ordinary loader
would silently keep the last.

tree, duplicates = load("a: 1\\nb: 2\\na: 3\\n")      # {"a": 3, "b": 2}, ["line 3: the key 'a' stands there twice ..."]
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

# A recipe has some thousand characters and some hundred values. Aliases can make billions of values of few characters.
MAX_CHARACTERS = 1 << 18
MAX_VALUES = 50_000
MAX_DEPTH = 40
_TOO_DEEP = "its lists and mappings are nested more than 40 deep"


class _StrictLoader(yaml.SafeLoader):
    duplicates: list[str]
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.depth += 1
        if self.depth > MAX_DEPTH:  # at once: reading on would take time by the square of the depth
            raise yaml.YAMLError(_TOO_DEEP)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: dict[Any, int] = {}
    for key_node, _ in node.value:
        line = key_node.start_mark.line + 1
        if key_node.tag == "tag:yaml.org,2002:merge":  # `<<: *base`, which construct_mapping puts in
            continue
        if not isinstance(key_node, yaml.ScalarNode):
            raise yaml.constructor.ConstructorError(
                problem="a key is a list or a mapping", problem_mark=key_node.start_mark
            )
        key = loader.construct_object(key_node, deep=True)
        if key in seen:
            loader.duplicates.append(
                f"line {line}: the key {key!r} stands there twice (first on line {seen[key]}); only one could count: "
                "remove one of them"
            )
        seen[key] = line
    return loader.construct_mapping(node, deep=True)


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def read(path: Path) -> tuple[Any, list[str]]:
    """`load` of a file, of which no more is read than a recipe may have. Raises OSError, UnicodeDecodeError, yaml.YAMLError."""
    with open(path, encoding="utf-8") as file:
        return load(file.read(MAX_CHARACTERS + 1))


def load(text: str) -> tuple[Any, list[str]]:
    """(what it holds, one line for each key given twice). Raises yaml.YAMLError."""
    if len(text) > MAX_CHARACTERS:
        raise yaml.YAMLError(f"it has more than {MAX_CHARACTERS:,} characters, which no recipe needs")
    try:
        loader = _StrictLoader(text)
        loader.duplicates = []
        node = loader.get_single_node()
        if node is None:
            return None, []
        _measure(node, {})
        return loader.construct_document(node), loader.duplicates
    except (ValueError, OverflowError) as error:  # 2026-13-45 is no date, and 5000 digits are no number
        raise yaml.YAMLError(f"a value is none ({error})") from None


def _measure(node: yaml.Node, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """(values in it, each as often as aliases name it; how deep they nest). Raises yaml.YAMLError for too many or too deep."""
    if id(node) in known:
        if not known[id(node)][0]:
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: it holds itself, by an alias")
        return known[id(node)]
    known[id(node)] = 0, 0  # under way
    total, depth = 1, 0
    children = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
    for child in children if isinstance(node, yaml.CollectionNode) else ():
        values, levels = _measure(child, known)
        total, depth = total + values, max(depth, levels)
        if total > MAX_VALUES:
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: its aliases make more than {MAX_VALUES:,} values")
    if depth >= MAX_DEPTH:
        raise yaml.YAMLError(_TOO_DEEP)
    known[id(node)] = total, depth + 1
    return known[id(node)]
