"""Rotary position embedding: inverse frequencies (plain and llama3) and the table of angles.

Owns the angles; the rotation itself is in lean.py. Everything is computed in float32, because a
bfloat16 angle is off by a radian at position 256.

    cos, sin = rotary_table(inverse_frequencies(config), positions_BT)

Sources: RoFormer (arXiv 2104.09864) eq. 34, in the half-split layout of Llama; the llama3 scaling is that of
Llama 3.1's reference code. `B` batch, `T` tokens, `H` heads, `D` head dim, `R` = D/2 rotation pairs.
"""

from __future__ import annotations

import math

import torch

from slm.model.config import ModelConfig


def inverse_frequencies(config: ModelConfig) -> torch.Tensor:
    """Angle per position of each pair: float32 [R]."""
    exponents_R = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    inv_freq_R = 1.0 / (config.rope_theta**exponents_R)
    scaling = config.rope_scaling
    if scaling is None or scaling.rope_type == "default":
        return inv_freq_R
    # llama3: long wavelengths are stretched by `factor`, short ones kept, the band between interpolated.
    original = scaling.original_max_position_embeddings
    wavelength_R = 2 * math.pi / inv_freq_R
    keep_R = (original / wavelength_R - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep_R = keep_R.clamp(0.0, 1.0)
    return (1 - keep_R) * inv_freq_R / scaling.factor + keep_R * inv_freq_R


def rotary_table(inv_freq_R: torch.Tensor, positions_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, each float32 [B, T, 1, R] (the 1 broadcasts over heads)."""
    angles_BT1R = (positions_BT.float()[..., None] * inv_freq_R)[:, :, None, :]
    return angles_BT1R.cos(), angles_BT1R.sin()
