"""Shared fixtures: a tiny model shape, its transformers twin, and settings that keep the suite quiet."""

import os

# The suite checks float32 on a CPU, also on a machine with GPUs; tests/gpu starts processes without this.
os.environ["DS_ACCELERATOR"] = "cpu"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from slm.model.config import ModelConfig, RopeScaling


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The file that takes longest and mostly waits comes first, so that others compute beside it; run.sh keeps to the order."""
    items.sort(key=lambda item: item.path.parent.name != "slurm")


@pytest.fixture(scope="session")
def tiny_config() -> ModelConfig:
    """Two layers, four query heads over two kv heads, llama3-scaled rotary embedding that really scales."""
    scaling = RopeScaling(rope_type="llama3", factor=8.0, original_max_position_embeddings=32)
    return ModelConfig.preset("cpu-tiny", rope_scaling=scaling)


@pytest.fixture
def hf_twin(tiny_config, tmp_path):
    """Our model and transformers' LlamaForCausalLM with the same weights, through a saved folder."""
    import transformers

    from slm import SLMForCausalLM

    ours = SLMForCausalLM(tiny_config).init_weights(seed=3)
    ours.save_pretrained(tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    assert type(theirs).__name__ == "LlamaForCausalLM"
    return ours, theirs.train()


@pytest.fixture(scope="session")
def one_rank():
    """This process as a world of one, joined once: DeepSpeed cannot join a second process group."""
    from slm import parallel
    from slm.runtime import discover_ranks

    before = dict(os.environ)
    parallel.start(parallel.local_device(discover_ranks().local_rank))
    yield
    parallel.stop()
    os.environ.clear()
    os.environ.update(before)
