"""The largest logits of rows and the sums of their weights, on a device. See sampling.cu."""

_THREADS = 256


def find_best(device, logits, first: int, rows, most: int, best) -> None:
    """best int64 [rows, segments] = the greatest keys (see ``kernels.sampling``) of logits float32 [rows, columns] of tokens
    ``first`` …; segments beyond the columns get less than any key. ``rows``: int32 [1], at most ``most``."""
    device.launch("sampling.cu", "find_best", (best.shape[1], most), (_THREADS,), logits, logits.shape[1], first, rows, best)


def find_totals(device, logits, best, rows, most: int, totals) -> None:
    """totals int64 [rows, segments] = sums of weights relative to the largest logit, which ``best`` of the whole row tells."""
    device.launch("sampling.cu", "find_totals", (totals.shape[1], most), (_THREADS,), logits, logits.shape[1], best, rows, totals)
