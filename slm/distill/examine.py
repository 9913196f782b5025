"""`slm teacher verify | stats | diff`: is a cache whole and aligned, what is in it, and what did it cost.

    problems = verify(recipe)
    found = stats(recipe); draw(found); plot(found, "head.png")
    costs = diff(recipe)

`N` rows, `K` entries, `V` vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from slm import parallel
from slm.data.batches import assemble
from slm.data.packing import pieces_of
from slm.distill.cache import ANEW, REPAIR, Cache
from slm.distill.codec import RawTargets, token_tags
from slm.distill.models import TeacherModel, check_teacher, describe_teacher, load_teacher
from slm.distill.settings import teacher_field
from slm.distill.wanted import Wanted, cache_spec, misfit, misfits, open_cache, wanted_caches
from slm.errors import CorruptArtefact, SLMError, UserError
from slm.losses import IGNORE
from slm.pictures import check_picture, save_picture
from slm.recipe import Recipe

_BLOCKS = 32  # that stats and diff look at, evenly spread over a cache: with their checksums that is a GB at the most
_ROWS = 16384  # of these, for stats
_CHUNK = 1 << 20


def verify(recipe: Recipe, *, repair: bool = False) -> list[SLMError]:
    """Reads everything; what is wrong: missing, damaged by block, of other settings, or of other tokens.

    repair: damaged blocks are marked as missing, so that slm teacher makes only them again.
    """
    problems: list[SLMError] = []
    wanted = list(wanted_caches(recipe))
    identities = _identities(recipe, wanted)
    console = Console(stderr=True)
    with Progress(transient=True, console=console, disable=not console.is_terminal) as progress:
        for w in progress.track(wanted, description="verifying"):
            try:
                cache = open_cache(w, allow_partial=True)
            except SLMError as error:
                problems.append(error)
                continue
            problems += [misfit(w, problem) for problem in _misfits(recipe, identities, cache, w)]
            by_block = cache.verify()
            damaged = [block for block in by_block if not cache.missing[block]]
            if damaged and repair:
                cache.forget(damaged)
            for block, problem in by_block.items():
                marked = cache.missing[block] or repair
                problems.append((UserError if marked else CorruptArtefact)(problem, fix=_MAKE if marked else REPAIR))
            problems += [] if damaged else _misaligned(cache, w)
    return problems


_MAKE = "slm teacher RECIPE, which makes the missing and the damaged blocks, and only them"


def _identities(recipe: Recipe, wanted: list[Wanted]) -> dict[str, dict[str, Any] | None]:
    """Of each teacher, once for all its shards: a fingerprint reads a part of every file of weights. None: no longer there."""
    models = {w.teacher: recipe.teacher[w.teacher].model for w in wanted}
    return {name: describe_teacher(model).identity if Path(model).exists() else None for name, model in models.items()}


def _misfits(recipe: Recipe, identities: dict[str, dict[str, Any] | None], cache: Cache, w: Wanted) -> list[str]:
    """A teacher that is no longer there is taken to be the one that made it."""
    identity = identities[w.teacher] or cache.spec.teacher
    return misfits(cache.spec, cache_spec(recipe.teacher[w.teacher], identity, w))


def _to_look_at(recipe: Recipe) -> Iterator[tuple[Wanted, Cache, np.ndarray]]:
    """The recipe's caches, opened one at a time."""
    wanted = list(wanted_caches(recipe))
    identities = _identities(recipe, wanted)
    for w in wanted:
        yield w, *_open_to_look_at(recipe, identities, w)


def _open_to_look_at(
    recipe: Recipe, identities: dict[str, dict[str, Any] | None], w: Wanted
) -> tuple[Cache, np.ndarray]:
    """A cache that may be partial, and those of its blocks that are looked at, which are whole.

    Raises UserError if it is not the recipe's, or empty; CorruptArtefact if a block is damaged.
    """
    cache = open_cache(w, allow_partial=True)
    if problems := _misfits(recipe, identities, cache, w):
        raise misfit(w, problems[0])
    there = np.flatnonzero(~cache.missing & (np.diff(cache.bounds) > 0))
    if not len(there):
        raise UserError(
            f"{cache.path} holds no complete block yet, so there is nothing to show", fix="slm teacher RECIPE"
        )
    blocks = there[np.unique(np.linspace(0, len(there) - 1, min(_BLOCKS, len(there))).astype(np.int64))]
    cache.check_blocks(blocks.tolist())
    return cache, blocks


def _misaligned(cache: Cache, w: Wanted) -> Iterator[SLMError]:
    """Every row that is there must carry the tag of its own token and the next."""
    shard = w.dataset.shards[w.shard]
    starts, lengths, is_last = pieces_of(shard.doc_offsets, cache.spec.piece_length)
    ends = np.zeros(shard.num_tokens, dtype=bool)
    ends[(starts + lengths - 1)[is_last]] = True
    wrong, first = 0, -1
    for low in range(0, shard.num_tokens, _CHUNK):
        high = min(low + _CHUNK, shard.num_tokens)
        following = np.full(high - low, -1, dtype=np.int64)
        known = ~ends[low:high]
        following[known] = shard.tokens[np.flatnonzero(known) + low + 1]
        tags = token_tags(shard.tokens[low:high].astype(np.int64), following, np.arange(low, high))
        bad = np.flatnonzero((tags != cache.plane("tag")[low:high]) & ~cache.missing_at(np.arange(low, high)))
        wrong += len(bad)
        first = low + int(bad[0]) if first < 0 and len(bad) else first
    if wrong:
        yield CorruptArtefact(
            f"{w.path}: {wrong} rows belong to other tokens than the shard's, the first is row {first}", fix=ANEW
        )


def stats(recipe: Recipe, *, most: int | None = None) -> list[dict[str, Any]]:
    """Per cache: size, the teacher's own loss and entropy, and the mass that its likeliest k hold, by k and temperature.

    most: of so many caches, the first ones; all, if None.
    """
    return [_stats_of(cache, blocks, w) for w, cache, blocks in islice(_to_look_at(recipe), most)]


def _stats_of(cache: Cache, blocks: np.ndarray, w: Wanted) -> dict[str, Any]:
    spec, totals = cache.spec, cache.totals()
    each = -(-_ROWS // len(blocks))
    ranges = [
        np.linspace(a, b - 1, min(each, b - a))
        for a, b in zip(cache.bounds[blocks], cache.bounds[blocks + 1], strict=True)
    ]
    places = np.concatenate(ranges).astype(np.int64)
    places = places[cache.plane("tag")[places] != 0]  # a piece of one token at a document's end has no row
    rows = RawTargets.of(spec.kind, spec.temperatures, cache.rows(places))
    head_mass: dict[str, dict[float, float]] = {}
    for i, temperature in enumerate(spec.temperatures):
        if spec.kind == "top_k":
            _, log_p_NK, _ = rows.decode(temperature)
            cumulative = log_p_NK.exp().cumsum(1).mean(0)
            ks = sorted({k for k in (1, 2, 4, 8, 12, 16, 32, 64, 128, 256, 512, 1024, spec.k) if k <= spec.k})
            head_mass[f"{temperature:g}"] = {k: float(cumulative[k - 1]) for k in ks}
        else:
            log_tail = cache.plane("log_tail")[places, i]
            heads = round(float(cache.plane("heads")[places, i].mean()), 1)
            head_mass[f"{temperature:g}"] = {heads: float(-np.expm1(log_tail).mean())}
    return {
        "path": str(w.path),
        "teacher": w.teacher,
        "kind": spec.kind,
        "k": spec.k,
        "piece_length": spec.piece_length,
        "tokens": spec.num_tokens,
        "missing_tokens": cache.num_missing_tokens,
        "bytes_per_token": spec.bytes_per_token,
        "teacher_loss": totals.nll / max(1, totals.num_targets),
        "entropy": totals.entropy / max(1, totals.num_targets),
        "head_mass": head_mass,
    }


def warnings_of(row: dict[str, Any]) -> list[str]:
    if row["kind"] != "top_k":
        return []
    return [
        f"{row['path']}: at temperature {temperature} its {row['k']} entries hold {list(masses.values())[-1]:.0%} of the mass, "
        "less than half: what is left is one bucket without a shape; use a larger k, kind: sampled, or a lower temperature"
        for temperature, masses in row["head_mass"].items()
        if list(masses.values())[-1] < 0.5
    ]


def draw(rows: list[dict[str, Any]]) -> None:
    """On the terminal."""
    console = Console()
    for r in rows:
        missing = r["missing_tokens"] / max(1, r["tokens"])
        console.print(f"[bold]{escape(r['path'])}[/bold]", soft_wrap=True, highlight=False)
        console.print(
            f"teacher {escape(r['teacher'])}, {r['kind']} {r['k']}, pieces of up to {r['piece_length']:,} tokens: "
            f"{r['tokens']:,} tokens{f', {missing:.1%} missing' if missing else ''}, {r['bytes_per_token']} bytes a token; the "
            f"teacher's loss {r['teacher_loss']:.4f}, entropy {r['entropy']:.4f} nats",
            highlight=False,
        )
        what = "mass of the likeliest k" if r["kind"] == "top_k" else "mass of the exact entries; the rest is drawn"
        table = Table("temperature", "k" if r["kind"] == "top_k" else "exact entries, mean", what)
        for temperature, masses in r["head_mass"].items():
            for k, mass in masses.items():
                table.add_row(temperature, f"{k:,}", "█" * round(mass * 40) + f" {mass:.1%}")
        console.print(table)
        for warning in warnings_of(r):
            console.print(f"Warning: {escape(warning)}", style="yellow", soft_wrap=True)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """The mass of the likeliest k against k, a line for each cache and temperature, as a PNG, SVG or PDF."""
    check_picture(path)
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for r in rows:
        for temperature, masses in r["head_mass"].items():
            label = f"{r['teacher']}, {Path(r['path']).stem}, {r['piece_length']} tokens, T={temperature}"
            axes.plot(list(masses), list(masses.values()), marker="o", label=label)
    axes.axhline(0.5, color="grey", linewidth=0.8, linestyle=":")
    axes.set(xlabel="k likeliest tokens", ylabel="mean mass of the teacher", ylim=(0, 1.02))
    axes.set_xscale("symlog", linthresh=1)  # a sample may have no exact entry
    axes.set_title("How much of the teacher the cache's entries hold")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save_picture(figure, path)
    console = Console(stderr=True)
    console.print(f"wrote {escape(str(path))}", soft_wrap=True, highlight=False)


def diff(recipe: Recipe, num_tokens: int = 8192) -> list[dict[str, Any]]:
    """Each cache against its live teacher on about num_tokens tokens, evenly spread: what was lost, in nats.

    codec: KL(exact, decoded) over the k entries and the bucket. truncation: what the bucket does not tell, KL of the tail
    to a uniform one, times its mass. control: the live teacher against itself, one piece a row instead of packed.
    """
    device = parallel.local_device(0)
    found = []
    loaded: dict[str, TeacherModel] = {}
    for w, cache, blocks in list(_to_look_at(recipe)):  # all of them, before a teacher is loaded
        settings = recipe.teacher[w.teacher]
        if w.teacher not in loaded:
            if settings.zero3:
                raise UserError(
                    f"{teacher_field(w.teacher)}.zero3 is true, and diff runs a teacher on one device",
                    fix="compare on a machine that holds it, with zero3=false",
                )
            info = describe_teacher(settings.model)
            check_teacher(settings.model, info, w.dataset.vocab_size, w.dataset.tokenizer_fingerprint)
            loaded = {w.teacher: load_teacher(settings.model, device)}
        found.append(_diff_of(cache, blocks, w, loaded[w.teacher], device, num_tokens))
    return found


def _diff_of(
    cache: Cache, blocks: np.ndarray, w: Wanted, model: TeacherModel, device: torch.device, num_tokens: int
) -> dict[str, Any]:
    shard, spec = w.dataset.shards[w.shard], cache.spec
    starts, lengths, is_last = pieces_of(shard.doc_offsets, spec.piece_length)
    useful = np.flatnonzero((lengths > 1) & np.isin(cache.block_of(starts), blocks))
    every = max(1, int(lengths[useful].sum()) // num_tokens)
    sums: dict[str, float] = {}
    worst = 0.0
    count = 0
    console = Console(stderr=True)
    with Progress(transient=True, console=console, disable=not console.is_terminal) as progress:
        for piece in progress.track(useful[::every].tolist(), description=f"comparing {w.path.name}"):
            start, end = int(starts[piece]), int(starts[piece] + lengths[piece])
            ids = shard.tokens[start:end]
            batch = assemble([[(ids, None if is_last[piece] else int(shard.tokens[end]))]], len(ids), 0, 1)
            again = assemble([[(ids, None)], [(ids, None)]], len(ids), 0, 1)
            live_NV, twice_NV = (
                _log_probabilities(model, b.to(device), spec.vocab_size)[: len(ids)] for b in (batch, again)
            )
            rows = RawTargets.of(spec.kind, spec.temperatures, cache.rows(slice(start, end))).to(device)
            inside = (batch.labels_BT.flatten() != IGNORE).to(device)
            for i, temperature in enumerate(spec.temperatures):
                part = _costs(live_NV[inside], rows, i, temperature, inside)
                for name, value_N in part.items():
                    sums[f"{name} T={temperature:g}"] = sums.get(f"{name} T={temperature:g}", 0.0) + float(
                        value_N.sum()
                    )
                    worst = max(worst, float(value_N.max())) if name == "codec" else worst
            control_N = (live_NV.exp() * (live_NV - twice_NV)).sum(1)[inside]
            sums["control"] = sums.get("control", 0.0) + float(control_N.sum())
            stored_N = cache.plane("label")[start:end].astype(np.float32)[inside.cpu().numpy()]
            labels = batch.labels_BT.flatten().to(device)[inside]
            exact_N = live_NV[inside].gather(1, labels[:, None])[:, 0]
            sums["label"] = sums.get("label", 0.0) + float((exact_N.cpu() - torch.from_numpy(stored_N)).abs().sum())
            entropy = -(live_NV.exp() * live_NV).sum(1)[inside]
            sums["entropy"] = sums.get("entropy", 0.0) + float(entropy.sum())
            count += int(inside.sum())
    sums |= {n.replace("codec", "codec per nat", 1): v / max(1e-9, sums["entropy"]) * count
             for n, v in sums.items() if n.startswith("codec")}  # fmt: skip
    means = {name: total / max(1, count) for name, total in sums.items()}
    return {"path": str(w.path), "tokens": count, **means, **({"codec_max": worst} if spec.kind == "top_k" else {})}


@torch.no_grad()
def _log_probabilities(model: TeacherModel, batch: Any, vocab_size: int) -> torch.Tensor:
    parts: list[torch.Tensor] = []
    model.visit(batch, lambda first, logits_CV: parts.append(logits_CV[:, :vocab_size].float().log_softmax(1)))
    return torch.cat(parts)


def _costs(
    live_NV: torch.Tensor, rows: RawTargets, plane: int, temperature: float, inside: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Nats by token. live_NV: the teacher's log-probabilities at T = 1."""
    log_p_NV = (live_NV / temperature).log_softmax(1)
    index_NK, decoded_NK, log_tail_N = (None if x is None else x[inside] for x in rows.decode(temperature))
    assert index_NK is not None
    assert decoded_NK is not None
    p_NV = log_p_NV.exp()
    exact_NK = log_p_NV.gather(1, index_NK)
    if log_tail_N is None:  # a sample: unbiased, so its distance from the teacher is noise
        target_NV = torch.zeros_like(p_NV).scatter_(1, index_NK, decoded_NK.exp())
        return {"noise": ((target_NV - p_NV) ** 2).sum(1)}
    tail_NV = log_p_NV.scatter(1, index_NK, -math.inf)
    exact_tail_N = tail_NV.logsumexp(1)
    rho_N = exact_tail_N.exp()
    codec_N = (exact_NK.exp() * (exact_NK - decoded_NK)).sum(1)
    codec_N += torch.where(rho_N > 0, rho_N * (exact_tail_N - log_tail_N), 0.0)
    shape_NV = tail_NV - exact_tail_N[:, None]
    entropy_N = -torch.where(shape_NV > -math.inf, shape_NV.exp() * shape_NV, 0.0).sum(1)
    left = live_NV.shape[1] - index_NK.shape[1]
    truncation_N = rho_N * (math.log(max(1, left)) - entropy_N)
    return {"codec": codec_N, "truncation": truncation_N}


def draw_diff(rows: list[dict[str, Any]]) -> None:
    """On the terminal; nats by token, means but for the last."""
    for r in rows:
        table = Table(title=escape(f"{r['path']}: {r['tokens']:,} tokens"), title_justify="left")
        table.add_column("what")
        table.add_column("mean over tokens", justify="right")
        for name, value in r.items():
            kind = next((k for k in _TOLD if name.startswith(f"{k} ") or name == k), "")
            if kind in _TOLD:
                table.add_row(f"{_TOLD[kind]}{name[len(kind) :]}", f"{value:.3g}")
        Console().print(table)


# What a number of diff is: its key in the JSON, and in words.
_TOLD = {
    "codec per nat": "lost by 8-bit values, nats for each nat of the teacher's entropy",
    "codec": "lost by 8-bit values, nats: KL(teacher, cache) over the entries and the rest",
    "codec_max": "the same, of the worst token",
    "truncation": "not told by the bucket, nats: KL(the teacher's tail, a flat one), times its mass",
    "noise": "a sample's squared distance from the teacher, probabilities; nothing on the average",
    "control": "the teacher against itself in another batch, nats: what no cache could do better",
    "label": "error of the stored log-probability of the next token, nats",
    "entropy": "the teacher's entropy, nats",
}
