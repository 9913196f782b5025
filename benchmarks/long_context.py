"""Does context extension work: from 128 to 1,024 tokens with each RoPE scaling, against not scaling at all.

    python benchmarks/long_context.py --json long.json --plot long.png      # hours on 2 cores; --main: what has an aim
    python benchmarks/long_context.py --arms yarn-100-0,none-100-0          # these arms (and the base that they need)
    python benchmarks/long_context.py --show                                # the table of what is there
    python benchmarks/long_context.py --trial                               # a trial of the script, no result

Every arm is `slm train` on phases of recipes/long-context-toy.yaml, in a process of its own: a base of 0.36 M parameters at 128
tokens for each seed, and from it 256 tokens (factor 2) and 1,024 (factor 8). Names: SCALING-STEPS-SEED, STEPS of the phase at
256 (the one at 1,024 has 100); `short`, the second control, trains for the same steps at 128; zero-SCALING-SEED is the base,
untrained, under a scaling; sequence-1 and sequence-2 are a yarn arm of few steps by one rank and by two that share each sequence.

Measured on held-out files: pass keys at 1,024, 100 needles in each tenth of the depth (by the loop's own evaluation); loss by
position, in text that fills 1,024 tokens; and the loss of the same text cut at 128 (`short`).

What it does not say: a toy's needles are bytes that no text holds, which is easier than a pass key in words; few steps are the
point, since with more of them the control catches up; `dynamic` at a fixed length is `ntk`, and differs on shorter input alone.
`longrope` is left out: its factors come from a search.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from long_context_data import make_data
from rich.console import Console
from rich.table import Table
from side_by_side import REPOSITORY, call, machine

from slm.recipe import load_recipe

RECIPE = REPOSITORY / "recipes" / "long-context-toy.yaml"
ORIGINAL, LONG, STEP_TOKENS = 128, 1024, 4096
SCALINGS = ("none", "linear", "dynamic", "ntk", "theta", "yarn", "llama3")
THETA = 500000.0
EARLY, LATE = (64, 128), (900, 1024)  # tokens seen, for the loss by position
BIN = 64
MEASURED = ("extend", "short", "zero")  # kinds whose losses `measure` finds


@dataclass(frozen=True)
class Arm:
    """kind: base, extend, short, zero or sequence. steps: of the first phase of an extension."""

    name: str
    kind: str
    scaling: str = "none"
    steps: int = 0
    seed: int = 0


def arm(name: str) -> Arm:
    """By its name. Raises ValueError."""
    first, *rest = name.split("-")
    if first == "base":
        return Arm(name, "base", seed=int(rest[0]))
    if first == "sequence":
        return Arm(name, "sequence", "yarn", steps=int(rest[0]))
    if first == "zero" and rest[0] in SCALINGS:
        return Arm(name, "zero", rest[0], seed=int(rest[1]))
    if first in (*SCALINGS, "short"):
        return Arm(name, "short" if first == "short" else "extend", first, int(rest[0]), int(rest[1]))
    raise ValueError(
        f"{name!r} is no arm: give base-SEED, SCALING-STEPS-SEED, short-STEPS-SEED, zero-SCALING-SEED, sequence-N"
    )


def all_arms(*, main: bool, seeds: int) -> list[str]:
    """In the order in which they are worth running. main: those that have an aim, or are needed for one."""
    names = [
        "yarn-100-0",
        "none-50-0",
        "llama3-100-0",
        "short-100-0",
        "zero-none-0",
        "zero-yarn-0",
        "ntk-100-0",
        "theta-100-0",
    ]
    names += ["none-100-0", "sequence-1", "sequence-2"]
    for seed in range(1, seeds):
        names += [f"{s}-100-{seed}" for s in ("yarn", "llama3", "short")] + [f"none-50-{seed}"]
    if not main:
        names += ["linear-100-0", "dynamic-100-0", *(f"zero-{s}-0" for s in SCALINGS if s not in ("none", "yarn"))]
        names += [f"{s}-50-0" for s in ("yarn", "llama3", "ntk", "theta", "linear", "dynamic")]
        for seed in range(1, seeds):
            names += [f"none-100-{seed}", f"yarn-50-{seed}", f"llama3-50-{seed}"]
    return names


def scaled(scaling: str, factor: float) -> dict[str, Any]:
    if scaling in ("none", "short"):
        return {"rope_type": "default"}
    if scaling == "theta":
        return {"rope_type": "theta", "rope_theta": THETA}
    return {"rope_type": scaling, "factor": factor, "original_max_position_embeddings": ORIGINAL}


def recipe_of(a: Arm, work: Path, *, trial: bool = False) -> dict[str, Any]:
    """The recipe's own tree with this arm's phases; one rank takes each batch at once."""
    tree = load_recipe(RECIPE).model_dump(mode="json")
    phases = {phase["name"]: phase for phase in tree["phases"]}
    tree |= {"name": a.name, "output": str(work / a.name), "seed": a.seed}
    data = work / "data"
    tree["tokenizer"] = str(data / "tokenizer")
    tree["data"] = {
        key: {name: str(data / Path(path).name) for name, path in rows.items()} for key, rows in tree["data"].items()
    }
    recall = tree["eval"]["recall"]
    recall |= {"samples": 3 if trial else 100, "lengths": [ORIGINAL if a.kind in ("base", "short") else LONG]}
    tree["eval"] |= {"every_steps": 0, "max_sequences": 128, "seq_lens": []}
    if a.kind == "base":
        names = ["learn", "find", "base"]
    elif a.kind == "zero":
        names = ["long"]
        phases["long"] |= {"tokens": STEP_TOKENS, "rope_scaling": scaled(a.scaling, LONG / ORIGINAL), "lr": 1e-8}
        phases["long"]["schedule"] = {"type": "constant"}
        tree["eval"] |= {"at_start": True}
    else:
        names = ["middle", "long"]
        for name, steps in (("middle", a.steps), ("long", 100)):
            phases[name] |= {
                "tokens": steps * STEP_TOKENS,
                "rope_scaling": scaled(a.scaling, phases[name]["seq_len"] / ORIGINAL),
            }
    if a.kind == "short":  # the same steps and tokens, at the old length
        for name in names:
            phases[name] |= {"seq_len": ORIGINAL, "filters": phases["base"]["filters"]}
    if a.kind == "sequence":
        for name in names:
            phases[name] |= {"tokens": (2 if trial else 10) * STEP_TOKENS, "sequence_parallel": a.steps}
        tree["eval"] |= {"recall": None, "max_sequences": 8}
        tree["log"] = {"every_steps": 1}
    if a.kind != "base":
        tree["init_from"] = {"path": str(work / f"base-{a.seed}"), "optimizer": True}
    tree["phases"] = [phases[name] for name in names]
    for phase in tree["phases"]:
        phase["micro_batch"] = phase["batch_tokens"] // phase["seq_len"]
        if trial:
            phase["tokens"] = min(phase["tokens"], 3 * phase["batch_tokens"])
            phase["schedule"] = {"type": "constant"}
    return tree


def is_done(run: Path) -> bool:
    return (run / "exit.json").is_file() and json.loads((run / "exit.json").read_text())["code"] == 0


def run_arm(name: str, work: Path, *, trial: bool) -> None:
    """Trains it, if that is not done, and measures the losses."""
    a, run, log = arm(name), work / name, work / f"{name}.log"
    if not is_done(run):
        path = work / f"{name}.yaml"
        path.write_text(yaml.safe_dump(recipe_of(a, work, trial=trial), sort_keys=False))
        launcher = [sys.executable, "-m", "slm"]
        if name == "sequence-2":
            launcher = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc_per_node",
                "2",
                "-m",
                "slm",
            ]
        call(*launcher, "train", path, log=log)
    if a.kind in MEASURED and not (run / "losses.json").is_file():
        call(sys.executable, Path(__file__).resolve(), "--measure", run, log=log)


def measure(run: Path) -> None:
    """RUN/losses.json, nats per token of held-out text: in text that fills 1,024, by bins of 64 positions and in EARLY and LATE;
    and cut at 128, the same text for all arms (the loop's own evaluation takes equally many sequences of every length)."""
    import torch

    from slm import checkpoint
    from slm.data.batches import EvaluationBatches
    from slm.data.tokens import TokenDataset
    from slm.loading import ModelScorer, load_model
    from slm.losses import IGNORE

    torch.set_num_threads(1)
    model, state = load_model(checkpoint.locate(run), exact=True)
    [folder] = state["recipe"]["data"]["validation"].values()

    def sums(length: int, *, whole: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """(nats, labels) by position, in 131,072 tokens; whole: of pieces that fill their sequence."""
        sums_T, counts_T = (torch.zeros(length, dtype=torch.float64) for _ in range(2))
        for batch in EvaluationBatches(TokenDataset(folder), length, 4096 // length, max_sequences=131072 // length):
            loss_BT = ModelScorer(model).token_losses(batch).double()
            used_BT = batch.labels_BT != IGNORE
            if whole:
                used_BT &= batch.is_one_piece_B[:, None]
            sums_T += (loss_BT * used_BT).sum(0)
            counts_T += used_BT.sum(0)
        return sums_T, counts_T

    sums_T, counts_T = sums(ORIGINAL, whole=False)
    found: dict[str, Any] = {"short": float(sums_T.sum() / counts_T.sum())}
    if arm(run.name).kind != "short":
        sums_T, counts_T = sums(LONG, whole=True)

        def mean(first: int, end: int) -> float:
            return float(sums_T[first:end].sum() / counts_T[first:end].sum())

        bins = [mean(at, at + BIN) for at in range(0, LONG, BIN)]
        found |= {"early": mean(*EARLY), "late": mean(*LATE), "bins": bins}
    (run / "losses.json").write_text(json.dumps(found) + "\n")


def found_of(name: str, work: Path) -> dict[str, Any] | None:
    """What a finished arm found; None if it is not there."""
    a, run = arm(name), work / name
    if not is_done(run) or (a.kind in MEASURED and not (run / "losses.json").is_file()):
        return None
    if a.kind == "sequence":
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return {"losses": [row["loss"] for row in rows if "loss" in row]}
    reports = sorted((run / "eval").glob(f"{'base' if a.kind == 'base' else 'long'}-*.json"))
    tree = json.loads(reports[0 if a.kind == "zero" else -1].read_text())
    accuracy = [row["accuracy"] for row in tree["recall"]]
    row = {"deciles": accuracy, "accuracy": statistics.mean(accuracy), "worst": min(accuracy)}
    return row | (json.loads((run / "losses.json").read_text()) if a.kind in MEASURED else {})


# --- the table -----------------------------------------------------------------------------------------------


def aims(found: dict[str, dict[str, Any]]) -> list[tuple[str, str, bool | None]]:
    """(aim, what was measured, whether it is met; None where nothing was measured)."""
    rows: list[tuple[str, str, bool | None]] = []

    def of(*starts: str) -> list[dict[str, Any]]:
        return [row for name, row in found.items() if name.startswith(starts)]

    def add(aim: str, values: list[float], limit: float, *, at_least: bool = False, percent: bool = False) -> None:
        worst = (min(values) if at_least else max(values)) if values else None
        met = None if worst is None else worst >= limit if at_least else worst <= limit
        shown = ", ".join(
            f"{100 * x:.1f}" if percent else f"{x:+.3f}" if abs(x) >= 1e-3 else f"{x:+.1g}" for x in values
        )
        rows.append((aim, shown or "not run", met))

    add("base at 128 >= 99 %", [r["accuracy"] for r in of("base-")], 0.99, at_least=True, percent=True)
    for scaling, mean, decile in (
        ("yarn", 0.98, 0.95),
        ("llama3", 0.98, 0.95),
        ("ntk", 0.95, 0.85),
        ("theta", 0.95, 0.85),
    ):
        rows_of = of(f"{scaling}-100-")
        add(f"{scaling} mean >= {mean:.0%}", [r["accuracy"] for r in rows_of], mean, at_least=True, percent=True)
        add(
            f"{scaling} every decile >= {decile:.0%}",
            [r["worst"] for r in rows_of],
            decile,
            at_least=True,
            percent=True,
        )
    for scaling in ("yarn", "llama3"):
        add(
            f"{scaling} loss at 900-1,024 less that at 64-128 <= 0",
            [r["late"] - r["early"] for r in of(f"{scaling}-100-")],
            0.0,
        )
    add("none at 50 + 100, worst decile <= 60 %", [r["worst"] for r in of("none-50-")], 0.60, percent=True)
    add("zero-shot yarn >= 70 %", [r["accuracy"] for r in of("zero-yarn-")], 0.70, at_least=True, percent=True)
    add("zero-shot none <= 10 %", [r["accuracy"] for r in of("zero-none-")], 0.10, percent=True)
    for scaling in ("yarn", "llama3"):
        pairs = [
            (r, found.get(f"short-100-{name.rsplit('-', 1)[1]}"))
            for name, r in found.items()
            if name.startswith(f"{scaling}-100-")
        ]
        add(
            f"{scaling} short loss less the second control's <= 0.02",
            [r["short"] - c["short"] for r, c in pairs if c],
            0.02,
        )
    if {"sequence-1", "sequence-2"} <= found.keys():
        losses = zip(found["sequence-1"]["losses"], found["sequence-2"]["losses"], strict=True)
        add("sequence 2 less sequence 1, largest of 20 losses <= 1e-5", [max(abs(a - b) for a, b in losses)], 1e-5)
    return rows


def report(found: dict[str, dict[str, Any]], console: Console) -> bool:
    table = Table(title="extended to 1,024: exact answers in %, nats a token", title_justify="left")
    for column in ("arm", "mean", "worst", *(f"{10 * d}" for d in range(10)), "64-128", "900-1,024", "short"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    for name, row in found.items():
        if "deciles" in row:
            losses = [f"{row[key]:.3f}" if row.get(key) is not None else "" for key in ("early", "late", "short")]
            table.add_row(name, f"{100 * row['accuracy']:.1f}", f"{100 * row['worst']:.0f}",
                          *(f"{100 * x:.0f}" for x in row["deciles"]), *losses)  # fmt: skip
    console.print(table)
    judged = aims(found)
    for aim, values, met in judged:
        console.print(f"{aim}: {values}: {'not run' if met is None else 'met' if met else 'not met'}", highlight=False)
    return all(met for _, _, met in judged)


def draw(found: dict[str, dict[str, Any]], path: Path) -> None:
    """Loss by position of the arms of seed 0, and the grid of pass keys."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    curves = {n: r for n, r in found.items() if "bins" in r and n.endswith("-100-0")}
    grid = {n: r for n, r in found.items() if "deciles" in r and arm(n).kind in ("extend", "zero")}
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, max(4.5, 0.3 * len(grid) + 1.5)), layout="constrained")
    for name, row in [
        *curves.items(),
        *((n, r) for n, r in grid.items() if n in ("zero-none-0", "zero-yarn-0") and "bins" in r),
    ]:
        style = "--" if name.startswith("zero") else "-"
        left.plot([BIN * (i + 0.5) for i in range(len(row["bins"]))], row["bins"], style, label=name)
    left.axvline(ORIGINAL, color="grey", linewidth=0.8, linestyle=":")
    left.set(xlabel="tokens seen", ylabel="nats a token", title="Held-out text: loss by position")
    if left.lines[1:]:
        left.legend(fontsize=8)
    if grid:
        picture = right.imshow(
            [[100 * x for x in r["deciles"]] for r in grid.values()], vmin=0, vmax=100, aspect="auto", cmap="RdYlGn"
        )
        right.set_yticks(range(len(grid)), list(grid))
        for y, row in enumerate(grid.values()):
            for x, value in enumerate(row["deciles"]):
                ink = "black" if 0.15 < value < 0.9 else "white"
                right.text(x, y, f"{100 * value:.0f}", ha="center", va="center", fontsize=7, color=ink)
        figure.colorbar(picture, ax=right, label="% exact")
    right.set_xticks(range(10), [f"{10 * d}" for d in range(10)])
    right.set(xlabel="depth of the needle, % of 1,024 tokens (0: farthest)", title="Pass keys at 1,024 tokens")
    figure.savefig(path, dpi=130)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("artifacts/long_context"), help="kept: run again, it goes on")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--jobs", type=int, default=2, help="arms side by side, one core each")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--main", action="store_true", help="only the arms that have an aim or are needed for one")
    parser.add_argument("--arms", default="", help="only these, by name, with commas")
    parser.add_argument("--show", action="store_true", help="run nothing; the table of what is there")
    parser.add_argument("--trial", action="store_true", help="a tiny run of everything; its figures mean nothing")
    parser.add_argument("--measure", type=Path, metavar="RUN", help=argparse.SUPPRESS)
    job = parser.parse_args()
    if job.measure:
        measure(job.measure)
        return 0
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(f"[bold]{machine()}[/bold]", highlight=False)
    work = (job.work / "trial" if job.trial else job.work).resolve()
    work.mkdir(parents=True, exist_ok=True)
    names = job.arms.split(",") if job.arms else all_arms(main=job.main, seeds=1 if job.trial else job.seeds)
    names = list(dict.fromkeys([*(f"base-{arm(name).seed}" for name in names), *names]))
    if not job.show:
        make_data(work / "data")

        def one(name: str) -> None:
            run_arm(name, work, trial=job.trial)
            console.print(f"{name} done", highlight=False)

        for stage in ([n for n in names if arm(n).kind == "base"], [n for n in names if arm(n).kind != "base"]):
            with ThreadPoolExecutor(job.jobs) as pool:
                list(pool.map(one, stage))
    there = names if not job.show else list(dict.fromkeys([p.parent.name for p in sorted(work.glob("*/exit.json"))]))
    found = {name: row for name in there if (row := found_of(name, work)) is not None}
    good = report(found, console)
    if job.json:
        job.json.write_text(json.dumps(found, indent=1) + "\n")
    if job.plot:
        draw(found, job.plot)
    return 0 if good or job.trial else 1


if __name__ == "__main__":
    sys.exit(main())
