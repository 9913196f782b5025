"""One token of every row through the model, against a key/value cache: where generation spends its time.

Owns a lean forward for that case alone, the same maths as llama.py with less around it: angles looked up, projections of
one input in one product, grouped queries as a query's rows, nothing kept for a backward pass, no module calls. Its shapes
are fixed for the whole text where it is compiled or on a GPU, and there the launches are recorded once as a CUDA graph.

    step = DecodeStep(model, cache)
    logits_BV = step(ids_B, lengths)      # the ids go to slot lengths[row] of their rows

`B` rows, `S` cache slots, `E` hidden, `F` MLP width, `H` query heads, `J` key/value heads, `G` = H/J, `D` head dim, `R` = D/2,
`V` vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from slm.model.llama import KVCache, RMSNorm, SLMForCausalLM
from slm.model.rope import rotary_table

# What is applied to a row: a weight [out, in], or layers whose outputs are put behind one another.
Matrix = torch.Tensor | tuple[nn.Module, ...]


class _Norm(NamedTuple):
    """RMSNorm's weight and eps; or, with `floor`, sqrt(E) times the weight and sqrt(E eps): see `_normed`."""

    weight: torch.Tensor
    eps: float
    floor: torch.Tensor | None


class _Layer(NamedTuple):
    attention_norm: _Norm
    qkv: Matrix
    out: Matrix
    mlp_norm: _Norm
    gate_up: Matrix
    down: Matrix


class _Heads(NamedTuple):
    """Numbers of query heads and key/value heads, and their width."""

    H: int
    J: int
    D: int


def join_projections(model: SLMForCausalLM) -> SLMForCausalLM:
    """Lays the weights of q, k and v, and those of gate and up, behind one another in memory; in place, values unchanged.

    Then `DecodeStep` multiplies by them at once. For models that are only read: an engine that trains keeps weights its own way.
    """
    with torch.no_grad():
        for block in model.model.layers:
            layers: Any
            for layers in (_qkv_layers(block), _gate_up_layers(block)):
                if any(type(layer) is not nn.Linear for layer in layers):
                    continue
                joined = torch.cat([layer.weight for layer in layers])
                start = 0
                for layer in layers:
                    layer.weight.data = joined[start : start + layer.out_features]
                    start += layer.out_features
    return model


class DecodeStep:
    """A model and a cache, ready for one token of every row after another.

    compiled: by torch.compile, which takes half a minute or more once for a shape of the cache.
    Not for models whose angles follow the length, nor for weights that ZeRO-3 has distributed.
    """

    def __init__(self, model: SLMForCausalLM, cache: KVCache, compiled: bool = False) -> None:
        config = model.config
        few_calls = not compiled and cache.keys[0].device.type == "cpu" and cache.keys[0].dtype == torch.float32
        self._embedding, self._head = model.model.embed_tokens, _matrix(model.lm_head)
        self._norm = _norm(model.model.norm, few_calls)
        self._layers = [_layer(block, few_calls) for block in model.model.layers]
        self._heads = _Heads(config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        self._keys = [keys_BSJD.transpose(1, 2) for keys_BSJD in cache.keys]
        self._values = [values_BSJD.transpose(1, 2) for values_BSJD in cache.values]
        B, S = cache.keys[0].shape[:2]
        device = cache.keys[0].device
        cos_1S1R, sin_1S1R = rotary_table(
            model._inv_freq_R.to(device), torch.arange(S, device=device)[None], model._attention_factor
        )
        # One multiplication turns a head's first half, the other its second: [S, 1, D], as _rotated has it.
        self._cos_S1D = torch.cat([cos_1S1R, cos_1S1R], -1)[0]
        self._sin_S1D = torch.cat([-sin_1S1R, sin_1S1R], -1)[0]
        self._fixed = compiled or device.type == "cuda"
        self._ids_B = torch.zeros(B, dtype=torch.long, device=device)
        self._length_B = torch.zeros(B, dtype=torch.long, device=device)
        self._run: Callable[..., torch.Tensor] = _compiled(B, S) if compiled else _forward
        self._graph: Any = None
        self._logits_BV = torch.empty(0)

    def __call__(self, ids_B: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """Logits [B, V] of what follows; ids_B int64, each at slot lengths[row], behind which its row ends."""
        if not self._fixed:
            slot = lengths[0] if min(lengths) == max(lengths) else None
            length_B = self._length_B if slot is not None else torch.tensor(lengths)
            return self._forward(ids_B, length_B, slot, max(lengths) + 1)
        self._ids_B.copy_(ids_B)
        self._length_B.copy_(torch.tensor(lengths), non_blocking=True)
        if self._length_B.device.type != "cuda":
            return self._forward(self._ids_B, self._length_B, None, None)
        if self._graph is None:
            self._record()
        self._graph.replay()
        return self._logits_BV

    def _forward(
        self, ids_B: torch.Tensor, length_B: torch.Tensor, slot: int | None, filled: int | None
    ) -> torch.Tensor:
        return self._run(
            self._embedding, self._layers, self._norm, self._head, self._heads, self._keys, self._values,
            self._cos_S1D, self._sin_S1D, ids_B, length_B, slot, filled,
        )  # fmt: skip

    def _record(self) -> None:
        """The launches of one step as a CUDA graph. What runs before it (compiling, choosing kernels) writes to the slots that
        the first replay writes anew."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._forward(self._ids_B, self._length_B, None, None)
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits_BV = self._forward(self._ids_B, self._length_B, None, None)


def _forward(
    embedding: nn.Module,
    layers: list[_Layer],
    norm: _Norm,
    head: Matrix,
    heads: _Heads,
    keys: list[torch.Tensor],
    values: list[torch.Tensor],
    cos_S1D: torch.Tensor,
    sin_S1D: torch.Tensor,
    ids_B: torch.Tensor,
    length_B: torch.Tensor,
    slot: int | None,
    filled: int | None,
) -> torch.Tensor:
    """slot: of all rows, if it is one, and length_B is not looked at then. filled: slots in use; None: look at all."""
    H, J, D = heads
    x_BE = embedding.forward(ids_B)
    B = len(ids_B)
    slots = keys[0].shape[2] if filled is None else filled
    if slot is None:
        cos, sin = cos_S1D[length_B], sin_S1D[length_B]
        rows_B = torch.arange(B, device=ids_B.device)
        seen_BS = torch.arange(slots, device=ids_B.device) <= length_B[:, None]
        # As numbers, once: as truth values each layer would make numbers of them.
        mask = torch.zeros(seen_BS.shape, dtype=x_BE.dtype, device=ids_B.device).masked_fill_(~seen_BS, -torch.inf)
        mask = mask[:, None, None]
    else:
        cos, sin, mask = cos_S1D[slot], sin_S1D[slot], None
    for layer, keys_BJSD, values_BJSD in zip(layers, keys, values, strict=True):
        qkv = _apply(layer.qkv, _normed(layer.attention_norm, x_BE)).view(B, H + 2 * J, D)
        qk, v_BJD = qkv.split((H + J, J), 1)
        qk = (qk * cos + qk.roll(D // 2, -1) * sin).to(x_BE.dtype)
        q_BHD, k_BJD = qk.split((H, J), 1)
        if slot is not None:
            keys_BJSD.select(2, slot).copy_(k_BJD)
            values_BJSD.select(2, slot).copy_(v_BJD)
        else:
            keys_BJSD[rows_B, :, length_B] = k_BJD
            values_BJSD[rows_B, :, length_B] = v_BJD
        # The query heads that share a key are so many queries of one head.
        out_BJGD = F.scaled_dot_product_attention(
            q_BHD.view(B, J, H // J, D), keys_BJSD.narrow(2, 0, slots), values_BJSD.narrow(2, 0, slots), mask
        )
        x_BE = _added(x_BE, layer.out, out_BJGD.reshape(B, H * D))
        gate, up = _apply(layer.gate_up, _normed(layer.mlp_norm, x_BE)).chunk(2, -1)
        x_BE = _added(x_BE, layer.down, F.silu(gate).mul_(up))
    return _apply(head, _normed(norm, x_BE))


@functools.cache
def _compiled(rows: int, slots: int) -> Callable[..., torch.Tensor]:
    """_forward for a shape of the cache."""

    def forward(*arguments: Any) -> torch.Tensor:
        return _forward(*arguments)

    # The compiler counts its variants by code object, and gives up after a few: each shape has its own.
    forward.__code__ = forward.__code__.replace(co_name=f"forward_{rows}_{slots}")
    return torch.compile(forward, fullgraph=True, dynamic=False)


def _added(x_BE: torch.Tensor, matrix: Matrix, inner: torch.Tensor) -> torch.Tensor:
    if isinstance(matrix, torch.Tensor):
        return torch.addmm(x_BE, inner, matrix.T)
    return x_BE + _apply(matrix, inner)


def _apply(matrix: Matrix, x: torch.Tensor) -> torch.Tensor:
    if isinstance(matrix, torch.Tensor):
        return F.linear(x, matrix)
    if len(matrix) == 1:
        return matrix[0].forward(x)
    return torch.cat([layer.forward(x) for layer in matrix], -1)


def _normed(norm: _Norm, x: torch.Tensor) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight. On a CPU torch makes nine calls of it, each of which takes longer than its sums: there,
    of the same value, x / hypot(|x|, sqrt(E eps)) * (sqrt(E) weight)."""
    if norm.floor is None:
        return F.rms_norm(x, norm.weight.shape, norm.weight, norm.eps)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return (x / length.hypot_(norm.floor)).mul_(norm.weight)


def _norm(norm: RMSNorm, few_calls: bool) -> _Norm:
    weight = norm.weight.detach()
    if not few_calls:
        return _Norm(weight, norm.eps, None)
    return _Norm(weight * len(weight) ** 0.5, norm.eps, torch.tensor((len(weight) * norm.eps) ** 0.5))


def _qkv_layers(block: Any) -> tuple[nn.Module, ...]:
    return block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj


def _gate_up_layers(block: Any) -> tuple[nn.Module, ...]:
    return block.mlp.gate_proj, block.mlp.up_proj


def _layer(block: Any, few_calls: bool) -> _Layer:
    return _Layer(
        _norm(block.input_layernorm, few_calls),
        _matrix(*_qkv_layers(block)),
        _matrix(block.self_attn.o_proj),
        _norm(block.post_attention_layernorm, few_calls),
        _matrix(*_gate_up_layers(block)),
        _matrix(block.mlp.down_proj),
    )


def _matrix(*layers: Any) -> Matrix:
    """One weight if the layers' weights are one, or lie behind one another in memory."""
    if any(not isinstance(layer, nn.Linear) for layer in layers):
        return layers
    weights = [layer.weight.detach() for layer in layers]
    if len(weights) == 1:
        return weights[0]
    first = weights[0]
    end = first.data_ptr()
    for weight in weights:
        same = weight.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not same or weight.data_ptr() != end or not weight.is_contiguous():
            return layers
        end += weight.nbytes
    rows = sum(len(weight) for weight in weights)
    return first.as_strided((rows, first.shape[1]), first.stride())
