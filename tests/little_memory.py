"""`slm train` in a process that gets 48 MiB beside what the model has taken: a real allocation fails.

python tests/little_memory.py RECIPE [FIELD=VALUE]...
"""

import resource
import sys
from pathlib import Path

from slm.engine import Engine
from slm.recipe import load_recipe
from slm.train import train

build = Engine.write_weights


def then_no_more(self, value):
    build(self, value)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (48 << 20), resource.RLIM_INFINITY))


if __name__ == "__main__":
    Engine.write_weights = then_no_more
    sys.exit(train(load_recipe(sys.argv[1], sys.argv[2:])))
