"""The shape of a model: ModelConfig, its checks, its parameter count, and the presets.

Owns everything about a model that is known without weights; imports no torch, so that recipes and
plans stay light. Field names are those of a Hugging Face Llama `config.json`.

    ModelConfig.preset("llama3.2-1b").num_parameters()   # 1_235_814_400
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class RopeScaling(BaseModel):
    """How rotary frequencies differ from the plain ones of `rope_theta`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rope_type: Literal["default", "llama3"] = Field("default", description="llama3 is Llama 3.1's banded scaling")
    factor: float = Field(1.0, ge=1.0, description="how many times longer than the original context")
    low_freq_factor: float = Field(1.0, gt=0, description="llama3: wavelengths above original/this are scaled fully")
    high_freq_factor: float = Field(4.0, gt=0, description="llama3: wavelengths below original/this are kept")
    original_max_position_embeddings: int = Field(8192, gt=0, description="llama3: context before the extension")

    @model_validator(mode="after")
    def _check(self) -> RopeScaling:
        if self.rope_type == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor {self.high_freq_factor} must be above low_freq_factor {self.low_freq_factor}: "
                "the band between them is interpolated"
            )
        return self


class ModelConfig(BaseModel):
    """Shape of a Llama-family decoder. Defaults: Llama 3.2 1B."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    vocab_size: int = Field(128256, gt=0, description="rows of the embedding; at least the tokenizer's length")
    hidden_size: int = Field(2048, gt=0, description="width of the residual stream")
    intermediate_size: int = Field(8192, gt=0, description="width inside the SwiGLU MLP")
    num_hidden_layers: int = Field(16, gt=0, description="decoder blocks")
    num_attention_heads: int = Field(32, gt=0, description="query heads")
    num_key_value_heads: int = Field(8, gt=0, description="key/value heads; must divide num_attention_heads")
    head_dim: int = Field(0, ge=0, description="width of one head; 0 means hidden_size / num_attention_heads")
    max_position_embeddings: int = Field(131072, gt=0, description="longest context the model is meant for")
    rms_norm_eps: float = Field(1e-5, gt=0, description="added to the mean square in RMSNorm")
    rope_theta: float = Field(500000.0, gt=0, description="base of the rotary frequencies")
    rope_scaling: RopeScaling | None = Field(
        RopeScaling(rope_type="llama3", factor=32.0), description="null for plain rotary embedding"
    )
    tie_word_embeddings: bool = Field(True, description="the output head is the embedding")
    initializer_range: float = Field(0.02, gt=0, description="standard deviation of the initial weights")

    @model_validator(mode="before")
    @classmethod
    def _fill_head_dim(cls, data: Any) -> Any:
        if isinstance(data, dict) and not data.get("head_dim"):
            hidden = data.get("hidden_size", cls.model_fields["hidden_size"].default)
            heads = data.get("num_attention_heads", cls.model_fields["num_attention_heads"].default)
            if isinstance(hidden, int) and isinstance(heads, int) and heads > 0 and hidden % heads == 0:
                data = {**data, "head_dim": hidden // heads}
        return data

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        problems = []
        if self.head_dim == 0:
            problems.append(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                f"{self.num_attention_heads}, so head_dim is undefined: change one of them or give head_dim"
            )
        if self.head_dim % 2:
            problems.append(f"head_dim {self.head_dim} is odd: rotary embedding turns pairs; make it even")
        if self.num_attention_heads % self.num_key_value_heads:
            problems.append(
                f"num_attention_heads {self.num_attention_heads} is not divisible by num_key_value_heads "
                f"{self.num_key_value_heads}: query heads could not share key/value heads evenly; "
                f"choose num_key_value_heads among {_divisors(self.num_attention_heads)}"
            )
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> ModelConfig:
        """A named shape with fields replaced. Raises KeyError for an unknown name."""
        fields = {**PRESETS[name], **overrides}
        if "head_dim" not in overrides and {"hidden_size", "num_attention_heads"} & overrides.keys():
            fields.pop("head_dim", None)
        return cls(**fields)

    def shape(self) -> ModelConfig:
        """These fields alone, without what a subclass (slm.trainer.SLMConfig) adds."""
        return ModelConfig(**{name: getattr(self, name) for name in ModelConfig.model_fields})

    def num_parameters(self) -> int:
        """All trainable numbers; a tied head counts once."""
        heads = 1 if self.tie_word_embeddings else 2
        per_layer = self.linear_parameters_per_layer() + 2 * self.hidden_size
        embeddings = heads * self.vocab_size * self.hidden_size
        return embeddings + self.num_hidden_layers * per_layer + self.hidden_size

    def linear_parameters_per_layer(self) -> int:
        """Weights of the seven matrices of a block."""
        attention = 2 * self.hidden_size * self.head_dim * (self.num_attention_heads + self.num_key_value_heads)
        return attention + 3 * self.hidden_size * self.intermediate_size

    def matmul_parameters(self) -> int:
        """Weights that take part in a matrix product per token: the head counts (tied or not), the look-up not."""
        return self.num_hidden_layers * self.linear_parameters_per_layer() + self.vocab_size * self.hidden_size


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _cpu(hidden: int, layers: int, heads: int, kv_heads: int, ffn: int, vocab: int, context: int) -> dict[str, Any]:
    return dict(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=context,
        rope_theta=10000.0,
        rope_scaling=None,
    )


_LLAMA3_8X = RopeScaling(rope_type="llama3", factor=8.0)

# Shapes of meta-llama/Llama-3.2-1B, Llama-3.2-3B and Llama-3.1-8B as their config.json files give them,
# and three for CPUs: `cpu-tiny` for tests, `cpu-small` for the quickstart, `cpu-medium` for an evening.
PRESETS: dict[str, dict[str, Any]] = {
    "llama3.2-1b": {},
    "llama3.2-3b": dict(
        hidden_size=3072, num_hidden_layers=28, num_attention_heads=24, head_dim=128, intermediate_size=8192
    ),
    "llama3.1-8b": dict(
        hidden_size=4096,
        num_hidden_layers=32,
        intermediate_size=14336,
        rope_scaling=_LLAMA3_8X,
        tie_word_embeddings=False,
    ),
    "cpu-tiny": _cpu(64, 2, 4, 2, 176, 512, 256),
    "cpu-small": _cpu(192, 4, 6, 2, 512, 4096, 1024),
    "cpu-medium": _cpu(384, 6, 6, 2, 1024, 32000, 2048),
}
