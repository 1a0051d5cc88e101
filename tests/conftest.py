import pytest
import torch

from tests.runs import run


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Tiny tensors are slower on two threads, by far where the cores are busy."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    """A small run that nothing disturbs, with two rollout actors: its output folder and what it printed."""
    output = tmp_path_factory.mktemp("reference")
    return output, run(output, "reference", rollout__max_actors=2)


@pytest.fixture(scope="session")
def long_reference(tmp_path_factory):
    """The same for 20 iterations, in which nodes have time to come and go."""
    output = tmp_path_factory.mktemp("long")
    run(output, "long", iterations=20)
    return output
