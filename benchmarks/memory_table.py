"""The table of memory in docs/memory.md: the Llama 3.2 1B shape on one GPU, by part, from the formulas of `slm plan`.

python benchmarks/memory_table.py            # prints it; a test compares it with the page
"""

from __future__ import annotations

from slm.memory import Layout, Zero, inference_memory, rank_memory
from slm.model.config import ModelConfig

LENGTHS = (8192, 32768, 131072)
TRAINING = [
    ("float32", "none"),
    ("float32", "selective"),
    ("float32", "full"),
    ("bfloat16", "none"),
    ("bfloat16", "selective"),
    ("bfloat16", "full"),
]
PARTS = ("weights", "gradients", "optimizer", "checkpoints", "working", "logits", "buffers")


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f}"


def table() -> str:
    config = ModelConfig.preset("llama3.2-1b")
    heads = ["", "recompute", "tokens", *PARTS, "**all**", "fullest at"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for precision, policy in TRAINING:
        for tokens in LENGTHS:
            value_bytes = 4 if precision == "float32" else 2
            held = rank_memory(config, Zero(1), Layout(), tokens, policy, value_bytes=value_bytes).peak
            cells = [precision, policy, f"{tokens // 1024}K", *(_gib(held.parts()[part]) for part in PARTS)]
            lines.append("| " + " | ".join([*cells, f"**{_gib(held.total_bytes)}**", held.moment]) + " |")
    lines += ["", "| inference | tokens | weights | keys and values | working | **all** |", "|---|---|---|---|---|---|"]
    for bits in (16, 4):
        for tokens in LENGTHS:
            found = inference_memory(config, tokens, weight_bits=bits)
            cells = [f"{bits} bits", f"{tokens // 1024}K", _gib(found.weights), _gib(found.cache), _gib(found.working)]
            lines.append("| " + " | ".join([*cells, f"**{_gib(found.total_bytes)}**"]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
