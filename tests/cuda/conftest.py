"""Fixtures for tests of CUDA kernels: the emulated device, and with ``--gpu`` a real one."""

import pytest
from emulated_device import EmulatedDevice, missing


def _device(request, order: str):
    if request.config.getoption("--gpu", default=False):
        if order == "descending":
            pytest.skip("a GPU has an order of its own")
        from llama_hpc.kernels.cuda.device import Device
        return Device()
    if why := missing():
        pytest.skip(why)
    return EmulatedDevice(order == "descending")


@pytest.fixture(scope="session", params=["ascending", "descending"])
def device(request):
    """What kernels run on."""
    return _device(request, request.param)


@pytest.fixture(scope="session")
def one_device(request):
    """The same, in one order of threads: for whole models, as each kernel is tested in both."""
    return _device(request, "ascending")


@pytest.fixture
def gpu(request, device):
    """A real device, for what is too large for the emulated one."""
    if not request.config.getoption("--gpu", default=False):
        pytest.skip("too large for an emulated GPU")
    return device
