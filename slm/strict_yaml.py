"""YAML that says which keys stand there twice, of which the ordinary loader would silently keep the last.

tree, duplicates = load("a: 1\\nb: 2\\na: 3\\n")      # {"a": 3, "b": 2}, ["line 3: the key 'a' stands there twice ..."]
"""

from __future__ import annotations

from typing import Any

import yaml


class _StrictLoader(yaml.SafeLoader):
    duplicates: list[str]


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


def load(text: str) -> tuple[Any, list[str]]:
    """(what it holds, one line for each key given twice). Raises yaml.YAMLError."""
    loader = _StrictLoader(text)
    loader.duplicates = []
    return loader.get_single_data(), loader.duplicates
