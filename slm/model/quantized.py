"""Layers whose weights stay in 4 or 8 bits: what `slm quantize` makes, in memory.

Owns the arithmetic on codes and how they lie in memory. The search for codes and the files are slm/quantize.py's;
docs/formats.md has the bits on disk.

    layer = QuantizedLinear(codes_NK, scales_NG, zeros_NG)       # codes 0 to 15 in uint8, or int8 without zeros
    y = layer(x)                                                 # x [..., K] -> [..., N], in the dtype of x

For a few rows, as in decoding, torch's own kernels multiply by the codes as they are, which reads 4 to 8 times less memory
than float32; they compute in bfloat16, so x and y are rounded to it (relative error 1.7e-3, measured). For more rows, or
where there is no fast kernel, the weights are made again in float32 for each call, and the product is in the dtype of x.

`N` rows of a matrix (outputs), `K` columns (inputs), `g` columns that share a scale, `G` = K/g groups of a row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from slm.losses import Distillation
from slm.model.llama import Visit, head_outputs

# Up to so many rows the kernels are faster than making the weights again. Measured at 2048 x 8192 on one core of an AMD EPYC
# with AVX-512 (torch 2.13.0): 64 rows 71 ms by the kernel, 136 ms otherwise; 128 rows 259 and 249 ms.
KERNEL_ROWS = 64
_KERNEL_GROUPS = (32, 64, 128, 256)
_TILE = 64  # rows whose codes lie side by side, where no kernel says otherwise


class QuantizedLinear(nn.Module):
    """y = x W^T with W = codes * scales (8 bits), or (codes - 8) * scales + zeros (4 bits), by groups.

    codes_NK: int8 [N, K], or uint8 [N, K] of values below 16. scales_NG and zeros_NG: bfloat16 [N, G]; zeros with 4 bits only.
    Only the device can be changed: codes, scales and zeros keep their dtypes in `.to`, `.half()` and the like.
    """

    def __init__(self, codes_NK: torch.Tensor, scales_NG: torch.Tensor, zeros_NG: torch.Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = codes_NK.shape
        self.group_size = self.in_features // scales_NG.shape[1]
        self.bits = 8 if zeros_NG is None else 4
        if zeros_NG is None:
            # Into memory of torch's own: tensors of a safetensors file begin anywhere in it, and the 8-bit kernel (2.13) ends the
            # process where codes or x do not lie at a multiple of 32 bytes.
            self.register_buffer("codes", codes_NK.clone(memory_format=torch.contiguous_format))
            self.register_buffer("scales", scales_NG.contiguous())
        else:
            self.tile = _kernel_tile() or _TILE
            missing = -self.out_features % self.tile
            scales_zeros_GN2 = torch.stack([scales_NG.T, zeros_NG.T], -1)
            self.register_buffer("codes", tiled_codes(F.pad(codes_NK, (0, 0, 0, missing)), self.tile))
            self.register_buffer("scales", F.pad(scales_zeros_GN2, (0, 0, 0, missing)).contiguous())
        self._choose()

    codes: torch.Tensor
    scales: torch.Tensor

    def _choose(self) -> None:
        """Sets for up to how many numbers of x the kernel is called."""
        kernel = self.codes.device.type == "cpu"
        if self.bits == 4:
            kernel &= bool(_kernel_tile()) and self.group_size in _KERNEL_GROUPS and self.in_features % 32 == 0
        else:  # that kernel knows one scale a row
            kernel &= _fast_cpu() and self.group_size == self.in_features and self.in_features % 32 == 0
        self._kernel_numbers = KERNEL_ROWS * self.in_features if kernel else -1
        self._row_scales = self.scales[:, 0].contiguous() if self.bits == 8 else self.scales

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QuantizedLinear:
        device = fn(torch.empty(0, device=self.codes.device)).device
        self.codes, self.scales = self.codes.to(device), self.scales.to(device)
        self._choose()
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.numel() > self._kernel_numbers:
            return torch.matmul(x, self.transposed(x.dtype))
        if self.bits == 8:
            x_MK = x.reshape(-1, self.in_features).to(torch.bfloat16, copy=True, memory_format=torch.contiguous_format)
            y_MN = torch.ops.aten._weight_int8pack_mm(x_MK, self.codes, self._row_scales)
        else:
            x_MK = x.reshape(-1, self.in_features).to(torch.bfloat16).contiguous()
            y_MN = torch.ops.aten._weight_int4pack_mm_for_cpu(x_MK, self.codes, self.group_size, self.scales)
            y_MN = y_MN[:, : self.out_features]
        return y_MN.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def transposed(self, dtype: torch.dtype) -> torch.Tensor:
        """W^T [K, N], computed in float32 and rounded to dtype."""
        K, G = self.in_features, self.in_features // self.group_size
        if self.bits == 8:
            w_NGg = self.codes.view(-1, G, self.group_size).float() * self.scales.float()[..., None]
            return w_NGg.view(-1, K).to(dtype).T
        half = self.tile // 2
        tiles_nKh = self.codes.view(-1, K, half)
        w_Kn2h = torch.empty(K, len(tiles_nKh), 2, half, device=self.codes.device)
        w_Kn2h[:, :, 0] = (tiles_nKh & 15).transpose(0, 1)
        w_Kn2h[:, :, 1] = (tiles_nKh >> 4).transpose(0, 1)
        scales_GN, zeros_GN = self.scales.float().unbind(-1)
        w_GgN = w_Kn2h.view(G, self.group_size, -1)
        w_GgN.sub_(8).mul_(scales_GN[:, None]).add_(zeros_GN[:, None])
        return w_GgN.view(K, -1)[:, : self.out_features].to(dtype)

    def rows(self, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Rows of W [..., K], for row numbers of any shape."""
        G = self.in_features // self.group_size
        if self.bits == 8:
            codes, scales = self.codes[rows].float(), self.scales[rows].float()
            w = codes.unflatten(-1, (G, -1)) * scales[..., None]
            return w.flatten(-2).to(dtype)
        half = self.tile // 2
        column = rows % self.tile
        pairs = self.codes.view(-1, self.in_features, half)[rows // self.tile, :, column % half]
        codes = torch.where((column < half)[..., None], pairs & 15, pairs >> 4).float()
        scales, zeros = self.scales[:, rows].float().movedim(0, -2).unbind(-1)  # [..., G]
        w = (codes.unflatten(-1, (G, -1)) - 8) * scales[..., None] + zeros[..., None]
        return w.flatten(-2).to(dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, group_size={self.group_size}"


class QuantizedDown(QuantizedLinear):
    """The MLP's last matrix, which also applies the activation (llama.py, Down), unless that is done already (decode.py)."""

    def forward(self, gate_BTF: torch.Tensor, up_BTF: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(gate_BTF if up_BTF is None else F.silu(gate_BTF) * up_BTF)


class QuantizedHead(QuantizedLinear):
    """The output matrix [V, E]; for losses it is made whole in the dtype of the hidden states (1B shape, float32: 1.1 GB)."""

    def forward(
        self,
        hidden_BTE: torch.Tensor,
        labels_BT: torch.Tensor | None = None,
        z_loss: float = 0.0,
        each: bool = False,
        distillation: Distillation | None = None,
        visit: Visit | None = None,
    ) -> Any:
        if labels_BT is None and visit is None:
            return super().forward(hidden_BTE)
        weight_VE = self.transposed(hidden_BTE.dtype).T
        return head_outputs(hidden_BTE, weight_VE, labels_BT, z_loss, each, distillation, visit)


class QuantizedEmbedding(nn.Module):
    """Looks up rows of a matrix: one of its own, or the head's where they are tied (held once)."""

    def __init__(self, matrix: QuantizedLinear, dtype: torch.dtype, *, tied: bool) -> None:
        super().__init__()
        self.dtype = dtype
        if not tied:
            self.matrix = matrix
        self._matrix = (matrix,)  # in a tuple it is no second submodule

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QuantizedEmbedding:
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self._matrix[0].rows(tokens, self.dtype)


# --- how 4-bit codes lie in memory --------------------------------------------------------------------------------


def tiled_codes(codes_NK: torch.Tensor, tile: int) -> torch.Tensor:
    """Codes below 16 [N, K] as uint8 [N, K/2], as torch's CPU kernels want them: of each `tile` rows, column by column, byte i
    holds row i (low bits) and row i + tile/2 (high bits)."""
    N, K = codes_NK.shape
    low_high_nhK = codes_NK.view(N // tile, 2, tile // 2, K)
    pairs_nhK = low_high_nhK[:, 0] | (low_high_nhK[:, 1] << 4)
    return pairs_nhK.transpose(1, 2).contiguous().view(N, K // 2)


def _fast_cpu() -> bool:
    """Elsewhere torch's kernels are plain loops, slower than float32 (torch 2.13, aten/src/ATen/native/cpu/int4mm_kernel.cpp)."""
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


@functools.cache
def _kernel_tile() -> int:
    """The tile of the 4-bit kernel of this CPU; 0 if there is none that is fast and has a layout that is known here.

    The layout is torch's own affair, so it is asked, not assumed.
    """
    if not _fast_cpu():
        return 0
    codes_NK = torch.randint(16, (128, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    try:
        theirs = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes_NK.int(), 1)
    except (AttributeError, RuntimeError):  # another version of torch
        return 0
    return next((tile for tile in (64, 32) if torch.equal(tiled_codes(codes_NK, tile), theirs)), 0)
