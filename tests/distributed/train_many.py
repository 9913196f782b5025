"""Run by ranks.train_many on every rank: `slm train` for several recipes in one process group."""

import json
import sys

from slm.runtime import discover_ranks, lasting_imports

with lasting_imports():  # as slm.cli does
    import torch._dynamo  # noqa: F401

    from slm import parallel
    from slm.recipe import load_recipe
    from slm.train import train

if __name__ == "__main__":
    parallel.start(parallel.local_device(discover_ranks().local_rank))
    for recipe, overrides, until, expected in json.loads(sys.argv[1]):
        code = train(load_recipe(recipe, overrides), until=until)
        if code != expected:
            sys.exit(code or 1)
    parallel.stop()
