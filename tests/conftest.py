"""One thread for every test: models this small are slower on several, and much slower beside other tests."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def one_thread():
    """Code that sets threads, as a device does, leaves them to nobody else."""
    yield
    torch.set_num_threads(1)
