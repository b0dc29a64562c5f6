"""What the arithmetic of a device reaches. See probes.cu."""

_THREADS, _CHAINS = 256, 8
_BLOCKS = 8                     # of a multiprocessor: as many threads as it holds


def threads_of(device) -> int:
    """How many threads ``multiply_add`` keeps busy."""
    return _BLOCKS * device.multiprocessors * _THREADS


def multiply_add(device, steps: int, out) -> int:
    """Chains of ``steps`` multiply-adds in each thread, whose sums go to ``out`` float32 [threads_of]. Returns how many
    operations these are; a multiply-add counts as two."""
    device.launch("probes.cu", "multiply_add", (_BLOCKS * device.multiprocessors,), (_THREADS,), steps, 0.5, out)
    return 2 * _CHAINS * steps * threads_of(device)
