"""One rank of a test: what it hands to torch's collectives in a training step, as bytes that a ring would send.

argv: JSON list of cases of benchmarks/training_memory.py. Prints {"state": bytes, "exchange": bytes} for each, on rank 0.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from training_memory import DEFAULTS, _batch, _phase

from slm import parallel
from slm.engine import Engine
from slm.metrics import StepTimer
from slm.model.config import ModelConfig
from slm.recipe import Optim
from slm.runtime import discover_ranks
from slm.step import train_step

SMALL = 1000  # bytes: flags, norms and counts are not the plan's business
sent = {"state": 0.0, "exchange": 0.0}


def counted(name, kind, times, of):
    """Replaces torch.distributed.NAME by itself with a count. of(arguments): what a ring of W ranks sends (W - 1) / W of."""
    real = getattr(dist, name)

    def count(*args, **options):
        tensors = of(*args, **options)
        size = sum(x.nbytes for x in tensors)
        ranks = dist.get_world_size(options.get("group"))
        if size > SMALL:
            sent[kind] += times * size * (ranks - 1) / ranks
        return real(*args, **options)

    setattr(dist, name, count)


def listed(x):
    return x if isinstance(x, list | tuple) else [x]


counted("all_reduce", "state", 2, lambda tensor, *_, **__: [tensor])
counted("all_gather_into_tensor", "state", 1, lambda out=None, *_, **o: [o.get("output_tensor", out)])
counted("all_gather", "state", 1, lambda tensor_list, *_, **__: tensor_list)
counted("reduce_scatter_tensor", "state", 1, lambda output, input, *_, **__: [input])
counted("all_to_all_single", "exchange", 1, lambda output, input, *_, **__: [input])
counted("all_to_all", "exchange", 1, lambda out, tensors, *_, **__: listed(tensors))

parallel.start(parallel.local_device(discover_ranks().local_rank))
with tempfile.TemporaryDirectory() as folder:
    for case in json.loads(sys.argv[1]):
        case = {**DEFAULTS, **case}
        config = ModelConfig.preset("cpu-small", **case["model"])
        engine = Engine(
            config, _phase(case, Path(folder)), Optim(), precision=case["precision"], device=torch.device("cpu")
        )
        engine.write_weights(lambda _, shape: torch.zeros(shape))
        for _ in range(3):  # stage 3 fetches otherwise from the second on
            sent.update(state=0.0, exchange=0.0)
            train_step(engine, [_batch(config, case)] * case["accumulation"], 1e-4, StepTimer())
        engine.close()
        if parallel.rank() == 0:
            print("SENT " + json.dumps(sent), flush=True)
parallel.stop()
