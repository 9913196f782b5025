"""Run by test_saves.py on 2 ranks: rank 1 may write no file above a size, first for a whole run, then for half of the next."""

import json
import resource
import sys

import slm.loop
import slm.train
from slm import parallel
from slm.recipe import load_recipe
from slm.runtime import discover_ranks

recipe, folder = sys.argv[1:]
parallel.start(parallel.local_device(discover_ranks().local_rank))
step_itself, calls = slm.loop.train_step, []


def allow(num_bytes):
    if parallel.rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))


def counted(*args, **kwargs):
    calls.append(1)
    if len(calls) == 5:
        allow(resource.RLIM_INFINITY)
    return step_itself(*args, **kwargs)


allow(200_000)
codes = [slm.train.train(load_recipe(recipe, [f"output={folder}/stop"]))]
slm.loop.train_step = counted
codes.append(slm.train.train(load_recipe(recipe, [f"output={folder}/continue", "checkpoint.on_failure=continue"])))
print("codes", json.dumps(codes), flush=True)
parallel.stop()
