"""Memory of arrays that kernels read: where it lies, and that it is given back."""

import gc
import itertools
import weakref

import numpy as np

from llama_hpc.kernels.cpu.memory import HUGE_PAGE, LINE, SLAB, address, aligned


def test_arrays_lie_one_behind_the_other():
    """What is allocated in the order of its use is read as one stream; nothing overlaps, and fresh memory is zero."""
    arrays = [aligned((3, size), dtype) for size, dtype in ((100, np.int8), (64, np.float32), (1, np.int64), (1000, np.uint16))]
    for array, following in itertools.pairwise(arrays):
        gap = address(following) - address(array) - array.nbytes
        assert 0 <= gap < LINE or address(following) % HUGE_PAGE == 0
    assert all(address(array) % LINE == 0 and not array.any() for array in arrays)
    for number, array in enumerate(arrays):
        array[...] = number
    assert all((array == number).all() for number, array in enumerate(arrays))
    assert (aligned(7, np.float32, 2.5) == 2.5).all() and aligned((0, 5), np.int8).shape == (0, 5)


def test_large_arrays_start_a_huge_page_and_are_freed():
    first = aligned(SLAB + 1, np.int8)
    assert address(first) % HUGE_PAGE == 0 and first[0] == first[-1] == 0
    memory = weakref.ref(first.base.base if isinstance(first.base.base, np.ndarray) else first.base)
    aligned(SLAB + 1, np.int8)
    assert memory() is not None
    del first
    gc.collect()
    assert memory() is None
