"""Sampling and log-probabilities on a device. See sampling.cu and choose.cu, and ``kernels.sampling`` for what is computed."""

import numpy as np

from ..sampling import SEGMENT, TEMPERATURES

_THREADS, _COUNT_THREADS, _CHOOSE_THREADS = 256, 512, (128, 1024)
_COUNTED = 4 * SEGMENT                      # logits of a block of count_rows
_BINS = 1024
_SHARE = 2**32                              # shares are multiples of 2**-32

# What a token is drawn with: ``Draw`` of choose.cuh. ``row``: of the logits; ``penalties``, ``biases``: where its lists begin and
# end.
DRAW = np.dtype([("temperature", np.float32), ("top_k", np.int32), ("top_p", np.int64), ("min_p", np.int64),
                 ("key", np.uint64, 2), ("counter", np.uint64, 2), ("repetition", np.float32), ("frequency", np.float32),
                 ("presence", np.float32), ("row", np.int32), ("penalties", np.int32, 2), ("biases", np.int32, 2)])
DRAW_WORDS = DRAW.itemsize // 8             # draws travel as uint64 [draws, DRAW_WORDS]


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


def pick(device, logits, first: int, tokens, rows, most: int, picked) -> None:
    """picked float32 [rows] = of each row of logits that of ``tokens`` int32 [rows]; 0 where it is not among its columns, which
    are tokens ``first`` ...; of ``most`` rows at most."""
    device.launch("sampling.cu", "pick_logits", (-(-most // _THREADS),), (_THREADS,), logits, logits.shape[1], first, tokens,
                  rows, most, picked)


def set_sampling(draw, temperature: float, top_k: int, top_p: float, min_p: float, key: tuple[int, int],
                 counter: tuple[int, int]) -> None:
    """Fills in a record DRAW with what ``kernels.sampling.choose`` is given; ``counter``: the first half of Philox's.

    What belongs to penalties and biases stays as it is.
    """
    draw["temperature"] = np.clip(temperature, *TEMPERATURES) if temperature else 0
    draw["top_k"] = top_k
    draw["top_p"], draw["min_p"] = round(min(top_p, 1) * _SHARE), round(min_p * _SHARE)
    draw["key"], draw["counter"] = key, counter


class Scratch:
    """What is between the steps of ``choose``, for ``draws`` draws at most from ``columns`` logits each."""

    def __init__(self, device, draws: int, columns: int):
        self.adjusted = device.zeros((draws, columns), np.float32)
        self.best = device.zeros((draws, -(-columns // SEGMENT)), np.int64)
        self.counts, self.sums = device.zeros((draws, _BINS), np.int32), device.zeros((draws, 2, _BINS), np.int64)

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in (self.adjusted, self.best, self.counts, self.sums))


def choose(device, logits, draws, penalized, occurrences, biased, biases, best, totals, rows, most: int, tokens, logprobs,
           scratch: Scratch) -> None:
    """tokens int32 [draws] = a token for each draw, as ``kernels.sampling.choose`` takes it from logits that were adjusted, and
    logprobs float32 [draws] its log-probability under the raw ones. Temperature 0 takes the first in order.

    ``logits`` float32 [.., columns] is left as it is; ``best`` and ``totals`` are what was found for its rows. ``draws``: records
    DRAW as uint64 [draws, DRAW_WORDS]; ``rows``: how many, int32 [1] on the device, at most ``most``. A draw's penalties are for
    tokens ``penalized`` int32, of which the answer has ``occurrences`` int32 so far (``kernels.sampling.adjust``); then biases
    (float32) are added to the logits of tokens ``biased`` int32, -inf for what must not be drawn. Neither list of a draw names a
    token twice; tokens beyond the vocabulary do not count.
    """
    columns, segments = logits.shape[1], scratch.best.shape[1]
    device.launch("choose.cu", "adjust_rows", (segments, most), (_THREADS,), logits, columns, draws, penalized, occurrences,
                  biased, biases, rows, scratch.adjusted, scratch.best, scratch.counts, scratch.sums)
    device.launch("choose.cu", "count_rows", (-(-columns // _COUNTED), most), (_COUNT_THREADS,), scratch.adjusted, columns, draws,
                  rows, scratch.best, segments, scratch.counts, scratch.sums)
    # A power of two of threads, which the bins are dealt out to; of small vocabularies some 16 tokens each.
    least, greatest = _CHOOSE_THREADS
    threads = min(max(least, 1 << (columns // 16).bit_length()), greatest)
    device.launch("choose.cu", "choose_rows", (most,), (threads,), logits, columns, draws, rows, scratch.adjusted, scratch.best,
                  segments, scratch.counts, scratch.sums, best, totals, best.shape[1], tokens, logprobs)
