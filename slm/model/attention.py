"""Causal attention over packed documents, with the kernel chosen on purpose.

Owns the kernels' call; does not own projections or rotation (llama.py). Never builds a [T, T] mask:
* CPU: torch's flash kernel once per piece, pieces of equal length in one batch, wrapped as a custom operator
  so that torch.compile sees one node with a tensor of boundaries and never recompiles;
* CUDA: the variable-length flash kernel over cumulative boundaries (bfloat16 and float16 on Ampere and later; else SDPA
  once per piece);
* one query against a cache: SDPA with a [B, 1, 1, slots] mask.

    out_BTHD = packed_attention(q_BTHD, k_BTJD, v_BTJD, piece_bounds)

`B` batch, `T` tokens a row, `H` query heads, `J` key/value heads, `G` = H/J, `D` head dim,
`N` pieces of one length, `L` that length.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
import torch.nn.functional as F

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def packed_attention(
    q_BTHD: torch.Tensor, k_BTJD: torch.Tensor, v_BTJD: torch.Tensor, piece_bounds: torch.Tensor
) -> torch.Tensor:
    """Each token attends to itself and the earlier tokens of its own piece. Returns [B, T, H, D].

    `piece_bounds`: int32, non-decreasing, from 0 to B*T; entries are starts in the flattened [B*T], every row
    start among them; repeated entries (pieces of no length) are allowed, so its size can be fixed.
    """
    if q_BTHD.device.type == "cpu":
        # Where nothing is to be compiled or differentiated, not by the operator: its first call imports torch's compiler, which
        # takes a second.
        is_plain = not (torch.compiler.is_compiling() or torch.is_grad_enabled())
        attend = _attend_on_cpu if is_plain else _packed_attention_cpu
        return attend(q_BTHD, k_BTJD, v_BTJD, piece_bounds)[0]
    if q_BTHD.dtype == torch.float32 or torch.cuda.get_device_capability(q_BTHD.device) < (8, 0):
        return _piece_by_piece(q_BTHD, k_BTJD, v_BTJD, piece_bounds)
    from torch.nn.attention.varlen import varlen_attn

    B, T, H, D = q_BTHD.shape
    # The longest piece is at most a row; the constant keeps compiled graphs from depending on the batch.
    out: Any = varlen_attn(
        q_BTHD.reshape(B * T, H, D),
        *_match_heads(k_BTJD.reshape(B * T, -1, D), v_BTJD.reshape(B * T, -1, D), H),
        piece_bounds,
        piece_bounds,
        T,
        T,
        **_VARLEN_CAUSAL,
    )
    return out.view(B, T, H, D)


@torch._disable_dynamo  # the pieces differ from batch to batch
def _piece_by_piece(
    q_BTHD: torch.Tensor, k_BTJD: torch.Tensor, v_BTJD: torch.Tensor, piece_bounds: torch.Tensor
) -> torch.Tensor:
    """For what the variable-length kernel does not take (float32, GPUs before Ampere): one causal SDPA call a piece.

    Key/value heads are repeated: the memory-efficient kernel, the only one there that builds no [T, T] matrix, takes no
    grouped ones.
    """
    groups = q_BTHD.shape[2] // k_BTJD.shape[2]
    k_BTHD, v_BTHD = (x.repeat_interleave(groups, dim=2) for x in (k_BTJD, v_BTJD))
    q, k, v = (x.flatten(0, 1).transpose(0, 1)[None] for x in (q_BTHD, k_BTHD, v_BTHD))  # [1, H, B*T, D]
    bounds = piece_bounds.tolist()
    outputs = [
        F.scaled_dot_product_attention(q[:, :, start:end], k[:, :, start:end], v[:, :, start:end], is_causal=True)
        for start, end in zip(bounds, bounds[1:], strict=False)
        if end > start
    ]
    return torch.cat(outputs, dim=2)[0].transpose(0, 1).view(q_BTHD.shape)


def _varlen_causal_arguments() -> dict[str, Any]:
    """torch 2.10 spells causality `is_causal`; later versions as a window, and take grouped heads as they are."""
    import inspect

    from torch.nn.attention.varlen import varlen_attn

    names = inspect.signature(varlen_attn).parameters
    arguments: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in names else {"is_causal": True}
    if "enable_gqa" in names:
        arguments["enable_gqa"] = True
    return arguments


# Here, since torch.compile cannot follow it. It imports the compiler, a second of a process's start: not where no GPU can be.
_VARLEN_CAUSAL = _varlen_causal_arguments() if torch.backends.cuda.is_built() else {}


def _match_heads(k: torch.Tensor, v: torch.Tensor, num_heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    if "enable_gqa" in _VARLEN_CAUSAL:
        return k, v
    groups = num_heads // k.shape[1]
    return k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)


def cached_attention(
    q_BTHD: torch.Tensor, k_BSJD: torch.Tensor, v_BSJD: torch.Tensor, first_position_B: torch.Tensor
) -> torch.Tensor:
    """Queries at positions first_position + (0..T-1) of each row against cache slots 0..S-1. [B, T, H, D].

    Slot s holds the key of position s, so a query at position p sees the slots up to p.
    """
    T, S = q_BTHD.shape[1], k_BSJD.shape[1]
    last_visible_BT = first_position_B[:, None] + torch.arange(T, device=q_BTHD.device)
    visible_B1TS = torch.arange(S, device=q_BTHD.device) <= last_visible_BT[:, None, :, None]
    out_BHTD = F.scaled_dot_product_attention(
        q_BTHD.transpose(1, 2), k_BSJD.transpose(1, 2), v_BSJD.transpose(1, 2), visible_B1TS, enable_gqa=True
    )
    return out_BHTD.transpose(1, 2)


def padded_bounds(length_B: torch.Tensor, T: int) -> torch.Tensor:
    """piece_bounds of rows of T tokens: a row's first length_B tokens are one piece, the padding behind it another."""
    starts_B = torch.arange(len(length_B), device=length_B.device) * T
    bounds = torch.stack([starts_B, starts_B + length_B], dim=1).flatten()
    return torch.cat([bounds, bounds.new_tensor([len(length_B) * T])]).int()


# --- CPU -----------------------------------------------------------------------------------------------------


def _pieces_by_length(piece_bounds: torch.Tensor) -> dict[int, list[int]]:
    """{length: starts of the pieces of that length}; pieces of no length are left out."""
    bounds = piece_bounds.tolist()
    by_length: dict[int, list[int]] = defaultdict(list)
    for start, end in zip(bounds, bounds[1:], strict=False):
        if end > start:
            by_length[end - start].append(start)
    return by_length


def _one_piece(x: torch.Tensor, start: int, length: int, kv_heads: int, groups: int) -> torch.Tensor:
    """View of rows start.. of x [tokens, heads, D] as [J, G, L, D]: key/value heads become the batch, and the
    heads that share one are repeated by a stride of 0, so grouped-query attention copies nothing."""
    x_LJgD = x[start : start + length].view(length, kv_heads, -1, x.shape[-1])
    return x_LJgD.permute(1, 2, 0, 3).expand(kv_heads, groups, length, x.shape[-1])


def _equal_pieces(x: torch.Tensor, rows_NL: torch.Tensor, groups: int) -> torch.Tensor:
    """Copy of the rows of x [tokens, heads, D] as [N, H, L, D]."""
    return x[rows_NL].transpose(1, 2).repeat_interleave(groups, dim=1)


def _attend_on_cpu(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, piece_bounds: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the output [B, T, H, D] and the log-sum-exp float32 [B*T, H] that the backward needs."""
    B, T, H, D = q.shape
    J, G = k.shape[2], H // k.shape[2]
    q, k, v = (x.contiguous().view(B * T, -1, D) for x in (q, k, v))
    out = torch.empty_like(q)
    lse = torch.empty(B * T, H, dtype=torch.float32)
    for length, starts in _pieces_by_length(piece_bounds).items():
        if len(starts) == 1 or length == T:
            for start in starts:
                piece = slice(start, start + length)
                o_JGLD, lse_JGL = _flash(
                    _one_piece(q, start, length, J, G),
                    _one_piece(k, start, length, J, G),
                    _one_piece(v, start, length, J, G),
                    0.0,
                    True,
                )
                out[piece].view(length, J, G, D).copy_(o_JGLD.permute(2, 0, 1, 3))
                lse[piece].view(length, J, G).copy_(lse_JGL.permute(2, 0, 1))
        else:
            rows_NL = torch.tensor(starts)[:, None] + torch.arange(length)
            o_NHLD, lse_NHL = _flash(
                _equal_pieces(q, rows_NL, 1), _equal_pieces(k, rows_NL, G), _equal_pieces(v, rows_NL, G), 0.0, True
            )
            out[rows_NL] = o_NHLD.transpose(1, 2)
            lse[rows_NL] = lse_NHL.transpose(1, 2)
    return out.view(B, T, H, D), lse


_packed_attention_cpu = torch.library.custom_op("slm::packed_attention_cpu", mutates_args=(), device_types="cpu")(
    _attend_on_cpu
)


@torch.library.custom_op("slm::packed_attention_cpu_backward", mutates_args=(), device_types="cpu")
def _packed_attention_cpu_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    piece_bounds: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    B, T, H, D = q.shape
    J, G = k.shape[2], H // k.shape[2]
    grad, q, k, v, out = (x.contiguous().view(B * T, -1, D) for x in (grad, q, k, v, out))
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    for length, starts in _pieces_by_length(piece_bounds).items():
        if len(starts) == 1 or length == T:
            for start in starts:
                piece = slice(start, start + length)
                dq_JGLD, dk_JGLD, dv_JGLD = _flash_backward(
                    *(_one_piece(x, start, length, J, G) for x in (grad, q, k, v, out)),
                    lse[piece].view(length, J, G).permute(1, 2, 0),
                    0.0,
                    True,
                )
                grad_q[piece].view(length, J, G, D).copy_(dq_JGLD.permute(2, 0, 1, 3))
                grad_k[piece].copy_(dk_JGLD.sum(1).transpose(0, 1))
                grad_v[piece].copy_(dv_JGLD.sum(1).transpose(0, 1))
        else:
            rows_NL = torch.tensor(starts)[:, None] + torch.arange(length)
            dq_NHLD, dk_NHLD, dv_NHLD = _flash_backward(
                _equal_pieces(grad, rows_NL, 1),
                _equal_pieces(q, rows_NL, 1),
                _equal_pieces(k, rows_NL, G),
                _equal_pieces(v, rows_NL, G),
                _equal_pieces(out, rows_NL, 1),
                lse[rows_NL].transpose(1, 2),
                0.0,
                True,
            )
            grad_q[rows_NL] = dq_NHLD.transpose(1, 2)
            grad_k[rows_NL] = dk_NHLD.unflatten(1, (J, G)).sum(2).transpose(1, 2)
            grad_v[rows_NL] = dv_NHLD.unflatten(1, (J, G)).sum(2).transpose(1, 2)
    return grad_q.view(B, T, H, D), grad_k.view(B, T, J, D), grad_v.view(B, T, J, D)


@_packed_attention_cpu.register_fake
def _(q, k, v, piece_bounds):
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(
        q.shape[0] * q.shape[1], q.shape[2], dtype=torch.float32
    )


@_packed_attention_cpu_backward.register_fake
def _(grad, q, k, v, out, lse, piece_bounds):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _save_for_backward(ctx, inputs, output):
    q, k, v, piece_bounds = inputs
    ctx.save_for_backward(q, k, v, *output, piece_bounds)


def _backward(ctx, grad, _grad_lse):
    q, k, v, out, lse, piece_bounds = ctx.saved_tensors
    return *_packed_attention_cpu_backward(grad, q, k, v, out, lse, piece_bounds), None


_packed_attention_cpu.register_autograd(_backward, setup_context=_save_for_backward)

# --- for selective recomputation (recompute.py) ---------------------------------------------------------------

# The operators that compute attention's output and log-sum-exp, one for each path above.
KERNELS = {
    torch.ops.slm.packed_attention_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
}
if _VARLEN_CAUSAL:
    KERNELS.add(torch.ops.torch_attn._varlen_attn.default)  # what varlen_attn dispatches
