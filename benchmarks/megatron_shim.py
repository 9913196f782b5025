"""Runs a tool of a Megatron-LM checkout, or imports its dataset module, without what only training needs.

    python benchmarks/megatron_shim.py /path/to/Megatron-LM tools/preprocess_data_fast.py --input corpus.jsonl …

The packages' __init__ files import Triton, Transformer Engine and the whole trainer; the data tools need none of it. So
`megatron.core` and `megatron.training` become packages whose __init__ does not run, and two modules are replaced:
`megatron.core.utils`, of which one logging function is called, and `megatron.training.arguments`, of which the tokenizer's
arguments are built here from Megatron's own list of them. All that reads, encodes and writes is Megatron's own code. Start-up
is shorter than without: that is to the tool's advantage.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.machinery
import importlib.util
import logging
import runpy
import sys
import types
from pathlib import Path
from typing import Any


def make_importable(root: Path) -> None:
    """root: the folder that holds megatron/: a checkout, or site-packages with megatron-core."""
    for name in ("megatron", "megatron.core", "megatron.training", "megatron.training.config"):
        spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = [str(root.joinpath(*name.split(".")))]
        _register(name, importlib.util.module_from_spec(spec))
    _register("megatron.core.utils", types.ModuleType("megatron.core.utils")).__dict__.update(
        log_single_rank=lambda logger, *told, **_: logger.log(*told),
        accepts_parameter=None,  # imported, called for chats only
    )
    arguments = _register("megatron.training.arguments", types.ModuleType("megatron.training.arguments"))
    arguments.__dict__["_add_tokenizer_args"] = _add_tokenizer_args


def indexed_dataset(root: Path) -> Any:
    """Megatron's module that reads and writes .bin and .idx."""
    make_importable(root)
    return importlib.import_module("megatron.core.datasets.indexed_dataset")


def _register(name: str, module: types.ModuleType) -> types.ModuleType:
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)
    return module


def _add_tokenizer_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    config = importlib.import_module("megatron.training.config.training_config").TokenizerConfig
    for field in dataclasses.fields(config):
        names = field.metadata.get("argparse_meta", {}).get("arg_names", ["--" + field.name.replace("_", "-")])
        kind: dict[str, Any] = {"action": "store_true"} if field.default is False else {"default": field.default}
        parser.add_argument(*names, dest=field.name, **kind)
    return parser


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    checkout = Path(sys.argv[1]).resolve()
    make_importable(checkout)
    sys.argv = [str(checkout / sys.argv[2]), *sys.argv[3:]]
    runpy.run_path(sys.argv[0], run_name="__main__")
