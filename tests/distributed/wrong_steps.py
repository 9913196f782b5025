"""`slm train` of several recipes on this rank, with steps that go wrong on purpose. Run by ranks.run_ranks; argument: JSON,
[[recipe, faults], ...].

{"nan": [rank, [steps]]}      the loss of a rank's share is NaN at these steps, counted from 1 over the attempt
{"infinite": [rank, [steps]]} one element of its gradient is infinite
{"spike": [rank, [steps]]}    its loss is 200 times as large
{"flip": [rank, step, name]}  after that step, one bit of a weight is another
{"slow": [rank, seconds]}     every forward pass takes so much longer
{"unreadable": [rank]}        it cannot read a checkpoint's tensors
"""

import json
import os
import sys
import time

from slm import parallel
from slm.checkpoint import Reader
from slm.engine import Engine
from slm.errors import CorruptArtefact
from slm.recipe import load_recipe
from slm.runtime import discover_ranks
from slm.train import train

rank = int(os.environ["RANK"])
forward, step, read = Engine.forward, Engine.step, Reader.read
faults, done = {}, 0


def hit(kind):
    return kind in faults and faults[kind][0] == rank and done + 1 in faults[kind][1]


def forward_with_faults(self, batch, distillation=None):
    loss, count = forward(self, batch, distillation)
    if "slow" in faults and faults["slow"][0] == rank:
        time.sleep(faults["slow"][1])
    if hit("nan"):
        loss = loss * float("nan")
    if hit("spike"):
        loss = loss * 200
    if hit("infinite"):
        loss = loss + (self.module.model.norm.weight.sum() * 1e38 * 1e38 if self.stage < 3 else loss * float("inf"))
    return loss, count


def step_with_faults(self, lr):
    global done
    result = step(self, lr)
    done += 1
    if "flip" in faults and faults["flip"][:2] == [rank, done]:
        weight = dict(self.module.named_parameters())[faults["flip"][2]].data.view(-1)
        weight[3] += 1e-3
    return result


def read_with_faults(self, kind, name, start, length):
    if faults.get("unreadable") == [rank]:
        raise CorruptArtefact(f"rank {rank} finds a piece of it broken")
    return read(self, kind, name, start, length)


Engine.forward, Engine.step, Reader.read = forward_with_faults, step_with_faults, read_with_faults

if __name__ == "__main__":
    parallel.start(parallel.local_device(discover_ranks().local_rank))
    for recipe, wanted in json.loads(sys.argv[1]):
        faults, done = wanted, 0
        train(load_recipe(recipe))  # the exit code is in exit.json
    parallel.stop()
