"""What a run did, as one line: two runs that did the same have the same digest.

Owns the oracle of the tests of faults: per step the bits of the loss and the gradient norm, the tokens, and the token ids that
went into the model on each rank; at the end every weight and moment of the newest checkpoint, whatever layout it was saved at.

    record_what_is_fed()                                 # in each rank, before it trains
    python tests/faults/digest.py runs/demo              # prints the digest
    assert digest(killed_run) == digest(straight_run)    # or compare `steps(run)` and `state(run)` to see where they part
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import sys
import time
from pathlib import Path
from typing import Any

import torch

import slm.loop
import slm.train
from slm import checkpoint
from slm.engine import Engine


def record_what_is_fed() -> None:
    """From now on each step of this process that comes to its end is a line of RUN/fed/: its number, and a hash of the token ids,
    labels and boundaries of pieces that the engine was given, as it was given them."""
    run_phase, train_step, forward = slm.train.run_phase, slm.loop.train_step, Engine.forward
    now: dict[str, Any] = {}

    def phase_recorded(run: Any, phase: Any, data: Any, look_at: Any, position: Any, *args: Any, **kwargs: Any) -> Any:
        folder = run.run_dir / "fed"
        folder.mkdir(exist_ok=True)
        # A file for each attempt: a kill may cut its last line.
        now["file"] = folder / f"rank-{run.ranks.rank}-{os.getpid()}-{time.monotonic_ns()}.jsonl"
        now["step"] = position.global_step
        return run_phase(run, phase, data, look_at, position, *args, **kwargs)

    def step_recorded(*args: Any, **kwargs: Any) -> Any:
        now["hash"] = hashlib.sha256()
        done = train_step(*args, **kwargs)
        now["step"] += 1
        with open(now["file"], "a") as file:
            file.write(json.dumps({"step": now["step"], "fed": now["hash"].hexdigest()}) + "\n")
        return done

    def forward_recorded(self: Engine, batch: Any, *args: Any, **kwargs: Any) -> Any:
        for tensor in (batch.tokens_BT, batch.labels_BT, batch.positions_BT, batch.piece_bounds):
            now["hash"].update(repr(tuple(tensor.shape)).encode() + tensor.cpu().numpy().tobytes())
        return forward(self, batch, *args, **kwargs)

    slm.train.run_phase, slm.loop.train_step, Engine.forward = phase_recorded, step_recorded, forward_recorded  # type: ignore[assignment,method-assign]


def fed(run_dir: str | Path) -> dict[int, dict[str, str]]:
    """{global step: {rank: hash of what it was fed}}. A step that several attempts took must have been fed the same in each."""
    found: dict[int, dict[str, str]] = {}
    for path in sorted(Path(run_dir).glob("fed/*.jsonl")):
        for text in path.read_text().splitlines(keepends=True):
            if text.endswith("\n"):
                line = json.loads(text)
                before = found.setdefault(line["step"], {}).setdefault(path.name.split("-")[1], line["fed"])
                assert before == line["fed"], f"step {line['step']} was fed other tokens when it was taken again"
    return found


def steps(run_dir: str | Path) -> dict[int, str]:
    """{global step: SHA-256 of what was computed there, and from which tokens}."""
    found: dict[int, str] = {}
    samples = fed(run_dir)
    for line in map(json.loads, (Path(run_dir) / "metrics.jsonl").read_text().splitlines()):
        if "loss" not in line:
            continue
        assert line["step"] not in found, f"step {line['step']} was recorded twice"
        bits = [struct.pack("<d", line[key]).hex() for key in ("loss", "grad_norm", "lr")]
        told = (bits, line["tokens"], sorted(samples[line["step"]].items()))
        found[line["step"]] = hashlib.sha256(repr(told).encode()).hexdigest()
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
