"""A KV cache of a few sequences on a device, and attention over it by the reference and by the device."""

import numpy as np

from llama_hpc.kernels import reference
from llama_hpc.kernels.attention_inputs import padded_head_dim
from llama_hpc.kernels.cuda.activations import Activation
from llama_hpc.kernels.cuda.attention import Scratch, attention, most_blocks
from llama_hpc.kernels.numerics import OK, PAGE

KINDS = np.uint16, np.float32, np.int8


def queries(rows, columns, seed=5):
    return np.random.default_rng((seed, rows, columns)).standard_normal((rows, columns), np.float32) * np.float32(2)


class Pools:
    """Keys and values of sequences of the given lengths, in shuffled pages; slots never written are NaN, or -128."""

    def __init__(self, lengths, kv_heads, head_dim, kind, seed=0):
        rng, kind = np.random.default_rng(seed), np.dtype(kind)
        per_sequence = -(-max(lengths) // PAGE)
        count = per_sequence * len(lengths) + 3
        self.kv_heads, self.head_dim, self.lengths = kv_heads, head_dim, lengths
        self.pages = rng.permutation(count)[: per_sequence * len(lengths)].astype(np.int32).reshape(-1, per_sequence)
        unwritten = {"u": 0x7E00, "f": np.nan, "i": -128}[kind.kind]
        self.keys = np.full((count, kv_heads, head_dim, PAGE), unwritten, kind)
        self.values = np.full((count, kv_heads, PAGE, padded_head_dim(head_dim)), unwritten, kind)
        self.scales = [np.full((count, kv_heads, PAGE), 0x7E00, np.uint16) if kind == np.int8 else None for _ in range(2)]
        for s, length in enumerate(lengths):
            k, v = (rng.standard_normal((length, kv_heads, head_dim), np.float32) for _ in range(2))
            self.write(s, 0, k, v)

    def write(self, sequence, start, k, v):
        """Keys and values float32 [n, kv_heads, head_dim] of positions from ``start`` on."""
        rows = len(k)
        slots, positions = np.full(rows, sequence, np.int32), np.arange(start, start + rows, dtype=np.int32)
        stored = []
        for x, scales in zip((k, v), self.scales, strict=True):
            if scales is not None:
                status, x, found = reference.quantize_heads(x)
                assert status == OK
                reference.store_scales(found, scales, self.pages, slots, positions, rows)
            elif self.keys.dtype == np.uint16:
                x = reference.half_bits(x)
            stored.append(x.reshape(rows, -1))
        reference.store(*stored, self.keys, self.values, self.pages, slots, positions, rows)

    def expected(self, q, sequences, positions, heads, window=0):
        """(status, out) of the reference. ``heads``: query heads of each KV head."""
        out, kv_of_head = np.full(q.shape, np.nan, np.float32), np.repeat(np.arange(self.kv_heads), heads)
        status = reference.attention(q, self.keys, self.values, self.pages, np.array(sequences), np.array(positions), kv_of_head,
                                     window, self.head_dim**-0.5, out, None, len(q), *self.scales)
        return status, out

    def attend(self, device, q, sequences, positions, heads, window=0, spare=1, chunk=None, blocks=None, quantized=False,
               record=False):
        """(status, target) of the device, for ``spare`` rows more than there are, ``chunk`` rows of scratch at a time.

        ``record``: (OK, q, target, a function of (rows, sequences, positions) that does it again for these and returns a status).
        """
        rows, most, most_positions = len(q), len(q) + spare, max(self.lengths) + spare
        target = Activation(device, most, q.shape[1], self.head_dim, quantized)
        device.upload(np.full((most, q.shape[1]), np.nan, np.float32), target.values)
        blocks = blocks or most_blocks(most_positions, window)
        scratch = Scratch(device, chunk or most, blocks, sum(heads), self.head_dim, max(heads))
        for array in (scratch.maxima, scratch.sums, scratch.chains):
            device.upload(np.full(array.shape, np.nan, np.float32), array)
        head_starts = np.concatenate([[0], np.cumsum(heads)]).astype(np.int32)
        on_device = [None if x is None else device.upload(x) for x in (q, self.keys, self.values, *self.scales)]
        sequences, positions = ([*x, *[0] * spare] for x in (sequences, positions))
        integers = [device.upload(np.array(x, np.int32)) for x in (self.pages, sequences, positions, head_starts, [rows], [0])]

        def launch():
            attention(device, *on_device[:3], *integers[:4], self.kv_heads, self.head_dim, window, self.head_dim**-0.5, target,
                      integers[4], most, most_positions, scratch, integers[5], *on_device[3:])
        if not record:
            launch()
            return int(device.download(integers[5])[0]), target
        with device.capture() as recorded:
            launch()

        def again(rows, sequences, positions):
            for array, values in zip((integers[1], integers[2], integers[4]), (sequences, positions, [rows]), strict=True):
                device.upload(np.resize(np.array(values, np.int32), array.shape), array)
            device.replay(recorded)
            return int(device.download(integers[5])[0])
        return OK, q, target, again
