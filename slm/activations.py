"""Arithmetic of activation memory on one rank: what each recomputation policy keeps, and the peak of a step. No torch.

Owns the formula that `slm plan` shows; benchmarks/activation_memory.py measures it. docs/memory.md derives it.

    m = activation_memory(config, tokens=8192, policy="selective", tile_tokens=None, value_bytes=2, device="cuda")
    m.peak_bytes, m.kept_bytes

Counted are tensors, as the eager blocks of llama.py make them; not weights, their gradients' storage and optimiser states,
nor what libraries take for themselves (workspaces, fragmentation). Compiled blocks keep less with `none` and the same with
the others. Letters: `E` hidden, `F` MLP width, `Q` all query heads' width, `J` all key heads' width, `V` vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from slm.model.config import ModelConfig

POLICIES = ("none", "selective", "full")

# Elements of one chunk of logits (slm/losses.py). Large enough for full-speed matrix products, small beside the
# activations: 80 MiB in float32 on a CPU, 768 MiB of bfloat16 and float32 together on a GPU.
LOGITS_CHUNK_ELEMENTS = {"cpu": 5 << 22, "cuda": 1 << 27}


@dataclass(frozen=True)
class ActivationMemory:
    """Bytes on one rank."""

    kept_bytes: int  # what the blocks keep, on the device
    host_bytes: int  # what they keep, in host memory
    between_bytes: int  # all that is there between the passes, the loss's gradients included
    loss_peak_bytes: int  # while the loss is computed
    block_peak_bytes: int  # in the backward pass of the last block

    @property
    def peak_bytes(self) -> int:
        return max(self.loss_peak_bytes, self.block_peak_bytes)


def kept_bytes_per_token(config: ModelConfig, policy: str, *, tiled: bool, value_bytes: int) -> int:
    """What one block keeps of each token from its forward to its backward pass."""
    E, F = config.hidden_size, config.intermediate_size
    Q, J = _head_widths(config)
    log_sum_exp = 4 * config.num_attention_heads
    if policy == "full":
        return E * value_bytes
    if policy == "selective":
        return (E + Q) * value_bytes + log_sum_exp
    # Input, its norm, q, k, v, attention's output, the sum with it; a norm also keeps 4 bytes of scale.
    attention = (3 * E + 2 * Q + 2 * J) * value_bytes + 4 + log_sum_exp
    return attention if tiled else attention + (E + 2 * F) * value_bytes + 4


def activation_memory(
    config: ModelConfig,
    tokens: int,
    policy: str,
    *,
    tile_tokens: int | None = None,
    offload: bool = False,
    value_bytes: int = 2,
    device: str = "cuda",
) -> ActivationMemory:
    """tokens: of one micro-batch on this rank. value_bytes: of a weight and an activation, 2 or 4."""
    E, V, b = config.hidden_size, config.vocab_size, value_bytes
    layers = config.num_hidden_layers
    tiled = tile_tokens is not None and tile_tokens < tokens
    per_token = kept_bytes_per_token(config, policy, tiled=tiled, value_bytes=b)
    one_block = tokens * per_token
    kept = layers * one_block
    # Offloaded, two blocks' share is on the device: the one in use and the one on its way.
    here = min(2, layers) * one_block if offload else kept
    # The cosines and sines; the input of the last norm and its scale.
    always = tokens * 4 * config.head_dim
    last = tokens * (E * b + 4)
    table = V * E
    chunk = min(tokens, chunk_tokens(V, device)) * V * (b if b == 4 else b + 4)
    # The head's input, its gradient, and the gradient of its weight in float32 with, in half precision, one chunk's part.
    loss = here + always + last + 2 * tokens * E * b + chunk + table * (4 if b == 4 else 4 + b)
    # A tied weight's gradient waits for the embedding's share until the pass is over.
    waiting = table * b if config.tie_word_embeddings else 0
    # What the block's recomputation brings back.
    again = tokens * (kept_bytes_per_token(config, "none", tiled=tiled, value_bytes=b) - per_token)
    mlp = _mlp_backward(config, tokens, tile_tokens if tiled else None, b)
    attention = _attention_backward(config, tokens, tiled, b, device)
    block = here + always + waiting + again + max(mlp, attention)
    between = here + always + last + tokens * E * b + table * 4
    return ActivationMemory(here, kept if offload else 0, between, loss, block)


def chunk_tokens(vocab_size: int, device_type: str) -> int:
    """Tokens whose logits the loss holds at once: a multiple of 64, at least 64."""
    return max(64, LOGITS_CHUNK_ELEMENTS[device_type] // vocab_size // 64 * 64)


def _head_widths(config: ModelConfig) -> tuple[int, int]:
    return config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim


def _mlp_backward(config: ModelConfig, tokens: int, tile_tokens: int | None, b: int) -> int:
    """Most that the MLP's backward pass makes beside what the block keeps: lean._SwigluDown, or lean._Tiled."""
    E, F = config.hidden_size, config.intermediate_size
    if tile_tokens is None:  # the incoming gradient; silu(gate), and the gradients of the product and of the gate
        return tokens * (E + 3 * F) * b + E * F * b
    # Incoming and outgoing gradient; of a tile its input, norm and gradients, and five widths; three weights' gradients, added
    # up in float32, and one tile's share of them.
    return 2 * tokens * E * b + tile_tokens * (3 * E + 5 * F) * b + 3 * E * F * (4 + b)


def _attention_backward(config: ModelConfig, tokens: int, tiled: bool, b: int, device: str) -> int:
    """Likewise of attention, whose pass comes when what the MLP kept is freed."""
    E, F = config.hidden_size, config.intermediate_size
    Q, J = _head_widths(config)
    # The residual's gradient, those of the output, q, k and v; the kernel's own: on a GPU q's gradient in float32 and key
    # heads' for every query head; on a CPU all three for every query head, and the output's once more. That is for one piece
    # of all tokens, the most; without the CPU kernel's workspace, at most 1 MiB a thread.
    own = (2 * b + 4) * Q if device == "cuda" else 4 * Q * b
    freed = (E if tiled else 2 * E + 2 * F) * b
    return tokens * ((E + 2 * Q + 2 * J) * b + own - freed)
