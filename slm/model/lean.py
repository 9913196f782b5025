"""RMSNorm, rotation and SwiGLU that keep little for the backward pass and recompute the cheap rest there.

Owns memory, not maths: each function equals the plain torch expression in its docstring, which is also what runs
under torch.compile, where the compiler fuses and chooses what to keep itself. Per token and layer of the 1B shape this
saves two MLP widths (of four), the unrotated queries and keys, and one hidden width per norm.

    y = rms_norm(x, weight, eps)
    q = rotate(q, cos, sin)
    y = swiglu_down(gate, up, down_weight)
    y = tiled(functools.partial(norm_mlp, eps), 4096, x, norm_weight, gate_weight, up_weight, down_weight)

`B` batch, `T` tokens, `E` hidden, `F` MLP width, `H` heads, `D` head dim, `R` = D/2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv 1910.07467), in float32 inside."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return F.rms_norm(x, weight.shape, weight, eps)
    return _RMSNorm.apply(x, weight, eps)


def rotate(x_BTHD: torch.Tensor, cos_BT1R: torch.Tensor, sin_BT1R: torch.Tensor) -> torch.Tensor:
    """Turns pair (i, i + R) of each head by its angle, in float32; same shape and dtype as x (arXiv 2104.09864)."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return _rotated(x_BTHD, cos_BT1R, sin_BT1R)
    return _Rotate.apply(x_BTHD, cos_BT1R, sin_BT1R)


def swiglu_down(gate_BTF: torch.Tensor, up_BTF: torch.Tensor, weight_EF: torch.Tensor) -> torch.Tensor:
    """linear(silu(gate) * up, weight) (arXiv 2002.05202). Returns [B, T, E]."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return F.linear(F.silu(gate_BTF) * up_BTF, weight_EF)
    return _SwigluDown.apply(gate_BTF, up_BTF, weight_EF)


def norm_mlp(
    eps: float,
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    gate_FE: torch.Tensor,
    up_FE: torch.Tensor,
    down_EF: torch.Tensor,
) -> torch.Tensor:
    """RMSNorm and the SwiGLU MLP: swiglu_down(gate(n), up(n)) of n = rms_norm(x)."""
    normed = rms_norm(x, norm_weight, eps)
    return swiglu_down(F.linear(normed, gate_FE), F.linear(normed, up_FE), down_EF)


@torch._disable_dynamo  # the loop over tiles would be unrolled, as many copies as there are tiles
def tiled(
    function: Callable[..., torch.Tensor], tile_tokens: int, x_BTE: torch.Tensor, *weights: torch.Tensor
) -> torch.Tensor:
    """function(x, *weights), tile_tokens tokens at a time in both passes; x alone is kept for the backward pass.

    For functions of each token by itself with an output like x: what they make on the way exists for one tile, never for
    the whole sequence (ALST, arXiv 2506.13996, section 3.1.3).
    """
    return _Tiled.apply(function, tile_tokens, x_BTE, *weights)


class _RMSNorm(torch.autograd.Function):
    """Keeps x (which the residual stream keeps anyway) and one number per token."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        scale = x.to(torch.promote_types(x.dtype, torch.float32)).pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        normed = x * scale  # float32 (or 64), as scale is
        grad_weight = (grad * normed).flatten(0, -2).sum(0).to(weight.dtype)
        weighted = (grad * weight).to(normed.dtype)
        # d/dx of x * s(x): the part of the gradient along x is what changes the norm.
        along = (weighted * normed).mean(-1, keepdim=True)
        grad_x = weighted.sub_(normed.mul_(along)).mul_(scale)
        return grad_x.to(x.dtype), grad_weight, None


def _rotated(x_BTHD: torch.Tensor, cos_BT1R: torch.Tensor, sin_BT1R: torch.Tensor) -> torch.Tensor:
    a, b = x_BTHD.float().chunk(2, dim=-1)
    return torch.cat((a * cos_BT1R - b * sin_BT1R, b * cos_BT1R + a * sin_BT1R), dim=-1).to(x_BTHD.dtype)


class _Rotate(torch.autograd.Function):
    """Keeps the angles alone: the gradient of a rotation is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, -sin), None, None


class _SwigluDown(torch.autograd.Function):
    """Keeps gate and up; silu(gate) and the product are made again."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up, weight)
        return F.linear(F.silu(gate).mul_(up), weight)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        gate, up, weight = ctx.saved_tensors
        activated = F.silu(gate)
        grad_weight = grad.flatten(0, -2).T @ (activated * up).flatten(0, -2)
        grad_product = grad @ weight
        grad_up = activated.mul_(grad_product)
        grad_gate = torch.ops.aten.silu_backward(grad_product.mul_(up), gate)
        return grad_gate, grad_up, grad_weight


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        function: Callable[..., torch.Tensor],
        tile_tokens: int,
        x_BTE: torch.Tensor,
        *weights: torch.Tensor,
    ) -> torch.Tensor:
        ctx.function, ctx.tile_tokens = function, tile_tokens
        ctx.save_for_backward(x_BTE, *weights)
        x_NE, out_BTE = (
            x_BTE.reshape(-1, x_BTE.shape[-1]),
            torch.empty_like(x_BTE, memory_format=torch.contiguous_format),
        )
        out_NE = out_BTE.view(x_NE.shape)
        for start in range(0, len(x_NE), tile_tokens):
            rows = slice(start, start + tile_tokens)
            out_NE[rows] = function(x_NE[rows], *weights)
        return out_BTE

    @staticmethod
    def backward(ctx: Any, grad_BTE: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_BTE, *weights = ctx.saved_tensors
        needed = ctx.needs_input_grad[3:]
        leaves = [w.detach().requires_grad_(n) for w, n in zip(weights, needed, strict=True)]
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        # Tiles add up in float32 also when the weights are bfloat16, as one big product would inside the kernel.
        sums = [torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32)) for w in wanted]
        x_NE, grad_NE = (t.reshape(-1, x_BTE.shape[-1]) for t in (x_BTE, grad_BTE))
        grad_x_NE = torch.empty_like(x_NE)
        for start in range(0, len(x_NE), ctx.tile_tokens):
            rows = slice(start, start + ctx.tile_tokens)
            tile_CE = x_NE[rows].detach().requires_grad_()
            with torch.enable_grad():
                out_CE = ctx.function(tile_CE, *leaves)
            grad_x_NE[rows], *found = torch.autograd.grad(out_CE, (tile_CE, *wanted), grad_NE[rows])
            del out_CE
            for total, part in zip(sums, found, strict=True):
                total += part
            del found
        totals = iter(sums)
        grads = [next(totals).to(w.dtype) if n else None for w, n in zip(weights, needed, strict=True)]
        return None, None, grad_x_NE.view(x_BTE.shape), *grads
