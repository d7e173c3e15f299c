import pytest
import torch


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """Models of six weights train no faster on many threads, and much slower on a busy host."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
