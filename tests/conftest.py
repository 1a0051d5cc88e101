import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Tiny tensors are slower on two threads, by far where the cores are busy."""
    torch.set_num_threads(1)
