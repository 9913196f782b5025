"""`slm doctor`: what is wrong with a machine, or with all of a cluster's, before a run; everything it says it has measured.

Owns the order of the checks, the comparison of nodes, what a recipe needs, and the table. One machine's checks are
doctor_node.py's; how ranks meet and what is measured between them is in doctor_meeting.py and doctor_ranks.py.

    exit_code = examine(load_recipe("recipes/demo.yaml"), Path("runs"), as_json=False)      # 0, or 3 if something is wrong
"""

from __future__ import annotations

import json
import os
import sys
import urllib.error
import urllib.request
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from slm.doctor_node import OK, WARNING, WRONG, Check, apart, look, operators
from slm.errors import EnvironmentProblem, SLMError
from slm.installed import facts
from slm.recipe import Recipe
from slm.redact import redacted_in
from slm.runtime import discover_ranks
from slm.strategy import read_deepspeed

_ORDER = (WRONG, WARNING, OK)
# What the ranks of one run must have alike, beside versions: another value is another run, or none.
_SAME_EVERYWHERE = (
    "DS_ACCELERATOR",
    "CUBLAS_WORKSPACE_CONFIG",
    "NCCL_PROTO",
    "NCCL_ALGO",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING",
)
_NODES_NAMED = 8


def examine(recipe: Recipe | None, folder: Path, *, try_seconds: float = 60.0, as_json: bool = False) -> int:
    """The checks of this rank's part; rank 0 prints them. try_seconds: the longest that one measurement between ranks may take.
    The exit code is the same on every rank."""
    # is_available() would otherwise start CUDA here, after which no child (doctor_node.apart) could use it.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    ranks = discover_ranks()
    speaks = ranks.rank == 0

    def say(what: str) -> None:
        if speaks:
            print(f"measuring: {what}", file=sys.stderr, flush=True)

    from slm.doctor_meeting import Absent, Meeting, node_name
    from slm.doctor_ranks import measure, rates_of_ranks

    try:
        meeting = Meeting(ranks, try_seconds)
    except RuntimeError as error:  # torch's DistNetworkError
        where = f"{os.environ['MASTER_ADDR']}, port {os.environ['MASTER_PORT']}"
        what = "cannot listen at" if speaks else "does not reach rank 0 at"
        raise EnvironmentProblem(
            f"rank {ranks.rank} on {node_name()} {what} {where}: {str(error).splitlines()[0]}",
            fix="take another port"
            if speaks
            else "see whether that address is rank 0's machine as this one sees it, and the port is open between them",
        ) from None
    rows: list[tuple[str, Check]] = []
    made_folder = not folder.exists()
    try:
        meeting.meet(node_name())
        nodes = meeting.nodes
        name = meeting.names[ranks.rank]
        mine: list[Check] = []
        say(f"{len(nodes)} machine{'s' * (len(nodes) > 1)}: {', '.join(nodes)}")
        if nodes[name][0] == ranks.rank:
            mine = _of_this_machine(recipe, folder)
        for rank, found in enumerate(meeting.share("checks", [asdict(check) for check in mine], 1000.0)):
            rows += [(meeting.names[rank], Check(**check)) for check in found]
        rows += [
            ("all", check) for check in _differences(meeting.share("facts", facts() | _environment()), meeting.names)
        ]
        counted = meeting.share("GPUs", _count_gpus(), 300.0)
        rows += [("all", check) for check in _of_counts(counted, meeting.names)]
        backend = "nccl" if all(isinstance(number, int) and number for number in counted) else "gloo"
        say("arithmetic on every rank")
        rows += [("all", check) for check in rates_of_ranks(meeting, backend)]
        if ranks.world_size > 1:
            rows += [("all", check) for check in measure(meeting, folder, backend, say)]
    except Absent as absent:
        names = sorted({meeting.names[rank] for rank in absent.ranks}) if meeting.names else []
        told = f"{absent}{f' (on {chr(44).join(names)})' if names else ''}"
        rows.append(("all", Check("ranks", WRONG, told, "see what they printed, and whether their machines are up")))
        if not speaks:
            return EnvironmentProblem.exit_code
    code = EnvironmentProblem.exit_code if any(check.state == WRONG for _, check in rows) else 0
    if speaks:
        _show(rows, ranks.world_size, as_json)
        if made_folder:
            with suppress(OSError):  # another rank's
                folder.rmdir()
    try:
        return meeting.leave(code)
    except Absent:
        return EnvironmentProblem.exit_code


def _of_this_machine(recipe: Recipe | None, folder: Path) -> list[Check]:
    try:
        return [*look(folder), operators(_zero_sections(recipe)), *(_needed_by(recipe) if recipe else [])]
    except Exception as error:  # the other machines wait for an answer
        return [Check("this machine", WRONG, f"{type(error).__name__}: {error}", "run slm doctor there, alone")]


def _count_gpus() -> int | str:
    """That a run would use on this machine; or why they cannot be counted, as where a driver hangs."""
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return 0
    try:
        return apart(120, _ask_torch)
    except (RuntimeError, TimeoutError) as error:
        return str(error)


def _ask_torch() -> int:
    import torch

    return torch.cuda.device_count()


def _of_counts(counted: list[int | str], names: list[str]) -> list[Check]:
    failed = {name: number for name, number in zip(names, counted, strict=True) if isinstance(number, str)}
    if failed:
        told = "; ".join(f"{name}: {why}" for name, why in failed.items())
        return [Check("GPUs of torch", WRONG, told, "see nvidia-smi there, and dmesg")]
    if min(map(bool, counted)) != max(map(bool, counted)):
        without = _listed(sorted({name for name, number in zip(names, counted, strict=True) if not number}))
        return [Check("GPUs of torch", WRONG, f"none on {without}, and others have some", "see nvidia-smi there")]
    return []


def _environment() -> dict[str, str]:
    return {name: os.environ.get(name, "") for name in _SAME_EVERYWHERE}


def _differences(by_rank: list[dict[str, str]], names: list[str]) -> list[Check]:
    """Versions and variables that are not the same on all ranks, by who has which."""
    checks = []
    for what in by_rank[0]:
        who: dict[str, list[str]] = {}
        for found, name in zip(by_rank, names, strict=True):
            who.setdefault(found[what] or "none", []).append(name)
        if len(who) > 1:
            told = "; ".join(f"{value} on {_listed(sorted(set(nodes)))}" for value, nodes in who.items())
            checks.append(
                Check(f"{what} differs", WRONG, told, "make the nodes alike: the same environment, the same clone")
            )
    if not checks and len(set(names)) > 1:
        checks = [Check("versions", OK, f"the same on all {len(set(names))} nodes: {', '.join(by_rank[0])}")]
    return checks


# --- what a recipe needs -------------------------------------------------------------------------------------


def _zero_sections(recipe: Recipe | None) -> list[dict[str, Any]]:
    sections = [read_deepspeed(phase.deepspeed)["zero_optimization"] for phase in recipe.phases] if recipe else []
    compiled = ("offload_optimizer", "zero_quantized_weights", "zero_quantized_gradients")
    return [section for section in sections if any(section.get(name) for name in compiled)]


def _needed_by(recipe: Recipe) -> list[Check]:
    from slm.data.tokens import TokenDataset
    from slm.tokenizer import load_tokenizer

    checks = []

    def opened(what: str, path: str, function: Any) -> None:
        try:
            checks.append(Check(what, OK, f"{path}: {function()}"))
        except SLMError as error:
            checks.append(Check(what, WRONG, error.problem, error.fix))
        except Exception as error:
            checks.append(Check(what, WRONG, f"{path}: {error}", "see whether it is there, and whole"))

    def tokens(path: str) -> str:
        dataset = TokenDataset(path)
        return f"{dataset.num_tokens:,} tokens in {len(dataset.shards)} shards"

    if recipe.tokenizer:
        opened("tokenizer", recipe.tokenizer, lambda: f"{len(load_tokenizer(recipe.tokenizer)):,} entries")
    for kind, datasets in {"data": recipe.data.sources, "validation": recipe.data.validation}.items():
        for name, path in datasets.items():
            opened(f"{kind} {name}", path, lambda path=path: tokens(path))
    checks.append(_room_for_checkpoints(recipe))
    wandb = recipe.log.wandb
    if wandb is not None and wandb.mode == "online":
        checks.append(_reaches(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")))
    return checks


def _room_for_checkpoints(recipe: Recipe) -> Check:
    """As a run asks before its first step, too."""
    from slm.room import room

    found = room(recipe.run_dir, recipe, recipe.phases)
    one, free = found.each_bytes, found.free_bytes
    told = f"{free / 2**30:.1f} GiB free in {found.folder}; still to come at once (keep_last, the next one, "
    told += f"ends of phases, the best): {found.num} checkpoint{'s' * (found.num > 1)} of {one / 2**30:.3g} GiB"
    hopeless = free < one and recipe.checkpoint.on_failure == "stop"
    state = WRONG if hopeless else OK if found.is_enough else WARNING
    return Check("room for checkpoints", state, told, "free space there, give output another disk, or keep fewer")


def _reaches(url: str) -> Check:
    fix = "open the way, or log.wandb.mode=offline and `wandb sync` later"
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            told = f"{url} answers ({answer.status})"
    except urllib.error.HTTPError as error:  # it has answered
        told = f"{url} answers ({error.code})"
    except (OSError, ValueError) as error:
        return Check("W&B", WRONG, f"{url}: {getattr(error, 'reason', error)}", fix)
    return Check("W&B", OK, told)


# --- what is shown -------------------------------------------------------------------------------------------


def _show(rows: list[tuple[str, Check]], world_size: int, as_json: bool) -> None:
    wrong = sum(check.state == WRONG for _, check in rows)
    if as_json:
        found = [{"node": node, **asdict(check)} for node, check in rows]
        print(json.dumps(redacted_in({"wrong": wrong, "ranks": world_size, "checks": found}), indent=2))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    joined: dict[tuple[str, str, str, str], list[str]] = {}
    for node, check in sorted(rows, key=lambda row: _ORDER.index(row[1].state)):
        joined.setdefault((check.state, check.name, check.measured, check.fix), []).append(node)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("", "what", "where", "measured"):
        table.add_column(title, overflow="fold", no_wrap=title in ("", "what"))
    colours = {WRONG: "bold red", WARNING: "yellow", OK: "green"}
    for (state, name, measured, fix), nodes in joined.items():
        text = Text(measured)
        if fix and state != OK:
            text.append(f"\n-> {fix}", "bold")
        table.add_row(Text(state, colours[state]), name, _listed(nodes), text)
    console = Console()
    if not console.is_terminal:
        console = Console(width=150)
    console.print(table)
    warnings = sum(check.state == WARNING for _, check in rows)
    console.print(f"{wrong} wrong, {warnings} to look at, {len(rows) - wrong - warnings} ok", highlight=False)
    if world_size == 1:
        console.print(
            "This was one process. Under a launcher, on as many ranks as a run, it also measures clocks, shared files and the "
            "network (docs/distributed.md)",
            highlight=False,
        )


def _listed(names: list[str]) -> str:
    more = len(names) - _NODES_NAMED
    return ", ".join(names[:_NODES_NAMED]) + (f" and {more} more" if more > 0 else "")
