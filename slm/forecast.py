"""How long a training step takes on given GPUs: computation as efficient as published runs, and communication. No torch.

    time = step_time(config, work, gpu, GPUs(64))
    time.seconds, time.compute_seconds, time.exposed_seconds
    save_interval_seconds(stall_seconds=2.0, mtbf_seconds=mtbf_seconds(64))

Computation is linear FLOPs / (peak * matmul efficiency) + attention FLOPs / (peak * attention efficiency), with what is
computed again. All that is neither (norms, loss, optimiser, Python) is in the efficiencies, which are fits to published runs
of others (llm-foundry, MPT-1.3B on 8 H100 and 8 A100, at 2K to 32K tokens): not measurements of this project.
benchmarks/published_speeds.py holds the rule against those and other published runs. Attention counts whole squares ("full"),
FLOPs as in plan.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from slm.distill.beside import WEIGHT_BYTES, forward_flops
from slm.hardware import GPU, HOST_MEMORY_BANDWIDTH, PAGEABLE, PINNED
from slm.memory import STATE_BYTES, Zero, gathered_elements
from slm.model.config import ModelConfig

# Of a link's or network's printed bandwidth, what large collectives reach: an assumption.
REACHED = 0.8
# What is lost to waiting for the slowest of many GPUs, in proportion to their number. Fitted to llm-foundry's MPT-1.3B at 2,048
# tokens (45,455 tokens/s/GPU on 8 H100; 44,123 on 128; 42,555 on 256; 39,837 on 512) with its communication hidden. Beyond 512
# GPUs nothing was at hand to fit, and it is held.
_WAITING_PER_GPU, _WAITING_UP_TO = 2.75e-4, 512
# Meta, Llama 3 (arXiv 2407.21783), table 5: 419 unexpected interruptions in 54 days on 16,384 GPUs.
MTBF_HOURS_PER_GPU = 54 * 24 * 16384 / 419


@dataclass(frozen=True)
class GPUs:
    count: int
    per_node: int = 8

    @property
    def nodes(self) -> int:
        return -(-self.count // self.per_node)


@dataclass(frozen=True)
class Work:
    """One rank's in an optimiser step."""

    zero: Zero
    tokens: int  # of one micro-batch on this rank
    micro_batches: int
    seq_len: int
    sequence_parallel: int = 1
    policy: str = "none"
    tiled: bool = False
    offloaded_bytes: int = 0  # activations that go to host memory and come back, each micro-batch
    value_bytes: int = 2
    teachers: tuple[ModelConfig, ...] = ()  # that run beside, in bfloat16


@dataclass(frozen=True)
class StepTime:
    compute_seconds: float  # with the teachers'
    teacher_seconds: float  # of it
    exchange_bytes: float  # sent by one rank, in a step, for sequences that ranks share
    state_bytes: float  # likewise for gradients and weights
    exposed_seconds: float  # of communication that computation does not hide
    host_link_bytes: float  # of optimiser and weights in host memory: over one GPU's way there, in a step
    host_memory_bytes: float  # likewise: read and written by the CPUs for one GPU's share
    offload_seconds: float  # of both

    @property
    def seconds(self) -> float:
        return self.compute_seconds + self.exposed_seconds + self.offload_seconds


def step_time(config: ModelConfig, work: Work, gpu: GPU, gpus: GPUs) -> StepTime:
    teaching = work.micro_batches * teacher_seconds(work, gpu, gpus.count)
    compute = work.micro_batches * compute_seconds(config, work, gpu, gpus.count)
    state, exchange = state_bytes(config, work, gpus.count), exchange_bytes(config, work)
    # A ring over nodes enters and leaves each by all its network cards; an exchange within a node does not leave it.
    across = gpus.nodes > 1
    ring = (
        min(gpu.link_bandwidth, gpu.network_bandwidth * min(gpus.count, gpus.per_node))
        if across
        else gpu.link_bandwidth
    )
    far = work.sequence_parallel > gpus.per_node
    state_seconds = state / (ring * REACHED)
    exchange_seconds = exchange / ((gpu.network_bandwidth if far else gpu.link_bandwidth) * REACHED)
    hidden = 2 / 3 * compute if work.zero.stage < 3 else compute  # gradients: behind the backward pass
    exposed = max(0.0, state_seconds - hidden) if work.zero.overlap else state_seconds
    host = 2 * work.offloaded_bytes * work.micro_batches / (gpu.host_bandwidth * REACHED)
    exposed += exchange_seconds + max(0.0, host - compute)
    mine = config.num_parameters() / (gpus.count if work.zero.stage else 1)
    if not work.zero.offload_optimizer:  # reads gradient, master and moments; writes these and the weight
        compute += mine * (4 + 2 * STATE_BYTES + work.value_bytes) / (gpu.memory_bandwidth * REACHED)
    link, memory = offload_bytes(config, work, gpus.count)
    link_seconds = link / (gpu.host_bandwidth * (PINNED if work.zero.pinned else PAGEABLE))
    offload = link_seconds + memory * min(gpus.count, gpus.per_node) / HOST_MEMORY_BANDWIDTH
    return StepTime(compute + teaching, teaching, exchange, state, exposed, link, memory, offload)


def offload_bytes(config: ModelConfig, work: Work, num_gpus: int) -> tuple[float, float]:
    """(Over one GPU's way to host memory, both directions; through host memory by the CPUs) in a step, of what DeepSpeed 0.19.8
    offloads for this rank (runtime/zero/stage_1_and_2.py, stage3.py). Taken as hidden by nothing: CPU Adam waits for all
    gradients, and copies of memory that is not page-locked wait for themselves.

    Gradients arrive in float32 at the end of a step. Before, stage 2 in half precision adds micro-batches up on the GPU, where
    else each is fetched and sent again (async_accumulate_grad_in_cpu_via_gpu); stage 3 sends and fetches each micro-batch's in
    float32, and sends the last once more (partition_grads). Weights in host memory are fetched for each gathering.
    """
    zero, b, micro_batches = work.zero, work.value_bytes, work.micro_batches
    mine = config.num_parameters() / (num_gpus if zero.stage else 1)
    link = memory = 0.0
    if zero.offload_optimizer:
        # Clipping reads and writes the gradient; Adam reads it, master and moments, and writes these; the weight is made of it.
        memory = mine * (8 + 4 + 2 * STATE_BYTES + 4 + b)
        link = mine * 4.0
        if zero.stage == 3:
            link += mine * 8 * micro_batches
        elif micro_batches > 1 and not (zero.stage == 2 and b == 2):
            link += mine * b * (2 * micro_batches - 1)
    if zero.offload_parameters:
        link += mine * b * _gathers(config, zero) * micro_batches
    if (
        zero.offload_optimizer != zero.offload_parameters
    ):  # the new weights, from where they are made to where they are kept
        link += mine * b
    return link, memory


def _gathers(config: ModelConfig, zero: Zero) -> float:
    """Stage 3: how often a weight is gathered in a micro-batch: for each pass, but once if it stays whole between the two."""
    parameters = config.num_parameters()
    return 2 - gathered_elements(zero, parameters) / parameters


def teacher_seconds(work: Work, gpu: GPU, num_gpus: int) -> float:
    """Of one micro-batch on one rank: the teachers' forward pass. Of a fused kernel's seven products it has two."""
    seconds = 0.0
    for teacher in work.teachers:
        linear, attention = forward_flops(teacher, work.seq_len)
        seconds += linear / gpu.matmul_efficiency + attention * 3 * (2 / 7) / gpu.attention_efficiency
    return work.tokens * seconds / gpu.peak_flops * _waiting(num_gpus)


def _waiting(num_gpus: int) -> float:
    return 1 + _WAITING_PER_GPU * (min(num_gpus, _WAITING_UP_TO) if num_gpus > 8 else 0)


def compute_seconds(config: ModelConfig, work: Work, gpu: GPU, num_gpus: int) -> float:
    """Of one micro-batch on one rank, forward and backward, with what is computed again and with waiting for others."""
    blocks = config.num_hidden_layers * config.linear_parameters_per_layer()
    mlp = config.num_hidden_layers * 3 * config.hidden_size * config.intermediate_size
    linear = 6.0 * config.matmul_parameters()
    attention = 12.0 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * work.seq_len
    if work.policy != "none":
        linear += 2 * blocks
    if work.policy == "full":
        attention *= 1 + 2 / 7  # a forward pass is two of the seven products that a fused kernel executes
    if work.tiled:
        linear += 2 * mlp
    peak = gpu.peak_flops if work.value_bytes == 2 else gpu.float32_flops
    seconds = linear / (peak * gpu.matmul_efficiency) + attention / (peak * gpu.attention_efficiency)
    return work.tokens * seconds * _waiting(num_gpus)


def state_bytes(config: ModelConfig, work: Work, num_gpus: int) -> float:
    """Sent by one rank in a step for gradients and weights (rings: an all-reduce sends twice what a scatter or gather does).

    DeepSpeed 0.19.8 all-reduces whole buckets at stages 1 and 2 (use_multi_rank_bucket_allreduce), at stage 2 each micro-batch's.
    Gradients go in float32 where ranks share sequences. Stage 3 gathers the weights for each pass of each micro-batch, those that
    stay whole between the two passes once, and scatters the gradients.
    """
    parameters = config.num_parameters()
    once = parameters * (num_gpus - 1) / num_gpus
    b = work.value_bytes
    sent = 4 if work.sequence_parallel > 1 and work.zero.stage else b
    if work.zero.stage == 0:
        return 2 * once * b
    if work.zero.stage < 3:
        return 2 * once * sent * (work.micro_batches if work.zero.stage == 2 else 1) + once * b
    return (_gathers(config, work.zero) * b + sent) * once * work.micro_batches


def exchange_bytes(config: ModelConfig, work: Work) -> float:
    """Sent by one rank in a step so that ranks can share sequences (Ulysses): queries, keys and values there and the output back,
    in every block, and their gradients; once more where a block is computed again (by `selective` too, though attention is not).
    Of teachers that run beside, the forward pass alone.
    """
    if work.sequence_parallel == 1:
        return 0.0
    times = 2 if work.policy == "none" else 3
    student = times * _exchanged(config, work.sequence_parallel) * work.value_bytes
    teachers = sum(_exchanged(teacher, work.sequence_parallel) * WEIGHT_BYTES for teacher in work.teachers)
    return (student + teachers) * work.tokens * work.micro_batches


def _exchanged(config: ModelConfig, degree: int) -> float:
    """Values that leave a rank for each of its tokens in one forward pass."""
    kv_heads = max(config.num_key_value_heads, degree)  # copied where there are fewer than ranks
    widths = 2 * config.num_attention_heads * config.head_dim + 2 * kv_heads * config.head_dim
    return config.num_hidden_layers * widths * (degree - 1) / degree


# --- checkpoints and failures -----------------------------------------------------------------------------------


def mtbf_seconds(num_gpus: int, hours_per_gpu: float = MTBF_HOURS_PER_GPU) -> float:
    """Between two failures of any of num_gpus GPUs."""
    return hours_per_gpu * 3600 / num_gpus


def save_interval_seconds(stall_seconds: float, mtbf_seconds: float) -> float:
    """Young's rule (CACM 17(9), 1974): sqrt(2 * what a save costs * mean time between failures) makes both losses least."""
    return math.sqrt(2 * stall_seconds * mtbf_seconds)


def lost_fraction(interval_seconds: float, stall_seconds: float, mtbf_seconds: float) -> float:
    """Of the time, to saving, and to steps that a failure undoes: half an interval each."""
    return stall_seconds / interval_seconds + interval_seconds / 2 / mtbf_seconds


def save_stall_seconds(config: ModelConfig, gpu: GPU, num_gpus: int) -> float:
    """For how long a save blocks training: until each rank's share is in host memory. It is written behind the steps.

    Beside the copy 0.2 s, in which ranks agree and kernels wait: DLRover's published block of a save to memory.
    """
    return 0.2 + config.num_parameters() * STATE_BYTES / num_gpus / (gpu.host_bandwidth * REACHED)
