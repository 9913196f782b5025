"""Activation checkpointing of one block: what is kept for its backward pass, and where that waits.

Owns the two policies, `full` (the block's input) and `selective` (the attention kernel's results too, so that attention
is not run a second time), and the kept tensors' way to host memory and back. Does not own which policy a phase wants
(recipe.py) nor what it costs (slm/activations.py).

    x = checkpointed(block, x, keep_attention=True, store=None)

torch's own create_selective_checkpoint_contexts does the same keeping, but its tensors cannot be reached, so they could
not go to host memory: hence the two modes here. They stand around a compiled block as around a plain one, since
a compiled graph calls the attention kernels through the dispatcher.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint, noop_context_fn

from slm.model.attention import KERNELS

# Smaller tensors (random states, the log-sum-exp of a short piece) stay: a copy of theirs costs more than it frees.
_SMALLEST_BYTES = 4096


def checkpointed(
    block: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, *, keep_attention: bool, store: BlockStore | None
) -> torch.Tensor:
    """block(x), of which only x is kept, and with keep_attention what the attention kernels returned.

    store: where what is kept waits; None: where it is. Backward works once, as with the chunked loss.
    """
    contexts: Callable[[], Any] = noop_context_fn
    if keep_attention:
        results: list[Any] = []
        pack = store.pack if store else _itself
        unpack = store.unpack if store else _itself
        contexts = functools.partial(_keep_and_recall, results, pack, unpack)
    hooks = torch.autograd.graph.saved_tensors_hooks(store.pack, store.unpack) if store else contextlib.nullcontext()
    with hooks:  # they see x alone: what the block saves goes to checkpoint's own hooks, which drop it
        return checkpoint(block, x, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


def _itself(x: Any) -> Any:
    return x


def _keep_and_recall(
    results: list[Any], pack: Callable[[Any], Any], unpack: Callable[[Any], Any]
) -> tuple[TorchDispatchMode, TorchDispatchMode]:
    return _Keep(results, pack), _Recall(results, unpack)


class _Keep(TorchDispatchMode):
    """In the forward pass: notes what the attention kernels return."""

    def __init__(self, results: list[Any], pack: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.results, self.pack = results, pack

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # else torch.compile would run compiled blocks uncompiled under this mode

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in KERNELS:
            # Detached: autograd hangs its graph on the very tensors that are returned, and would keep it alive.
            self.results.append(tree_map_only(torch.Tensor, lambda x: self.pack(x.detach()), out))
        return out


class _Recall(TorchDispatchMode):
    """In the recomputation: answers the attention kernels' calls, in their order, with what they returned before."""

    def __init__(self, results: list[Any], unpack: Callable[[Any], torch.Tensor]) -> None:
        super().__init__()
        self.results, self.unpack = results, unpack

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in KERNELS:
            return func(*args, **(kwargs or {}))
        if not self.results:
            raise RuntimeError("backward a second time through a checkpointed block, whose attention is used up")
        return tree_map_only((torch.Tensor, _Slot), self.unpack, self.results.pop(0))


class _Slot:
    """One tensor that waits in host memory."""

    def __init__(self, host: torch.Tensor, device: torch.device) -> None:
        self.host: torch.Tensor | None = host
        self.device = device
        self.back: torch.Tensor | None = None  # on its device again


class BlockStore:
    """What one block keeps, in host memory. `before`: that of the block before, whose backward pass is the next.

    On a GPU the copies run on a stream of their own: out of it behind the computation, and back one block ahead of it.
    The pinned memory comes from torch's allocator, which keeps it for the next step (in powers of two).
    """

    def __init__(self, before: BlockStore | None) -> None:
        self.before = before
        self.slots: list[_Slot] = []
        self.fetched: torch.cuda.Event | None = None

    def pack(self, x: torch.Tensor) -> torch.Tensor | _Slot:
        if x.nbytes < _SMALLEST_BYTES:
            return x
        with torch.no_grad():
            host = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)
            if x.is_cuda:
                stream = _copy_stream(x.device)
                stream.wait_stream(torch.cuda.current_stream(x.device))
                with torch.cuda.stream(stream):
                    host.copy_(x, non_blocking=True)
                x.record_stream(stream)  # its memory is not used again before the copy is done
            else:
                host.copy_(x)
        slot = _Slot(host, x.device)
        self.slots.append(slot)
        return slot

    def unpack(self, packed: torch.Tensor | _Slot) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        self._fetch()
        if self.before is not None:
            self.before._fetch()
            self.before = None
        x, packed.back = packed.back, None
        if x is None:
            raise RuntimeError("backward a second time through an offloaded block, whose input is used up")
        if x.is_cuda:
            current = torch.cuda.current_stream(x.device)
            assert self.fetched is not None
            current.wait_event(self.fetched)
            x.record_stream(current)
        return x

    @torch.no_grad()
    def _fetch(self) -> None:
        """Starts the copies back, once."""
        slots, self.slots = self.slots, []
        for slot in slots:
            host, slot.host = slot.host, None
            assert host is not None
            if slot.device.type == "cuda":
                stream = _copy_stream(slot.device)
                with torch.cuda.stream(stream):
                    slot.back = host.to(slot.device, non_blocking=True)
                    self.fetched = stream.record_event()
            else:
                slot.back = host.clone()


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
