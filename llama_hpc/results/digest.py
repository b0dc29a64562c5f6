"""The digest: one hash over ids, tokens and log-probabilities, equal for equal answers whatever computed them."""

import hashlib
import struct
from collections.abc import Iterable, Sequence

from llama_hpc.results.schema import Output, canonical_logprobs, canonical_tokens

HEADER = b"llama_hpc digest 1\n"


def digest(ids: Sequence[str], outputs: Iterable[Output]) -> str:
    """Lower-case hexadecimal SHA-256 of all outputs, in any order given; ``ids[r]`` is the id of request row r.

    The bytes are ``llama_hpc digest 1`` and a newline, then for each output in (request, sample) order: uint64 length
    of the id in UTF-8, the id, uint32 sample, uint64 n, n int32 tokens, n float32 log-probabilities (-0 as +0), all
    little-endian.
    """
    total = hashlib.sha256(HEADER)
    for output in sorted(outputs, key=lambda output: (output.request, output.sample)):
        name = ids[output.request].encode("utf-8")
        total.update(struct.pack("<Q", len(name)) + name)
        total.update(struct.pack("<IQ", output.sample, len(output.tokens)))
        total.update(canonical_tokens(output.tokens).tobytes())
        total.update(canonical_logprobs(output.logprobs).tobytes())
    return total.hexdigest()
