"""The ranks together: start and end of the process group, the few reductions that the loop needs, and shared sequences.

Owns every collective call outside DeepSpeed. What one rank decides and others must know goes through `agree`.

    start(device)              # after runtime.discover_ranks has filled the environment
    total, stop = reduce_sum([num_targets, stop_requested])

world = data x sequence: with sequence_parallel 2, ranks 0 and 1 share the sequences of one part of the batch, 2 and 3 those
of the next. Between ranks of a group, attention exchanges parts of the sequence for heads (Ulysses, arXiv 2309.14509).

`B` batch, `T` tokens on this rank, `S` tokens of the sequence, `H` query heads, `J` key/value heads, `D` head dim.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist

from slm.errors import SLMError, UserError
from slm.runtime import discover_ranks, write_exit

log = logging.getLogger("slm")

_device = torch.device("cpu")


def local_device(local_rank: int) -> torch.device:
    """This rank's GPU, or the CPU if there is none or DS_ACCELERATOR=cpu. Tells DeepSpeed, which would guess and warn.

    Raises UserError if there are fewer GPUs than ranks.
    """
    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu":
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"this is rank {local_rank} of its machine, which has {torch.cuda.device_count()} visible GPUs",
                fix="start as many ranks as there are GPUs, or set DS_ACCELERATOR=cpu",
            )
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return torch.device("cpu")


def same_bits_every_time() -> None:
    """From now on torch takes kernels whose result does not depend on the order in which threads finish, and refuses to
    compute what has none. Before the first CUDA call."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS: a workspace of its own for each stream
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def start(device: torch.device, timeout_minutes: float = 30.0) -> bool:
    """Joins the process group named by the environment (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT).

    False if this process already was in one, whose owner then also ends it.
    """
    global _device
    _device = device
    if dist.is_initialized():
        return False
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.WARNING)
    # DeepSpeed 0.19.8 calls collectives by names that torch 2.13 deprecates; nothing a user could change.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if device.type == "cpu":
        # DeepSpeed would compile a shared-memory operator here (a minute, and a lock that outlives a killed
        # build); only its inference all-reduce uses it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed and Ulysses make further groups, which would take torch's own limits: on NCCL 10 minutes, in which a
    # rank that compiles longer than the others would end the run.
    limit = timedelta(minutes=timeout_minutes)
    dist.distributed_c10d.default_pg_timeout = dist.distributed_c10d.default_pg_nccl_timeout = limit
    deepspeed.init_distributed(
        dist_backend="nccl" if device.type == "cuda" else "gloo",
        auto_mpi_discovery=False,
        timeout=limit,
        verbose=False,
    )
    return True


def stop() -> None:
    """Leaves the process group; without it a rank can abort while another is still there."""
    if dist.is_initialized():
        sequence_groups.cache_clear()
        dist.destroy_process_group()


@contextmanager
def launched(timeout_minutes: float = 30.0) -> Iterator[torch.device | None]:
    """The ranks that a launcher has started, together until the end of the block: yields this one's device, or None where
    this process is alone.

    In the block a UserError and its like must be raised by all ranks (see `together`): rank 0 says it, and its exit code is the
    one that counts. The others leave in silence with 0: when one fails, torchrun ends all, rank 0 before it has spoken.
    """
    ranks = discover_ranks()
    device, joined = None, False
    if ranks.world_size > 1:
        device = local_device(ranks.local_rank)  # raised by the ranks that have no GPU, and said by them
        joined = start(device, timeout_minutes)
    try:
        yield device
        if ranks.rank == 0:
            write_exit(None, 0, "done")  # launchers/launch.py takes a command that leaves no word for one that crashed
    except SLMError as error:
        if ranks.rank:
            write_exit(None, error.exit_code, str(error))
            raise SystemExit(0) from None
        raise
    finally:
        if joined:
            stop()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def reduce_sum(values: Sequence[float]) -> list[float]:
    """Elementwise sum over ranks, in float64 (exact for counts below 2^53)."""
    if world_size() == 1:
        return [float(v) for v in values]
    tensor = torch.tensor(list(values), dtype=torch.float64, device=_device)
    dist.all_reduce(tensor)
    return tensor.tolist()


def reduce_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over ranks, in place; returns it."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def gather(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Every rank's tensor of this shape, in their order."""
    if world_size() == 1:
        return [tensor]
    tensors = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(tensors, tensor)
    return tensors


def reduce_max(value: int) -> int:
    """The largest over ranks."""
    if world_size() == 1:
        return value
    tensor = torch.tensor(value, dtype=torch.int64, device=_device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return int(tensor)


def agree(flag: bool) -> bool:
    """True on every rank if it is true on any."""
    return reduce_sum([float(flag)])[0] > 0


def broadcast(value: Any) -> Any:
    """Rank 0's picklable value, on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=_device)
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """Each rank's picklable value, by rank, on every rank."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another rank is no longer there, by what gloo and NCCL say of it."""
    said = str(error)
    return isinstance(error, RuntimeError) and any(
        words in said
        for words in ("Connection closed by peer", "Connection reset by peer", "gloo/transport", "ncclRemoteError")
    )


def together(function: Any, *arguments: Any) -> Any:
    """Runs function on every rank; if it fails on one, the first failure is raised on all of them."""
    result: Any = None
    failure: Exception | None = None
    try:
        result = function(*arguments)
    except Exception as error:
        failure = error
    if world_size() > 1:
        if failure is not None and not isinstance(failure, SLMError):
            log.error("rank %d failed", rank(), exc_info=failure)  # a traceback does not travel to the other ranks
        failures: list[Exception | None] = [None] * world_size()
        dist.all_gather_object(failures, failure)
        failure = next((f for f in failures if f is not None), None)
    if failure is not None:
        raise failure
    return result


def first_rank_decides(function: Any, *arguments: Any) -> Any:
    """Runs function on rank 0; every rank returns its result or raises its exception."""
    outcome: tuple[Any, BaseException | None] = (None, None)
    if rank() == 0:
        try:
            outcome = (function(*arguments), None)
        except Exception as error:
            outcome = (None, error)
    result, failure = broadcast(outcome)
    if failure is not None:
        raise failure
    return result


# --- sequences that several ranks share --------------------------------------------------------------------------


@dataclass(frozen=True)
class Share:
    """Which part of the batch, and of each of its sequences, is a rank's."""

    data_rank: int = 0
    data_world: int = 1
    sequence_rank: int = 0
    sequence_world: int = 1

    @classmethod
    def of(cls, rank: int, world_size: int, sequence_parallel: int = 1) -> Share:
        """Of ranks that lie together, so that a node's share a sequence."""
        assert world_size % sequence_parallel == 0  # layout.data_parallel
        data_rank, sequence_rank = divmod(rank, sequence_parallel)
        return cls(data_rank, world_size // sequence_parallel, sequence_rank, sequence_parallel)


class SequenceGroups:
    """What DeepSpeed asks of a Megatron-like `mpu`, for ranks that share sequences.

    Passed to deepspeed.initialize; its configuration keys and its mesh instead are silently wrong at stages 1 and 2
    (gradients are reduced over the data ranks only). That there is no model parallelism must be said too, by a group of this
    rank alone: DeepSpeed's own object takes the sequence group for it, and None is all ranks, over which clipping at stage 0
    would add up the norm again (deepspeed/runtime/utils.py, clip_grad_norm_).
    """

    def __init__(self, degree: int) -> None:
        share = Share.of(rank(), world_size(), degree)
        world, data_world = world_size(), share.data_world
        # Every rank makes every group, in the same order.
        shared = [dist.new_group(list(range(d * degree, (d + 1) * degree))) for d in range(data_world)]
        beside = [dist.new_group(list(range(s, world, degree))) for s in range(degree)]
        self.share, self.sequence, self.data = share, shared[share.data_rank], beside[share.sequence_rank]
        self.data_ranks = list(range(share.sequence_rank, world, degree))
        self.alone = dist.new_group([rank()], use_local_synchronization=True)

    def initialize_sequence_parallel(self) -> None:
        """DeepSpeed looks whether it is there."""

    def get_sequence_parallel_group(self) -> Any:
        return self.sequence

    def get_sequence_parallel_world_size(self) -> int:
        return self.share.sequence_world

    def get_sequence_parallel_rank(self) -> int:
        return self.share.sequence_rank

    def get_sequence_data_parallel_group(self) -> Any:
        return dist.group.WORLD

    def get_sequence_data_parallel_world_size(self) -> int:
        return world_size()

    def get_sequence_data_parallel_rank(self) -> int:
        return rank()

    def get_data_parallel_group(self) -> Any:
        return self.data

    def get_data_parallel_group_ranks(self) -> list[int]:
        return self.data_ranks

    def get_data_parallel_world_size(self) -> int:
        return self.share.data_world

    def get_data_parallel_rank(self) -> int:
        return self.share.data_rank

    def get_model_parallel_world_size(self) -> int:
        return 1

    def get_model_parallel_rank(self) -> int:
        return 0

    def get_model_parallel_group(self) -> Any:
        return self.alone

    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_group = get_model_parallel_group


@cache
def sequence_groups(degree: int) -> SequenceGroups:
    """Made once: by all ranks together."""
    return SequenceGroups(degree)


# (q_BTHD, k_BTJD, v_BTJD, piece_bounds) -> out_BTHD; piece_bounds are of the whole sequences.
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def shared_attention(attend: Attend, degree: int, num_kv_heads: int) -> Attend:
    """`attend` over sequences of which each of `degree` ranks holds a part: inside, a rank has H / degree heads of all S tokens.

    More ranks than key/value heads each get a copy of the one that their query heads share.
    """
    from deepspeed.sequence.layer import DistributedAttention

    exchange = DistributedAttention(attend, sequence_groups(degree).sequence, scatter_idx=2, gather_idx=1)
    copies = max(1, degree // num_kv_heads)

    @torch._disable_dynamo  # collectives
    def attend_together(
        q_BTHD: torch.Tensor, k_BTJD: torch.Tensor, v_BTJD: torch.Tensor, piece_bounds: torch.Tensor
    ) -> torch.Tensor:
        if copies > 1:
            k_BTJD, v_BTJD = (x.repeat_interleave(copies, dim=2) for x in (k_BTJD, v_BTJD))
        return exchange(q_BTHD, k_BTJD, v_BTJD, 0, None, piece_bounds)

    return attend_together
