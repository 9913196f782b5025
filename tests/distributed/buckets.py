"""Each rank's part of the test that a bucket of the model's size changes no bit: whose weights differ, by strategy, as JSON.

The ranks train on sequences of their own, so what they reduce differs between them.
"""

import importlib
import json
import sys
import tempfile
import zlib
from pathlib import Path

import torch

from slm import engine as engines
from slm import parallel
from slm.engine import Engine
from slm.metrics import StepTimer
from slm.model.config import ModelConfig
from slm.recipe import Optim
from slm.runtime import discover_ranks
from slm.step import train_step

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
training_memory = importlib.import_module("training_memory")

DEEPSPEEDS = 500_000_000  # for any model
of_the_model = engines.reduce_bucket_elements


def weights(case, bucket, folder) -> dict:
    """This rank's float32 weights after three steps."""
    engines.reduce_bucket_elements = of_the_model if bucket is None else lambda *_: bucket
    config, device = ModelConfig.preset("cpu-small", **case["model"]), torch.device("cpu")
    phase = training_memory._phase(case, folder)
    engine = Engine(config, phase, Optim(), precision="float32", device=device)

    def initial(name, shape):
        return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode()))) * 0.02

    engine.write_weights(initial)
    batch = training_memory._batch(config, case)
    batch.tokens_BT.add_(parallel.rank()).remainder_(config.vocab_size)
    for _ in range(3):
        train_step(engine, [batch], 1e-3, StepTimer())
    found = {(f.name, f.start): f.values["master"].clone() for f in engine.fragments()}
    started = {
        key: initial(key[0], engine.shapes[key[0]]).flatten()[key[1] : key[1] + len(v)] for key, v in found.items()
    }
    assert all(not torch.equal(started[key], value) for key, value in found.items()), "nothing was trained"
    engine.close()
    return found


def main() -> None:
    parallel.start(parallel.local_device(discover_ranks().local_rank))
    differ = {}
    with tempfile.TemporaryDirectory() as folder:
        for zero in sys.argv[1:]:
            case = training_memory.DEFAULTS | {
                "zero": zero,
                "world_size": parallel.world_size(),
                "model": dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4),
            }
            of_model, of_deepspeed = (weights(case, bucket, Path(folder)) for bucket in (None, DEEPSPEEDS))
            same = of_model.keys() == of_deepspeed.keys()
            bad = [str(key) for key in of_model if not same or not torch.equal(of_model[key], of_deepspeed[key])]
            differ[zero] = sum(parallel.gather_objects(bad), [])
    if parallel.rank() == 0:
        print("DIFFER " + json.dumps(differ), flush=True)
    parallel.stop()


if __name__ == "__main__":
    main()
