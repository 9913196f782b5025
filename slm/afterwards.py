"""What `slm eval --suite` and `--text` found of a run's checkpoint, kept with the run.

Owns RUN/eval/suite-CHECKPOINT.json and text-CHECKPOINT.json, and the rows of the run's log: metrics.jsonl, and TensorBoard and
Weights & Biases where the run has them.

    keep("suite", found, {"gsm8k/exact_match": 0.41}, Path("runs/demo/eval"), run_of("runs/demo"))
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm import strict_yaml
from slm.errors import EnvironmentProblem, SLMError
from slm.metrics import append_row, to_tensorboard, to_wandb_summary
from slm.runtime import atomic_write, look_at_lock
from slm.status import json_object
from slm.supervise import last_step

if TYPE_CHECKING:
    from slm.loading import RunPlace

log = logging.getLogger("slm")


def scores(results: dict[str, Any]) -> Iterator[tuple[str, str, str, float, float | None]]:
    """(task, metric, filter or "none", score, its standard error or None) of a suite's results."""
    for task, result in results.items():
        found = result["scores"]
        for key, value in found.items():
            metric, _, kind = key.partition(",")
            if not metric.endswith("_stderr"):
                yield task, metric, kind, value, found.get(f"{metric}_stderr,{kind}")


def keep(kind: str, found: dict[str, Any], values: dict[str, float], folder: Path, run: RunPlace | None) -> Path:
    """Into FOLDER/KIND-NAME.json, beside what was found earlier of the same weights; of a run also KIND/NAME of `values` into its
    log. found: with `fingerprint` (of the weights) and `results`, by name. Raises EnvironmentProblem."""
    path = folder / f"{kind}-{run.checkpoint if run is not None else found['fingerprint'][:12]}.json"
    try:
        before = json_object(path)
        if before.get("fingerprint") == found["fingerprint"]:
            found = found | {"results": before["results"] | found["results"]}
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(path, json.dumps(found, indent=1) + "\n")
        if run is not None:
            _log(kind, {f"{kind}/{name}": value for name, value in values.items()}, run)
    except OSError as error:
        raise EnvironmentProblem(
            f"{path} cannot be written: {error.strerror or error}", fix="give another --output, or make room"
        ) from None
    return path


def _log(kind: str, values: dict[str, float], run: RunPlace) -> None:
    """Raises OSError; a tracker that cannot be reached is told of."""
    # Steps never go down there: of an earlier checkpoint the row stands at the newest step, and says which it is of.
    append_row(run.folder, max(run.step, last_step(run.folder)), {f"{kind}/step": run.step, **values})
    try:
        to_tensorboard(run.folder, run.step, values)
        recipe = strict_yaml.read(run.folder / "recipe.yaml")[0]
        if options := (recipe.get("log") or {}).get("wandb"):
            look_at_lock(run.folder)  # two processes cannot write one W&B run
            to_wandb_summary(run.folder, options, str(recipe.get("name")), {f"{kind}/step": run.step, **values})
    except (SLMError, OSError, ValueError) as error:
        log.warning("what was found is in the run's folder, and not in its tracker: %s", error)
