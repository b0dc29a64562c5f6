"""Random weights in the memory of a device, made without quantising anything. Needs no Numba."""

import numpy as np

from ..formats import Blocks
from ..random_rows import RandomRows
from .weights import TILE, DeviceWeights, HostWeights, lay_out

BANK_ROWS = 16 * TILE


class RandomDeviceWeights:
    """Random matrices on a device: some tiles are laid out on the host, and copied there as often as it takes."""

    def __init__(self, device):
        self._device, self._random, self._banks = device, RandomRows(), {}

    def matrix(self, weights_format: str, rows: int, blocks: Blocks) -> DeviceWeights:
        """Weights [rows, blocks.size], in memory of their own."""
        if not rows or not blocks.size:
            return DeviceWeights(weights_format, rows, blocks, self._device.zeros((0,), np.uint8))
        bank, tiles = self._bank(weights_format, blocks), -(-rows // TILE)
        data = repeated(self._device, bank.data, tiles * (bank.data.size // (BANK_ROWS // TILE)))
        scales = codebook = None
        if bank.row_scales is not None:
            scales = np.resize(bank.row_scales, tiles * TILE)
            scales[rows:] = 0
            scales = self._device.upload(scales)
        if bank.codebook is not None:
            codebook = self._device.upload(bank.codebook)
        return DeviceWeights(weights_format, rows, blocks, data, scales, codebook)

    def pair(self, weights_format: str, rows: int, blocks: Blocks) -> list[DeviceWeights]:
        """The same for gate and up."""
        return [self.matrix(weights_format, rows, blocks) for _ in range(2)]

    def _bank(self, weights_format: str, blocks: Blocks) -> HostWeights:
        if (weights_format, blocks) not in self._banks:
            self._banks[weights_format, blocks] = lay_out(self._random.rows(weights_format, BANK_ROWS, blocks), blocks)
        return self._banks[weights_format, blocks]


def repeated(device, bank: np.ndarray, nbytes: int):
    """uint8 [nbytes] on the device: the bytes of a bank again and again."""
    bank = bank.reshape(-1).view(np.uint8)
    out, filled = device.zeros((nbytes,), np.uint8), min(nbytes, bank.size)
    device.upload(bank[:filled], out[:filled])
    while filled < nbytes:
        count = min(filled, nbytes - filled)
        device.copy(out[:count], out[filled : filled + count])
        filled += count
    return out
