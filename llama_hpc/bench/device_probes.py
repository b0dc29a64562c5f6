"""What a GPU reaches at most, measured beside what is compared with it: copies of memory, multiply-adds in registers."""

from collections.abc import Callable

import numpy as np

from llama_hpc.kernels.cuda import probes

COPY_BYTES = 1 << 30
LEAST_SECONDS = 0.01            # what is timed is repeated for so long
FRESH = 6                       # what is walked through, in sizes of the second-level cache: little of it is still there
STEPS = 1 << 16
_WIDE = 75, 80                  # architectures with 64 float32 lanes in a multiprocessor; others have 128


class Captured:
    """Launches that were run once, as kernels are loaded at their first one, and captured as one graph. Keeps what they hold."""

    def __init__(self, device, *launches: Callable[[], None]):
        self._device, self._launches = device, launches
        for launch in launches:
            launch()
        device.synchronize()
        with device.capture() as self._recorded:
            for launch in launches:
                launch()

    def run(self) -> None:
        """Replays them."""
        self._device.replay(self._recorded)

    def seconds(self) -> float:
        """How long a replay takes, of as many as take LEAST_SECONDS together."""
        self.run()
        first = self._device.seconds(self.run)
        times = max(1, min(1000, round(LEAST_SECONDS / max(first, 1e-6))))
        return self._device.seconds(self.run, times) / times


def copies_for(device, nbytes: int) -> int:
    """How many things of this size are so large together that each comes from memory in its turn."""
    return max(1, -(-FRESH * device.l2_bytes // max(1, nbytes)))


class DeviceProbes:
    """The limits of a device, each time that it is asked."""

    def __init__(self, device):
        self._device = device
        size = min(COPY_BYTES, device.free_bytes() // 16)
        source, target = (device.zeros((size,), np.uint8) for _ in range(2))
        self._bytes, self.copy = 2 * size, lambda: device.copy(source, target)
        self._copying = Captured(device, self.copy)
        out = device.zeros((probes.threads_of(device),), np.float32)
        self._computing = Captured(device, lambda: self._count(probes.multiply_add(device, STEPS, out)))

    def _count(self, operations: int) -> None:
        self._operations = operations

    def bandwidth(self) -> float:
        """Bytes a second of a copy in the device's memory: those read and those written."""
        return self._bytes / self._copying.seconds()

    def peak(self) -> float:
        """Operations a second on float32 in registers; a multiply-add counts as two."""
        return self._operations / self._computing.seconds()

    @property
    def nominal_peak(self) -> float:
        """The same at the highest clock rate."""
        lanes = 64 if self._device.architecture in _WIDE else 128
        return 2.0 * lanes * self._device.multiprocessors * self._device.clock_hz


def verdict(share: float, target: float) -> str:
    """``REACHED`` or ``MISSED``; nothing where there is no target."""
    return "" if not target else "REACHED" if share >= target else "MISSED"


def outcome(found) -> str:
    """A line that says whether a measurement's target was reached; empty where it has none."""
    told = verdict(found.share, found.target)
    return f"{told}: {found.claim}: {found.share:.3f}, target {found.target}" if told else ""


def target_cells(share: float, target: float) -> tuple[str, str]:
    """The last two columns of a table."""
    return f"{target:.1f}" if target else "-", verdict(share, target)
