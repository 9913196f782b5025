"""One run that changes its layout again and again comes to the same losses and weights as one that never did."""

import pytest

from slm.checkpoint import Reader
from tests.distributed.ranks import train_many
from tests.distributed.test_same_run import STEPS, metrics, overrides, write_recipe

WORLDS, STARTS = (2, 1, 2, 4), (0, 2, 4, 6)  # ranks of each leg, and the step that it goes on from
CHAINS = {
    "zero 0-1-2-3, offloaded once, sequences shared once": [
        ["deepspeed=zero0", "micro_batch=2"],
        ["deepspeed=zero1", "micro_batch=2"],
        ["deepspeed=zero2_offload", "micro_batch=8", "sequence_parallel=2"],
        ["deepspeed=zero3", "micro_batch=2"],
    ],
    "zero 3-2-1-0, offloaded once, sequences shared twice": [
        ["deepspeed=zero3", "micro_batch=4", "sequence_parallel=2"],
        ["deepspeed=zero2_offload", "micro_batch=4"],
        ["deepspeed=zero1", "micro_batch=4"],
        ["deepspeed=zero0", "micro_batch=2", "sequence_parallel=2"],
    ],
}
SLOW_CHAINS = {
    "zero 1-0-1-0, sequences shared by 2-1-2-1": [
        ["deepspeed=zero1", "micro_batch=8", "sequence_parallel=2"],
        ["deepspeed=zero0", "micro_batch=8"],
        ["deepspeed=zero1", "micro_batch=4", "sequence_parallel=2"],
        ["deepspeed=zero0", "micro_batch=2"],
    ],
    "zero 3-2-3-2, offloaded, not, offloaded, not": [
        ["deepspeed=zero3_offload", "micro_batch=4"],
        ["deepspeed=zero2", "micro_batch=2"],
        ["deepspeed=zero3_offload", "micro_batch=8", "sequence_parallel=2"],
        ["deepspeed=zero2", "micro_batch=2", "sequence_parallel=2"],
    ],
}


def train_legs(chains, folder):
    """{chain: [(layout, run) of each leg]}, and the run that never changes. Each leg is trained to the end, from a checkpoint of
    the leg before; those of a number of ranks in one start."""
    recipe = write_recipe(folder)
    runs = {chain: [folder / f"{i}-leg{leg}" for leg in range(len(WORLDS))] for i, chain in enumerate(chains)}
    for leg, (world, start) in enumerate(zip(WORLDS, STARTS, strict=True)):
        jobs = []
        for chain, layouts in chains.items():
            run = runs[chain][leg]
            if leg:
                name = f"main-{start:08d}"
                (run / "checkpoints").mkdir(parents=True)
                (run / "checkpoints" / name).symlink_to(runs[chain][leg - 1] / "checkpoints" / name)
            jobs.append((recipe, [*overrides(layouts[leg], run), "checkpoint.every_steps=2"]))
        if world == 1:
            jobs.append((recipe, overrides(["deepspeed=zero0", "micro_batch=8"], folder / "straight")))
        train_many(jobs, world)
    return {
        chain: list(zip(layouts, runs[chain], strict=True)) for chain, layouts in chains.items()
    }, folder / "straight"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train_legs(CHAINS, tmp_path_factory.mktemp("chains"))


@pytest.fixture(scope="module")
def trained_slowly(tmp_path_factory):
    return train_legs(SLOW_CHAINS, tmp_path_factory.mktemp("slow-chains"))


@pytest.mark.parametrize(
    ("chain", "legs"),
    [
        *((chain, "trained") for chain in CHAINS),
        *(pytest.param(chain, "trained_slowly", marks=pytest.mark.slow) for chain in SLOW_CHAINS),
    ],
)
def test_a_chain_of_layouts_is_the_uninterrupted_run(chain, legs, request):
    """2, 1, 2 and 4 ranks, ZeRO stage, shared sequences, offloading, micro-batch and accumulation: every leg goes on where the
    one before was, and all its losses are the uninterrupted run's to 1e-5, the last weights to a relative L2 of 1e-5."""
    chains, whole = request.getfixturevalue(legs)
    straight = metrics(whole)
    assert straight[STEPS]["loss"] < straight[1]["loss"] - 0.02  # it does learn
    for (options, run), world, start in zip(chains[chain], WORLDS, STARTS, strict=True):
        found = metrics(run)
        assert sorted(found) == list(range(start + 1, STEPS + 1))
        for step, row in found.items():
            assert row["loss"] == pytest.approx(straight[step]["loss"], abs=1e-5), (options, step)
            assert row["grad_norm"] == pytest.approx(straight[step]["grad_norm"], rel=1e-5), (options, step)
            assert (row["lr"], row["tokens"]) == (straight[step]["lr"], straight[step]["tokens"])
        layout = Reader(run / "checkpoints" / f"main-{STEPS:08d}").state["layout"]
        asked = dict(option.split("=") for option in options)
        assert layout == {
            "world_size": world,
            "zero_stage": int(asked["deepspeed"][4]),
            "sequence_parallel": int(asked.get("sequence_parallel", 1)),
        }
    a, b = (Reader(run / "checkpoints" / f"main-{STEPS:08d}") for run in (whole, chains[chain][-1][1]))
    for name, shape in a.shapes.items():
        want, got = a.weight(name, shape), b.weight(name, shape)
        assert (got - want).norm() <= 1e-5 * want.norm(), name
