"""What a result file holds (version 1).

Root attributes: ``format``, ``version``, ``status`` (``complete`` or ``incomplete``), ``digest``.

===========================  =======================================================================================
``requests/id``              string [R]: one row a prompt, in input order
``requests/prompt``          string [R]: the text as the tokenizer got it, chat template applied
``requests/sampling``        string [R]: the effective sampling settings as JSON
``requests/messages``        string [R]: JSON, empty for other requests; only where a request came as messages
``requests/tokens``          int32, flat, with ``requests/offsets`` int64 [R+1]; only where a request came as token ids
``outputs/request``          int64 [n]: the row of ``requests`` that output i answers; sorted by it, then by sample
``outputs/sample``           int32 [n]: 0, 1, … among the answers to one prompt
``outputs/text``             string [n]
``outputs/finish_reason``    string [n]
``outputs/setbacks``         int32 [n]: how often the answer had to give its place in the KV cache to others
``outputs/attempt``          int32 [n]: which of the runs of a job that was resumed found it, from 0; ``timing`` counts from that
                             run's start
``outputs/offsets``          int64 [n+1]: output i holds tokens ``offsets[i]:offsets[i+1]``
``outputs/tokens``           int32, flat: generated tokens, with the end token or stop string's tokens if produced
``outputs/logprobs``         float32, flat: natural logarithm, of the raw logits, of the token chosen; never -0
``outputs/top_tokens``       int32, flat: the likeliest tokens by raw logits at each token, of equal ones the lowest id first
``outputs/top_logprobs``     float32, flat: their log-probabilities
``outputs/top_offsets``      int64 [n+1]: output i holds ``top_offsets[i]:top_offsets[i+1]`` of both, equally many for each of its
                             tokens; all three only where a request asked for ``logprobs``; not part of the digest
``timing/<name>``            float64 [n]: seconds; NaN where an output has no such time
``metrics/ranks/<name>``     [ranks]: seconds of each phase of a rank's steps (engine/metrics.py), counts of what it did
``metrics/steps/<name>``     flat, by ``rank``: ``start`` and phases in seconds, what every ``metrics/ranks/stride``-th step held
``provenance``               attributes for scalars, datasets for lists, groups for dictionaries (provenance.py)
===========================  =======================================================================================

Strings are variable-length UTF-8. HDF5 strings end at the first NUL and UTF-8 has no surrogates, so in text (prompts,
answers) each of these is stored as U+FFFD; the tokens are exact. Ids hold neither (Request refuses them).
"""

import re
from dataclasses import dataclass, field

import numpy as np

FORMAT = "llama_hpc results"
VERSION = 1
STATUSES = ("complete", "incomplete")

_UNSTORABLE = re.compile("[\0\ud800-\udfff]")


@dataclass
class Output:
    """One answer: sample number ``sample`` to the prompt in row ``request``.

    ``tokens`` int32 [n] and ``logprobs`` float32 [n] belong together; n may be 0. ``timing`` maps names to seconds.
    ``top_tokens`` int32 [n, k] and ``top_logprobs`` float32 [n, k] are the k likeliest tokens at each token. ``attempt``: number
    of the run that found it, where a job was resumed.
    """

    request: int
    sample: int
    tokens: np.ndarray
    logprobs: np.ndarray
    text: str
    finish_reason: str
    timing: dict[str, float] = field(default_factory=dict)
    setbacks: int = 0
    top_tokens: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.int32))
    top_logprobs: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    attempt: int = 0


def storable(text: str) -> str:
    """``text`` with every character that an HDF5 UTF-8 string cannot hold replaced by U+FFFD."""
    return _UNSTORABLE.sub("\ufffd", text)


def canonical_tokens(tokens: np.ndarray) -> np.ndarray:
    """Tokens as stored and hashed: little-endian int32."""
    return np.asarray(tokens, dtype="<i4")


def canonical_logprobs(logprobs: np.ndarray) -> np.ndarray:
    """Log-probabilities as stored and hashed: little-endian float32, -0 made +0."""
    return np.asarray(logprobs, dtype="<f4") + np.float32(0.0)
