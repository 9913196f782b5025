"""Run on every rank by test_teacher.py: slm teacher on a recipe."""

import sys

from slm.distill.build import build
from slm.recipe import load_recipe

if __name__ == "__main__":
    sys.exit(build(load_recipe(sys.argv[1])))
