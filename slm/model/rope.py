"""Rotary position embedding: inverse frequencies of every scaling, the attention factor and the table of angles.

Owns the angles; the rotation itself is in lean.py. Everything is computed in float32, because a
bfloat16 angle is off by a radian at position 256.

    cos, sin = rotary_table(inverse_frequencies(config), positions_BT, attention_factor(config))

RoFormer (arXiv 2104.09864) eq. 34, in the half-split layout of Llama. Scalings, with s the factor and L0 the original
context: linear (arXiv 2306.15595, section 2.3); ntk, dynamic, yarn (2309.00071, sections 3.1, 3.3, 3.4); llama3 (Llama
3.1's reference code); longrope (2402.13753, section 3). Each equals transformers' of that name.

The angles of `dynamic` and `longrope` follow the length of the sequence. That is a packed piece's own length, so a piece
has the same angles whatever it is packed with. `B` batch, `T` tokens, `H` heads, `D` head dim, `R` = D/2 rotation pairs.
"""

from __future__ import annotations

import math

import torch

from slm.model.config import ModelConfig, RopeScaling, effective_theta


def follows_length(config: ModelConfig) -> bool:
    """Whether all angles of a sequence change as it grows."""
    return config.rope_scaling is not None and config.rope_scaling.rope_type in ("dynamic", "longrope")


def inverse_frequencies(config: ModelConfig, length: torch.Tensor | None = None) -> torch.Tensor:
    """Angle per position of each pair: float32 [R].

    length: int64 of any shape, tokens of the sequences; only for scalings that follow it. Then [..., R].
    """
    scaling = config.rope_scaling or RopeScaling()
    exponents_R = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    if length is not None:
        exponents_R = exponents_R.to(length.device)
    if scaling.rope_type == "dynamic" and length is not None:
        return 1.0 / _dynamic_base(config, scaling, length)[..., None] ** exponents_R
    inv_freq_R = 1.0 / (effective_theta(config) ** exponents_R)
    if scaling.rope_type == "linear":
        return inv_freq_R / scaling.factor
    if scaling.rope_type == "yarn":
        return _yarn(config, scaling, inv_freq_R)
    if scaling.rope_type == "llama3":
        return _llama3(scaling, inv_freq_R)
    if scaling.rope_type == "longrope":
        return _longrope(scaling, inv_freq_R, length)
    return inv_freq_R


def attention_factor(config: ModelConfig) -> float:
    """What cos and sin are multiplied by; attention logits thus by its square."""
    scaling = config.rope_scaling or RopeScaling()
    if scaling.rope_type not in ("yarn", "longrope") or scaling.factor <= 1.0 and scaling.attention_factor is None:
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.rope_type == "longrope":  # as released with Phi-3
        return math.sqrt(1 + math.log(scaling.factor) / math.log(scaling.original_max_position_embeddings))
    log = 0.1 * math.log(scaling.factor)  # arXiv 2309.00071, section 3.4
    if scaling.mscale is not None and scaling.mscale_all_dim is not None:  # DeepSeek-V2's variant
        return (scaling.mscale * log + 1.0) / (scaling.mscale_all_dim * log + 1.0)
    return log + 1.0


def angle_length(config: ModelConfig, length: torch.Tensor) -> torch.Tensor:
    """Equal for two lengths exactly if the angles are: what to compare before cached keys are used again."""
    assert config.rope_scaling is not None
    original = config.rope_scaling.original_max_position_embeddings
    if config.rope_scaling.rope_type == "longrope":
        return (length > original).long()
    return length.clamp(min=original)


def piece_lengths(positions_BT: torch.Tensor, piece_bounds: torch.Tensor, part: int = 0, of: int = 1) -> torch.Tensor:
    """The length of the piece that each token belongs to, int64 [B, T]: its last position + 1.

    With `of` > 1, positions_BT are the part-th of so many equal parts of each sequence, and piece_bounds those of the whole
    sequences. The last position may then be on another rank: positions must count on without gaps.
    """
    B, T = positions_BT.shape
    device = positions_BT.device
    first_B1 = torch.arange(B, device=device)[:, None] * (T * of) + part * T
    ends = piece_bounds[1:].long()
    piece_BT = torch.searchsorted(ends, first_B1 + torch.arange(T, device=device), right=True)
    if of > 1:
        return piece_bounds.long().diff()[piece_BT]
    return positions_BT.flatten()[ends[piece_BT] - 1] + 1


def rotary_table(
    inv_freq: torch.Tensor, positions_BT: torch.Tensor, factor: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin times the attention factor, each float32 [B, T, 1, R] (the 1 broadcasts over heads).

    inv_freq: [R], or [B, T, R] where it differs between tokens.
    """
    angles_BT1R = (positions_BT.float()[..., None] * inv_freq)[:, :, None, :]
    cos, sin = angles_BT1R.cos(), angles_BT1R.sin()
    return (cos, sin) if factor == 1.0 else (cos * factor, sin * factor)


def _dynamic_base(config: ModelConfig, scaling: RopeScaling, length: torch.Tensor) -> torch.Tensor:
    """theta * (s L / L0 - (s - 1))^(D/(D-2)) beyond L0, written so that float32 keeps small growth."""
    D, original = config.head_dim, scaling.original_max_position_embeddings
    growth = 1.0 + scaling.factor * (length - original).clamp(min=0).float() / original
    return config.rope_theta * growth ** (D / (D - 2))


def _yarn(config: ModelConfig, scaling: RopeScaling, inv_freq_R: torch.Tensor) -> torch.Tensor:
    """NTK by parts: divided by s where a pair turns less than beta_slow times in L0, kept above beta_fast, a ramp between."""

    def pair_that_turns(turns: float) -> float:
        ratio = scaling.original_max_position_embeddings / (turns * 2 * math.pi)
        return config.head_dim * math.log(ratio) / (2 * math.log(config.rope_theta))

    low, high = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.head_dim - 1)
    if low == high:
        high += 0.001  # as transformers: a step, not a division by 0
    pairs_R = torch.arange(len(inv_freq_R), dtype=torch.float32)
    divided_R = ((pairs_R - low) / (high - low)).clamp(0.0, 1.0)
    return inv_freq_R / scaling.factor * divided_R + inv_freq_R * (1 - divided_R)


def _llama3(scaling: RopeScaling, inv_freq_R: torch.Tensor) -> torch.Tensor:
    """Long wavelengths are stretched by `factor`, short ones kept, the band between interpolated."""
    original = scaling.original_max_position_embeddings
    wavelength_R = 2 * math.pi / inv_freq_R
    keep_R = (original / wavelength_R - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep_R = keep_R.clamp(0.0, 1.0)
    return (1 - keep_R) * inv_freq_R / scaling.factor + keep_R * inv_freq_R


def _longrope(scaling: RopeScaling, inv_freq_R: torch.Tensor, length: torch.Tensor | None) -> torch.Tensor:
    """Each pair divided by a number of its own: one set up to the original context, another beyond it."""
    short_R, long_R = (
        inv_freq_R / torch.tensor(divisors, dtype=torch.float32, device=inv_freq_R.device)
        for divisors in (scaling.short_factor, scaling.long_factor)
    )
    if length is None:
        return short_R
    return torch.where((length > scaling.original_max_position_embeddings)[..., None], long_R, short_R)
