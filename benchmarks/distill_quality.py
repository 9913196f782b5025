"""Does distillation from a cache work: the share of the way from cross-entropy to full distillation that each target goes.

    python benchmarks/distill_quality.py --json quality.json --plot quality.png        # about 40 minutes on 2 cores
    python benchmarks/distill_quality.py --trial                                       # a trial of the script, no result

Text: the Python standard library of this interpreter, without its tests; a tenth of the files is held out, two files in ten
are for the student and the teacher never sees them. Everything runs through the commands themselves: slm-data, slm train,
slm teacher. A teacher of 2.2 M parameters is trained for a fixed number of steps; then a student of 0.24 M parameters from
the same start, in the same order, by each kind of target, T = 1, no labels (alpha 0). A seed is the student's start, its
order, and the draws of the sampled caches; the teacher and the text are the same for all.

`repeated`: 131 k tokens eight times (--epochs; the student leaves its first plateau only after one, and with four it is a matter
of chance how far it gets after that). `fresh`: all of the tokens once. A share is paired: of one seed's own gap. None is
printed unless the gap is at least 0.4 nats and 10 standard deviations of it.

What it does not say: a small teacher has a flatter distribution than a large one (its mass beyond k stands in the output), which
is hard on the bucket; do not carry these shares over to a large teacher.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import statistics
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from side_by_side import call, machine

SEQ, BATCH, VOCAB = 128, 1024, 2048
TEACHER = dict(vocab_size=VOCAB, hidden_size=192, num_hidden_layers=4, num_attention_heads=6, num_key_value_heads=6,
               intermediate_size=512, max_position_embeddings=SEQ, rope_theta=10000.0, rope_scaling=None)  # fmt: skip
STUDENT = {**TEACHER, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
           "intermediate_size": 192}  # fmt: skip
CE = {"type": "ce"}


def distill(teacher: str, **more: Any) -> dict[str, Any]:
    return {"type": "distill", "alpha": 0.0, "teachers": {teacher: 1.0}, **more}


# name -> (loss, repeated: how many of the seeds, fresh: how many)
ARMS: dict[str, tuple[dict[str, Any], int, int]] = {
    "cross-entropy": (CE, 3, 1),
    "full (online)": (distill("live"), 3, 1),
    "sampled 32": (distill("s32"), 3, 1),
    "sampled 12": (distill("s12"), 3, 1),
    "bucket 64": (distill("top"), 3, 1),
    "bucket 32": (distill("top", k=32), 3, 0),
    "bucket 12": (distill("top", k=12), 3, 0),
    "renormalised 32": (distill("top", k=32, targets="renormalised"), 3, 0),
    "renormalised 12": (distill("top", k=12, targets="renormalised"), 3, 0),
    "both renormalised 32": (distill("top", k=32, targets="renormalised"), 2, 0),
}
AIMS = {"sampled 32": 95.0, "sampled 12": 90.0, "bucket 64": 80.0}


def group(path: Path, root: Path) -> str:
    place = int.from_bytes(hashlib.sha256(path.relative_to(root).as_posix().encode()).digest()[:4], "big") % 100
    return "held-out" if place < 9 else "student" if place < 21 else "teacher"


def make_text(work: Path) -> None:
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"test", "tests", "idle_test", "encodings", "pydoc_data", "site-packages", "__pycache__"}
    for path in sorted(root.rglob("*.py")):
        if not skipped & set(path.relative_to(root).parts):
            target = work / "text" / group(path, root) / path.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


def recipe(
    work: Path, name: str, model: dict[str, Any], source: str, loss: dict[str, Any], seed: int, **phase: Any
) -> Path:
    caches = work / f"caches-{seed}"
    kinds = {"top": ("top_k", 64), "s32": ("sampled", 32), "s12": ("sampled", 12)}
    teachers: dict[str, Any] = {
        n: {"model": str(work / "teacher-run"),
            "cache": {"kind": kind, "k": k, "seed": seed, "folder": str((work / "caches-1" if n == "top" else caches) / n)}}
        for n, (kind, k) in kinds.items()
    }  # fmt: skip
    teachers["live"] = {"model": str(work / "teacher-run")}
    tree = {
        "name": name,
        "output": str(work / name),
        "seed": seed,
        "model": model,
        "data": {"sources": {source: str(work / source / "train")},
                 "validation": {"held-out": str(work / "held-out" / "train")}},
        "teacher": teachers if source == "student" else {},
        "optim": {"lr": 4e-3 if source == "student" else 3e-3, "betas": [0.9, 0.95], "weight_decay": 0.1, "grad_clip": 1.0},
        "phases": [{"name": "main", "seq_len": SEQ, "batch_tokens": BATCH, "micro_batch": BATCH // SEQ, "loss": loss,
                    "schedule": {"type": "cosine", "warmup_steps": 20, "min_ratio": 0.0},
                    "deepspeed": "ds_configs/zero0.json", **phase}],
        "checkpoint": {"every_steps": 100000, "keep_last": 1},
        "eval": {"max_sequences": 256},
        "log": {"every_steps": 50},
    }  # fmt: skip
    path = work / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def is_done(run: Path) -> bool:
    return (run / "exit.json").is_file() and json.loads((run / "exit.json").read_text())["code"] == 0


def held_out(run: Path) -> float:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["eval/held-out/loss"] for row in rows if "eval/held-out/loss" in row][-1]


def student(work: Path, arm: str, seed: int, setting: str, tokens: int, share: float) -> float:
    name = f"{setting}-{tokens}-{arm.replace(' ', '_').replace('(', '').replace(')', '')}-{seed}"
    path = recipe(
        work, name, STUDENT, "student", ARMS[arm][0], seed, tokens=tokens, filters={"student": {"share": share}}
    )
    command: list[str | Path] = [sys.executable, "-m", "slm", "train", path]
    if arm.startswith("both"):  # what a recipe refuses, forced upon the same loop
        command = [sys.executable, Path(__file__).resolve(), "--both-renormalised", path]
    if not is_done(work / name):
        call(*command, log=work / f"{name}.log")
    return held_out(work / name)


def train_both_renormalised(path: str) -> int:
    from slm.distill import student as module
    from slm.recipe import load_recipe
    from slm.train import train

    module.Targets.form = property(lambda self: "both_renormalised", lambda self, value: None)  # type: ignore[attr-defined]
    return train(load_recipe(path))


def prepare(work: Path, teacher_steps: int, seeds: int, jobs: int, console: Console) -> None:
    log = work / "prepare.log"
    slm, data = [sys.executable, "-m", "slm"], [sys.executable, "-m", "data_prep.cli"]
    if not (work / "text").is_dir():
        make_text(work)
    tokenizer = work / "tokenizer"
    if not tokenizer.is_dir():
        call(*data, "tokenizer", work / "text" / "teacher", work / "text" / "student", "--vocab-size", VOCAB, "--output",
             tokenizer, log=log)  # fmt: skip
    for source in ("teacher", "student", "held-out"):
        if not (work / source).is_dir():
            call(*data, "shards", work / "text" / source, "--tokenizer", tokenizer, "--validation-fraction", "0", "--output",
                 work / source, log=log)  # fmt: skip
    console.print("training the teacher …")
    if not is_done(work / "teacher-run"):
        path = recipe(work, "teacher-run", TEACHER, "teacher", CE, 1, tokens=teacher_steps * BATCH)
        call(*slm, "train", path, log=log)
    console.print("writing the caches …")

    def cache(seed: int) -> None:
        path = recipe(work, f"cache-{seed}", STUDENT, "student", CE, seed, tokens=100 * BATCH)
        tree = yaml.safe_load(path.read_text())
        names = ["top", "s32", "s12"] if seed == 1 else ["s32", "s12"]
        phase = tree["phases"][0]
        tree["phases"] = [{**phase, "name": n, "loss": distill(n)} for n in names]
        path.write_text(yaml.safe_dump(tree, sort_keys=False))
        call(*slm, "teacher", path, log=work / f"cache-{seed}.log")

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(cache, range(1, seeds + 1)))


def run_students(
    work: Path, seeds: int, jobs: int, settings: dict[str, tuple[int, float]]
) -> dict[str, dict[str, list[float]]]:
    todo = [
        (setting, arm, seed)
        for setting in settings
        for arm, (_, repeated, fresh) in ARMS.items()
        for seed in range(1, min(seeds, repeated if setting == "repeated" else fresh) + 1)
    ]
    found: dict[str, dict[str, list[float]]] = {setting: {} for setting in settings}
    columns = (TextColumn("students"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress, ThreadPoolExecutor(jobs) as pool:
        bar = progress.add_task("", total=len(todo))

        def one(what: tuple[str, str, int]) -> float:
            setting, arm, seed = what
            loss = student(work, arm, seed, setting, *settings[setting])
            progress.advance(bar)
            return loss

        for (setting, arm, _), loss in zip(todo, pool.map(one, todo), strict=True):
            found[setting].setdefault(arm, []).append(loss)
    return found


def shares(losses: dict[str, list[float]]) -> dict[str, list[float]] | None:
    """Percent of each seed's own gap; None if the gap is too small to speak of shares."""
    gaps = [a - b for a, b in zip(losses["cross-entropy"], losses["full (online)"], strict=True)]
    spread = statistics.stdev(gaps) if len(gaps) > 1 else 0.0
    if statistics.mean(gaps) < 0.4 or statistics.mean(gaps) < 10 * spread:
        return None
    return {
        arm: [100 * (ce - loss) / gap for ce, loss, gap in zip(losses["cross-entropy"], values, gaps, strict=False)]
        for arm, values in losses.items()
    }


def report(found: dict[str, dict[str, list[float]]], console: Console) -> tuple[dict[str, Any], bool]:
    good, out = True, {}
    for setting, losses in found.items():
        share = shares(losses)
        out[setting] = {"loss": losses, "share": share}
        table = Table(title=f"{setting}: held-out loss of the student, nats a token", title_justify="left")
        for column in ("target", "seeds", "loss", "% of the gap, by seed", "mean", "aim"):
            table.add_column(column)
        for arm, values in losses.items():
            aim = ""
            if share is not None and setting == "repeated":
                mean = statistics.mean(share[arm])
                met = mean < 0 if arm.startswith("both") else mean >= AIMS.get(arm, -1e9)
                wanted = "< 0" if arm.startswith("both") else f">= {AIMS[arm]:g}" if arm in AIMS else ""
                aim = f"{wanted}: {'met' if met else 'not met'}" if wanted else ""
                good &= met
            of_seed = ", ".join(f"{x:.1f}" for x in share[arm]) if share else "-"
            mean_text = f"{statistics.mean(share[arm]):.1f}" if share else "-"
            table.add_row(arm, str(len(values)), f"{statistics.mean(values):.3f}", of_seed, mean_text, aim)
        console.print(table)
        if share is None:
            console.print("No shares: the gap is below 0.4 nats or 10 standard deviations.", style="red")
            good = False
        elif setting == "repeated":
            for k in (12, 32) if "renormalised 32" in losses else ():
                triples = zip(share[f"sampled {k}"], share[f"bucket {k}"], share[f"renormalised {k}"], strict=True)
                ordered = all(s > b > r for s, b, r in triples)
                console.print(
                    f"k = {k}: sampled > bucket > renormalised in every seed: {'met' if ordered else 'not met'}"
                )
                good &= ordered
    return out, good


def draw(found: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    share = found["repeated"]["share"]
    if share is None:
        return
    arms = [arm for arm in share if arm not in ("cross-entropy", "full (online)")][::-1]
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    axes.barh(arms, [max(-50.0, statistics.mean(share[arm])) for arm in arms], color="#4878a8")
    for y, arm in enumerate(arms):
        axes.plot([max(-50.0, x) for x in share[arm]], [y] * len(share[arm]), "k.", markersize=5)
        axes.text(102, y, f"{statistics.mean(share[arm]):.0f} %", va="center")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.axvline(100, color="grey", linewidth=0.8, linestyle=":")
    axes.set(
        xlim=(-52, 115),
        xlabel="% of the way from cross-entropy (0) to full distillation (100); dots: seeds; cut at -50",
    )
    axes.set_title("A student of 0.24 M parameters, a teacher of 2.2 M, T = 1")
    figure.savefig(path, dpi=150)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--work", type=Path, default=Path("artifacts/distill_quality"), help="kept: run again, it goes on"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--jobs", type=int, default=2, help="students side by side, one core each")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=8, help="of `repeated`")
    parser.add_argument("--main", action="store_true", help="only the arms that have an aim or are needed for one")
    parser.add_argument("--trial", action="store_true", help="a tiny run of everything; its figures mean nothing")
    parser.add_argument("--both-renormalised", metavar="RECIPE", help=argparse.SUPPRESS)
    job = parser.parse_args()
    if job.both_renormalised:
        return train_both_renormalised(job.both_renormalised)
    if job.main:
        for arm in [arm for arm in ARMS if arm not in (*AIMS, "cross-entropy", "full (online)")]:
            del ARMS[arm]
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(f"[bold]{machine()}[/bold]", highlight=False)
    work = (job.work / "trial" if job.trial else job.work).resolve()
    work.mkdir(parents=True, exist_ok=True)
    seeds = 1 if job.trial else job.seeds
    prepare(work, 20 if job.trial else 1721, seeds, job.jobs, console)
    (work / "stats.json").unlink(missing_ok=True)
    call(sys.executable, "-m", "slm", "teacher", "stats", work / "cache-1.yaml", "--json", log=work / "stats.json")
    text = (work / "stats.json").read_text()
    stats = json.loads(text[text.index("[\n") :])
    mass = next(iter(next(r for r in stats if r["kind"] == "top_k")["head_mass"].values()))
    console.print("the teacher's mass on its likeliest k: " + ", ".join(f"{k}: {m:.3f}" for k, m in mass.items()))
    num_tokens = sum(r["tokens"] for r in stats if r["teacher"] == "top")
    share = min(1.0, 131072 / num_tokens)
    settings = {"repeated": (job.epochs * 131072, share), "fresh": (num_tokens // BATCH * BATCH, 1.0)}
    if job.trial:
        settings = {"repeated": (30 * BATCH, share), "fresh": (30 * BATCH, 1.0)}
    found, good = report(run_students(work, seeds, job.jobs, settings), console)
    result = {"head_mass": mass, **found}
    if job.json:
        job.json.write_text(json.dumps(result, indent=2) + "\n")
    if job.plot:
        draw(found, job.plot)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
