"""The speed rule of `slm plan` against training speeds that others have published: tokens/s per GPU, predicted and theirs.

    python benchmarks/published_speeds.py

No GPU: arithmetic. The rule (slm/forecast.py) has two efficiencies for each kind of GPU and one number for waiting at scale; rows
marked "fit" gave them, the others test it. They are others' programs, so that a difference is theirs and the rule's: read it as
the spread of what a well-made trainer reaches, not as an error bar of this project's own speed.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from slm.forecast import GPUs, Work, step_time
from slm.hardware import GPUS
from slm.memory import Zero
from slm.model.config import ModelConfig

# As many weights and as much attention as theirs: MPT's and GPT's MLP has two matrices of four widths, ours three.
_MLP2 = dict(
    hidden_size=2048, intermediate_size=5461, num_hidden_layers=24, num_attention_heads=16, num_key_value_heads=16
)
MPT_1B = ModelConfig(vocab_size=50368, **_MLP2)  # type: ignore[arg-type]
GPT3_1B = ModelConfig(vocab_size=50257, **_MLP2)  # type: ignore[arg-type]
TINYLLAMA = ModelConfig(
    vocab_size=32000, intermediate_size=5632, num_hidden_layers=22, num_key_value_heads=4, tie_word_embeddings=False
)
SMOLLM3 = ModelConfig(
    intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16, num_key_value_heads=4
)  # head 128

LLM_FOUNDRY = "mosaicml/llm-foundry 8c8dd48f scripts/train/benchmarking/README.md"
_FSDP = Zero(3, overlap=True)  # as ZeRO-3, with communication behind computation


@dataclass(frozen=True)
class Published:
    source: str
    model: ModelConfig
    gpu: str
    num_gpus: int
    seq_len: int
    tokens_per_second: float  # a GPU
    is_fit: bool = False
    policy: str = "none"
    zero: Zero = _FSDP


PUBLISHED = [
    Published(LLM_FOUNDRY, MPT_1B, "h100", 8, 2048, 45455, is_fit=True),
    Published(LLM_FOUNDRY, MPT_1B, "h100", 8, 4096, 38535),
    Published(LLM_FOUNDRY, MPT_1B, "h100", 8, 8192, 29157, is_fit=True),
    Published(LLM_FOUNDRY, MPT_1B, "h100", 8, 16384, 19649),
    Published(LLM_FOUNDRY, MPT_1B, "h100", 8, 32768, 12025, is_fit=True),
    Published(LLM_FOUNDRY, MPT_1B, "h100", 8, 65536, 5506, policy="full"),
    Published(LLM_FOUNDRY, MPT_1B, "h100", 128, 2048, 44123, is_fit=True),
    Published(LLM_FOUNDRY, MPT_1B, "h100", 256, 2048, 42555, is_fit=True),
    Published(LLM_FOUNDRY, MPT_1B, "h100", 512, 2048, 39837, is_fit=True),
    Published(LLM_FOUNDRY, MPT_1B, "a100-80", 8, 2048, 20513, is_fit=True),
    Published(LLM_FOUNDRY, MPT_1B, "a100-80", 8, 8192, 13814, is_fit=True),
    Published(LLM_FOUNDRY, MPT_1B, "a100-80", 8, 32768, 6275, is_fit=True),
    Published(
        "Smol Training Playbook (nanotron)",
        ModelConfig.preset("llama3.2-1b"),
        "h100",
        8,
        4096,
        42000,
        zero=Zero(1, overlap=True),
    ),
    Published("TinyLlama bf122247 README", TINYLLAMA, "a100-40", 16, 2048, 24000),
    Published(
        "FlashAttention 0251105a training/README.md", GPT3_1B, "a100-80", 8, 2048, 21125, zero=Zero(1, overlap=True)
    ),
    Published(
        "torchtitan b5bcd76c llama3_h100_202412 (compile)", ModelConfig.preset("llama3.1-8b"), "h100", 8, 8192, 6667
    ),
    Published(
        "torchtitan b5bcd76c llama3_h100_202412 (eager)", ModelConfig.preset("llama3.1-8b"), "h100", 8, 8192, 5762
    ),
    Published("SmolLM3-3B (384 GPUs, tensor parallel 2)", SMOLLM3, "h100", 384, 4096, 14000),
]


def predicted(row: Published) -> float:
    """Tokens/s of one GPU, with 32K tokens a micro-batch or one sequence, one micro-batch a step."""
    tokens = max(32768, row.seq_len)
    work = Work(row.zero, tokens, 1, row.seq_len, policy=row.policy)
    return tokens / step_time(row.model, work, GPUS[row.gpu], GPUs(row.num_gpus)).seconds


def compare() -> list[dict[str, Any]]:
    rows = []
    for row in PUBLISHED:
        rate = predicted(row)
        rows.append({"row": row, "predicted": rate, "ratio": rate / row.tokens_per_second})
    return rows


def main() -> int:
    table = Table("source", "GPUs", "tokens", "", "published", "predicted", "predicted / published")
    table.title = "tokens/s per GPU, bfloat16"
    for found in compare():
        row = found["row"]
        table.add_row(
            row.source.split(" scripts")[0] if row.source == LLM_FOUNDRY else row.source,
            f"{row.num_gpus} x {row.gpu}",
            f"{row.seq_len:,}",
            "fit" if row.is_fit else "",
            f"{row.tokens_per_second:,.0f}",
            f"{found['predicted']:,.0f}",
            f"{found['ratio']:.2f}",
        )
    Console(width=130).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
