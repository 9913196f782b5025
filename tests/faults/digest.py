"""What a run did, as one line: two runs that did the same have the same digest.

Owns the oracle of the tests of faults: per step the bits of the loss and the gradient norm, the tokens and the ids of the
samples; at the end every weight and moment of the newest checkpoint, whatever layout it was saved at.

    python tests/faults/digest.py runs/demo              # prints the digest
    assert digest(killed_run) == digest(straight_run)    # or compare `steps(run)` and `state(run)` to see where they part
"""

from __future__ import annotations

import hashlib
import json
import struct
import sys
from pathlib import Path

import torch

from slm import checkpoint
from slm.inputs import open_phase_data
from slm.recipe import load_recipe


def steps(run_dir: str | Path) -> dict[int, str]:
    """{global step: SHA-256 of what was computed there, and from which samples}."""
    run_dir = Path(run_dir)
    recipe = load_recipe(run_dir / "recipe.yaml")
    phases = {phase.name: (phase, open_phase_data(recipe, phase)) for phase in recipe.phases}
    found: dict[int, str] = {}
    counts = dict.fromkeys(phases, 0)
    for line in map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines()):
        if "loss" not in line:
            continue
        assert line["step"] not in found, f"step {line['step']} was recorded twice"
        phase, data = phases[line["phase"]]
        samples = data.sample_ids(counts[phase.name], phase.global_batch)
        counts[phase.name] += 1
        bits = [struct.pack("<d", line[key]).hex() for key in ("loss", "grad_norm", "lr")]
        found[line["step"]] = hashlib.sha256(repr((bits, line["tokens"], samples)).encode()).hexdigest()
    return found


def state(run_dir: str | Path) -> dict[str, str]:
    """{KIND/NAME: SHA-256 of all its elements} of the newest checkpoint that verifies, and its step."""
    folder = checkpoint.choose(Path(run_dir))
    assert folder is not None
    reader = checkpoint.Reader(folder)
    counters = {"global_step": str(reader.state["global_step"]), "updates": str(reader.state["optimizer_steps"])}
    return counters | tensors(reader)


def tensors(reader: checkpoint.Reader) -> dict[str, str]:
    """{KIND/NAME: SHA-256 of all its elements} of a checkpoint."""
    found = {}
    for name, shape in reader.shapes.items():
        for kind in ("master", "exp_avg", "exp_avg_sq"):
            values = reader.read(kind, name, 0, torch.Size(shape).numel())
            found[f"{kind}/{name}"] = hashlib.sha256(values.numpy().tobytes()).hexdigest()
    return found


def digest(run_dir: str | Path) -> str:
    return hashlib.sha256(json.dumps([sorted(steps(run_dir).items()), state(run_dir)]).encode()).hexdigest()


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(digest(argument), argument)
