"""Norm, rotation and storing of keys and values on a device give the bits of the plain reference."""

import numpy as np
import pytest

from llama_hpc.kernels import reference
from llama_hpc.kernels.cuda.kv_store import rotate_and_store
from llama_hpc.kernels.numerics import NOT_FINITE, OK, OUT_OF_RANGE, PAGE, rope_table

HEADS, KV_HEADS = 5, 2
DTYPES = {"f16": np.uint16, "f32": np.float32, "q8": np.int8}


class Step:
    """Rows of three sequences on scattered pages: the same on the host and on a device."""

    def __init__(self, device, kind, head_dim, normed, bad=None):
        rng = np.random.default_rng(head_dim)
        self.head_dim, self.dtype, self.device = head_dim, DTYPES[kind], device
        self.sequences = np.array([0, 2, 1, 1, 1], np.int32)
        self.positions = np.array([0, 37, 14, 15, 16], np.int32)
        self.pages = rng.permutation(9).reshape(3, 3).astype(np.int32)
        self.q, self.k, self.v = (rng.standard_normal((5, n * head_dim), np.float32) for n in (HEADS, KV_HEADS, KV_HEADS))
        self.v[1, :head_dim] = 0
        if bad is not None:
            self.k[2, 3] = bad
        self.norms = [rng.standard_normal(head_dim).astype(np.float32) if normed else None for _ in range(2)]
        self.tables = rope_table(rng.integers(0, 2**64, head_dim // 2, np.uint64), 40)
        width = -(-head_dim // 16) * 16
        self.pools = [np.zeros((9, KV_HEADS, head_dim, PAGE), self.dtype), np.zeros((9, KV_HEADS, PAGE, width), self.dtype)]
        self.scales = [np.zeros((9, KV_HEADS, PAGE), np.uint16) for _ in range(2)] if kind == "q8" else [None, None]

    def on_device(self):
        """(status, q, pools, scales) as the device leaves them."""
        upload, download = self.device.upload, self.device.download
        q, k, v = map(upload, (self.q, self.k, self.v))
        pools = [upload(pool) for pool in self.pools]
        scales, norms = ([None if array is None else upload(array) for array in arrays] for arrays in (self.scales, self.norms))
        status, rows = upload(np.zeros(1, np.int32)), upload(np.array([5], np.int32))
        rotate_and_store(self.device, q, k, v, *map(upload, self.tables), upload(self.sequences), upload(self.positions),
                         upload(self.pages), *pools, HEADS, KV_HEADS, self.head_dim, rows, 7, status, *norms, 1e-6, *scales)
        return download(status)[0], download(q), [download(pool) for pool in pools], [
            None if scale is None else download(scale) for scale in scales]

    def on_host(self):
        """The same by the reference."""
        where = self.sequences, self.positions
        for x, norm in ((self.q, self.norms[0]), (self.k, self.norms[1])):
            heads = x.reshape(-1, self.head_dim)
            if norm is not None:
                reference.rms_norm(heads.copy(), norm, 1e-6, heads, len(heads))
            reference.rope(x, *self.tables, self.positions, 5)
        stored = [self.k, self.v]
        if self.dtype == np.uint16:
            stored = [reference.half_bits(x) for x in stored]
        elif self.dtype == np.int8:
            for i, x in enumerate(stored):
                _, stored[i], scales = reference.quantize_heads(x.reshape(5, KV_HEADS, self.head_dim))
                reference.store_scales(scales, self.scales[i], self.pages, *where, 5)
        reference.store(*stored, *self.pools, self.pages, *where, 5)
        return OK, self.q, self.pools, self.scales


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("head_dim,normed", [(8, False), (48, True), (64, False), (128, True)])
def test_what_is_stored(device, kind, head_dim, normed):
    step = Step(device, kind, head_dim, normed)
    found, expected = step.on_device(), step.on_host()
    assert found[0] == expected[0]
    assert found[1].tobytes() == expected[1].tobytes()
    for arrays in zip(found[2] + found[3], expected[2] + expected[3], strict=True):
        assert arrays[0] is arrays[1] is None or arrays[0].tobytes() == arrays[1].tobytes()


@pytest.mark.parametrize("kind,normed,bad,status", [("f16", False, 1e5, OUT_OF_RANGE), ("f16", True, np.nan, NOT_FINITE),
                                                    ("q8", False, 1e8, OUT_OF_RANGE), ("q8", False, np.inf, OUT_OF_RANGE)])
def test_what_cannot_be_stored_is_told(device, kind, normed, bad, status):
    assert Step(device, kind, 48, normed, bad).on_device()[0] & status
