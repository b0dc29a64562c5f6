"""The digest against a straight implementation of its definition, and against a stored value."""

import hashlib
import struct

import numpy as np

from llama_hpc.results import Output, digest


def straight(ids, outputs):
    data = b"llama_hpc digest 1\n"
    for output in outputs:
        name = ids[output.request].encode()
        data += struct.pack("<Q", len(name)) + name + struct.pack("<I", output.sample)
        data += struct.pack("<Q", len(output.tokens))
        for token in output.tokens:
            data += struct.pack("<i", token)
        for logprob in output.logprobs:
            data += struct.pack("<f", 0.0 if logprob == 0 else logprob)
    return hashlib.sha256(data).hexdigest()


def output(request, sample, tokens, logprobs):
    return Output(request, sample, np.array(tokens, np.int32), np.array(logprobs, np.float32), "text", "stop")


IDS = ["0", "é𝄞", ""]
OUTPUTS = [
    output(0, 0, [1, 2, 49151], [-0.0, -1.25, -1e-40]),
    output(0, 1, [], []),
    output(1, 0, [2**31 - 1], [-np.inf]),
    output(2, 7, [0, 0], [-0.1, -3.3333333]),
]


def test_definition_in_any_order():
    assert digest(IDS, OUTPUTS) == digest(IDS, OUTPUTS[::-1]) == straight(IDS, OUTPUTS)
    assert digest([], []) == hashlib.sha256(b"llama_hpc digest 1\n").hexdigest()


def test_stored_value():
    """Files of today can be verified by the program of tomorrow."""
    assert digest(IDS, OUTPUTS) == "cd493d355c30651757d9b05abb54b22b2e12062ec3f533f60776b8aade87a993"


def test_every_part_counts():
    seen = {digest(IDS, OUTPUTS), digest(["1", *IDS[1:]], OUTPUTS), digest(IDS, OUTPUTS[:-1])}
    seen.add(digest(IDS, [output(0, 0, [1, 2, 49150], [0.0, -1.25, -1e-40]), *OUTPUTS[1:]]))
    seen.add(digest(IDS, [output(0, 0, [1, 2, 49151], [0.0, -1.25, -2e-40]), *OUTPUTS[1:]]))
    seen.add(digest(IDS, [output(0, 2, [1, 2, 49151], [0.0, -1.25, -1e-40]), *OUTPUTS[1:]]))
    assert len(seen) == 6


def test_array_kinds_do_not_matter():
    """Big-endian, strided and wider arrays of the same values have the same digest, and -0 that of +0."""
    tokens = np.arange(20, dtype=">i8")[::2]
    logprobs = np.linspace(-4, 0, 10).astype(np.float32)
    plain = output(0, 0, tokens, logprobs)
    other = Output(0, 0, tokens, logprobs.astype(">f8"), "", "")
    other.logprobs[-1] = -0.0
    assert digest(["a"], [other]) == digest(["a"], [plain])
