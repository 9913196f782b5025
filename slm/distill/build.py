"""`slm teacher`: runs a teacher over token shards and writes its caches, on any number of processes, from any kill on.

Owns the job: who does which block, what goes into one forward pass, and the progress. A block's content depends on
nothing but the block, so who makes it, and when, does not show in the file.

    exit_code = build(load_recipe("recipe.yaml"))

`C` tokens of a chunk of logits, `P` planes, `K` entries, `V` vocabulary.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Generator
from contextlib import closing

import numpy as np
import torch
from rich.filesize import decimal

from slm import parallel
from slm.data.batches import Batch, Piece, assemble
from slm.data.order import GOLDEN, derive_key, mix_many
from slm.data.packing import best_fit, pieces_of
from slm.distill.cache import Cache, CacheSpec, CacheWriter, Sums, block_bounds, new_planes
from slm.distill.codec import encode_entries, token_tags
from slm.distill.models import TeacherInfo, TeacherModel, check_teacher, describe_teacher, load_teacher
from slm.distill.settings import Teacher, teacher_field
from slm.distill.targets import Entries, sample, top_k
from slm.distill.wanted import Wanted, cache_spec, check_begun, misfit, misfits, open_cache, wanted_caches
from slm.errors import CorruptArtefact, EnvironmentProblem, SLMError, UserError
from slm.losses import IGNORE
from slm.progress import TokenProgress
from slm.recipe import Recipe
from slm.runtime import Ranks, StopRequest, discover_ranks, setup_logging

log = logging.getLogger("slm")


# Logits that entries are chosen from at once: on a CPU as many as its cache holds.
_ELEMENTS_AT_ONCE = {"cpu": 1 << 19, "cuda": 1 << 25}


class Stopped(Exception):
    """A signal came; every block that is complete stays."""


def build(recipe: Recipe) -> int:
    """Makes what is missing of the recipe's caches; 0, or 75 after a stop signal. Raises SLMError."""
    stop = StopRequest()
    ranks = discover_ranks()
    setup_logging(ranks.rank, None)
    device = parallel.local_device(ranks.local_rank)
    all_wanted = list(wanted_caches(recipe))
    together = any(recipe.teacher[w.teacher].zero3 for w in all_wanted)
    joined = together and parallel.start(device)
    try:
        for name in dict.fromkeys(w.teacher for w in all_wanted):
            wanted = [w for w in all_wanted if w.teacher == name]
            _run_teacher(recipe.teacher[name], name, wanted, ranks, device, stop)
    except Stopped:
        log.info(
            "stopped by %s; the same command goes on from the blocks that are complete", stop.signal_name or "a signal"
        )
        if joined:
            parallel.stop()
        return 75
    finally:
        stop.close()
    if joined:  # after a failure another rank may be in a collective call: just leave
        parallel.stop()
    return 0


def _run_teacher(
    settings: Teacher, name: str, wanted: list[Wanted], ranks: Ranks, device: torch.device, stop: StopRequest
) -> None:
    looked_at = (_look, settings, name, wanted)
    missing = parallel.together(*looked_at) if settings.zero3 else _look(*looked_at[1:])
    if not missing:
        log.info("teacher %s: all %d caches are complete (slm teacher verify reads them again)", name, len(wanted))
        return
    log.info("teacher %s: loading %s", name, settings.model)
    model = load_teacher(settings.model, device, zero3=settings.zero3)
    total = sum(w.dataset.shards[w.shard].num_tokens for w in missing)
    progress = TokenProgress(f"teacher {name}", total, enabled=ranks.rank == 0)
    try:
        for w in missing:
            _build_cache(model, settings, w, ranks, device, stop, progress)
    finally:
        progress.close()
    folders = sorted({str(w.path.parent) for w in wanted})
    size = decimal(sum(w.path.stat().st_size for w in wanted))
    where, then = ", ".join(folders), f"slm train {SLMError.recipe}"
    log.info("teacher %s: %d caches of %s in %s; next: %s", name, len(wanted), size, where, then)


def _look(settings: Teacher, name: str, wanted: list[Wanted]) -> list[Wanted]:
    """The caches that are not complete, after everything that can be wrong has been looked at."""
    info = describe_teacher(settings.model)
    missing = [w for w in wanted if not w.path.exists()]
    for dataset in dict.fromkeys(w.dataset for w in wanted):
        check_teacher(settings.model, info, dataset.vocab_size, dataset.tokenizer_fingerprint)
    for w in wanted:
        if w not in missing:
            _check_complete(w, settings, info)
            continue
        _check_context(info, w)
        check_begun(w, cache_spec(settings, info.identity, w))
        try:
            w.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{w.path.parent} cannot be made: {error.strerror}",
                fix=f"set another {teacher_field(name)}.cache.folder",
            ) from None
        assert settings.cache is not None
        if settings.cache.k > w.dataset.vocab_size:
            raise UserError(
                f"{teacher_field(name)}.cache.k is {settings.cache.k}, and the tokenizer of {w.dataset.path} has only "
                f"{w.dataset.vocab_size} tokens",
                fix="use a smaller k",
            )
    return missing


def _check_complete(w: Wanted, settings: Teacher, info: TeacherInfo) -> None:
    """Raises UserError if the complete cache does not serve the recipe."""
    if problems := misfits(open_cache(w).spec, cache_spec(settings, info.identity, w)):
        raise misfit(w, problems[0])


def _check_context(model: TeacherInfo, w: Wanted) -> None:
    longest = int(min(w.piece_length, np.diff(w.dataset.shards[w.shard].doc_offsets).max(initial=0)))
    if longest > model.context:
        raise UserError(
            f"{w.dataset.path} has pieces of {longest} tokens at seq_len {w.piece_length}, beyond the teacher's context of "
            f"{model.context}: its distribution there would mean nothing",
            fix="use a teacher of a longer context, or distil in a phase of shorter seq_len",
        )


def _build_cache(
    model: TeacherModel,
    settings: Teacher,
    w: Wanted,
    ranks: Ranks,
    device: torch.device,
    stop: StopRequest,
    progress: TokenProgress,
) -> None:
    offsets = w.dataset.shards[w.shard].doc_offsets
    spec = cache_spec(settings, model.identity, w)
    bounds = block_bounds(offsets, spec.piece_length, spec.block_tokens)
    writer = CacheWriter(w.path, spec, bounds)

    def stopped() -> bool:
        """Of all ranks the same under ZeRO-3, where each forward takes all of them."""
        return parallel.agree(stop.signal_name is not None) if settings.zero3 else stop.signal_name is not None

    maker = BlockMaker(model, settings, w, spec, bounds, device, reusable_caches(w, spec), stopped)
    blocks = _own_blocks_first(len(bounds) - 1, ranks)
    base = progress.done
    progress.update(base + int(np.diff(bounds)[writer.done].sum()))
    work = _in_step(writer, blocks, ranks) if settings.zero3 else _by_claims(writer, blocks)
    with closing(work):  # which frees the lock of a block that fails
        for block in work:
            failure: Exception | None = None
            try:
                planes, sums = maker.make(block)
                if block >= 0:
                    writer.write_block(block, planes, sums)
            except (SLMError, OSError) as error:
                failure = error
            # Under ZeRO-3 the others wait for this rank in the next forward: all leave together.
            failed = parallel.agree(failure is not None) if settings.zero3 else failure is not None
            if failed:
                raise failure or EnvironmentProblem("another rank could not write its block; it says why")
            progress.update(base + int(np.diff(bounds)[writer.done].sum()))
            if stopped():
                raise Stopped
    writer.finish()
    progress.update(base + int(bounds[-1]))


def _own_blocks_first(num_blocks: int, ranks: Ranks) -> list[int]:
    """Each rank, and each task of a SLURM array, begins at another place, so that they seldom meet."""
    task = int(os.environ.get("SLURM_ARRAY_TASK_ID", 0)) - int(os.environ.get("SLURM_ARRAY_TASK_MIN", 0))
    tasks = int(os.environ.get("SLURM_ARRAY_TASK_COUNT", 1))
    first = num_blocks * (task % tasks * ranks.world_size + ranks.rank) // (tasks * ranks.world_size)
    return [*range(first, num_blocks), *range(first)]


def _by_claims(writer: CacheWriter, blocks: list[int]) -> Generator[int]:
    """The blocks that nobody has done, one at a time under its lock; ends when all are done, also those of others."""
    while not writer.done.all():
        worked = False
        done = writer.done  # read from the file, and again under the lock
        for block in (b for b in blocks if not done[b]):
            with writer.claim(block) as mine:
                if mine and not writer.done[block]:
                    worked = True
                    yield block
        if not worked:
            time.sleep(0.5)  # others are at the last ones; if one dies, its block is free again


def _in_step(writer: CacheWriter, blocks: list[int], ranks: Ranks) -> Generator[int]:
    """Under ZeRO-3 a forward takes all ranks: in each round every rank has a block, or -1 for a pretended one."""
    missing = parallel.broadcast([b for b in sorted(blocks) if not writer.done[b]])
    for first in range(0, len(missing), ranks.world_size):
        mine = missing[first + ranks.rank : first + ranks.rank + 1]
        yield mine[0] if mine else -1
    parallel.barrier()


def reusable_caches(w: Wanted, spec: CacheSpec) -> list[Cache]:
    """Complete caches of the same teacher and shard at other piece lengths."""
    found = []
    for path in sorted(w.path.parents[1].glob(f"*/{w.path.name}")):
        if path != w.path and path.parent.name.isdigit():
            other = Cache(path, doc_offsets=w.dataset.shards[w.shard].doc_offsets)
            if other.spec.at(spec.piece_length) != spec:
                continue
            if problems := other.verify():  # its rows would be copied with a new checksum
                log.warning("%s is not used again: %s", path, next(iter(problems.values())))
            else:
                found.append(other)
    return found


class BlockMaker:
    """Makes the planes of one block after the other."""

    def __init__(
        self,
        model: TeacherModel,
        settings: Teacher,
        w: Wanted,
        spec: CacheSpec,
        bounds: np.ndarray,
        device: torch.device,
        reusable: list[Cache],
        stopped: Callable[[], bool],
    ) -> None:
        self.model, self.settings, self.spec, self.bounds, self.device = model, settings, spec, bounds, device
        self.stopped = stopped
        self.reusable = reusable
        shard = w.dataset.shards[w.shard]
        self.tokens = shard.tokens
        self.starts, self.lengths, self.is_last = pieces_of(shard.doc_offsets, spec.piece_length)
        self.reuse = np.full(len(self.starts), -1)  # of each piece, the reusable cache that holds its very rows
        for i, cache in enumerate(reusable):
            starts, lengths, _ = pieces_of(shard.doc_offsets, cache.spec.piece_length)
            at = np.searchsorted(starts, self.starts).clip(max=len(starts) - 1)
            self.reuse[(starts[at] == self.starts) & (lengths[at] == self.lengths)] = i

    def make(self, block: int) -> tuple[dict[str, np.ndarray], Sums]:
        """Planes of the block's tokens. -1: only takes part in the forwards of the others.

        Raises Stopped, within a block too: one of a large teacher takes longer than the time that a scheduler grants.
        """
        low, high = (int(x) for x in self.bounds[block : block + 2]) if block >= 0 else (0, 0)
        planes = new_planes(self.spec, high - low)
        first, last = np.searchsorted(self.starts, [low, high])
        to_do = []
        for piece in range(int(first), int(last)):
            if self.reuse[piece] >= 0:
                start = int(self.starts[piece])
                self.reusable[self.reuse[piece]].copy_into(planes, start - low, start, int(self.lengths[piece]))
            else:
                to_do.append(piece)
        self._entropy = [0.0, 0]
        batches = list(self._batches(to_do))
        rounds = parallel.reduce_max(len(batches)) if self.settings.zero3 else len(batches)
        order = _shuffled(self.spec.vocab_size, f"{self.spec.seed}/{self.spec.shard['sha256']}/{block}")
        order_V = torch.from_numpy(order).to(self.device)
        for number in range(rounds):
            if self.stopped():
                raise Stopped
            if number < len(batches):
                self._run(*batches[number], planes, low, order_V)
            else:
                self.model.visit(_nothing(self.device), lambda first, logits_CV: None)
        return planes, self._sums(planes, self._labelled(low, high))

    def _sums(self, planes: dict[str, np.ndarray], labelled: np.ndarray) -> Sums:
        """Over the tokens that predict one. The entropy of rows that were copied is taken to be that of the others."""
        total, count = self._entropy
        if not count and self.reusable:
            others = self.reusable[0].totals()
            total, count = others.entropy, others.num_targets
        num_targets = int(labelled.sum())
        return Sums(
            num_targets=num_targets,
            nll=-float(planes["label"][labelled].astype(np.float64).sum()),
            entropy=total / max(1, count) * num_targets,
            head_mass=float(-np.expm1(planes["log_tail"][labelled, 0].astype(np.float64)).sum()),
        )

    def _labelled(self, low: int, high: int) -> np.ndarray:
        """bool [high - low]: the tokens that predict one; the last of a document does not."""
        labelled = np.ones(high - low, dtype=bool)
        inside = (self.starts >= low) & (self.starts < high) & self.is_last
        labelled[self.starts[inside] + self.lengths[inside] - 1 - low] = False
        return labelled

    def _batches(self, pieces: list[int]) -> Generator[tuple[Batch, np.ndarray]]:
        """Pieces packed into forward passes of about batch_tokens: (batch, address of each place in the shard, -1: none)."""
        if not pieces:
            return
        lengths = self.lengths[pieces].astype(np.int64)
        width = max(int(lengths.max()), min(self.settings.batch_tokens, self.spec.piece_length))
        order, sizes = best_fit(lengths, width)
        ends = np.cumsum(sizes).tolist()
        rows = [[pieces[i] for i in order[end - n : end].tolist()] for end, n in zip(ends, sizes.tolist(), strict=True)]
        per_batch = max(1, self.settings.batch_tokens // width)
        for at in range(0, len(rows), per_batch):
            chosen = rows[at : at + per_batch]
            batch = assemble([[self._piece(p) for p in row] for row in chosen], width, 0, max(map(len, chosen)))
            address = np.full((len(chosen), width), -1, dtype=np.int64)
            for b, row in enumerate(chosen):
                place = 0
                for piece in row:
                    start, length = int(self.starts[piece]), int(self.lengths[piece])
                    address[b, place : place + length] = np.arange(start, start + length)
                    place += length
            yield batch, address.ravel()

    def _piece(self, piece: int) -> Piece:
        start, end = int(self.starts[piece]), int(self.starts[piece] + self.lengths[piece])
        return self.tokens[start:end], None if self.is_last[piece] else int(self.tokens[end])

    def _run(
        self, batch: Batch, address: np.ndarray, planes: dict[str, np.ndarray], low: int, order_V: torch.Tensor
    ) -> None:
        labels_N = batch.labels_BT.flatten()
        tokens = batch.tokens_BT.flatten().numpy()
        following = np.where(labels_N.numpy() == IGNORE, -1, labels_N.numpy())

        def visit(first: int, logits_CV: torch.Tensor) -> None:
            at_once = max(1, _ELEMENTS_AT_ONCE[logits_CV.device.type] // logits_CV.shape[1])
            for start in range(0, len(logits_CV), at_once):
                keep(first + start, logits_CV[start : start + at_once])

        def keep(first: int, logits_CV: torch.Tensor) -> None:
            inside = np.flatnonzero(address[first : first + len(logits_CV)] >= 0)
            if not len(inside):
                return
            places = address[first + inside]
            rows = torch.from_numpy(inside)
            labels_C = labels_N[first + rows].to(logits_CV.device)
            logits_CV = logits_CV[rows.to(logits_CV.device), : self.spec.vocab_size]
            entries = self._entries(logits_CV, labels_C, places, order_V)
            if not (torch.isfinite(entries.label_log_p_C).all() and torch.isfinite(entries.entropy_C).all()):
                raise CorruptArtefact(
                    f"the teacher {self.settings.model} gives logits that are not numbers: its weights are damaged, or too "
                    "large for this precision",
                    fix="copy its files again",
                )
            self._entropy[0] += float(entries.entropy_C[labels_C != IGNORE].sum(dtype=torch.float64))
            self._entropy[1] += int((labels_C != IGNORE).sum())
            stored = encode_entries(entries, self.spec.vocab_size, self.spec.kind, self.spec.temperatures)
            stored["tag"] = token_tags(tokens[first + inside], following[first + inside], places)
            for name, values in stored.items():
                planes[name][places - low] = values

        self.model.visit(batch.to(self.device), visit)

    def _entries(
        self, logits_CV: torch.Tensor, labels_C: torch.Tensor, places: np.ndarray, order_V: torch.Tensor
    ) -> Entries:
        spec = self.spec
        if spec.kind == "top_k":
            return top_k(logits_CV, labels_C, spec.k, spec.temperatures)
        key = derive_key(spec.seed, spec.shard["sha256"], spec.teacher.get("fingerprint", ""))
        uniform_CT = np.stack([_uniform(places, key + t) for t in range(len(spec.temperatures))], 1)
        on = logits_CV.device
        return sample(logits_CV, labels_C, spec.k, spec.temperatures, torch.from_numpy(uniform_CT).to(on), order_V)


def _mixed(values: np.ndarray, key: int) -> np.ndarray:
    """Each value scrambled under a key. uint64."""
    return mix_many(values.astype(np.uint64), np.uint64(key * GOLDEN & 0xFFFFFFFFFFFFFFFF))


def _uniform(places: np.ndarray, key: int) -> np.ndarray:
    """One number in [0, 1) for each token of a shard, float64."""
    return (_mixed(_mixed(places, key), 1) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _shuffled(size: int, key: str) -> np.ndarray:
    """A permutation of range(size), a function of the key."""
    return np.argsort(_mixed(_mixed(np.arange(size), derive_key(key)), 1), kind="stable")


def _nothing(device: torch.device) -> Batch:
    return assemble([[]], 1, 0, 1).to(device)
