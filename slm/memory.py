"""Arithmetic of everything that one rank's memory holds in training, by part, at the moment when it is fullest. No torch.

Owns what DeepSpeed 0.19.8 keeps and allocates on the way, read in its source (runtime/zero/) and measured by
benchmarks/training_memory.py; activations are in activations.py. docs/memory.md derives both.

    found = rank_memory(config, Zero.read("ds_configs/zero2.json"), Layout(world_size=8), tokens=8192, policy="none")
    found.peak.total_bytes, found.peak.parts(), found.peak.moment

Counted are tensors; not what libraries take for themselves: the CUDA context, NCCL, cuBLAS workspaces, fragmentation.
Letters: `P` parameters, `n` those of one rank's partition, `R` the reduction bucket's, `b` bytes of a weight, `c` of a gradient
that is sent.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from slm.activations import activation_memory
from slm.distill.beside import TeacherMemory
from slm.model.config import ModelConfig
from slm.strategy import read_deepspeed

MASTER_BYTES = 4
MOMENTS_BYTES = 8  # Adam's two, in float32
STATE_BYTES = MASTER_BYTES + MOMENTS_BYTES  # what a checkpoint holds of each parameter
_BUCKET = 500_000_000  # DeepSpeed's default of its buckets, and the stride of stage 0's all-reduce (MEMORY_OPT_ALLREDUCE_SIZE)


@dataclass(frozen=True)
class Zero:
    """What memory and communication depend on in a DeepSpeed JSON; DeepSpeed's defaults (runtime/zero/config.py)."""

    stage: int
    reduce_bucket: int = _BUCKET  # elements, like all of these
    allgather_bucket: int = _BUCKET
    prefetch: int = 50_000_000
    persistence_threshold: int = 100_000
    max_live: int = 1_000_000_000
    max_reuse_distance: int = 1_000_000_000
    overlap: bool = False
    offload_optimizer: bool = False
    offload_parameters: bool = False
    pinned: bool = False  # what is offloaded, in page-locked host memory
    plus_plus: bool = False  # ZeRO++, of whose copies and quantised traffic nothing is counted

    @property
    def offloads(self) -> bool:
        return self.offload_optimizer or self.offload_parameters

    @classmethod
    def read(cls, path: str) -> Zero:
        return cls.of(read_deepspeed(path)["zero_optimization"])

    @classmethod
    def of(cls, zero: dict[str, Any]) -> Zero:
        """zero: the "zero_optimization" section."""
        stage = int(zero.get("stage", 0))

        def number(name: str, default: int) -> int:
            return int(zero.get(f"stage3_{name}", zero.get(name, default)))

        offloaded = [
            part
            for name in ("offload_optimizer", "offload_param")
            if (part := zero.get(name, {})).get("device", "none") != "none"
        ]
        return cls(
            stage,
            number("reduce_bucket_size", _BUCKET),
            number("allgather_bucket_size", _BUCKET),
            number("prefetch_bucket_size", 50_000_000),
            number("param_persistence_threshold", 100_000),
            number("max_live_parameters", 1_000_000_000),
            number("max_reuse_distance", 1_000_000_000),
            bool(zero.get("overlap_comm", stage == 3)),
            zero.get("offload_optimizer", {}).get("device", "none") != "none",
            zero.get("offload_param", {}).get("device", "none") != "none",
            bool(offloaded) and all(part.get("pin_memory", False) for part in offloaded),
            any(zero.get(name) for name in ("zero_quantized_weights", "zero_quantized_gradients"))
            or int(zero.get("zero_hpz_partition_size", 1)) > 1,
        )


@dataclass(frozen=True)
class Layout:
    """How ranks share the work."""

    world_size: int = 1
    sequence_parallel: int = 1
    gradient_accumulation: int = 1


@dataclass(frozen=True)
class Held:
    """Bytes on one rank's device at one moment of a step."""

    moment: str
    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    checkpoints: int = 0  # what the blocks keep from their forward to their backward pass
    working: int = 0  # what one block's backward pass, or the loss's ends, need besides
    logits: int = 0  # a chunk of them, and the gradients that the loss makes
    buffers: int = 0  # of communication
    teacher: int = 0  # weights of those that run beside, their targets or cached ones, and their working memory

    def parts(self) -> dict[str, int]:
        return {name: value for name, value in vars(self).items() if name != "moment"}

    @property
    def total_bytes(self) -> int:
        return sum(self.parts().values())


@dataclass(frozen=True)
class RankMemory:
    """One rank's: on its device at each moment of a step, and in host memory."""

    moments: tuple[Held, ...]
    host_bytes: int  # what is offloaded, in host memory
    offloaded_activations: int  # of it
    save_bytes: int  # the copy in host memory from which a checkpoint is written
    value_bytes: int  # of a weight

    @property
    def peak(self) -> Held:
        return max(self.moments, key=lambda held: held.total_bytes)


def reduce_bucket_elements(zero: dict[str, Any], parameters: int) -> int:
    """DeepSpeed allocates the bucket whole, however small the model is; one of all parameters fills only at the end, as a
    larger one does."""
    return min(int(zero.get("reduce_bucket_size", _BUCKET)), parameters)


def gathered_elements(zero: Zero, parameters: int) -> int:
    """Stage 3: how many of the split weights stay whole from their forward to their backward pass: those of which the way to the
    end and back is within max_reuse_distance. As many are whole, at most, at any time."""
    return min(parameters, zero.max_live, zero.max_reuse_distance // 2 + zero.prefetch)


def matrix_elements(config: ModelConfig) -> list[int]:
    """Elements of each weight: embedding, head if it is one of its own, and of all blocks; norms too."""
    E, F, D = config.hidden_size, config.intermediate_size, config.head_dim
    Q, J = config.num_attention_heads * D, config.num_key_value_heads * D
    block = [E * Q, E * J, E * J, Q * E, E * F, E * F, F * E, E, E]
    tables = [config.vocab_size * E] * (1 if config.tie_word_embeddings else 2)
    return [*tables, *block * config.num_hidden_layers, E]


def rank_memory(
    config: ModelConfig,
    zero: Zero,
    layout: Layout,
    tokens: int,
    policy: str = "none",
    *,
    tile_tokens: int | None = None,
    offload_activations: bool = False,
    value_bytes: int = 2,
    device: str = "cuda",
    teacher: TeacherMemory | None = None,
) -> RankMemory:
    """tokens: of one micro-batch on this rank. value_bytes: of a weight, 2 or 4. device "cpu": with gloo's own copies."""
    found = activation_memory(
        config, tokens, policy, tile_tokens=tile_tokens, offload=offload_activations,
        value_bytes=value_bytes, device=device,
    )  # fmt: skip
    state = _State(config, zero, layout, value_bytes, gloo=device == "cpu")
    taught = teacher or TeacherMemory()
    # A micro-batch's targets are let go of when the next one's are there.
    resting = replace(state.resting(), teacher=taught.weights + taught.targets)
    passes = replace(resting, gradients=resting.gradients + state.accumulated())
    kept = found.kept_bytes
    moments = [
        replace(
            passes, moment="loss", weights=passes.weights + state.gathered(), checkpoints=kept,
            logits=found.loss_peak_bytes - kept + taught.chunk,
        ),
        replace(
            passes, moment="backward pass, last block", weights=passes.weights + state.gathered(), checkpoints=kept,
            working=passes.working + found.block_peak_bytes - kept, buffers=passes.buffers + state.bucket(),
        ),
        *state.reduction(passes, found.kept_bytes // max(1, config.num_hidden_layers), found.block_peak_bytes - kept),
        *state.update(resting),
    ]  # fmt: skip
    if taught.working:
        held = passes.teacher + taught.working + taught.targets
        moments.insert(0, replace(passes, moment="teacher's forward pass", teacher=held))
    host = found.host_bytes
    return RankMemory(tuple(moments), state.host() + host, host, STATE_BYTES * state.n, value_bytes)


class _State:
    """The arithmetic of one rank's share of weights, gradients and optimiser; everything in bytes but n, P, R."""

    def __init__(self, config: ModelConfig, zero: Zero, layout: Layout, b: int, *, gloo: bool) -> None:
        self.zero, self.b, self.gloo = zero, b, gloo
        self.W = layout.world_size
        self.P = config.num_parameters()
        self.n = -(-self.P // self.W) if zero.stage else self.P
        self.R = min(zero.reduce_bucket, self.P)
        self.c = 4 if layout.sequence_parallel > 1 and zero.stage else b
        self.accumulates = layout.gradient_accumulation > 1
        self.largest = max(matrix_elements(config))
        self.table = config.vocab_size * config.hidden_size
        self.tied = config.tie_word_embeddings
        # Stage 2 in half precision adds up this rank's gradients in one float32 buffer ("compact").
        self.compact = zero.stage == 2 and b == 2
        small = sum(size for size in matrix_elements(config) if size < zero.persistence_threshold)
        self.whole = small if zero.stage == 3 and self.W > 1 else 0  # weights that no rank gives up

    def resting(self) -> Held:
        """Between two steps."""
        P, n, b, zero = self.P, self.n, self.b, self.zero
        if zero.stage == 0:
            return Held("rest", weights=P * b, optimizer=MOMENTS_BYTES * P)
        optimizer = 0 if zero.offload_optimizer else STATE_BYTES * n
        if zero.stage < 3:
            return Held("rest", weights=P * b, optimizer=optimizer, buffers=self.largest * b * zero.offload_optimizer)
        weights = (0 if zero.offload_parameters else n * b) + self.whole * b
        gradients = 0 if zero.offload_optimizer else 4 * n
        return Held("rest", weights=weights, optimizer=optimizer, gradients=gradients, buffers=self.R * self.c)

    def host(self) -> int:
        n, b, zero = self.n, self.b, self.zero
        if not zero.offload_optimizer:
            return 0
        if zero.stage < 3:  # with its gradient, the updated weights on their way back, one gradient on its way here
            more = 4 * n if self.accumulates and not self.compact else 0
            return (STATE_BYTES + 4 + b) * n + self.largest * b + more
        return (STATE_BYTES + 8) * n + (n * b if zero.offload_parameters else 0)

    def accumulated(self) -> int:
        """Gradients of the micro-batches before, beyond what rests."""
        if not self.accumulates or self.zero.stage == 3:
            return 0
        if self.zero.stage == 2:
            if self.zero.offload_optimizer and not self.compact:
                return 0
            return 4 * self.n
        return self.P * self.b

    def gathered(self) -> int:
        """Stage 3: weights that are whole on this rank while it computes: those of which the next use is near."""
        if self.zero.stage < 3 or (self.W == 1 and not self.zero.offload_parameters):
            return 0
        return gathered_elements(self.zero, self.P - self.whole) * self.b

    def bucket(self) -> int:
        """Allocated by the first gradient of a backward pass; stage 3's rests."""
        if self.zero.stage not in (1, 2):
            return 0
        return self.R * self.b * (2 if self.zero.overlap else 1)

    def reduction(self, passes: Held, one_block: int, working: int) -> list[Held]:
        """At the end of the backward pass, and while gradients are reduced."""
        P, n, R, b, c, zero = self.P, self.n, self.R, self.b, self.c, self.zero
        # The embedding's gradient is made whole beside the head's, which waits for it if they are tied.
        embedding = self.table * b * (2 if self.tied else 1)
        first_block = replace(
            passes, moment="backward pass, first block", checkpoints=one_block, working=passes.working + working,
            buffers=passes.buffers + self.bucket(),
        )  # fmt: skip
        ended = replace(passes, moment="backward pass, embedding", buffers=passes.buffers + self.bucket())
        sent = replace(ended, moment="reduction of gradients")
        flat = R * c if c == b else R * (b + c)  # a copy of the bucket, and another in the type that is sent
        if zero.stage < 2:
            made = 0 if self.accumulates else P * b
            late = self.table * b if self.tied and self.accumulates else 0
            first_block = replace(first_block, gradients=passes.gradients + max(0, made - self.table * b))
            ended = replace(ended, gradients=passes.gradients + made + self.table * b + late)
            if zero.stage == 0:
                copy = min(P, _BUCKET + self.largest) * b
                return [first_block, ended, replace(sent, gradients=P * b, buffers=copy)]
            # As gradients go into the bucket their own memory is freed; what is this rank's is copied out after each bucket.
            copy = flat if self.W > 1 else 0
            out = [P * b, (P - R) * b + copy]
            if P > R:
                out += [(P - R) * b + n * b, max(P - 2 * R, 0) * b + n * b + copy]
            return [first_block, ended, replace(sent, gradients=max(out))]
        mine = 0  # of this rank's part, beyond what earlier micro-batches have made
        if zero.stage == 2 and not (zero.offload_optimizer and not self.compact):
            mine = 0 if self.compact and self.accumulates else (4 if self.compact else b) * n
        ended = replace(ended, gradients=passes.gradients + (mine if P > R else 0) + embedding)
        if zero.stage == 2:
            if self.compact:
                extra, held = flat + min(self.largest, n) * 4, mine
            else:  # copied out when the bucket's copy is freed, but for what earlier buckets brought
                extra, held = (flat if self.W > 1 else 0), mine if P > R else 0
            last = replace(sent, gradients=passes.gradients + held, buffers=sent.buffers + extra)
            copied = replace(sent, gradients=passes.gradients + mine)
            return [first_block, replace(ended, weights=passes.weights), last, copied]
        here = min(self.gathered(), (self.table + zero.prefetch) * b)
        after = R * c if self.gloo else 0  # gloo scatters a copy
        if c != 4:
            after = max(after, 4 * R // self.W)
        ended, first_block = (replace(held, weights=passes.weights + here) for held in (ended, first_block))
        return [
            first_block,
            ended,
            replace(sent, weights=passes.weights + min(here, self.table * b), buffers=sent.buffers + R * c + after),
        ]

    def update(self, resting: Held) -> list[Held]:
        """The optimiser's step, and the gathering of the new weights."""
        P, n, b, zero = self.P, self.n, self.b, self.zero
        step, gather = replace(resting, moment="optimiser's step"), replace(resting, moment="new weights")
        if zero.stage == 0:
            return [replace(step, gradients=P * b)]
        if zero.stage == 3:
            # Flattened by sub-groups (1e9 elements). The next forward pass begins with what is fetched ahead.
            flattened = 0 if zero.offload_optimizer else 4 * n
            fetched = min(self.gathered(), zero.prefetch * b)
            return [
                replace(step, gradients=resting.gradients + flattened),
                replace(gather, weights=gather.weights + fetched, buffers=gather.buffers + fetched * self.gloo),
            ]
        if zero.offload_optimizer:
            gradients = 4 * n if self.compact else 0
        else:  # this rank's part, flattened, and in float32
            gradients = 4 * n if self.compact else 2 * n * b + (4 * n if b != 4 else 0)
        copy = min(P, zero.allgather_bucket) * b if self.gloo and self.W > 1 else 0
        return [replace(step, gradients=gradients), replace(gather, buffers=gather.buffers + copy)]


# --- without training -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class InferenceMemory:
    """Bytes on one device that generates."""

    weights: int
    cache: int  # keys and values of all tokens
    working: int  # one chunk of the prompt: its logits, its mask over the cache, one block's activations

    @property
    def total_bytes(self) -> int:
        return self.weights + self.cache + self.working


def inference_memory(
    config: ModelConfig,
    tokens: int,
    *,
    weight_bits: int = 16,
    group: int = 64,
    value_bytes: int = 2,
    chunk_tokens: int = 1024,
) -> InferenceMemory:
    """One sequence of `tokens`. weight_bits: of the blocks' matrices; below 16, every `group` of them share a float32 scale, and
    embedding, head and norms stay in value_bytes. chunk_tokens: of a prompt, at once (slm/generate.py)."""
    E, F, D, V, b = config.hidden_size, config.intermediate_size, config.head_dim, config.vocab_size, value_bytes
    Q, J = config.num_attention_heads * D, config.num_key_value_heads * D
    matrices = config.num_hidden_layers * config.linear_parameters_per_layer()
    rest = (config.num_parameters() - matrices) * b
    chunk = min(chunk_tokens, tokens)
    working = chunk * V * b + chunk * tokens + chunk * (2 * E + 2 * Q + 2 * J + 3 * F) * b
    if weight_bits < 16:
        weights = matrices * weight_bits // 8 + matrices // group * 4
        working += E * F * b  # one matrix at a time, in the type of the activations
    else:
        weights = matrices * weight_bits // 8
    return InferenceMemory(weights + rest, 2 * config.num_hidden_layers * J * tokens * b, working)
