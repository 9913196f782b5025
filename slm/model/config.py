"""The shape of a model: ModelConfig, its checks, its parameter count, and the presets.

Owns everything about a model that is known without weights; imports no torch, so that recipes and
plans stay light. Field names are those of a Hugging Face Llama `config.json`.

    ModelConfig.preset("llama3.2-1b").num_parameters()   # 1_235_814_400
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_serializer, model_validator

from slm.fields import Count, Real

RopeType = Literal["default", "linear", "dynamic", "ntk", "theta", "yarn", "llama3", "longrope"]

_SPAN = ("factor", "original_max_position_embeddings")
# What each type reads besides its name.
ROPE_FIELDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": _SPAN,
    "dynamic": _SPAN,
    "ntk": _SPAN,
    "theta": ("rope_theta",),
    "yarn": (*_SPAN, "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "llama3": (*_SPAN, "low_freq_factor", "high_freq_factor"),
    "longrope": (*_SPAN, "short_factor", "long_factor", "attention_factor"),
}


class RopeScaling(BaseModel):
    """How rotary frequencies differ from the plain ones of `rope_theta`; the formulas are in rope.py.

    A field that its type does not read must be left at its default.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    rope_type: RopeType = Field("default", description="how angles are scaled; default: not at all (docs/numerics.md)")
    factor: Real = Field(1.0, ge=1.0, description="how many times longer than the original context")
    original_max_position_embeddings: Count = Field(8192, gt=1, description="context before the extension, in tokens")
    rope_theta: Real | None = Field(None, gt=1, description="theta: the new base, such as twice the model's (2θ rule)")
    low_freq_factor: Real = Field(1.0, gt=0, description="llama3: wavelengths above original/this are scaled fully")
    high_freq_factor: Real = Field(4.0, gt=0, description="llama3: wavelengths below original/this are kept")
    attention_factor: Real | None = Field(
        None,
        gt=0,
        description="yarn, longrope: cos and sin are multiplied by it; null for the papers' function of factor",
    )
    beta_fast: Real = Field(32.0, gt=0, description="yarn: pairs that turn more often in the original context are kept")
    beta_slow: Real = Field(1.0, gt=0, description="yarn: pairs that turn less often are scaled fully")
    mscale: Real | None = Field(None, gt=0, description="yarn: with mscale_all_dim, another default attention_factor")
    mscale_all_dim: Real | None = Field(None, gt=0, description="yarn: see mscale")
    truncate: bool = Field(True, description="yarn: the band between beta_fast and beta_slow is widened to whole pairs")
    short_factor: tuple[Real, ...] | None = Field(
        None, description="longrope: divisor of each pair's frequency up to the original context; head_dim/2 numbers"
    )
    long_factor: tuple[Real, ...] | None = Field(None, description="longrope: the same, beyond the original context")

    @model_validator(mode="after")
    def _check(self) -> RopeScaling:
        kind, reads = self.rope_type, ROPE_FIELDS[self.rope_type]
        problems = [
            f"{name} is {getattr(self, name)}, which has no effect on rope_type {kind}: remove it"
            for name, field in RopeScaling.model_fields.items()
            if name not in ("rope_type", *reads) and getattr(self, name) != field.default
        ]
        if "factor" in reads and kind != "dynamic" and "factor" not in self.model_fields_set:
            so = f"rope_type {kind} would change nothing"
            if kind == "longrope":
                so = "nothing says how far the lists of rope_type longrope reach"
            problems.append(f"factor is missing, so {so}: give new / original context")
        if kind == "theta" and self.rope_theta is None:
            problems.append(
                "rope_theta is missing: rope_type theta is a new base; the 2θ rule is twice model.rope_theta"
            )
        if kind == "longrope":
            for name in ("short_factor", "long_factor"):
                divisors = getattr(self, name)
                if not divisors or min(divisors) <= 0:
                    problems.append(
                        f"{name} is {None if divisors is None else list(divisors)}, but rope_type longrope divides the "
                        "frequencies by it: give head_dim/2 numbers above 0, from the search or the model's config.json"
                    )
        if self.high_freq_factor <= self.low_freq_factor:
            problems.append(
                f"high_freq_factor {self.high_freq_factor} must be above low_freq_factor {self.low_freq_factor}: "
                "the band between them is interpolated"
            )
        if self.beta_fast <= self.beta_slow:
            problems.append(
                f"beta_fast {self.beta_fast} must be above beta_slow {self.beta_slow}: the band between is interpolated"
            )
        if (self.mscale is None) != (self.mscale_all_dim is None):
            problems.append(
                "one of mscale and mscale_all_dim is given, which has no effect alone: give both or neither"
            )
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @model_serializer(mode="wrap")
    def _fields_read(self, all_fields: Any) -> dict[str, Any]:
        """Without the fields that this type does not read."""
        return {k: v for k, v in all_fields(self).items() if k in ("rope_type", *ROPE_FIELDS[self.rope_type])}

    @property
    def reach_tokens(self) -> int | None:
        """The longest sequence that the frequencies are made for; None where nothing says so."""
        if self.rope_type in ("default", "theta") or (self.rope_type == "dynamic" and self.factor == 1.0):
            return None
        if self == LLAMA31:
            return 131072  # as Meta trained and published it, twice factor * original
        return round(self.factor * self.original_max_position_embeddings)

    def is_plain(self, rope_theta: float) -> bool:
        """Whether angles and attention are those of no scaling at all, in a model of this base."""
        plain_attention = self.factor == 1.0 if self.attention_factor is None else self.attention_factor == 1.0
        if self.rope_type == "theta":
            return self.rope_theta == rope_theta
        if self.rope_type == "yarn":
            return self.factor == 1.0 and plain_attention
        if self.rope_type == "longrope":
            return plain_attention and {*(self.short_factor or ()), *(self.long_factor or ())} == {1.0}
        return self.rope_type == "default" or (self.rope_type != "dynamic" and self.factor == 1.0)

    def told(self, wanted_tokens: int) -> str:
        """Why a sequence of wanted_tokens is beyond reach_tokens, and what to do, for a message."""
        original, least = (
            self.original_max_position_embeddings,
            -(-wanted_tokens // self.original_max_position_embeddings),
        )
        return (
            f"factor {self.factor:g} x original_max_position_embeddings {original} = {self.reach_tokens} tokens: nothing was "
            f"scaled for the positions beyond; give a factor of at least {least}, or a length of at most {self.reach_tokens}"
        )

    def misfits(self, head_dim: int, max_position_embeddings: int) -> list[str]:
        """What contradicts a model of this head_dim and context."""
        problems = [
            f"{name} has {len(divisors)} numbers, but head_dim {head_dim} has {head_dim // 2} pairs to scale: give that many"
            for name, divisors in (("short_factor", self.short_factor), ("long_factor", self.long_factor))
            if divisors is not None and len(divisors) != head_dim // 2
        ]
        original = self.original_max_position_embeddings
        if "factor" in ROPE_FIELDS[self.rope_type] and original > max_position_embeddings:
            problems.append(
                f"original_max_position_embeddings is {original}, longer than the model's max_position_embeddings "
                f"{max_position_embeddings}: nothing would be extended; give the context of before the extension"
            )
        if self.rope_type in ("ntk", "dynamic") and head_dim <= 2:
            problems.append(
                f"rope_type {self.rope_type} raises the base to the power of D/(D-2), and head_dim is {head_dim}"
            )
        return problems


# Of Llama 3.1 (8B, 70B, 405B), whose config.json says a context of 131072.
LLAMA31 = RopeScaling(rope_type="llama3", factor=8.0)


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
        # A short context under the default llama3 scaling is no contradiction: it is the shape's own.
        if self.rope_scaling is not None and self.rope_scaling.rope_type != "llama3":
            misfits = self.rope_scaling.misfits(self.head_dim, self.max_position_embeddings)
            problems += [f"rope_scaling.{problem}" for problem in misfits]
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


def effective_theta(config: ModelConfig) -> float:
    """The base of the frequencies, with what `theta` and `ntk` change about it: theta' = theta * s^(D/(D-2))."""
    scaling, D = config.rope_scaling, config.head_dim
    if scaling is not None and scaling.rope_type == "theta":
        assert scaling.rope_theta is not None
        return scaling.rope_theta
    if scaling is not None and scaling.rope_type == "ntk":
        return config.rope_theta * scaling.factor ** (D / (D - 2))
    return config.rope_theta


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
        rope_scaling=LLAMA31,
        tie_word_embeddings=False,
    ),
    "cpu-tiny": _cpu(64, 2, 4, 2, 176, 512, 256),
    "cpu-small": _cpu(192, 4, 6, 2, 512, 4096, 1024),
    "cpu-medium": _cpu(384, 6, 6, 2, 1024, 32000, 2048),
}
