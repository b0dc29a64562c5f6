"""Fixtures for tests of CUDA kernels: the emulated device, and with ``--gpu`` a real one."""

import pytest
from emulated_device import EmulatedDevice, missing


@pytest.fixture(scope="session", params=["ascending", "descending"])
def device(request):
    """What kernels run on."""
    if request.config.getoption("--gpu", default=False):
        if request.param == "descending":
            pytest.skip("a GPU has an order of its own")
        from llama_hpc.kernels.cuda.device import Device
        return Device()
    if why := missing():
        pytest.skip(why)
    return EmulatedDevice(request.param == "descending")


@pytest.fixture
def gpu(request, device):
    """A real device, for what is too large for the emulated one."""
    if not request.config.getoption("--gpu", default=False):
        pytest.skip("too large for an emulated GPU")
    return device
