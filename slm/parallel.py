"""The ranks together: start and end of the process group, and the few reductions that the loop needs.

Owns every collective call outside DeepSpeed. What one rank decides and others must know goes through `agree`.

    start(device)              # after runtime.discover_ranks has filled the environment
    total, stop = reduce_sum([num_targets, stop_requested])
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from slm.errors import SLMError, UserError

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
    deepspeed.init_distributed(
        dist_backend="nccl" if device.type == "cuda" else "gloo",
        auto_mpi_discovery=False,
        timeout=timedelta(minutes=timeout_minutes),
        verbose=False,
    )
    return True


def stop() -> None:
    """Leaves the process group; without it a rank can abort while another is still there."""
    if dist.is_initialized():
        dist.destroy_process_group()


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
