"""What saving costs a run: the same run with saves, with saves that training waits for, and without any; bytes read on a resume.

    python benchmarks/checkpoint_cost.py                        # 2 ranks, ZeRO 1, about 10 minutes on 2 cores
    python benchmarks/checkpoint_cost.py --rounds 1 --steps 12  # a trial

Arms in turn (A B C, then C B A), each `train` on real ranks over gloo: `none` saves only at the end, `async` every --every
steps, `sync` the same but waits until each save is committed, as a save in the training loop would. First the losses of all arms
are compared, bit by bit: where they differ, no figure is printed and the exit code is 1.

Blocked seconds are those that the training thread spends in save (metrics.jsonl, seconds/save); the end of the run, which always
waits, is left out. A step's time beside that shows what the writing thread takes from training on shared cores.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table
from side_by_side import REPOSITORY, Spread, call, machine

ARMS = ("none", "async", "sync")


def one_rank(arm: str, recipe: str, overrides: list[str]) -> int:
    """What each rank of an arm runs."""
    from slm.recipe import load_recipe
    from slm.saving import Checkpointer
    from slm.train import train

    if arm == "sync":
        begin = Checkpointer.save

        def save(self: Checkpointer, *args: Any, **options: Any) -> bool:
            begun = begin(self, *args, **options)
            self.wait()
            return begun

        Checkpointer.save = save  # type: ignore[method-assign]
    return train(load_recipe(recipe, overrides))


def write_recipe(folder: Path, options: argparse.Namespace) -> Path:
    sys.path.insert(0, str(REPOSITORY))
    from tests.shards import make_dataset

    make_dataset(folder / "tokens")
    batch_tokens = 64 * 2 * options.ranks
    tree = {
        "name": "cost",
        "model": {"preset": "cpu-tiny", "hidden_size": options.hidden, "num_hidden_layers": 4,
                  "intermediate_size": 4 * options.hidden},
        "data": {"sources": {"a": str(folder / "tokens")}},
        "phases": [{"name": "main", "tokens": options.steps * batch_tokens, "seq_len": 64, "batch_tokens": batch_tokens}],
        "checkpoint": {"every_steps": options.every, "keep_last": 2},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
    return folder / "recipe.yaml"


def launch(ranks: int, arm: str, recipe: Path, *overrides: str) -> None:
    start = (sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}")
    call(*start, __file__, "--arm", arm, recipe, *overrides, log=recipe.with_name("log"))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def measured(run: Path) -> dict[str, Any]:
    rows = [row for row in lines(run / "metrics.jsonl") if "loss" in row]
    saves = [row["seconds/save"] for row in rows if row.get("seconds/save", 0) > 0]
    written = [event["seconds"] for event in lines(run / "events.jsonl") if event["kind"] == "saved"]
    steps = [row["seconds/step"] for row in rows[2:]]
    return {
        "losses": [(row["step"], row["loss"], row["grad_norm"]) for row in rows],
        "blocked": sum(saves) / max(1, len(saves)),
        "written": sum(written) / max(1, len(written)),
        "step": sum(steps) / len(steps),
    }


def bytes_read(folder: Path, recipe: Path, saved: Path) -> list[tuple[int, str, list[int], int]]:
    """(ranks, ZeRO, bytes that each rank read of the last checkpoint, its size) of resumes from it."""
    found = []
    for ranks in (1, 2, 4):
        for stage in (1, 3):
            run = folder / f"resume-{ranks}-{stage}"
            (run / "checkpoints").mkdir(parents=True)
            middle = sorted((saved / "checkpoints").iterdir())[-2]
            (run / "checkpoints" / middle.name).symlink_to(middle.resolve())
            zero = REPOSITORY / "ds_configs" / f"zero{stage}.json"
            launch(ranks, "async", recipe, f"output={run}", f"phases.main.deepspeed={zero}")
            logs = [(run / "logs" / f"rank-{rank}.log").read_text() for rank in range(ranks)]
            pairs = [re.search(r"read ([0-9,]+) of the ([0-9,]+) bytes", log) for log in logs]
            numbers = [[int(text.replace(",", "")) for text in pair.groups()] for pair in pairs if pair]
            found.append((ranks, f"ZeRO {stage}", [read for read, _ in numbers], numbers[0][1]))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=5, help="steps between saves")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=384, help="of the model: 4 layers; 12 bytes of state a parameter")
    options = parser.parse_args()
    console = Console()
    console.print(machine())
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        recipe = write_recipe(folder, options)
        found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
        for turn in range(options.rounds):
            for arm in ARMS if turn % 2 == 0 else reversed(ARMS):
                run = folder / f"{arm}-{turn}"
                launch(
                    options.ranks,
                    arm,
                    recipe,
                    f"output={run}",
                    *(["checkpoint.every_steps=1Mi"] if arm == "none" else []),
                )
                found[arm].append(measured(run))
        reference = found["none"][0]["losses"]
        if wrong := [arm for arm in ARMS for result in found[arm] if result["losses"] != reference]:
            console.print(
                f"the arms {', '.join(sorted(set(wrong)))} have other losses or gradients than none: no figures"
            )
            return 1
        console.print(f"{len(reference)} losses and gradient norms are the same bits in all arms and rounds")
        table = Table(
            "arm", "step [ms]", "blocked by a save [ms]", "of the run", "until committed [ms]", "1 % at one in [s]"
        )
        for arm in ARMS:
            step, blocked, written = (
                Spread.of([1000 * r[key] for r in found[arm]]) for key in ("step", "blocked", "written")
            )
            share = blocked.median / (blocked.median + options.every * step.median)
            of_saves = (blocked.show(1), f"{share:.2%}", written.show(0), f"{blocked.median / 10:.2f}")
            table.add_row(arm, step.show(1), *(of_saves if arm != "none" else ()))
        console.print(table)
        reads = Table("ranks", "strategy", "bytes read by each rank on a resume", "of", "all together")
        for ranks, strategy, read, size in bytes_read(folder, recipe, folder / "async-0"):
            listed = ", ".join(f"{n:,}" for n in read)
            reads.add_row(str(ranks), strategy, listed, f"{size:,}", f"{sum(read) / size:.3f}")
        console.print(reads)
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--arm"]:
        sys.exit(one_rank(sys.argv[2], sys.argv[3], sys.argv[4:]))
    sys.exit(main())
