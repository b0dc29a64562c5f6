"""Softmax weights of a row of logits on the CPU."""

import numpy as np
from numba import njit

from ..numerics import FIXED
from .functions import exp
from .simd import rint


@njit(cache=True)
def weigh(logits, weights):
    """weights[i] = rint(exp(logits[i] - maximum) * 2**32) as int64 for float32 logits [V]; returns (maximum, sum)."""
    maximum = logits[0]
    for i in range(logits.shape[0]):
        maximum = max(maximum, logits[i])
    total = np.int64(0)
    for i in range(logits.shape[0]):
        weight = np.int64(rint(exp(logits[i] - maximum) * FIXED))
        weights[i] = weight
        total += weight
    return maximum, total
