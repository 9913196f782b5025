"""SLMForCausalLM: the Llama 3.2 decoder. RMSNorm, SwiGLU, grouped-query attention, rotary embedding.

Owns the forward pass, the initial weights and the key/value cache; attention kernels are in attention.py, the
loss in slm/losses.py, Hugging Face files in hf.py, sampling in slm/generate.py. Parameter names are those of
transformers' LlamaForCausalLM, so weights move without renaming.

    model = SLMForCausalLM(ModelConfig.preset("cpu-tiny"))
    loss_sum, count = model(tokens_BT, labels_BT=labels_BT)      # labels: the next token, -100 for none
    logits_BTV = model(tokens_BT)

`B` batch, `T` tokens a row, `E` hidden, `H` query heads, `J` key/value heads, `D` head dim, `V` vocabulary,
`S` cache slots.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from slm import parallel
from slm.losses import Distillation, chunk_tokens, linear_cross_entropy, linear_distillation, token_losses
from slm.model.attention import cached_attention, packed_attention, padded_bounds
from slm.model.config import ModelConfig
from slm.model.lean import norm_mlp, rms_norm, rotate, swiglu_down, tiled
from slm.model.recompute import BlockStore, checkpointed
from slm.model.rope import (
    angle_length,
    attention_factor,
    follows_length,
    inverse_frequencies,
    piece_lengths,
    rotary_table,
)

if TYPE_CHECKING:
    from slm.model.quantized_files import Quantization


@dataclass
class KVCache:
    """Keys and values of the tokens so far: per layer [B, S, J, D]; `length_B` counts the filled slots of a row.

    Where angles follow the length (`dynamic`, `longrope`), also the tokens, and the angle_length that a row's keys and
    values were made at (-1: none yet). They are made again from the tokens when that changes. Keeping keys before rotation
    would not do: from the second layer on, all that is cached went through attention with the old angles.
    """

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    length_B: torch.Tensor
    tokens_BS: torch.Tensor | None = None
    made_at_B: torch.Tensor | None = None

    @classmethod
    def empty(cls, config: ModelConfig, batch: int, slots: int, dtype: torch.dtype, device: Any) -> KVCache:
        shape = (batch, slots, config.num_key_value_heads, config.head_dim)
        keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        values = [torch.zeros_like(k) for k in keys]
        length_B = torch.zeros(batch, dtype=torch.long, device=device)
        if not follows_length(config):
            return cls(keys, values, length_B)
        tokens_BS = torch.zeros(batch, slots, dtype=torch.long, device=device)
        return cls(keys, values, length_B, tokens_BS, torch.full_like(length_B, -1))


# One layer's keys and values [B, S, J, D], the rows' lengths [B], and the slots in use after this call.
LayerCache = tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]

# (tokens_BT, positions_BT, piece_bounds, labels_BT, logits_BTV) -> loss (sum float32 scalar, count of targets).
Objective = Callable[..., tuple[torch.Tensor, torch.Tensor]]

# (number of the first token, logits [C, V] of it and those after it): how a teacher's logits are looked at in chunks.
Visit = Callable[[int, torch.Tensor], None]


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, in float32 inside (arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention with rotary embedding (arXiv 2305.13245)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        query_width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(query_width, config.hidden_size, bias=False)
        self.attend = packed_attention  # SLMForCausalLM.share_sequences replaces it

    def forward(
        self,
        x_BTE: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        piece_bounds: torch.Tensor | None,
        cache: LayerCache | None,
    ) -> torch.Tensor:
        B, T, _ = x_BTE.shape
        q_BTHD = rotate(self.q_proj(x_BTE).view(B, T, -1, self.head_dim), *rope)
        k_BTJD = rotate(self.k_proj(x_BTE).view(B, T, -1, self.head_dim), *rope)
        v_BTJD = self.v_proj(x_BTE).view(B, T, -1, self.head_dim)
        if cache is not None:
            keys_BSJD, values_BSJD, length_B, filled = cache
            rows_B1 = torch.arange(B, device=x_BTE.device)[:, None]
            slots_BT = length_B[:, None] + torch.arange(T, device=x_BTE.device)
            keys_BSJD[rows_B1, slots_BT] = k_BTJD
            values_BSJD[rows_B1, slots_BT] = v_BTJD
        if piece_bounds is None:
            assert cache is not None
            out_BTHD = cached_attention(q_BTHD, keys_BSJD[:, :filled], values_BSJD[:, :filled], length_B)
        else:
            attend = self.attend if cache is None else packed_attention  # a cache is never shared
            out_BTHD = attend(q_BTHD, k_BTJD, v_BTJD, piece_bounds)
        return self.o_proj(out_BTHD.reshape(B, T, -1))


class Down(nn.Linear):
    """The MLP's last matrix, which also applies the activation: it need not be kept for the backward pass."""

    def forward(self, gate_BTF: torch.Tensor, up_BTF: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return swiglu_down(gate_BTF, up_BTF, self.weight)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Down(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_BTE: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.gate_proj(x_BTE), self.up_proj(x_BTE))


class Block(nn.Module):
    """Pre-norm decoder block."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.mlp_tile_tokens: int | None = None  # the norm and the MLP take this many tokens at once; None: all
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x_BTE: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        piece_bounds: torch.Tensor | None,
        cache: LayerCache | None = None,
    ) -> torch.Tensor:
        x_BTE = x_BTE + self.self_attn(self.input_layernorm(x_BTE), rope, piece_bounds, cache)
        if self.mlp_tile_tokens is None or x_BTE.shape[:2].numel() <= self.mlp_tile_tokens:
            return x_BTE + self.mlp(self.post_attention_layernorm(x_BTE))
        norm, mlp = self.post_attention_layernorm, self.mlp
        weights = norm.weight, mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight
        return x_BTE + tiled(functools.partial(norm_mlp, norm.eps), self.mlp_tile_tokens, x_BTE, *weights)


class Head(nn.Linear):
    """The output matrix [V, E]; also the home of the loss, so that ZeRO-3 gathers the weight for it."""

    def forward(
        self,
        hidden_BTE: torch.Tensor,
        labels_BT: torch.Tensor | None = None,
        z_loss: float = 0.0,
        each: bool = False,
        distillation: Distillation | None = None,
        visit: Visit | None = None,
    ) -> Any:
        return head_outputs(hidden_BTE, self.weight, labels_BT, z_loss, each, distillation, visit)


def head_outputs(
    hidden_BTE: torch.Tensor,
    weight_VE: torch.Tensor,
    labels_BT: torch.Tensor | None,
    z_loss: float,
    each: bool,
    distillation: Distillation | None,
    visit: Visit | None,
) -> Any:
    """What SLMForCausalLM.forward returns, of hidden states and the output matrix."""
    hidden_NE = hidden_BTE.flatten(0, 1)
    if visit is not None:
        chunk = chunk_tokens(weight_VE.shape[0], hidden_NE.device.type)
        for start in range(0, len(hidden_NE), chunk):
            visit(start, F.linear(hidden_NE[start : start + chunk], weight_VE))
        return None
    if labels_BT is None:
        return F.linear(hidden_BTE, weight_VE)
    labels_N = labels_BT.flatten()
    if each:
        return token_losses(hidden_NE, weight_VE, labels_N).view(labels_BT.shape)
    if distillation is not None:
        return linear_distillation(hidden_NE, weight_VE, labels_N, distillation, z_loss=z_loss)
    return linear_cross_entropy(hidden_NE, weight_VE, labels_N, z_loss=z_loss)


class Decoder(nn.Module):
    """Embedding, blocks and final norm (transformers calls it `model`)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


def uncompiled() -> contextlib.AbstractContextManager[Any]:
    """In it compiled blocks run as they were before. Nobody has compiled one where the compiler was never imported, which takes
    a second."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()


class SLMForCausalLM(nn.Module):
    """The language model, with random weights of `seed`; None leaves them unset, for weights that follow."""

    def __init__(self, config: ModelConfig, seed: int | None = 0) -> None:
        super().__init__()
        self.config = config = config.shape()
        self.recompute = "none"  # activation checkpointing of each block: none, full or selective
        self.offload_activations = False  # what it keeps waits in host memory
        self.quantization: Quantization | None = None  # how its weights are coded; such a model is only read
        self.objective: Objective | None = None  # a loss of the user's own, instead of cross-entropy
        with _no_default_init():
            self.model = Decoder(config)
            self.lm_head = Head(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        # A plain attribute, not a buffer: a buffer would be cast to bfloat16 with the weights.
        self._inv_freq_R = inverse_frequencies(config)
        self._attention_factor = attention_factor(config)
        self._share = parallel.Share()
        if seed is not None:
            self.init_weights(seed)

    def forward(
        self,
        tokens_BT: torch.Tensor,
        positions_BT: torch.Tensor | None = None,
        piece_bounds: torch.Tensor | None = None,
        labels_BT: torch.Tensor | None = None,
        *,
        z_loss: float = 0.0,
        each: bool = False,
        distillation: Distillation | None = None,
        visit: Visit | None = None,
        cache: KVCache | None = None,
    ) -> Any:
        """Logits [B, T, V]; with labels the loss (sum float32 scalar, count), or with `each` -log p [B, T].

        distillation: then the loss is linear_distillation's (sum, parts).
        visit: called with (first token, its logits [C, V]) chunk by chunk, for a teacher; nothing is returned.

        tokens_BT, labels_BT: int64; a label is the next token, -100 where there is none.
        positions_BT: int64, restarting in each packed piece; counted from 0 (or from the cache's length) if absent.
        piece_bounds: int32 starts of the pieces in the flattened [B*T] (packed_attention); one piece a row if absent.
        cache: filled and advanced by T; attention then sees the cache too, unless piece_bounds are given.
        """
        x_BTE = self.hidden_states(tokens_BT, positions_BT, piece_bounds, cache)
        if self.objective is not None and labels_BT is not None and not each:
            return self.objective(tokens_BT, positions_BT, piece_bounds, labels_BT, self.lm_head(x_BTE))
        return self.lm_head(x_BTE, labels_BT, z_loss, each, distillation, visit)

    def hidden_states(
        self,
        tokens_BT: torch.Tensor,
        positions_BT: torch.Tensor | None = None,
        piece_bounds: torch.Tensor | None = None,
        cache: KVCache | None = None,
    ) -> torch.Tensor:
        """What the head is applied to, [B, T, E], after the last norm; arguments as of `forward`."""
        if cache is not None and cache.tokens_BS is not None and piece_bounds is None:
            assert positions_BT is None, "where angles follow the length, a cache counts its positions itself"
            x_BTE = self._remade(tokens_BT, cache)
            if x_BTE is not None:
                return x_BTE
        B, T = tokens_BT.shape
        device = tokens_BT.device
        if positions_BT is None:
            positions_BT = torch.arange(T, device=device).expand(B, T)
            if cache is not None:
                positions_BT = positions_BT + cache.length_B[:, None]
        if piece_bounds is None and cache is None:
            piece_bounds = torch.arange(0, B * T + 1, T, dtype=torch.int32, device=device)
        if self._inv_freq_R.device != device:
            self._inv_freq_R = self._inv_freq_R.to(device)
        inv_freq = self._inv_freq_R
        if follows_length(self.config):
            # With a cache, a row's tokens so far are one piece.
            share = self._share if cache is None else parallel.Share()
            length_BT = (
                positions_BT[:, -1:] + 1
                if piece_bounds is None
                else piece_lengths(positions_BT, piece_bounds, share.sequence_rank, share.sequence_world)
            )
            inv_freq = inverse_frequencies(self.config, length_BT)
        rope = rotary_table(inv_freq, positions_BT, self._attention_factor)
        x_BTE = self.model.embed_tokens(tokens_BT)
        filled = int(cache.length_B.max()) + T if cache is not None else 0
        store: BlockStore | None = None
        for i, block in enumerate(self.model.layers):
            if cache is not None:
                layer_cache = (cache.keys[i], cache.values[i], cache.length_B, filled)
                x_BTE = block(x_BTE, rope, piece_bounds, layer_cache)
            elif self.recompute != "none" and torch.is_grad_enabled():
                store = BlockStore(before=store) if self.offload_activations else None
                bound = functools.partial(block, rope=rope, piece_bounds=piece_bounds)
                x_BTE = checkpointed(bound, x_BTE, keep_attention=self.recompute == "selective", store=store)
            else:
                x_BTE = block(x_BTE, rope, piece_bounds)
        x_BTE = self.model.norm(x_BTE)
        if cache is not None:
            cache.length_B += T
        return x_BTE

    def _remade(self, tokens_BT: torch.Tensor, cache: KVCache) -> torch.Tensor | None:
        """hidden_states where these tokens change the angles of all before them: keys and values of every token are made
        again, as in a forward without cache. None, with nothing done but the tokens noted, if the angles stay."""
        assert cache.tokens_BS is not None
        assert cache.made_at_B is not None
        B, T = tokens_BT.shape
        rows_B1 = torch.arange(B, device=tokens_BT.device)[:, None]
        slots_BT = cache.length_B[:, None] + torch.arange(T, device=tokens_BT.device)
        cache.tokens_BS[rows_B1, slots_BT] = tokens_BT
        length_B = cache.length_B + T
        made_at_B = angle_length(self.config, length_B)
        if torch.equal(made_at_B, cache.made_at_B):
            return None
        longest = int(length_B.max())
        cache.length_B, cache.made_at_B = torch.zeros_like(length_B), made_at_B
        bounds = padded_bounds(length_B, longest)
        x_BSE = self.hidden_states(cache.tokens_BS[:, :longest], piece_bounds=bounds, cache=cache)
        cache.length_B = length_B
        return x_BSE[rows_B1, slots_BT]

    def init_weights(self, seed: int) -> SLMForCausalLM:
        """Fills every parameter with `initial_value`; in place."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(initial_value(self.config, name, tuple(parameter.shape), seed))
        return self

    def share_sequences(self, degree: int) -> None:
        """From now on a batch holds this rank's part of each sequence, and piece_bounds are of the whole ones."""
        if degree > 1:
            self._share = parallel.sequence_groups(degree).share
            attend = parallel.shared_attention(packed_attention, degree, self.config.num_key_value_heads)
            for block in self.model.layers:
                attention: Any = block.self_attn
                attention.attend = attend

    def compile_blocks(self) -> None:
        """torch.compile each block; equal blocks share one compiled graph."""
        for block in self.model.layers:
            block.compile()

    def resize_token_embeddings(self, num_tokens: int) -> None:
        """Changes the vocabulary to `num_tokens` rows; new rows are the mean of the old ones. Raises ValueError."""
        from slm.model.hf import refuse_quantized

        refuse_quantized(self, "what is to be enlarged")
        if num_tokens < 1:
            raise ValueError(f"num_tokens is {num_tokens}; a vocabulary has at least one token")
        embedding, head = self.model.embed_tokens, self.lm_head
        self.config = self.config.model_copy(update={"vocab_size": num_tokens})
        embedding.weight = nn.Parameter(_resized_rows(embedding.weight.data, num_tokens))
        tied = self.config.tie_word_embeddings
        head.weight = embedding.weight if tied else nn.Parameter(_resized_rows(head.weight.data, num_tokens))
        embedding.num_embeddings = head.out_features = num_tokens

    @classmethod
    def from_pretrained(cls, path: str | Path, *, dtype: torch.dtype = torch.float32) -> SLMForCausalLM:
        """Loads a Hugging Face Llama folder (config.json, safetensors), ours or theirs, or a quantised one. Raises UserError."""
        from slm.model.hf import load_pretrained

        return load_pretrained(path, dtype)

    def save_pretrained(self, path: str | Path, tokenizer: Any = None) -> None:
        """Writes a folder that transformers' AutoModelForCausalLM loads, with the tokenizer and its special ids if given."""
        from slm.model.hf import save_pretrained

        save_pretrained(self, path, tokenizer)

    def generate(self, input_ids: torch.Tensor, **options: Any) -> torch.Tensor:
        """Continues token ids [B, T]; returns [B, up to max_length]. Options: slm.generate.generate."""
        from slm.generate import generate

        return generate(self, input_ids, **options)


def _resized_rows(old_VE: torch.Tensor, rows: int) -> torch.Tensor:
    if rows <= old_VE.shape[0]:
        return old_VE[:rows].clone()
    mean_1E = old_VE.float().mean(0, keepdim=True).to(old_VE.dtype)
    return torch.cat([old_VE, mean_1E.expand(rows - old_VE.shape[0], -1)])


class _no_default_init:
    """nn.Linear and nn.Embedding draw random weights on construction; ours come from initial_value instead."""

    def __enter__(self) -> None:
        self.saved = nn.Linear.reset_parameters, nn.Embedding.reset_parameters
        for cls in (nn.Linear, nn.Embedding):
            cls.reset_parameters = lambda self: None  # type: ignore[method-assign]

    def __exit__(self, *_: object) -> None:
        nn.Linear.reset_parameters, nn.Embedding.reset_parameters = self.saved  # type: ignore[method-assign]


def initial_value(config: ModelConfig, name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """The initial float32 value of one parameter: a function of (seed, name) alone.

    So it is the same at any world size and ZeRO stage, and a rank can make one parameter at a time. Norms are 1;
    matrices normal(0, initializer_range); the two that write to the residual stream are scaled by
    1/sqrt(2 * layers), which keeps its variance constant with depth (GPT-2, section 2.3).
    """
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=False) >> 1)
    std = config.initializer_range
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        std /= math.sqrt(2 * config.num_hidden_layers)
    return torch.empty(shape).normal_(0.0, std, generator=generator)
