"""Sampling and log-probabilities on a device. See sampling.cu, and ``kernels.sampling`` for what is computed."""

_THREADS = 256


def find_best(device, logits, first: int, rows, most: int, best) -> None:
    """best [rows, segments] = the greatest int64 key of each segment of ``SEGMENT`` logits, float32 [rows, columns] of tokens
    ``first`` ...; ``NOTHING`` of a segment without any.

    ``rows``: int32 [1] on the device, at most ``most``. ``best`` may have more rows and more segments than there are.
    """
    device.launch("sampling.cu", "find_best", (best.shape[1], most), (_THREADS,), logits, logits.shape[1], first, rows, best)


def find_totals(device, logits, best, rows, most: int, totals) -> None:
    """totals [rows, segments] = the int64 sums of weights of each segment relative to the row's largest logit, which the keys
    ``best`` tell; 0 of a segment without any."""
    device.launch("sampling.cu", "find_totals", (totals.shape[1], most), (_THREADS,), logits, logits.shape[1], best, rows, totals)
