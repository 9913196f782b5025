"""SLM: from raw text to a small language model, on DeepSpeed. See README.md.

Owns the version and the public names; importing it costs nothing (torch is imported on first use).

    from slm import SLMConfig, SLMTrainer
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "SLMConfig": "slm.trainer",
    "SLMTrainer": "slm.trainer",
    "TextDataset": "slm.trainer",
    "DistillationLoss": "slm.distill.loss",
    "SLMForCausalLM": "slm.model.llama",
    "ModelConfig": "slm.model.config",
    "SLMTokenizer": "slm.tokenizer",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'slm' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
