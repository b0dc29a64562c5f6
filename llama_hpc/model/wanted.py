"""What is wanted of a step's outputs beyond their likeliest tokens: said before it begins, so that a device can bring it."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Draw:
    """One token to be chosen from ``row`` of the logits: what ``kernels.sampling.choose`` is given, with Philox's ``key`` and the
    first half of its ``counter``. ``penalties``: how often the answer has each token that is penalised; ``biases``: what is added
    to logits, -inf for what must not be drawn."""

    row: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    key: tuple[int, int]
    counter: tuple[int, int]
    repetition: float = 1.0
    frequency: float = 0.0
    presence: float = 0.0
    penalties: dict[int, int] = field(default_factory=dict)
    biases: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Wanted:
    """``rows``: outputs whose logits come to the host, ascending; ``draws``: tokens that a device chooses; ``tokens`` int64 [n]:
    one of each of the first n outputs, whose logit is wanted."""

    rows: Sequence[int] = ()
    draws: Sequence[Draw] = ()
    tokens: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))


NOTHING = Wanted()
